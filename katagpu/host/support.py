"""Does a guest's driver drive a GPU? By what the release's manifest records, and by generation.

Ids of a generation: https://pci-ids.ucw.cz. First and last branches: NVIDIA's data-center driver
documentation and its deprecation schedule for Unix; the open modules: README of
open-gpu-kernel-modules, and for Grace Hopper and Blackwell "NVIDIA Transitions Fully Towards
Open-Source GPU Kernel Modules" (developer.nvidia.com/blog).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from katagpu.errors import UserError
from katagpu.host import kataguest
from katagpu.host.machine import Machine
from katagpu.host.pci import Function
from katagpu.host.verdict import Verdict, failed, passed, warned
from katagpu.host.vfio import GRACE_IDS

NAME = "driver-id"
_RANGES = (
    (0x0FC0, 0x103F, "Kepler"), (0x1180, 0x12BF, "Kepler"), (0x1340, 0x1436, "Maxwell"),
    (0x15F0, 0x15FF, "Pascal"), (0x1617, 0x1667, "Maxwell"), (0x1725, 0x172F, "Pascal"),
    (0x174D, 0x17FF, "Maxwell"), (0x1B00, 0x1D7F, "Pascal"), (0x1D80, 0x1DFF, "Volta"),
    (0x1E00, 0x1FFF, "Turing"), (0x2080, 0x20FF, "Ampere"), (0x2180, 0x21FF, "Turing"),
    (0x2200, 0x22FF, "Ampere"), (0x2300, 0x23FF, "Hopper"), (0x2400, 0x25FF, "Ampere"),
    (0x2680, 0x28FF, "Ada"), (0x2900, 0x29FF, "Blackwell"), (0x2B00, 0x2FFF, "Blackwell"),
    (0x3180, 0x31FF, "Blackwell"))
FIRST: Mapping[str, int] = {"Kepler": 304, "Maxwell": 340, "Pascal": 375, "Volta": 384,
                            "Turing": 410, "Ampere": 450, "Ada": 520, "Hopper": 520,
                            "Blackwell": 570}
LAST: Mapping[str, int] = {"Kepler": 470, "Maxwell": 580, "Pascal": 580, "Volta": 580}
CLOSED_ONLY = ("Kepler", "Maxwell", "Pascal", "Volta")
OPEN_ONLY = ("Blackwell",)


def generation(device: str) -> str | None:
    """The generation of a device id; None where it is not known here."""
    number = int(device, 16)
    return next((name for first, last, name in _RANGES if first <= number <= last), None)


def manifest(machine: Machine, given: str | None) -> tuple[str, dict[str, Any]] | None:
    """The manifest that is named, else that of the installed release. Raises `UserError`."""
    place = given or kataguest.manifest(machine, kataguest.CURRENT)
    if place is None:
        return None
    data = machine.raw(place)
    if data is None:
        raise UserError(f"{place} cannot be read", hint="--manifest names the manifest.json of a "
                                                        "build or a release")
    try:
        found = json.loads(data)
        found["kernel_release"], found["driver"]
    except (ValueError, KeyError, TypeError) as wrong:
        raise UserError(f"{place} is no manifest of a guest: {wrong}", hint=(
            "--manifest names the manifest.json of a build or a release" if given else
            "install the release again (katagpu-install.pyz)")) from None
    return place, found


def check(gpu: Function, facts: Mapping[str, Any] | None) -> Verdict:
    """Does the driver of a guest drive a GPU?"""
    if facts is None:
        return warned(NAME, "not known: no guest of katagpu is installed, and none is named",
                      "--manifest FILE, or katagpu-install.pyz install …", gpu.address)
    driver = facts["driver"]
    if not isinstance(driver, dict):
        return failed(NAME, "the guest has no driver", "build one with `driver:` in the recipe",
                      gpu.address)
    flavour, version = str(driver.get("kernel_module")), str(driver.get("version"))
    title = f"{version} ({flavour})" if driver.get("kernel_module") else version
    kind = generation(gpu.device)
    problem = _problem(kind, flavour, version, grace=gpu.ids in GRACE_IDS) if kind else None
    if problem:
        return failed(NAME, f"[{gpu.ids}] is {kind}, and the guest's driver is {title}", problem,
                      gpu.address)
    listed = driver.get("supported_ids")
    if isinstance(listed, list):
        if gpu.device in listed:
            return passed(NAME, f"{title} lists [{gpu.ids}]", gpu.address)
        return failed(NAME, f"{title} does not list [{gpu.ids}]: the GPU is newer than the driver, "
                      "or of no kind that it drives", "a newer driver: driver=VERSION",
                      gpu.address)
    if kind is None:
        return warned(NAME, f"not known: [{gpu.ids}] is of no generation that is known here, and "
                      f"the manifest does not say which ids {title} drives",
                      "NVIDIA's list of supported products for that driver has it or not",
                      gpu.address)
    return passed(NAME, f"{title} drives {kind}; whether [{gpu.ids}] is in its list, the manifest "
                  "does not say", gpu.address)


def _problem(kind: str, flavour: str, version: str, *, grace: bool = False) -> str | None:
    """The cure where a driver cannot drive a generation."""
    found = re.match(r"\d+", version)
    branch = int(found[0]) if found else None
    if branch is not None and branch < FIRST[kind]:
        return f"{kind} needs driver {FIRST[kind]} or newer: driver=VERSION"
    if branch is not None and branch > LAST.get(kind, branch):
        return f"{LAST[kind]} is the last branch that drives {kind}: driver=VERSION"
    if flavour == "open" and kind in CLOSED_ONLY:
        return "NVIDIA's open modules drive Turing and newer: `kernel_module: closed` in the recipe"
    if flavour == "closed" and (kind in OPEN_ONLY or grace):
        name = kind if kind in OPEN_ONLY else f"Grace {kind}"
        return f"{name} is driven by NVIDIA's open modules alone: `kernel_module: open`"
    return None
