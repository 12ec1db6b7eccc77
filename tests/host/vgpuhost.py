"""Hosts with NVIDIA's vGPU manager, and what it does with writes to its attributes."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests import hosttree
from tests.hosttree import Device, Kernel, Tree

PF = "0000:41:00.0"
VF = "0000:41:00.4"
TYPES = {"nvidia-692": ("GRID A100D-4C", 1), "nvidia-693": ("GRID A100D-8C", 1),
         "nvidia-698": ("GRID A100D-80C", 0)}
MIG_TYPES = {"nvidia-699": ("GRID A100D-1-10C", 1)}
CREATABLE = "ID    : vGPU Name\n1414  : NVIDIA H200X-1-18C\n1427  : NVIDIA H200X-70C\n" \
            "1428  : NVIDIA H200X-141C\n"
COUNT = 3


@dataclass
class Manager(Kernel):
    """A kernel with the vGPU manager. `refuses` and `written` are those of any kernel."""

    silent: bool = False  # it takes writes, and does nothing

    def __call__(self, path: Path, data: bytes) -> None:
        """A write(2)."""
        super().__call__(path, data)
        path, text = path.parent.resolve() / path.name, data.decode().strip()
        if self.silent:
            if path.name == "current_vgpu_type":
                path.write_text("0\n")
            return
        if path.name == "create":
            self._create(path.parent, text)
        elif path.name == "remove":
            self._remove(path.parent)
        elif path.name == "current_vgpu_type":
            free = text == "0"
            (path.parent / "creatable_vgpu_types").write_text(
                CREATABLE if free else CREATABLE.splitlines()[0] + "\n")
        elif path.name == "sriov_numvfs":
            self._functions(path.parent.name, int(text))

    def _create(self, kind: Path, uuid: str) -> None:
        if (kind / "available_instances").read_text().strip() == "0":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        function = kind.parent.parent
        place = function / uuid
        place.mkdir()
        (place / "remove").touch()
        group = self.tree.root / "sys/kernel/iommu_groups/192"
        group.mkdir(parents=True, exist_ok=True)
        self.tree.link(place / "iommu_group", group)
        self.tree.link(place / "mdev_type", kind)
        self.tree.link(self.tree.root / "sys/bus/mdev/devices" / uuid, place)
        self.tree.file("dev/vfio/192", "")
        self._instances(function, 0)

    def _remove(self, place: Path) -> None:
        (self.tree.root / "sys/bus/mdev/devices" / place.name).unlink()
        (self.tree.root / "dev/vfio/192").unlink()
        shutil.rmtree(place)
        self._instances(place.parent, 1)

    def _instances(self, function: Path, count: int) -> None:
        for kind in (function / "mdev_supported_types").iterdir():
            (kind / "available_instances").write_text(f"{count}\n")

    def _functions(self, physical: str, count: int) -> None:
        path = self.tree.paths[physical]
        for number, link in enumerate(sorted(path.glob("virtfn*"))):
            function = link.resolve()
            (self.tree.root / "sys/bus/pci/devices" / function.name).unlink()
            shutil.rmtree(self.tree.root / f"sys/kernel/iommu_groups/{30 + number}")
            shutil.rmtree(function)
            link.unlink()
        if count:
            self.tree.functions(physical, 4, count, group=30, files=hosttree.mdev_types(TYPES))


def card(root: Path, total: int = COUNT, driver: str = "nvidia", ids: str = "10de:20b5") -> Tree:
    """An A100 whose virtual functions are off."""
    tree = Tree(root)
    tree.add(Device("0000:40:01.0", "8086:347a", hosttree.BRIDGE, driver="pcieport", group=26))
    tree.add(Device(PF, ids, bars=hosttree.bars(0x222800000000, 128 << 30), group=27,
                    above="0000:40:01.0", total_vfs=total, driver=driver))
    return tree


def mdev(root: Path) -> Tree:
    """The same with time-sliced types on its virtual functions (the guide's host)."""
    tree = card(root)
    tree.functions(PF, 4, COUNT, group=30, files=hosttree.mdev_types(TYPES))
    return tree


def mig(root: Path) -> Tree:
    """The same with types of MIG slices."""
    tree = card(root)
    tree.functions(PF, 4, COUNT, group=30, files=hosttree.mdev_types(MIG_TYPES))
    return tree


def vendor(root: Path) -> Tree:
    """An H200 of a kernel without mdev: the attributes are NVIDIA's."""
    tree = card(root)
    tree.functions(PF, 4, COUNT, group=30, files={
        "nvidia/creatable_vgpu_types": CREATABLE, "nvidia/current_vgpu_type": "0\n"})
    return tree


def old(root: Path) -> Tree:
    """A V100: no SR-IOV, and the types on itself."""
    tree = card(root, 0)
    for name, text in hosttree.mdev_types({"nvidia-300": ("GRID V100-4C", 8)}).items():
        tree.file(f"sys/devices/pci0000:40/0000:40:01.0/{PF}/{name}", text)
    return tree
