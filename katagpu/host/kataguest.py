"""The guest that Kata is to boot: what an installed release, or a build, says of itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

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
MANIFEST, DROP_IN = "manifest", "50-katagpu"


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
    said = facts.get("kernel_verity_params", "")
    if said != settings.kernel_verity_params:
        raise UserError(f"{text} and the manifest beside it are not of one guest: their "
                        "kernel_verity_params differ", hint="take the release again")
    return Guest(machine.real(place), facts, settings)


def _manifest(machine: Machine, place: str) -> Mapping[str, Any]:
    names = [name for name in machine.names(place)
             if name.startswith(MANIFEST) and name.endswith(".json")]
    if not names:
        raise UserError(f"{place} has no manifest.json", hint="it is no guest of katagpu's")
    try:
        found = json.loads(machine.raw(f"{place}/{names[0]}") or b"")
    except ValueError as failure:
        raise UserError(f"{place}/{names[0]}: {failure}", hint="take the release again") from None
    if not isinstance(found, dict) or found.get("schema") != 1:
        raise UserError(f"{place}/{names[0]} is of a schema that is not known here",
                        hint="take the katagpu-host.pyz of that release")
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
    table = values.get("hypervisor", {}).get("qemu", {})
    try:
        params = str(table["kernel_params"]).split()
        return KataSettings(
            kernel=str(table["kernel"]), shim=Shim.GO, image=table["image"] or None,
            initrd=table["initrd"] or None, rootfs_type=str(table["rootfs_type"]),
            dax_header=not table["disable_image_nvdimm"],
            kernel_verity_params=str(table["kernel_verity_params"]),
            toolkit_mode=ToolkitMode.HOOK if table["guest_hook_path"] == HOOK_PATH
            else ToolkitMode.CDI,
            machine_type=str(table["machine_type"]), default_vcpus=int(table["default_vcpus"]),
            default_memory=int(table["default_memory"]),
            extra_kernel_params=tuple(word for word in params if word not in KERNEL_PARAMS),
            extensions=tuple(Extension(**disk) for disk in
                             table.get("guest_extension_images", ())))
    except (KeyError, TypeError, ValueError) as failure:
        raise UserError(f"{path}: [{HYPERVISOR}] is not as a build writes it: {failure}",
                        hint="take the release again") from None
