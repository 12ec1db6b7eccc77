"""Names of PCI devices, from the `pci.ids` of the host (https://pci-ids.ucw.cz)."""

from __future__ import annotations

import gzip
import zlib

from katagpu.host.machine import Machine

PLACES = ("/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids", "/usr/share/pci.ids",
          "/var/lib/pciutils/pci.ids")


def load(machine: Machine, vendor: str) -> dict[str, str] | None:
    """The names of a vendor's devices by their ids; None where the host has no such file."""
    for place in PLACES:
        data = machine.raw(place)
        if data is None:
            packed = machine.raw(f"{place}.gz")
            try:
                data = gzip.decompress(packed) if packed is not None else None
            except (OSError, EOFError, zlib.error):
                continue
        if data is not None:
            return parse(data.decode(errors="replace"), vendor)
    return None


def parse(text: str, vendor: str) -> dict[str, str]:
    """Devices have one tab before them, their subsystems two; a vendor's end at the next one."""
    found: dict[str, str] = {}
    inside = False
    for line in text.splitlines():
        if not line or line.startswith(("#", "\t\t")):
            continue
        if line.startswith("\t"):
            if inside:
                device, _, name = line.strip().partition("  ")
                found[device.lower()] = name
        elif inside:
            break
        else:
            inside = line[:4].lower() == vendor and line[4:6] == "  "
    return found
