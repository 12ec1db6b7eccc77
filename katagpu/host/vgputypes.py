"""vGPUs as sysfs has them: the types that can be made on each function, and those that are made.

mdev: the kernel's Documentation/ABI/testing/sysfs-bus-vfio-mdev. NVIDIA's own attributes, on
kernels whose VFIO has no mdev for it (Ubuntu 24.04; 6.8 and newer): NVIDIA's vGPU documentation,
`nvidia/creatable_vgpu_types` (lines of `ID : NAME`) and `nvidia/current_vgpu_type` (0: none).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from katagpu.host.machine import Machine
from katagpu.host.pci import DEVICES, Function
from katagpu.host.vfio import MDEVS, Interface

CURRENT = "nvidia/current_vgpu_type"
CREATABLE = "nvidia/creatable_vgpu_types"
SUPPORTED = "mdev_supported_types"
# The part of a name behind the card: 10C is of the whole card's memory, 1-10C of a MIG slice.
_MIG_BACKED = re.compile(r"-\d+-\d+[A-Z]+$")
_LINE = re.compile(r"^\s*(\d+)\s*:\s*(\S.*?)\s*$", re.M)


@dataclass(frozen=True)
class Kind:
    """A type on a function. `directory` is its name in sysfs: `nvidia-692`, or a number."""

    function: str
    interface: Interface
    directory: str
    name: str
    instances: int

    @property
    def mig_backed(self) -> bool:
        """Is it of a MIG slice, and not of the whole card by time?"""
        return bool(_MIG_BACKED.search(self.name))

    @property
    def backing(self) -> str:
        """In words."""
        return "MIG" if self.mig_backed else "time-sliced"

    def answers_to(self, text: str) -> bool:
        """Is it the type that a user names: A100D-4C, GRID A100D-4C, nvidia-692, 692?"""
        text = text.lower()
        return text in (self.name.lower(), self.name.lower().rpartition(" ")[2],
                        self.directory.lower(), self.directory.lower().rpartition("-")[2])


@dataclass(frozen=True)
class Made:
    """A vGPU: an mdev by its UUID, or a virtual function that has a type."""

    name: str
    function: str
    interface: Interface
    directory: str
    kind: str  # the type's name; empty where it cannot be told any more
    group: str | None

    @property
    def node(self) -> str | None:
        """The device that a container is given."""
        return None if self.group is None else f"/dev/vfio/{self.group}"


def places(gpu: Function) -> list[str]:
    """The functions of a GPU that can have types: itself (before Ampere), virtual ones."""
    return [gpu.address, *gpu.vfs]


def kinds(machine: Machine, gpu: Function) -> Iterator[Kind]:
    """The types of all functions of a GPU, those too of which no more can be made."""
    for address in places(gpu):
        path = f"{DEVICES}/{address}"
        for directory in sorted(machine.names(f"{path}/{SUPPORTED}"), key=_number):
            place = f"{path}/{SUPPORTED}/{directory}"
            name = machine.text(f"{place}/name")
            if name is not None:
                yield Kind(address, Interface.MDEV, directory, name,
                           _whole(machine.text(f"{place}/available_instances")))
        current = machine.text(f"{path}/{CURRENT}")
        for number, name in _LINE.findall(machine.text(f"{path}/{CREATABLE}") or ""):
            yield Kind(address, Interface.VENDOR, number, name, int(current in ("", "0")))


def made(machine: Machine, gpu: Function) -> Iterator[Made]:
    """The vGPUs of a GPU."""
    here = places(gpu)
    names = {(kind.interface, kind.directory): kind.name for kind in kinds(machine, gpu)}
    for uuid in machine.names(MDEVS):
        parent = machine.real(f"{MDEVS}/{uuid}").split("/")[-2]
        if parent in here:
            kind = machine.link(f"{MDEVS}/{uuid}/mdev_type") or ""
            yield Made(uuid, parent, Interface.MDEV, kind, names.get((Interface.MDEV, kind), ""),
                       machine.link(f"{MDEVS}/{uuid}/iommu_group"))
    for address in here:
        current = machine.text(f"{DEVICES}/{address}/{CURRENT}")
        if current not in (None, "", "0"):
            yield Made(address, address, Interface.VENDOR, str(current),
                       names.get((Interface.VENDOR, str(current)), ""),
                       machine.link(f"{DEVICES}/{address}/iommu_group"))


def _number(directory: str) -> tuple[int, str]:
    found = re.search(r"(\d+)$", directory)
    return (int(found[1]) if found else 0, directory)


def _whole(text: str | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0
