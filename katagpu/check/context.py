"""The guest under examination: its root and the facts, each read once and only when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from katagpu.check.elf import Damaged
from katagpu.check.facts import GuestFacts
from katagpu.check.kmod import (
    SUFFIXES,
    Export,
    Module,
    canonical,
    read_config,
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
        self.linker = Linker(self.root)
        self.damaged_modules: dict[str, str] = {}

    @property
    def module_directory(self) -> str:
        """/lib/modules/<release> of the kernel that the guest boots."""
        return f"/lib/modules/{self.facts.kernel_release}"

    @cached_property
    def module_files(self) -> tuple[str, ...]:
        """The real path of every module file of this kernel."""
        return tuple(path for path in self.root.below(self.module_directory)
                     if path.endswith(SUFFIXES))

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
        lines = self.root.text(f"{self.module_directory}/modules.builtin").split()
        return frozenset(canonical(line) for line in lines)

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
        return read_config(self.facts.kernel_config)
