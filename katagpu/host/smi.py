"""nvidia-smi: what it says of GPUs and MIG, read from its XML where that has it.

The XML (`-q -x`) is the same from driver 450 on in what is read here. Profiles and instances are in
tables only (`mig -lgip`, `-lgi`, `-lci`), whose columns changed their width and not their order.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass

from katagpu.errors import UserError
from katagpu.host.machine import Machine
from katagpu.host.nvidia import address
from katagpu.host.programs import Missing, Result

PROGRAM = "nvidia-smi"
TIMEOUT = 30.0  # seconds; the first call after boot initialises all GPUs
MODES = {"enabled": True, "disabled": False, "n/a": None, "[n/a]": None, "not supported": None}
_PROFILE = re.compile(r"^\|\s*(\d+)\s+MIG\s+(\S+)\s+(\d+)\s+(\d+)/(\d+)\s+([\d.,]+)\s")
_INSTANCE = re.compile(r"^\|\s*(\d+)\s+MIG\s+(\S+)\s+(\d+)\s+(\d+)\s+(\d+):(\d+)\s*\|")
_COMPUTE = re.compile(r"^\|\s*(\d+)\s+(\d+)\s+MIG\s+(\S+)\s+(\d+)\s+(\d+)\s")
_NOTHING = re.compile(r"^No (MIG-enabled devices|GPU instances?|compute instances?|"
                      r"supported devices|MIG-supported devices|devices)", re.I | re.M)
_FAILURES = (
    ("Driver/library version mismatch", "the driver was renewed and its old modules are still "
     "loaded: reboot, or unload them (rmmod nvidia_uvm nvidia)"),
    ("couldn't communicate with the NVIDIA driver", "NVIDIA's driver is not loaded on this host, "
     "or has no GPU: modprobe nvidia; a GPU bound to vfio-pci comes back with katagpu host unbind"),
    ("No devices were found", "no GPU is bound to NVIDIA's driver here: katagpu host gpus shows "
     "which driver has them"),
    ("Insufficient Permissions", "run it as root: sudo"),
    ("In use by another client", "something uses the GPU: nvidia-smi, or fuser -v /dev/nvidia*, "
     "says what; stop it (nvidia-persistenced, dcgm and monitoring too)"),
    ("GPU is lost", "the GPU fell off the bus: dmesg | grep -i nvrm, then reboot"),
    ("Not Supported", "this GPU, or its driver on this host, cannot do it"),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU that NVIDIA's driver has. `current` and `pending` None: it has no MIG."""

    index: int
    address: str
    name: str
    driver: str
    current: bool | None
    pending: bool | None
    devices: Sequence[tuple[int, int]]  # GPU and compute instances
    processes: Sequence[str]
    virtualization: str

    @property
    def waits(self) -> bool:
        """Was the mode changed, and is not in force yet?"""
        return self.pending is not None and self.pending != self.current


@dataclass(frozen=True)
class Profile:
    """A GPU instance profile: `1g.10gb`, 19."""

    gpu: int
    name: str
    number: int
    free: int
    total: int
    memory: float  # GiB

    def answers_to(self, text: str) -> bool:
        """Is it the profile that a user names?"""
        return text.lower().removeprefix("mig ") in (self.name.lower(), str(self.number))


@dataclass(frozen=True)
class Instance:
    """A GPU instance."""

    gpu: int
    name: str
    profile: int
    number: int
    start: int
    size: int


@dataclass(frozen=True)
class Compute:
    """A compute instance of a GPU instance."""

    gpu: int
    instance: int
    name: str
    profile: int
    number: int


def gpus(machine: Machine) -> list[Gpu]:
    """All GPUs that it shows. Raises `UserError` where it is missing, hangs or fails."""
    said = ask(machine, "-q", "-x")
    try:
        root = xml.fromstring(said.out.strip())
    except xml.ParseError as failure:
        first = said.out.strip().splitlines()[:1] or ["nothing"]
        raise UserError(f"nvidia-smi -q -x answers in no XML ({failure}); it begins: {first[0]}",
                        hint="is it NVIDIA's own program, and no wrapper?") from None
    if root.tag != "nvidia_smi_log":
        raise UserError(f"nvidia-smi -q -x answers with <{root.tag}>, which is not known here")
    driver = _text(root, "driver_version")
    return [_gpu(number, entry, driver) for number, entry in enumerate(root.findall("gpu"))]


