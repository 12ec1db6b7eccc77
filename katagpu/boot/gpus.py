"""Checks of the emulated GPUs: plugged in, given addresses, taken by the driver, known by it."""

from __future__ import annotations

import errno
import re

from katagpu import provenance
from katagpu.boot import pci
from katagpu.boot.facts import Failed, Skipped
from katagpu.boot.pci import Function
from katagpu.boot.session import Plugged, Session
from katagpu.boot.vm import HotPlug

GIB4 = 1 << 32
MODULES = ("nvidia", "nvidia_uvm")
# What the open driver says when it opens a GPU that answers with zeros: the firmware was loaded
# and there is no ROM behind BAR0 (0x62), or the firmware was not found (0x61). 550.163.01.
FIRMWARE_FOUND = re.compile(r"RmInitAdapter failed! \(0x62:")
FIRMWARE_MISSING = re.compile(
    r"Direct firmware load for nvidia/\S+ failed|RmInitAdapter failed! \(0x61:")
OPENED = re.compile(r"RmInitAdapter failed! \(0x[0-9a-f]+:")
ADDRESSES = ("the kernel lacks what gives addresses to large BARs, or the root port reserves too "
             "little for them")


def find(session: Session, plugged: Plugged) -> Function:
    """The function in the guest. Raises `Failed` when it is not there."""
    found = [each for each in pci.functions(session.guest) if each.address == plugged.address]
    if not found:
        raise Failed(f"the function at {plugged.address} is gone", session.tail(),
                     cause="it was unplugged, or its root port went down",
                     cure="look at the kernel's log")
    return found[0]


def cold(session: Session) -> list[str]:
    """A GPU that is there at the start is found, with its own ids."""
    return _present(session, session.cold())


def _present(session: Session, plugged: Plugged) -> list[str]:
    function = find(session, plugged)
    offer = plugged.offer
    wanted = (offer.vendor, offer.device, offer.pci_class)
    if (function.vendor, function.device, function.pci_class >> 8) != wanted:
        raise Failed(f"the function shows itself as {function}", [function],
                     cause="the emulated function is wrong", cure="this is a fault of katagpu")
    return [str(function)]


def cold_addresses(session: Session) -> list[str]:
    """All BARs of a GPU that is there at the start have addresses, the large one above 4 GiB."""
    return _addresses(session, session.first())


def _addresses(session: Session, plugged: Plugged) -> list[str]:
    function = find(session, plugged)
    lines = [str(region) for region in function.regions]
    lacking = [region for region in function.regions if not region.assigned]
    sizes = {region.number: region.size for region in function.regions}
    if lacking or not set(plugged.offer.bars) <= set(sizes):
        raise Failed(f"{len(plugged.offer.bars)} BARs were offered, and not all have addresses",
                     [*lines, *session.grep(r"BAR \d|can't (assign|claim)|failed to assign")],
                     cause=ADDRESSES,
                     cure="kernel: PCI_MMCONFIG, HOTPLUG_PCI_PCIE; Kata: pcie_root_port, and "
                          "pci=realloc in kernel_params")
    if any(sizes[number] != size for number, size in plugged.offer.bars.items()):
        raise Failed(f"the BARs are {sizes}, not {plugged.offer.bars}", lines, cause=ADDRESSES,
                     cure="this is a fault of katagpu, or of QEMU")
    low = [region for region in function.regions
           if region.size >= pci.GIB and region.start < GIB4]
    if low:
        raise Failed("a BAR of this size cannot lie below 4 GiB", lines,
                     cause="addresses collide", cure="look at the kernel's log")
    return lines


def modules(session: Session) -> list[str]:
    """The driver's modules are loaded, by the guest's own units and names."""
    guest, facts = session.guest, session.facts
    session.require_driver()
    wanted = [*MODULES, *(("nvidia_modeset", "nvidia_drm") if {"graphics", "display"} & set(
        facts.capabilities) else ())]

    def missing() -> list[str]:
        return [name for name in wanted if not guest.exists(f"/sys/module/{name}/refcnt")]

    if not guest.until(lambda: not missing(), session.patience):
        session.lost = "the driver's modules are not loaded, as another check says"
        asked = guest.run(["modprobe", "--verbose", *(
            ["--dirname", facts.extension] if facts.extension else []), "nvidia"]).said
        raise Failed(f"not loaded: {', '.join(missing())}",
                     [*asked, *session.grep(r"nvidia|NVRM|module")],
                     cause=_refusal(session, "modules for another release or configuration, "
                                    "missing from modules.dep, or refused by the kernel"),
                     cure="build kernel and modules of one recipe (./doitw build_image); the lines "
                          "above have the kernel's own reason")
    version = guest.text("/sys/module/nvidia/version").strip()
    if version != facts.driver:
        raise Failed(f"nvidia.ko is of driver {version}, the guest's is {facts.driver}",
                     cause="module and user space are not of one driver",
                     cure="./doitw build_image")
    return [f"{name} {guest.text(f'/sys/module/{name}/version').strip()}" for name in wanted]


