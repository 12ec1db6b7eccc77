"""What `host check` asks of the host's kernel: its configuration, the IOMMU, KVM, vsock."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

from katagpu.host import bootline
from katagpu.host.machine import Machine
from katagpu.host.verdict import Verdict, failed, passed, warned

NEEDED = ("VFIO", "VFIO_IOMMU_TYPE1", "VFIO_PCI")
MDEV_DEVICE_UNTIL = (5, 14)  # the kernel without VFIO_MDEV_DEVICE
GROUP_SINCE = (6, 6)  # VFIO_GROUP, without which VFIO has no /dev/vfio/N
GRACE = "NVGRACE_GPU_VFIO_PCI"
MODULES = {"VFIO": "vfio", "VFIO_IOMMU_TYPE1": "vfio_iommu_type1", "VFIO_PCI": "vfio-pci",
           GRACE: "nvgrace-gpu-vfio-pci"}
OTHER_KERNEL = "boot a kernel that has it: distributions' kernels do"
VIRTUAL = ("this is a virtual machine: its hypervisor has to give it a virtual IOMMU (QEMU: "
           "-device intel-iommu,intremap=on) and nested virtualisation")


def release(machine: Machine) -> str:
    """`uname -r` of the host."""
    return machine.text("/proc/sys/kernel/osrelease") or ""


def configuration(machine: Machine) -> tuple[str, Mapping[str, str]] | None:
    """Where the kernel's configuration is, and its symbols without CONFIG_; None: nowhere."""
    number = release(machine)
    for place in ("/proc/config.gz", f"/boot/config-{number}", f"/lib/modules/{number}/config",
                  f"/usr/lib/ostree-boot/config-{number}"):
        data = machine.raw(place)
        if data is None:
            continue
        if place.endswith(".gz"):
            try:
                data = gzip.decompress(data)
            except (OSError, EOFError, zlib.error):
                continue
        return place, dict(re.findall(r"^CONFIG_(\w+)=(.*)$", data.decode(errors="replace"), re.M))
    return None


def kernel(machine: Machine, *, grace: bool = False) -> Iterator[Verdict]:
    """The symbols of the guide, built in or as modules; `grace`: that of Grace's GPUs too."""
    found = configuration(machine)
    needed = (*NEEDED, GRACE) if grace else NEEDED
    if found is None:
        yield from _modules(machine, needed)
        return
    place, symbols = found
    own = _version(machine) >= GROUP_SINCE and "VFIO" in symbols and \
        symbols.get("VFIO_GROUP") != "y"
    for name in needed:
        if own and name == "VFIO_IOMMU_TYPE1":
            continue  # it is for groups
        value = symbols.get(name)
        if value in ("y", "m"):
            yield passed("kernel", f"CONFIG_{name}={value} ({place})")
        else:
            yield failed("kernel", f"CONFIG_{name} is not set ({place})", OTHER_KERNEL)
    if own:
        yield _iommufd(symbols)
    yield from _mdev(machine, symbols)


def _iommufd(symbols: Mapping[str, str]) -> Verdict:
    """A kernel without VFIO_GROUP: each function has a device of its own, or there are none."""
    said = "CONFIG_VFIO_GROUP is not set: there are no /dev/vfio/N"
    if symbols.get("VFIO_DEVICE_CDEV") == "y" and symbols.get("IOMMUFD") in ("y", "m"):
        return warned("kernel", f"{said}, but /dev/vfio/devices/vfioN (iommufd)",
                      "nothing with Kata 3.15 or newer (runtime-rs: 3.31), which takes those; with "
                      "an older one boot a kernel that has VFIO_GROUP")
    return failed("kernel", f"{said}, nor /dev/vfio/devices/vfioN (VFIO_DEVICE_CDEV, IOMMUFD)",
                  OTHER_KERNEL)


def _mdev(machine: Machine, symbols: Mapping[str, str]) -> Iterator[Verdict]:
    names = ["VFIO_MDEV"]
    if _version(machine) < MDEV_DEVICE_UNTIL:
        names.append("VFIO_MDEV_DEVICE")
    for name in names:
        value = symbols.get(name)
        if value in ("y", "m"):
            yield passed("kernel", f"CONFIG_{name}={value}: vGPUs can be made through mdev")
        else:
            yield warned("kernel", f"CONFIG_{name} is not set: only vGPUs through mdev need it",
                         f"for those: {OTHER_KERNEL}; for whole GPUs nothing")
    if len(names) == 1:
        yield passed("kernel", f"CONFIG_VFIO_MDEV_DEVICE: {release(machine)} has no such symbol, "
                               "nor needs it")


def _version(machine: Machine) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release(machine))
    return (int(found[1]), int(found[2])) if found else (99, 0)


def _modules(machine: Machine, needed: Sequence[str]) -> Iterator[Verdict]:
    """Without a configuration: is the code there, as a file or in the kernel?"""
    place = f"/lib/modules/{release(machine)}"
    text = "\n".join(machine.text(f"{place}/{name}") or ""
                     for name in ("modules.dep", "modules.builtin"))
    for name in needed:
        module = MODULES[name]
        if machine.exists(f"/sys/module/{module.replace('-', '_')}") or \
                re.search(rf"/{module.replace('_', '[-_]')}\.ko", text):
            yield passed("kernel", f"CONFIG_{name}: {module} is there")
        else:
            yield failed("kernel", f"CONFIG_{name}: there is no module {module} below {place}, and "
                                   "the configuration is nowhere", OTHER_KERNEL)


