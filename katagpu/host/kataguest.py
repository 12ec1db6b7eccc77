"""The guest that Kata is to boot: what an installed release, or a build, says of itself."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from katagpu.errors import UserError
from katagpu.host import katafiles
from katagpu.host.katafiles import Target
from katagpu.host.machine import Machine
from katagpu.kataconfig import (
    HOOK_PATH,
    HYPERVISOR,
    KERNEL_PARAMS,
    MAX_PORTS,
    Bar,
    Extension,
    KataSettings,
    Plug,
    Port,
    ToolkitMode,
)
from katagpu.kataversions import Shim

HOME = "/opt/kata/share/kata-containers/katagpu"
CURRENT = f"{HOME}/current"
DROP_IN = "50-katagpu"
Kind = TypeVar("Kind")


@dataclasses.dataclass(frozen=True)
class Guest:
    """A guest: where it is from, its manifest, and the settings for today's Kata."""

    place: str
    manifest: Mapping[str, Any]
    settings: KataSettings

    @property
    def name(self) -> str:
        """The recipe and the driver, for messages."""
        driver = self.manifest.get("driver") or {}
        return f"{self.manifest.get('recipe', '?')}, driver {driver.get('version', 'none')}"

    def on(self, target: Target, *, functions: int, bar: Bar, plug: Plug = Plug.COLD,
           port: Port = Port.ROOT) -> KataSettings:
        """The settings for a runtime of this host, and as many functions as one sandbox gets.

        Raises `UserError` for what this Kata cannot do.
        """
        return dataclasses.replace(
            self.settings, shim=target.shim, version=target.version, bar=bar, plug=plug, port=port,
            ports=max(1, min(functions, MAX_PORTS)))


def load(machine: Machine, place: str | None) -> Guest:
    """The guest in a directory: of an installed release (the current one), a release, a build.

    Raises `UserError` where there is none, or where manifest and drop-in are not of one guest.
    """
    place = place or CURRENT
    if not machine.names(place):
        raise UserError(
            f"there is no guest in {place}" if place != CURRENT else
            "no release of katagpu is installed on this host",
            hint="katagpu-install.pyz install RELEASE --key KEY, or say --release DIRECTORY (of a "
                 "release, or out/RECIPE/DRIVER of a build)")
    facts = _manifest(machine, place)
    text = _drop_in(machine, place)
    settings = of_drop_in(katafiles.read(machine, text), text)
    said = facts.get("kernel_verity_params") or ""
    if said != settings.kernel_verity_params:
        raise UserError(f"{text} and the manifest beside it are not of one guest: their "
                        "kernel_verity_params differ", hint="take the release again")
    return Guest(machine.real(place), facts, settings)


def manifest(machine: Machine, place: str) -> str | None:
    """The manifest in a directory of a release, where its name has the version, or of a build."""
    return next((f"{place}/{name}" for name in machine.names(place)
                 if re.fullmatch(r"manifest(-.*)?\.json", name)), None)


def _manifest(machine: Machine, place: str) -> Mapping[str, Any]:
    path = manifest(machine, place)
    if path is None:
        raise UserError(f"{place} has no manifest.json", hint="it is no guest of katagpu's")
    try:
        found = json.loads(machine.raw(path) or b"")
    except ValueError as failure:
        raise UserError(f"{path}: {failure}", hint="take the release again") from None
    if not isinstance(found, dict) or found.get("schema") != 1:
        raise UserError(f"{path} is of a schema that is not known here",
                        hint="take the katagpu-host.pyz of that release")
    for key, kind in (("driver", dict), ("kernel_verity_params", str)):
        if not isinstance(found.get(key), (kind, type(None))):
            raise UserError(f"{path}: {key} is {found[key]!r}, and not as a build writes it",
                            hint="take the release again")
    return found


def _drop_in(machine: Machine, place: str) -> str:
    for directory in (f"{place}/config", place):
        for name in machine.names(directory):
            rest = name[len(DROP_IN):]
            if name.startswith(DROP_IN) and name.endswith(".toml") and "runtime-rs" not in rest:
                return f"{directory}/{name}"
    raise UserError(f"{place} has no {DROP_IN}.toml", hint="it is no guest of katagpu's")


def of_drop_in(values: Mapping[str, Any], path: str) -> KataSettings:
    """What a drop-in that a build wrote for Go's runtime asks for. Raises `UserError`."""
    found: Any = values
    for part in HYPERVISOR.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path} has no table [{HYPERVISOR}], and is not as a build writes it",
                        hint="take the release again")
    disks = found.get("guest_extension_images", [])
    if not (isinstance(disks, list) and all(isinstance(disk, dict) for disk in disks)):
        raise UserError(f"{path}: guest_extension_images in [{HYPERVISOR}] is {disks!r}, and not "
                        "as a build writes it", hint="take the release again")

    def get(key: str, kind: type[Kind]) -> Kind:
        value = found.get(key)
        if type(value) is not kind:
            raise UserError(f"{path}: {key} in [{HYPERVISOR}] is {value!r}, and not as a build "
                            "writes it", hint="take the release again")
        return value

    words = get("kernel_params", str).split()
    hook = get("guest_hook_path", str) == HOOK_PATH
    return KataSettings(
        kernel=get("kernel", str), shim=Shim.GO, image=get("image", str) or None,
        initrd=get("initrd", str) or None, rootfs_type=get("rootfs_type", str),
        dax_header=not get("disable_image_nvdimm", bool),
        kernel_verity_params=get("kernel_verity_params", str),
        toolkit_mode=ToolkitMode.HOOK if hook else ToolkitMode.CDI,
        machine_type=get("machine_type", str), default_vcpus=get("default_vcpus", int),
        default_memory=get("default_memory", int),
        extra_kernel_params=tuple(word for word in words if word not in KERNEL_PARAMS),
        extensions=tuple(Extension(**{name: str(disk.get(name, "")) for name in
                                      ("name", "path", "verity_params")})
                         for disk in disks))