def vermagic(session: Session) -> list[str]:
    """Each of the driver's modules was made for this kernel, as modinfo says of the file."""
    facts = session.facts
    session.require_driver(working=False)
    base = ["--basedir", facts.extension] if facts.extension else []
    lines = []
    for name in ("nvidia", "nvidia-uvm"):
        found = session.guest.run(["modinfo", *base, "--field", "vermagic", name])
        said = found.stdout.strip()
        if found.status != 0 or said.split(" ")[0] != facts.release:
            raise Failed(f"{name} has the version magic {said or 'none'!r}", found.said,
                         cause=f"a module for another kernel than {facts.release}, or not in "
                               "modules.dep", cure="./doitw build_image")
        lines.append(f"{name}: {said}")
    return lines


def compiled_against(session: Session) -> list[str]:
    """The driver's modules were compiled against this very kernel's configuration."""
    session.require_driver(working=False)
    if not session.guest.exists("/proc/config.gz"):
        raise Skipped("this kernel does not show its configuration (IKCONFIG_PROC)")
    import gzip

    place = f"{session.facts.extension or ''}/lib/modules/{session.facts.release}"
    try:
        found = provenance.read(session.guest.text(f"{place}/{provenance.RECORD}"))
    except FileNotFoundError:
        found = {}
    running = provenance.settings(gzip.decompress(session.guest.read("/proc/config.gz")).decode())
    if found.get(provenance.SETTINGS) != running:
        raise Failed("the driver's modules are of a kernel of another configuration", [
            f"compiled against {found.get(provenance.SETTINGS, 'nobody knows what')}",
            f"running          {running}"],
            cause="kernel and image are of two builds; the release is the same, and says nothing",
            cure="./doitw build_image, and install all of its files together")
    return [f"settings {running}"]


def nouveau(session: Session) -> list[str]:
    """nouveau is not there, and nothing would load it."""
    guest = session.guest
    loaded = guest.exists("/sys/module/nouveau")
    named = guest.run(["modprobe", "--show-depends", "nouveau"])
    files = guest.shell("find /lib/modules/ -name 'nouveau.ko*'").said
    if loaded or named.status == 0 or files:
        raise Failed("nouveau is in this guest", [*named.said, *files],
                     cause="the kernel has DRM_NOUVEAU; it takes the GPU before NVIDIA's driver",
                     cure="kernel-configs: leave DRM_NOUVEAU out")
    return ["not loaded, not in the guest"]


def cold_bound(session: Session) -> list[str]:
    """nvidia.ko takes the GPU that is there at the start."""
    return _bound(session, session.first())


def _bound(session: Session, plugged: Plugged) -> list[str]:
    session.require_driver()

    def bound() -> bool:
        return find(session, plugged).driver == "nvidia"

    if not session.guest.until(bound, session.patience, step=0.3):
        session.lost = "the driver has not taken the GPU, as another check says"
        raise Failed(f"{find(session, plugged)}: nvidia.ko did not take it",
                     session.grep(r"NVRM|nvidia"),
                     cause=_refusal(session), cure="the kernel's lines above say why")
    return [str(find(session, plugged))]


def _refusal(session: Session,
             other: str = "the module is not loaded, or no unit loads it") -> str:
    for pattern, words in (
            (r"fallen off the bus", "the function does not answer: all registers read as ones"),
            (r"not supported by the NVIDIA", "this driver does not know the GPU"),
            (r"I/O region assigned to your NVIDIA device is invalid", "a BAR has no address"),
            (r"Unknown symbol|version magic", "a module for another kernel")):
        if session.grep(pattern):
            return words
    return other


def cold_model(session: Session) -> list[str]:
    """The driver reads the GPU's identity and knows its name."""
    return _model(session, session.first())


def _model(session: Session, plugged: Plugged) -> list[str]:
    session.require_driver()
    try:
        said = session.guest.text(f"/proc/driver/nvidia/gpus/{plugged.address}/information")
    except OSError as missing:
        raise Failed(f"the driver does not know {plugged.address}: {missing}",
                     session.grep("NVRM|nvidia"), cause=_refusal(session),
                     cure="the kernel's lines above say why") from None
    model = next((line.partition(":")[2].strip() for line in said.splitlines()
                  if line.startswith("Model:")), "")
    if plugged.offer.model is not None and model != plugged.offer.model:
        raise Failed(f"the driver calls it {model!r}, not {plugged.offer.model!r}",
                     said.splitlines(),
                     cause="the driver read another identity than the function gives",
                     cure="this is a fault of katagpu, or a driver that names it otherwise")
    return [f"Model: {model}", *(line for line in said.splitlines() if "Bus Location" in line)]


