"""The parts of a lock: which groups of packages each has, what it asks for, where it comes from.

What a part asks for is compared without addresses: a mirror or a snapshot that is written into the
recipe later supplies the same files.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from katagpu import emulator, request
from katagpu.errors import UserError
from katagpu.keys import digest
from katagpu.lock import FORMAT, GUEST
from katagpu.schema import (
    COMPONENTS,
    Distribution,
    DriverSource,
    KernelSource,
    Recipe,
    ToolkitSource,
)


class Part(StrEnum):
    """What can be moved alone."""

    AGENT = "agent"
    BASE = "base"
    DRIVER = "driver"
    EMULATOR = "emulator"
    KERNEL = "kernel"
    SERVICES = "services"
    TOOLCHAIN = "toolchain"
    TOOLKIT = "toolkit"
    TOOLS = "tools"


OF_GROUP = {
    "stage0": Part.TOOLS, "imagetools": Part.TOOLS, "toolchain": Part.TOOLCHAIN,
    "rpm_tools": Part.TOOLCHAIN, "build_layer": Part.TOOLCHAIN, "base": Part.BASE,
    "extension_tools": Part.BASE, "kernel_source": Part.KERNEL, "toolkit": Part.TOOLKIT,
    "driver_needs": Part.DRIVER, "driver_user": Part.DRIVER, "driver_source": Part.DRIVER,
    "driver_build": Part.DRIVER, "services": Part.SERVICES, emulator.GROUP: Part.EMULATOR,
}
"""The part of each group of packages."""


def asked(recipe: Recipe, root: Path) -> dict[Part, str]:
    """For each part of a recipe the digest of what it asks for; `root` is the repository."""
    wanted: dict[Part, dict[str, Any]] = {}
    groups = to_builtins(request.groups(recipe, root))
    distributions = request.distributions(recipe)
    for name, group in groups.items():
        group["files"] = [deb["sha256"] for deb in group["files"]]
        group["archives"] = _suite(distributions[group["archives"]])
        wanted.setdefault(OF_GROUP[name], {})[name] = group
    for part, what in _files(recipe).items():
        wanted.setdefault(part, {})["files"] = what
    wanted[Part.EMULATOR] = {emulator.GROUP: list(emulator.PACKAGES),
                             "archives": _suite(emulator.distribution(recipe))}
    return {part: digest({"format": FORMAT, **what}) for part, what in sorted(wanted.items())}


def _suite(distribution: Distribution) -> dict[str, Any]:
    return {"id": str(distribution.id), "suite": distribution.suite,
            "components": list(distribution.components or COMPONENTS[distribution.id])}


def _files(recipe: Recipe) -> dict[Part, Any]:
    """What is asked for beside packages."""
    found: dict[Part, Any] = {}
    if recipe.kernel.source is KernelSource.KERNEL_ORG:
        found[Part.KERNEL] = recipe.kernel.version
    driver = recipe.driver
    if driver.source is DriverSource.RUNFILE:
        found[Part.DRIVER] = [driver.version, driver.file, driver.sha256]
    if recipe.toolkit.source is ToolkitSource.GO:
        found[Part.TOOLKIT] = recipe.toolkit.version
    if recipe.agent is not None:
        found[Part.AGENT] = [recipe.agent.file or recipe.agent.image, recipe.agent.sha256]
    return found


def named(words: str, known: Iterable[str]) -> list[Part]:
    """The parts of a list with commas. Raises `UserError` for one that the recipe has not."""
    parts = sorted(known)
    found = [word.strip() for word in words.split(",") if word.strip()]
    for word in found:
        if word not in parts:
            raise UserError(f"this recipe's lock has no part {word!r}",
                            hint=f"its parts: {', '.join(parts)}; several with commas between them")
    return [Part(word) for word in found]


# archives


REPOSITORY = "repository-"  # begins the name of an archive beside a distribution's


def sets(recipe: Recipe) -> dict[str, Distribution]:
    """The distributions that packages come from, by the names of their sets of archives."""
    found = dict(request.distributions(recipe))
    if emulator.distribution(recipe) not in found.values():
        found[emulator.ARCHIVES] = emulator.distribution(recipe)
    return found


def set_of(recipe: Recipe, group: str, archives: str = GUEST) -> str:
    """The set of archives of a group; `archives` is what the request has for it."""
    if group != emulator.GROUP:
        return archives
    wanted = emulator.distribution(recipe)
    return next(name for name, each in sets(recipe).items() if each == wanted)


def origins(recipe: Recipe, root: Path) -> dict[str, str]:
    """The public address of each archive: what the recipe says, whatever this host has."""
    found = {}
    for name, each in sets(recipe).items():
        found[name] = each.fallback_mirror if each.mirror == "host" else each.mirror
        if each.security_mirror is not None:
            found[f"{name}-security"] = each.security_mirror
    found |= {f"{REPOSITORY}{name}": each.archive.uri
              for name, each in request.repositories(recipe, root).items()}
    return {name: address.rstrip("/") for name, address in found.items()}


def here(recipe: Recipe, root: Path) -> dict[str, str]:
    """The address of each archive on this host. Asks the host's apt."""
    found = {}
    for name, each in sets(recipe).items():
        for archive in request.archives(each, root):
            security = archive.suites[0].endswith("-security")
            found[f"{name}-security" if security else name] = archive.uri
    found |= {f"{REPOSITORY}{name}": each.archive.uri
              for name, each in request.repositories(recipe, root).items()}
    return {name: address.rstrip("/") for name, address in found.items()}
