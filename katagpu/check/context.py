"""The guest under examination: its root and the facts, each read once and only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from katagpu.check import kernelconfig
from katagpu.check.elf import Damaged
from katagpu.check.facts import GuestFacts
from katagpu.check.kmod import (
    SUFFIXES,
    Export,
    Module,
    canonical,
    read_module,
    read_symvers,
)
from katagpu.check.linker import Linker
from katagpu.check.root import Root

# By name: the kernel has modules of its own that begin with nvidia (nvidia-wmi-ec-backlight).
DRIVER_MODULES = frozenset({"nvidia", "nvidia_uvm", "nvidia_modeset", "nvidia_drm",
                            "nvidia_peermem", "nvidia_vgpu_vfio"})


class Guest:
    """What every check is given."""

    def __init__(self, top: Path, facts: GuestFacts) -> None:
        self.root = Root(top)
        self.facts = facts
        mounted = facts.extension is not None and facts.driver is not None
        self.extension = facts.extension if mounted else None
        self.linker = Linker(self.root, self.extension)
        self.damaged_modules: dict[str, str] = {}

    @property
    def module_directory(self) -> str:
        """/lib/modules/<release> where the driver's modules are, of the kernel that it boots."""
        return f"{self.extension or ''}/lib/modules/{self.facts.kernel_release}"

    @property
    def module_directories(self) -> tuple[str, ...]:
        """All of them: the base has one, and an extension has one of its own."""
        return tuple(dict.fromkeys((f"/lib/modules/{self.facts.kernel_release}",
                                    self.module_directory)))

    def driver_path(self, path: str) -> str:
        """Where a path of the driver is: an extension has its programs in bin."""
        return path if self.extension is None else self.extension + path.replace(
            "/usr/bin/", "/bin/")

    @cached_property
    def caches(self) -> Mapping[str, Linker]:
        """Each root that has an ld.so.cache of its own: its place, and its linker."""
        found = {"": self.linker}
        if self.extension is not None:
            found[self.extension] = Linker(Root(self.root.host(self.extension)))
        return found

    def files_of(self, directory: str) -> tuple[str, ...]:
        """The real path of every module file in a module directory."""
        return tuple(path for path in self.root.below(directory) if path.endswith(SUFFIXES))

    @cached_property
    def module_files(self) -> tuple[str, ...]:
        """The real path of every module file of this kernel."""
        return tuple(path for directory in self.module_directories
                     for path in self.files_of(directory))

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """Every readable module of this kernel; the others are in `damaged_modules`."""
        found: list[Module] = []
        for path in self.module_files:
            try:
                found.append(read_module(self.root.host(path), path))
            except Damaged as broken:
                self.damaged_modules[path] = str(broken)
        return tuple(found)

    @cached_property
    def by_name(self) -> Mapping[str, Module]:
        """The modules by the kernel's name for them."""
        return {module.name: module for module in self.modules}

    @cached_property
    def driver_modules(self) -> tuple[Module, ...]:
        """The modules of NVIDIA's driver."""
        return tuple(module for module in self.modules if module.name in DRIVER_MODULES)

    @cached_property
    def builtin(self) -> frozenset[str]:
        """The modules that modules.builtin says are in vmlinux."""
        return frozenset(canonical(line) for directory in self.module_directories
                         for line in self.root.text(f"{directory}/modules.builtin").split())

    @cached_property
    def symvers(self) -> Mapping[str, Export]:
        """What this kernel exports."""
        return read_symvers(self.facts.symvers)

    @cached_property
    def exports(self) -> Mapping[str, Export]:
        """What a module in the guest can use: vmlinux's exports and those of the modules there."""
        usable = {name: export for name, export in self.symvers.items()
                  if export.owner == "vmlinux" or export.owner in self.builtin}
        for module in self.modules:
            usable.update(module.exports)
        return usable

    @cached_property
    def config(self) -> Mapping[str, str]:
        """The kernel's configuration."""
        return kernelconfig.read(self.facts.kernel_config)