def nodes(session: Session) -> list[str]:
    """The device nodes are there, with the numbers that the kernel gave."""
    session.require_driver()
    wanted = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools")
    guest = session.guest
    if not guest.until(lambda: guest.shell(" && ".join(
            f"test -c {name}" for name in wanted)).status == 0, session.patience):
        raise Failed("device nodes are missing", guest.shell("ls -l /dev/nvidia*").said,
                     cause="nvidia-devices.service did not run", cure="journalctl -u "
                     "nvidia-devices.service in ./doitw boot_shell")
    if guest.open("/dev/nvidia-uvm") != 0:
        raise Failed("/dev/nvidia-uvm cannot be opened", guest.shell("ls -l /dev/nvidia*").said,
                     cause="nvidia-uvm is not loaded, or the node has another number",
                     cure="look at /proc/devices in ./doitw boot_shell")
    return guest.shell("ls -l /dev/nvidia*").said


def firmware(session: Session) -> list[str]:
    """Opening the GPU goes as far as one without a ROM can: past the search for GSP firmware."""
    session.require_driver()
    code = session.guest.open("/dev/nvidia0")
    reached = session.guest.wait_line(OPENED.pattern, timeout=10) if code else None
    lines = [line for line in session.guest.lines() if "NVRM" in line.text
             or "firmware" in line.text]
    missing = [line for line in lines if FIRMWARE_MISSING.search(line.text)]
    if missing:
        raise Failed("the driver does not find its GSP firmware", missing,
                     cause="lib/firmware/nvidia/<driver> is not in the guest",
                     cure="recipe: the driver's firmware ships with every capability; "
                          "./doitw build_image")
    if reached is None:
        raise Failed(f"opening /dev/nvidia0 gave {errno.errorcode.get(code, code)} and no word of "
                     "the driver", lines, cause="the driver ended elsewhere than it is known to",
                     cure="compare with docs/boot.md")
    if session.facts.flavour == "open" and not FIRMWARE_FOUND.search(reached.text):
        raise Failed("the driver ended elsewhere than behind the firmware", lines,
                     cause="another driver, or firmware that it does not accept",
                     cure="compare with docs/boot.md")
    return [str(line) for line in lines[-6:]]


def none_yet(session: Session) -> list[str]:
    """Without a GPU the guest loads no driver, and waits for one."""
    loaded = [name for name in MODULES if session.guest.exists(f"/sys/module/{name}/refcnt")]
    gpus = [function for function in pci.functions(session.guest) if function.gpu]
    if loaded or gpus:
        raise Failed("the driver is loaded, and no GPU is there", [*loaded, *gpus],
                     cause="a unit loads it without asking for a GPU",
                     cure="rootfs/: nvidia-modules.service")
    return ["no GPU on the bus, no module of the driver"]


def small_hot_plug(session: Session) -> list[str]:
    """A function with small BARs is hot-plugged below a PCI bridge, through ACPI."""
    if session.hot_plug is not HotPlug.ACPI:
        raise Skipped("this machine has no hot-plug through ACPI")
    plugged = session.plug_small("pci-bridge-0")
    lines = _addresses(session, plugged)
    session.unplug(plugged)
    return [f"{plugged.address} came and went", *lines]


def hot_plug(session: Session) -> list[str]:
    """A GPU with a 32 GiB BAR is hot-plugged through PCI Express' own handler."""
    since = session.guest.mark()
    plugged = session.plug_gpu()
    handler = [line for line in session.guest.lines(since) if "pciehp" in line.text]
    if not handler:
        raise Failed("the function came, but pciehp had no part in it",
                     session.guest.lines(since), cause="the kernel lacks HOTPLUG_PCI_PCIE",
                     cure="kernel-configs: keep HOTPLUG_PCI_PCIE")
    return [*_present(session, plugged), *map(str, handler)]


def hot_addresses(session: Session) -> list[str]:
    """All BARs of the hot-plugged GPU have addresses, the large one above 4 GiB."""
    return _addresses(session, session.first())


def hot_bound(session: Session) -> list[str]:
    """udev loads the driver for the hot-plugged GPU, and it takes it."""
    return [*_bound(session, session.first()), *_model(session, session.first())]


def second(session: Session) -> list[str]:
    """A second GPU is hot-plugged beside the first; both have addresses and the driver."""
    session.first()
    if session.lost:
        raise Skipped(session.lost)
    plugged = session.plug_gpu()
    lines = [*_addresses(session, plugged), *_bound(session, plugged), *_model(session, plugged)]
    first, other = (find(session, each) for each in session.gpus[:2])
    for one in first.regions:
        for two in other.regions:
            if one.start <= two.end and two.start <= one.end:
                raise Failed("BARs of the two GPUs overlap", [one, two], cause=ADDRESSES,
                             cure="look at the kernel's log")
    return lines


def unplug(session: Session) -> list[str]:
    """A GPU is unplugged, and nothing is said of it but that."""
    session.first()
    plugged, since = session.gpus[-1], session.guest.mark()
    session.unplug(plugged)
    lines = session.guest.lines(since)
    wrong = [line for line in lines if line.level <= 3 and "NVRM" not in line.text]
    if wrong:
        raise Failed("the kernel reports errors", wrong, cause="the driver or the port did not let "
                     "go of the GPU", cure="look at the kernel's log")
    return [f"{plugged.address} is gone", *map(str, lines)]
