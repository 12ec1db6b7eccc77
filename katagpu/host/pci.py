"""PCI functions as sysfs shows them: ids, BARs, driver, IOMMU group, SR-IOV.

Attributes: the kernel's Documentation/ABI/testing/sysfs-bus-pci; flags of `resource`:
`<linux/ioport.h>`; the header's layout: `<linux/pci_regs.h>`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from katagpu.errors import UserError
from katagpu.host.machine import Machine

DEVICES = "/sys/bus/pci/devices"
DRIVERS = "/sys/bus/pci/drivers"
NVIDIA = "10de"
GIB = 1 << 30
_IO, _MEMORY, _PREFETCH, _WIDE, _UNSET = 0x100, 0x200, 0x2000, 0x100000, 0x20000000
_BARS = 6
_BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])")


@dataclass(frozen=True)
class Bar:
    """A BAR; `size` 0: its registers say that it is there, and the kernel gave it no place."""

    number: int
    start: int
    size: int
    wide: bool
    prefetchable: bool
    io: bool = False
    assigned: bool = True

    @property
    def large(self) -> bool:
        """Is it what Kata calls large? (Its runtime counts whole GiB, and more than four.)"""
        return self.size // GIB > 4

    def __str__(self) -> str:
        size = amount(self.size) if self.size else "?"
        return f"{size}{'' if self.assigned else '!'}"


@dataclass(frozen=True)
class Function:
    """A PCI function. Ids are hexadecimal, without 0x; `kind` is the class, six digits.

    Not `answers`: its configuration reads all ones, though the kernel remembers it.
    """

    address: str
    vendor: str
    device: str
    kind: str
    bridge: bool
    bars: Sequence[Bar]
    driver: str | None
    override: str | None
    group: str | None
    numa: int | None
    total_vfs: int
    vfs: Sequence[str]
    parent: str | None
    resets: Sequence[str] | None
    answers: bool = True

    @property
    def path(self) -> str:
        """Its directory in sysfs."""
        return f"{DEVICES}/{self.address}"

    @property
    def ids(self) -> str:
        """`10de:20b5`."""
        return f"{self.vendor}:{self.device}"

    @property
    def gpu(self) -> bool:
        """Is it an NVIDIA GPU: a VGA or 3D controller?"""
        return self.vendor == NVIDIA and self.kind[:4] in ("0300", "0302")

    @property
    def large(self) -> bool:
        """Has it a BAR that is large for Kata?"""
        return any(bar.large for bar in self.bars)

    def __str__(self) -> str:
        return f"{self.address} [{self.ids}]"


def amount(size: int) -> str:
    """A BAR's size as lspci has it: 16M, 32G."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


def read(machine: Machine, address: str) -> Function:
    """A function that is there."""
    path = f"{DEVICES}/{address}"

    def text(name: str) -> str:
        return machine.text(f"{path}/{name}") or ""

    config = machine.raw(f"{path}/config") or b""
    kind = text("class")[2:].rjust(6, "0")
    override = text("driver_override")
    methods = machine.text(f"{path}/reset_method")
    resets = methods.split() if methods is not None else (
        [] if machine.exists(f"{path}/reset") else None)
    vfs = sorted((name for name in machine.names(path) if re.fullmatch(r"virtfn\d+", name)),
                 key=lambda name: int(name[6:]))
    return Function(
        address=address, vendor=text("vendor")[2:], device=text("device")[2:], kind=kind,
        bridge=kind[:4] in ("0604", "0609") or (len(config) > 0xE and config[0xE] & 0x7F == 1),
        bars=bars(text("resource"), config), driver=machine.link(f"{path}/driver"),
        override=None if override in ("", "(null)") else override,
        group=machine.link(f"{path}/iommu_group"), numa=_node(text("numa_node")),
        total_vfs=int(text("sriov_totalvfs") or 0),
        vfs=[name for name in (machine.link(f"{path}/{vf}") for vf in vfs) if name],
        parent=machine.link(f"{path}/physfn"), resets=resets,
        answers=config[:4] != b"\xff" * 4 or machine.exists(f"{path}/physfn"))