def iommu(machine: Machine) -> Iterator[Verdict]:
    """The IOMMU is there, on, and used."""
    groups = machine.names("/sys/kernel/iommu_groups")
    units = machine.names("/sys/class/iommu")
    if (machine.text("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode") or "N") == "Y":
        yield failed("iommu", "vfio runs without an IOMMU (enable_unsafe_noiommu_mode)",
                     "take the option out of /etc/modprobe.d: a guest could write to all memory")
    if groups:
        yield passed("iommu", f"on: {', '.join(units) or 'units are not shown'}; "
                              f"groups: {len(groups)}")
        yield from _remapping(machine)
        return
    words = bootline.options(machine)
    off = [word for word in words if word in ("intel_iommu=off", "amd_iommu=off", "iommu=off")]
    if off:
        yield failed("iommu", f"{' '.join(off)} is on the kernel's command line",
                     f"take it away; {bootline.how(machine, bootline.wanted(machine))}")
        return
    maker = bootline.maker(machine)
    intel = maker == bootline.INTEL
    table = {bootline.INTEL: "DMAR", bootline.AMD: "IVRS"}.get(maker, "IORT")
    tables = machine.names("/sys/firmware/acpi/tables")
    if tables and table not in tables:
        yield failed("iommu", f"the firmware offers none (no ACPI table {table})", VIRTUAL if
                     bootline.virtual(machine) else "turn it on in the firmware's setup: "
                     f"{'VT-d' if intel else 'IOMMU, AMD-Vi, SMMU'}")
    elif intel and "intel_iommu=on" not in words and not _by_default(machine):
        yield failed("iommu", "off: intel_iommu=on is not on the kernel's command line",
                     bootline.how(machine, bootline.wanted(machine)))
    else:
        yield failed("iommu", "off, though nothing turns it off",
                     "dmesg | grep -i -e DMAR -e AMD-Vi -e smmu says why; is it on in the "
                     "firmware's setup?")


def _remapping(machine: Machine) -> Iterator[Verdict]:
    """VFIO refuses a group whose interrupts are not remapped (x86; vfio_iommu_type1.c).

    Chips in /proc/interrupts are named IR-… where they are.
    """
    if not bootline.maker(machine):
        return
    name = "remapping"
    off = [word for word in bootline.options(machine) if word in ("intremap=off", "nointremap")]
    lines = machine.text("/proc/interrupts") or ""
    unsafe = [module for module in ("vfio_iommu_type1", "iommufd") if machine.text(
        f"/sys/module/{module}/parameters/allow_unsafe_interrupts") == "Y"]
    if re.search(r"\bIR-(IO-APIC|PCI-MSI)", lines):
        yield passed(name, "interrupts are remapped")
    elif unsafe:
        yield warned(name, f"{unsafe[0]}.allow_unsafe_interrupts is on: a guest can raise any "
                     "interrupt of this host", "for guests that are trusted alone; else interrupt "
                     "remapping on in the firmware's setup, and the option away")
    elif off:
        yield failed(name, f"{' '.join(off)} is on the kernel's command line", "take it away, and "
                     "reboot: without remapping VFIO refuses GPUs (\"No interrupt remapping\")")
    elif re.search(r"\b(IO-APIC|PCI-MSI)", lines):
        yield failed(name, "interrupts are not remapped, and so VFIO refuses GPUs", VIRTUAL if
                     bootline.virtual(machine) else "turn on VT-d (AMD: IOMMU) with interrupt "
                     "remapping, and x2APIC, in the firmware's setup; for guests that are trusted, "
                     "options vfio_iommu_type1 allow_unsafe_interrupts=1 in /etc/modprobe.d")
    else:
        yield warned(name, "whether interrupts are remapped cannot be told",
                     "dmesg | grep -i remapping")


def _by_default(machine: Machine) -> bool:
    """Does the kernel turn Intel's IOMMU on unasked?"""
    found = configuration(machine)
    return found is not None and any(
        found[1].get(f"INTEL_IOMMU_DEFAULT_ON{end}") == "y" for end in ("", "_INTGPU_OFF"))


def devices(machine: Machine) -> Iterator[Verdict]:
    """Kata's own: KVM, and a vsock to the agent."""
    if machine.exists("/dev/kvm"):
        yield passed("kvm", "/dev/kvm is there")
    else:
        yield failed("kvm", "there is no /dev/kvm", "modprobe kvm_intel (or kvm_amd); where that "
                     "fails, turn virtualisation on in the firmware's setup")
    if machine.exists("/dev/vhost-vsock"):
        yield passed("vsock", "/dev/vhost-vsock is there")
    else:
        yield failed("vsock", "there is no /dev/vhost-vsock: Kata says \"host system doesn't "
                     "support vsock\"", "modprobe vhost_vsock; katagpu host persist has it loaded "
                     "at every boot")
