"""What `host check` says of each GPU: addresses of its BARs, its group, its driver, its reset."""

from __future__ import annotations

from collections.abc import Iterator

from katagpu.host import groups, pci, vfio
from katagpu.host.machine import Machine
from katagpu.host.pci import NVIDIA, Function
from katagpu.host.verdict import Verdict, failed, passed, warned
from katagpu.host.vfio import DRIVERS

ABOVE_4G = ('in the firmware\'s setup turn on "Above 4G Decoding" (also: "Memory Mapped I/O above '
            '4GB", "Memory Hole for PCI MMIO"), with a window that is large enough; else boot with '
            "pci=realloc")


def check(machine: Machine, gpu: Function, *, named: bool, kept: bool) -> Iterator[Verdict]:
    """All of one GPU. The user named it, or made it persistent (`kept`) for pass-through."""
    yield from bars(gpu)
    yield from group(machine, gpu)
    yield from driver(machine, gpu, named=named, kept=kept)
    yield reset(gpu)


def bars(gpu: Function) -> Iterator[Verdict]:
    """The GPU answers, and every BAR has an address."""
    lost = [bar for bar in gpu.bars if not bar.assigned]
    if not gpu.answers:
        yield failed("bars", "it does not answer: its configuration reads all ones",
                     "it has fallen off the bus, or sleeps (D3cold): power the host off and on; "
                     "dmesg | grep -i -e pcie -e aer says why", gpu.address)
    elif not gpu.bars:
        yield failed("bars", "it has no BARs",
                     "power the host off and on; dmesg | grep -i pci", gpu.address)
    elif lost:
        names = ", ".join(f"{bar.number} ({pci.amount(bar.size) if bar.size else 'size unknown'})"
                          for bar in lost)
        yield failed("bars", f"no address for BAR {names}", ABOVE_4G, gpu.address)
    for bar in gpu.bars:
        if bar.large and bar.assigned:
            # A BAR lies at a multiple of its size: one of more than 4 GiB is above 4 GiB.
            yield passed("bars", f"large: BAR {bar.number} ({pci.amount(bar.size)}) is at "
                         f"{bar.start:#x}, above 4 GiB", gpu.address)
    if gpu.bars and not lost and not gpu.large:
        yield passed("bars", "small, and all have addresses", gpu.address)


def group(machine: Machine, gpu: Function) -> Iterator[Verdict]:
    """The GPU has a group, and shares it with nothing that the host needs."""
    if gpu.group is None:
        yield failed("group", "it is in no IOMMU group", "see iommu above", gpu.address)
        return
    others = [member for member in pci.members(machine, gpu.group)
              if member.address != gpu.address and not groups.stays(member)]
    slot = gpu.address.rpartition(".")[0]
    own = [member for member in others if member.address.rpartition(".")[0] == slot]
    nvidia = [member for member in others if member.vendor == NVIDIA and member not in own]
    foreign = [member for member in others if member.vendor != NVIDIA and member not in own]
    if foreign:
        used = [member for member in foreign if _host_has(member)]
        said = f"group {gpu.group} has {', '.join(map(str, foreign))} too"
        cure = "another slot, or ACS on in the firmware's setup; the whole group goes to one guest"
        yield failed("group", said, cure, gpu.address) if used else \
            warned("group", said, cure, gpu.address)
    kept = [member for member in (*own, *nvidia) if _host_has(member)] \
        if gpu.driver in DRIVERS else []
    if kept:
        said = ", ".join(f"{member} ({member.driver})" for member in kept)
        yield failed("group", f"group {gpu.group} is not viable: the host's drivers have {said}",
                     f"katagpu host bind {gpu.address}", gpu.address)
    if nvidia and not kept:
        yield warned("group", f"group {gpu.group} has {', '.join(map(str, nvidia))} too: they go "
                     "to the same guest", "another slot, or ACS on in the firmware's setup, to "
                     "give them to two", gpu.address)
    if not foreign and not nvidia and not kept:
        more = f" with its own {', '.join(member.address for member in own)}" if own else ""
        yield passed("group", f"group {gpu.group}, alone{more}", gpu.address)


def _host_has(function: Function) -> bool:
    """Has it a driver that makes its group not viable? (pci-stub leaves DMA to VFIO.)"""
    return function.driver not in (None, "pci-stub", *DRIVERS)


def driver(machine: Machine, gpu: Function, *, named: bool, kept: bool) -> Iterator[Verdict]:
    """vfio-pci, or Grace's own driver, has it, and its device node is there."""
    if machine.text(f"{gpu.path}/boot_vga") == "1":
        yield warned("console", "the firmware's console is on it, and may hold its BARs",
                     "another card as the first display in the firmware's setup; else "
                     "video=efifb:off (initcall_blacklist=sysfb_init) on the command line",
                     gpu.address)
    if gpu.driver in DRIVERS:
        nodes = vfio.nodes(machine, gpu)
        if gpu.driver != vfio.driver(gpu.ids):
            yield failed("driver", f"{gpu.driver} has it: the GPU of a Grace superchip (GH200, "
                         f"GB200) wants {vfio.driver(gpu.ids)}, else a guest sees none of its "
                         "memory", f"katagpu host bind {gpu.address}", gpu.address)
        elif nodes:
            yield passed("driver", f"{gpu.driver}, {' '.join(nodes)}", gpu.address)
        else:
            yield failed("driver", f"{gpu.driver}, but there is no device node below /dev/vfio",
                         "is udev running? katagpu host unbind, then katagpu host bind",
                         gpu.address)
        return
    state = vfio.vgpu(machine, gpu)
    if gpu.driver == "nvidia" and state.interface is not None and not kept:
        yield _for_vgpus(gpu, state, named=named)
        return
    give = f"katagpu host bind {gpu.address}; katagpu host persist {gpu.address} for every boot"
    if gpu.driver is None:
        yield warned("driver", "none: it is given to no guest yet",
                     give, gpu.address)
        return
    made = failed if named or kept else warned
    if gpu.driver == "nouveau":
        give += ", which keeps nouveau away too"
    yield made("driver", f"{gpu.driver} has it, so no guest can", give, gpu.address)


def _for_vgpus(gpu: Function, state: vfio.Vgpu, *, named: bool) -> Verdict:
    """NVIDIA's vGPU manager has it: as it should be, unless it was meant for one guest."""
    said = f"nvidia, for vGPUs ({state.interface.value if state.interface else '?'})"
    if named and not gpu.vfs and not state.made:
        return warned("driver", f"{said}, and there is none yet",
                      f"for one guest as a whole: katagpu host bind {gpu.address}; for vGPUs: "
                      f"katagpu host vgpu create {gpu.address} TYPE", gpu.address)
    return passed("driver", said, gpu.address)


def reset(gpu: Function) -> Verdict:
    """The GPU can be reset between two guests."""
    if gpu.resets is None:
        return warned("reset", "the kernel knows no way to reset it: after one guest the next may "
                      "not get it to work", "reboot the host between guests", gpu.address)
    if not gpu.resets:
        return passed("reset", "possible (this kernel does not say how)", gpu.address)
    return passed("reset", " ".join(gpu.resets), gpu.address)