def _gpu(index: int, entry: xml.Element, driver: str) -> Gpu:
    name = address(entry.get("id") or _text(entry, "pci/pci_bus_id"))
    devices = [(_whole(one, "gpu_instance_id"), _whole(one, "compute_instance_id"))
               for one in entry.findall("mig_devices/mig_device")]
    processes = [f"{_text(one, 'pid')} {_text(one, 'process_name')}".strip()
                 for one in entry.findall("processes/process_info")]
    return Gpu(index, name, _text(entry, "product_name"), driver,
               _mode(name, _text(entry, "mig_mode/current_mig")),
               _mode(name, _text(entry, "mig_mode/pending_mig")), devices, processes,
               _text(entry, "gpu_virtualization_mode/virtualization_mode"))


def _mode(name: str, word: str) -> bool | None:
    """MIG's mode. A word that is not known must not pass for `off`."""
    if word and word.lower() not in MODES:
        raise UserError(f"nvidia-smi says that MIG of {name} is {word!r}, which is not known here",
                        hint="is it NVIDIA's own? It was asked in English (LC_ALL=C)")
    return MODES.get(word.lower()) if word else None


def _text(entry: xml.Element, path: str) -> str:
    return (entry.findtext(path) or "").strip()


def _whole(entry: xml.Element, path: str) -> int:
    word = _text(entry, path)
    return int(word) if word.isdigit() else -1


def ask(machine: Machine, *words: str, empty: bool = False) -> Result:
    """Ask it something that changes nothing.

    With `empty`, that there is none of something is an answer, and of any status. Raises
    `UserError` with the cure.
    """
    try:
        said = machine.ask([PROGRAM, *words], timeout=TIMEOUT)
    except Missing:
        raise missing() from None
    if said.status != 0 and not (empty and _NOTHING.search(said.out + said.err)):
        raise failed(said)
    return said


def missing() -> UserError:
    """What it means that the program is not there."""
    return Missing("there is no nvidia-smi on this host",
                   hint="MIG is a matter of NVIDIA's driver on the host (for vGPU: its vGPU "
                        "manager): install it, with nvidia-smi")


def failed(said: Result) -> UserError:
    """What its failure means."""
    return UserError(f"`{' '.join(said.argv)}` failed with status {said.status}:\n    "
                     f"{said.said or 'it said nothing'}", hint=cure(said.out + said.err))


def cure(text: str) -> str | None:
    """What to do about what it said."""
    return next((what for words, what in _FAILURES if words.lower() in text.lower()), None)


def profiles(machine: Machine, gpu: Gpu) -> list[Profile]:
    """The profiles that a GPU offers."""
    said = ask(machine, "mig", "-i", gpu.address, "-lgip", empty=True).out
    return [Profile(int(gpu_), name, int(number), int(free), int(total),
                    float(memory.replace(",", ".")))
            for gpu_, name, number, free, total, memory in _rows(_PROFILE, said, "-lgip")]


def instances(machine: Machine, gpu: Gpu) -> list[Instance]:
    """Its GPU instances."""
    said = ask(machine, "mig", "-i", gpu.address, "-lgi", empty=True).out
    return [Instance(int(gpu_), name, int(profile), int(number), int(start), int(size))
            for gpu_, name, profile, number, start, size in _rows(_INSTANCE, said, "-lgi")]


def computes(machine: Machine, gpu: Gpu) -> list[Compute]:
    """Its compute instances."""
    said = ask(machine, "mig", "-i", gpu.address, "-lci", empty=True).out
    return [Compute(int(gpu_), int(instance), name, int(profile), int(number))
            for gpu_, instance, name, profile, number in _rows(_COMPUTE, said, "-lci")]


def _rows(pattern: re.Pattern[str], said: str, what: str) -> list[tuple[str, ...]]:
    """The rows of a table. One that cannot be read is an error, and not an empty table."""
    lines = said.splitlines()
    found = [match.groups() for match in map(pattern.match, lines) if match]
    table = [line for line in lines if re.match(r"\|\s*\d", line) and " MIG " in line]
    if len(found) != len(table) or (not found and not _NOTHING.search(said)):
        odd = next((line for line in table if not pattern.match(line)), said.strip()[:200])
        raise UserError(f"nvidia-smi mig {what} answers in a form that is not known here:\n    "
                        f"{odd}", hint="take a newer katagpu, or use nvidia-smi by hand")
    return found