def _node(text: str) -> int | None:
    return None if text in ("", "-1") else int(text)


def bars(resource: str, config: bytes = b"") -> list[Bar]:
    """The BARs of a `resource` file, and those that only the header knows.

    A BAR for which no place was found is shown from 0, or not at all; its register keeps the type.
    """
    found: list[Bar] = []
    lines = resource.splitlines()
    wide = False
    for number, line in enumerate(lines[:_BARS]):
        upper, wide = wide, False
        words = line.split()
        if len(words) != 3:
            continue
        start, end, flags = (int(word, 16) for word in words)
        if flags & (_IO | _MEMORY) and end >= start:
            wide = bool(flags & _WIDE)
            found.append(Bar(number=number, start=start, size=end - start + 1, wide=wide,
                             prefetchable=bool(flags & _PREFETCH), io=bool(flags & _IO),
                             assigned=start != 0 and not flags & _UNSET))
            continue
        at = 0x10 + 4 * number
        register = int.from_bytes(config[at:at + 4], "little")
        if not upper and register & 0b111 == 0b100:  # memory with 64 bits
            wide = True
            found.append(Bar(number=number, start=0, size=0, wide=True,
                             prefetchable=bool(register & 8), assigned=False))
    return found


def functions(machine: Machine) -> list[Function]:
    """All functions of the host."""
    return [read(machine, name) for name in machine.names(DEVICES)]


def gpus(machine: Machine) -> list[Function]:
    """NVIDIA's GPUs, the virtual functions of their SR-IOV left out."""
    found = [read(machine, name) for name in machine.names(DEVICES)
             if machine.text(f"{DEVICES}/{name}/vendor") == f"0x{NVIDIA}"]
    return [function for function in found if function.gpu and function.parent is None]


def switches(machine: Machine) -> list[Function]:
    """NVIDIA's NVSwitches, which a guest with all GPUs of a board needs too."""
    return [function for function in functions(machine)
            if function.vendor == NVIDIA and function.kind[:4] == "0680"]


def members(machine: Machine, group: str) -> list[Function]:
    """The functions of an IOMMU group."""
    return [read(machine, name)
            for name in machine.names(f"/sys/kernel/iommu_groups/{group}/devices")]


def resolve(machine: Machine, text: str) -> Function:
    """The NVIDIA function that a user names. Raises `UserError`.

    Without a domain it is looked for in all of them, as lspci -s does; nvidia-smi's domain of eight
    digits is taken too.
    """
    known = machine.names(DEVICES)
    match = _BDF.fullmatch(text.strip().lower())
    if match is None:
        raise UserError(f"{text!r} is no PCI address", hint=f"it is written 0000:41:00.0"
                                                            f"{_nearest(machine, text)}")
    domain, rest = match[1], f"{match[2]}:{match[3]}.{match[4]}"
    if domain is None:
        found = [name for name in known if name.partition(":")[2] == rest]
    else:
        found = [name for name in known if name == f"{int(domain, 16):04x}:{rest}"]
    if not found:
        raise UserError(f"there is no PCI function {text}",
                        hint=_nearest(machine, text).lstrip("; ") or "this host has no NVIDIA GPU")
    if len(found) > 1:
        raise UserError(f"{text} is in several PCI domains: {', '.join(found)}",
                        hint="give it with its domain")
    function = read(machine, found[0])
    if function.vendor != NVIDIA:
        raise UserError(f"{function} is not NVIDIA's (its class is {function.kind[:4]})",
                        hint=_nearest(machine, text).lstrip("; ") or "this host has no NVIDIA GPU")
    return function


def _nearest(machine: Machine, text: str) -> str:
    names = [gpu.address for gpu in gpus(machine)]
    near = difflib.get_close_matches(text.lower(), names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; the GPUs here: {', '.join(names)}" if names else ""
