"""Which release of Kata Containers reads which key of its configuration.

Source: the TOML tags in (src/runtime/)pkg/katautils/config.go and the fields in
src/libs/kata-types/src/config of every release, 1.0.0 to 4.1.0 (tests/host/data/kata-keys.json has
all of them). A key that a release does not know is ignored in its configuration.toml; in a drop-in
Go's shim stops at one in [hypervisor.*] or [agent.*]. So none is written that is not known.

It runs on GPU hosts: Python 3.9, standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from katagpu.errors import UserError


class Words(str, Enum):  # noqa: UP042 (Python 3.9)
    """An enumeration of words, as `StrEnum` is (which Python has since 3.11)."""

    def __str__(self) -> str:
        return str(self.value)


class Shim(Words):
    """Kata's two runtimes; their keys differ."""

    GO = "go"
    RUST = "runtime-rs"


class Version(NamedTuple):
    """A release of Kata. Alphas and candidates count as the release that they became."""

    major: int
    minor: int
    patch: int = 0

    def __str__(self) -> str:
        return ".".join(map(str, self))


NEWEST = Version(4, 1, 0)
"""The newest release whose source was read. Later ones of the same number are taken for it."""
OLDEST = Version(1, 3, 0)
"""The first one that can give a GPU to a guest (the guide's smallest)."""
DROP_INS = {Shim.GO: Version(2, 5, 0), Shim.RUST: Version(3, 0, 0)}
"""Since when a runtime reads config.d beside its configuration file."""
OWN_DIRECTORIES = Version(3, 27, 0)
"""Since when kata-deploy gives each runtime a directory, and so a config.d of its own."""

_ALL: tuple[tuple[Version, Version | None], ...] = ((Version(0, 0), None),)


def _since(first: tuple[int, int], last: tuple[int, int] | None = None,
           ) -> tuple[Version, Version | None]:
    """From a release to another: to the last patch of `last`, or to today."""
    return Version(*first), None if last is None else Version(last[0], last[1] + 1)


_Ranges = tuple[tuple[Version, "Version | None"], ...]

# The keys that are not in all releases of their runtime.
_HYPERVISOR: Mapping[str, Mapping[Shim, _Ranges]] = {
    "hotplug_vfio_on_root_bus": {Shim.GO: (_since((1, 3), (3, 1)),),
                                 Shim.RUST: (_since((3, 0), (3, 32)),)},
    # Go's shim counted the ports itself from 3.2 to 3.5, and refuses the key in a drop-in.
    "pcie_root_port": {Shim.GO: (_since((1, 11), (3, 1)), _since((3, 6))), Shim.RUST: _ALL},
    "pcie_switch_port": {Shim.GO: (_since((3, 6)),), Shim.RUST: (_since((3, 17)),)},
    "cold_plug_vfio": {Shim.GO: (_since((3, 2)),), Shim.RUST: (_since((3, 31)),)},
    "hot_plug_vfio": {Shim.GO: (_since((3, 2)),), Shim.RUST: ()},
    "rootfs_type": {Shim.GO: (_since((3, 1)),), Shim.RUST: (_since((3, 1)),)},
    "kernel_verity_params": {Shim.GO: (_since((3, 27)),), Shim.RUST: (_since((3, 27)),)},
    "guest_extension_images": {Shim.GO: (_since((4, 0)),), Shim.RUST: (_since((4, 0)),)},
    "guest_hook_path": {Shim.GO: (_since((1, 4)),), Shim.RUST: _ALL},
    "disable_image_nvdimm": {Shim.GO: (_since((1, 11)),), Shim.RUST: _ALL},
    "vm_rootfs_driver": {Shim.GO: (), Shim.RUST: (_since((3, 2)),)},
}
_AGENT: Mapping[str, Mapping[Shim, _Ranges]] = {
    "dial_timeout": {Shim.GO: (_since((2, 1)),), Shim.RUST: ()},
    "reconnect_timeout_ms": {Shim.GO: (), Shim.RUST: _ALL},
    "create_container_timeout": {Shim.GO: (), Shim.RUST: (_since((3, 19)),)},
}
_RUNTIME: Mapping[str, Mapping[Shim, _Ranges]] = {
    "vfio_mode": {Shim.GO: (_since((2, 3)),), Shim.RUST: _ALL},
    "static_sandbox_resource_mgmt": {Shim.GO: (_since((2, 4)),), Shim.RUST: (_since((3, 2)),)},
    "sandbox_cgroup_only": {Shim.GO: (_since((1, 9)),), Shim.RUST: _ALL},
    "create_container_timeout": {Shim.GO: (_since((3, 4)),), Shim.RUST: ()},
}
_TABLES = {"hypervisor.qemu": _HYPERVISOR, "agent.kata": _AGENT, "runtime": _RUNTIME}


def parse(text: str) -> Version:
    """The release that a text names: `4.1.0`, `3.2.0-rc0`, `kata-runtime  : 2.5.2`.

    Raises `UserError` for one that is not known here.
    """
    found = re.search(r"(?<![\d.])(\d+)\.(\d+)(?:[.-](\d+))?(?![\d.]*\.\d)", text)
    if not found:
        raise UserError(f"{text!r} is no version of Kata Containers",
                        hint="--kata-version X.Y.Z, for example 4.1.0")
    version = Version(*(int(part or 0) for part in found.groups()))
    if version < OLDEST:
        raise UserError(f"Kata {version} cannot give a GPU to a guest",
                        hint=f"install Kata {OLDEST} or newer; for large BARs 1.11.0")
    if version.major > NEWEST.major:
        raise UserError(f"Kata {version} is not known here (1.3 to {NEWEST.major}.x are): its keys "
                        "may have other names",
                        hint=f"take a newer katagpu, or --kata-version {NEWEST} to write the keys "
                             "of that release")
    return version


def known(shim: Shim, version: Version, table: str, key: str) -> bool:
    """Does this release of this runtime read the key?"""
    ranges = _TABLES.get(table, {}).get(key, {}).get(shim, _ALL)
    return any(first <= version and (end is None or version < end) for first, end in ranges)


def has_history(table: str, key: str) -> bool:
    """Is it a key that some release does not read?"""
    return key in _TABLES.get(table, {})


def reads_drop_ins(shim: Shim, version: Version) -> bool:
    """Does it merge config.d into its configuration?"""
    return version >= DROP_INS[shim]
