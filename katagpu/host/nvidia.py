"""What NVIDIA's driver on the host says of a GPU: its number, and whether MIG is on."""

from __future__ import annotations

import csv
import re

from katagpu.errors import UserError
from katagpu.host.machine import Machine
from katagpu.host.pci import Function

PROC = "/proc/driver/nvidia"
_MINOR = re.compile(r"^Device Minor:\s*(\d+)", re.M)


def minor(machine: Machine, address: str) -> int | None:
    """N of `/dev/nvidiaN`; None where the driver has not the function, or does not say."""
    found = _MINOR.search(machine.text(f"{PROC}/gpus/{address}/information") or "")
    return int(found[1]) if found else None


def mig(machine: Machine, gpus: list[Function]) -> dict[str, str]:
    """MIG's mode by address (`enabled`, `disabled`); a GPU of which nothing is known is left out.

    nvidia-smi says it; where it does not answer, an instance that is there tells as much.
    """
    driven = [gpu.address for gpu in gpus if gpu.driver == "nvidia"]
    found: dict[str, str] = {}
    if driven and machine.programs.find("nvidia-smi"):
        try:
            said = machine.ask(["nvidia-smi", "--query-gpu=pci.bus_id,mig.mode.current",
                                "--format=csv,noheader"], timeout=20)
            found = _modes(said.out) if said.status == 0 else {}
        except UserError:
            found = {}
    for address in driven:
        number = minor(machine, address)
        if address not in found and number is not None and any(
                name.startswith("gi")
                for name in machine.names(f"{PROC}/capabilities/gpu{number}/mig")):
            found[address] = "enabled"
    return {address: mode for address, mode in found.items() if address in driven}


def _modes(text: str) -> dict[str, str]:
    found = {}
    for row in csv.reader(text.splitlines()):
        words = [word.strip() for word in row]
        if len(words) == 2 and words[1].lower() in ("enabled", "disabled"):
            found[address(words[0])] = words[1].lower()
    return found


def address(text: str) -> str:
    """nvidia-smi's `00000000:41:00.0` as sysfs has it."""
    domain, _, rest = text.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}" if re.fullmatch("[0-9a-f]+", domain) else text
