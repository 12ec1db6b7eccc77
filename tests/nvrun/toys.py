"""Small `.run` files, made in milliseconds, and everything that can be wrong with one."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tests.nvrun.archive import Member, Name, pack, tree
from tests.nvrun.lines import MODULES, NO_INSTALLER, lines, manifest, member, modes

# Lines of a vGPU host's package, and of a guest's with the license daemon.
HOST = ("nvidia-vgpud 0755 UTILITY_BINARY MODULE:vgpu",
        "nvidia-vgpu-mgr 0755 UTILITY_BINARY MODULE:vgpu",
        "libnvidia-vgpu.so.{v} 0755 VGX_LIB MODULE:vgpu")
GRID = ("nvidia-gridd 0755 UTILITY_BINARY MODULE:vgpu",
        "gridd.conf.template 0644 EXPLICIT_PATH /etc/nvidia/ MODULE:vgpu",
        "init-scripts/systemd/nvidia-gridd.service 0644 INTERNAL_UTILITY_DATA MODULE:vgpu")
DECOMPRESSOR = b"\x7fELF\n\x00not really\n\n\xff"  # lines in a binary count


class Evil(Enum):
    """Members that no archive should have."""

    PARENT = (Member(name="./../evil"),)
    DEEP_PARENT = (Member(name="./kernel/../../evil"),)
    ABSOLUTE = (Member(name="/tmp/evil"),)
    LINK_ABSOLUTE = (Member(name="./evil", kind=tarfile.SYMTYPE, link="/etc/passwd"),)
    LINK_OUT = (Member(name="./kernel/evil", kind=tarfile.SYMTYPE, link="../../etc/passwd"),)
    LINK_WINDING = (Member(name="./here", kind=tarfile.SYMTYPE, link="."),
                    Member(name="./evil", kind=tarfile.SYMTYPE, link="here/../etc/passwd"))
    BELOW_LINK = (Member(name="./evil", kind=tarfile.SYMTYPE, link="kernel"),
                  Member(name="./evil/file"))
    BELOW_FILE = (Member(name="./nvidia-smi/evil"),)
    HARD_LINK_OUT = (Member(name="./evil", kind=tarfile.LNKTYPE, link="../../etc/passwd"),)
    HARD_LINK_ABSOLUTE = (Member(name="./evil", kind=tarfile.LNKTYPE, link="/etc/passwd"),)
    HARD_LINK_UNKNOWN = (Member(name="./evil", kind=tarfile.LNKTYPE, link="./nothing"),)
    HARD_LINK_TO_LINK = (Member(name="./inside", kind=tarfile.SYMTYPE, link="nvidia-smi"),
                         Member(name="./evil", kind=tarfile.LNKTYPE, link="./inside"))
    CHARACTER_DEVICE = (Member(name="./evil", kind=tarfile.CHRTYPE),)
    BLOCK_DEVICE = (Member(name="./evil", kind=tarfile.BLKTYPE),)
    FIFO = (Member(name="./evil", kind=tarfile.FIFOTYPE),)
    SET_USER_ID = (Member(name="./evil", mode=0o4755),)
    SET_GROUP_ID = (Member(name="./evil", mode=0o2755),)
    TWICE = (Member(name="./nvidia-smi", content=b"another"),)
    TWICE_BY_ANOTHER_NAME = (Member(name=".//kernel/../nvidia-smi"),)
    LINK_FOR_A_DIRECTORY = (Member(name="./kernel", kind=tarfile.SYMTYPE, link="."),)
    CASE = (Member(name="./Nvidia-SMI"),)
    CASE_OF_DIRECTORY = (Member(name="./Kernel/evil"),)
    CONTROL_CHARACTERS = (Member(name="./evil\x1b[2J"),)
    ROOT_IS_A_LINK = (Member(name="./", kind=tarfile.SYMTYPE, link="kernel"),)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A small package with all of NVIDIA's files, and what is wrong with it.

    `files` are added to NVIDIA's files, or replace them; None takes one away. `add` are lines of
    the manifest with their files, `members` raw members of the tar. `cut` bytes are missing at the
    end; `flip` is the place of a wrong byte, counted from the end.
    """

    name: Name = field(default_factory=lambda: Name(version="550.163.01"))
    modules: tuple[str, ...] = tuple(MODULES)
    flavours: tuple[str, ...] = ("kernel", "kernel-open")
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    add: tuple[str, ...] = ()
    members: tuple[Member, ...] = ()
    compression: str = "zstd"
    decompressor: bytes = DECOMPRESSOR
    compat32: bool = True
    installer: bytes = NO_INSTALLER
    cut: int = 0
    flip: int | None = None

    def content(self) -> dict[str, bytes]:
        """The files with their bytes."""
        found: dict[str, bytes] = {}
        for line in self._entries():
            file, mode, *rest = line.split()
            if mode != "0000":
                found[file] = f"{file} of {self.name.version}\n".encode()
                if self.compat32 and "NATIVE" in rest and ".so." in file and "/" not in file:
                    found[f"32/{file}"] = f"{file} of {self.name.version}, 32-bit\n".encode()
        for top in self.flavours:
            for file in ("Kbuild", "Makefile", "conftest.sh", "dkms.conf",
                         *(f"{module}/{module}.Kbuild" for module in self.modules)):
                found[f"{top}/{file}"] = f"# {top}/{file}\n".encode()
        found["nvidia-installer"] = self.installer
        text = manifest(self.name, {*found, *self.files}, self._entries(), modules=self.modules)
        found[".manifest"] = text.encode()
        changed = {**found, **self.files}
        return {file: data for file, data in changed.items() if data is not None}

    def _entries(self) -> list[str]:
        version = self.name.version
        return [*lines(version), *(line.replace("{v}", version) for line in self.add)]

    def make(self, out: Path) -> Path:
        """Write the `.run` into a directory."""
        known = {**modes(self._entries()), "nvidia-installer": 0o755}
        members = tree({file: member(file, data, known) for file, data in self.content().items()})
        out.mkdir(parents=True, exist_ok=True)
        path = pack(out / f"{self.name.directory}.run", self.name, [*members, *self.members],
                    compression=self.compression, decompressor=self.decompressor)
        data = bytearray(path.read_bytes())
        if self.flip is not None:
            data[-self.flip] ^= 1
        path.write_bytes(data[:len(data) - self.cut])
        return path
