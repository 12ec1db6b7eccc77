"""The guest's PCI functions, as its sysfs shows them (Documentation/ABI/testing/sysfs-bus-pci)."""

from __future__ import annotations

from dataclasses import dataclass

from katagpu.boot.channel import Channel

NVIDIA = 0x10DE
GIB = 1 << 30
# include/linux/ioport.h
MEMORY, PREFETCH, WIDE, UNSET = 0x200, 0x2000, 0x100000, 0x20000000
BARS = 6
_SCRIPT = ("cd /sys/bus/pci/devices && grep -H . */vendor */device */class */resource; "
           "for link in */driver; do [ ! -L $link ] || echo $link:$(readlink $link); done")


@dataclass(frozen=True, kw_only=True)
class Region:
    """A BAR: its number, first and last address, and the kernel's flags."""

    number: int
    start: int
    end: int
    flags: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start + 1

    @property
    def assigned(self) -> bool:
        """Has it an address? A BAR without one keeps its size at address 0, or is marked."""
        return self.start != 0 and not self.flags & UNSET

    def __str__(self) -> str:
        where = f"at {self.start:#x}" if self.assigned else "without an address"
        kind = "64-bit " if self.flags & WIDE else ""
        return f"BAR{self.number} {kind}{_size(self.size)} {where}"


def _size(number: int) -> str:
    return f"{number // GIB} GiB" if number >= GIB else f"{number // (1 << 20)} MiB" \
        if number >= 1 << 20 else f"{number} bytes"


@dataclass(frozen=True, kw_only=True)
class Function:
    """A PCI function of the guest by its address (domain:bus:device.function)."""

    address: str
    vendor: int
    device: int
    pci_class: int
    driver: str | None
    regions: tuple[Region, ...]

    @property
    def gpu(self) -> bool:
        """Is it a display controller of NVIDIA's, VGA or 3D?"""
        return self.vendor == NVIDIA and self.pci_class >> 8 in (0x0300, 0x0302)

    def __str__(self) -> str:
        bound = f", driver {self.driver}" if self.driver else ", no driver"
        return (f"{self.address} {self.vendor:04x}:{self.device:04x} class "
                f"{self.pci_class >> 8:04x}{bound}")


def parse(text: str) -> list[Function]:
    """The functions in what the script prints, by address."""
    fields: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        place, _colon, value = line.rpartition(":")
        if "/" not in place:
            continue
        address, _slash, name = place.partition("/")
        fields.setdefault(address, {}).setdefault(name, []).append(value)
    # One that goes while it is looked at has lost some of its files.
    return [_function(address, found) for address, found in sorted(fields.items())
            if {"vendor", "device", "class", "resource"} <= set(found)]


def _function(address: str, found: dict[str, list[str]]) -> Function:
    regions = []
    for number, line in enumerate(found.get("resource", [])[:BARS]):
        start, end, flags = (int(word, 16) for word in line.split())
        if flags & MEMORY:
            regions.append(Region(number=number, start=start, end=end, flags=flags))
    driver = found.get("driver")
    return Function(
        address=address, vendor=int(found["vendor"][0], 16), device=int(found["device"][0], 16),
        pci_class=int(found["class"][0], 16), regions=tuple(regions),
        driver=driver[0].rpartition("/")[2] if driver else None)


def functions(guest: Channel) -> list[Function]:
    """All PCI functions of the guest."""
    return parse(guest.shell(_SCRIPT).stdout)
