"""QEMU of the pipeline's own: which packages it is, locked apart from the guest.

A guest does not depend on what boots it for a check, so this has a lock of its own, made when a
boot task first asks for it. Building a guest needs no archive of backports, and its lock holds
whatever happens here. The lock is one for all drivers of a recipe.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from msgspec import to_builtins
from msgspec.structs import replace

from katagpu import lock, request, resolve
from katagpu.errors import UserError
from katagpu.keys import digest
from katagpu.lock import FORMAT, Archive, Group, Lock, Request
from katagpu.schema import TOOLS, Distribution, DistributionId, Recipe

GROUP = "emulator"
ARCHIVES = "backports"  # the set's name, and that of the directory for its package lists
FILE = "boot-lock.json"
# What boots a guest without a screen: the emulator with its firmware.
PACKAGES = (request.ESSENTIAL, "qemu-system-x86")


def distribution(recipe: Recipe) -> Distribution:
    """Whose backports it comes from: the tools' distribution, where that is Debian.

    Debian 13 has QEMU 10.0, and vfio-user-pci came with 10.1; trixie-backports has 11.1.
    """
    tools = request.tools_of(recipe)
    return tools if tools.id is DistributionId.DEBIAN else TOOLS


def archives(recipe: Recipe, root: Path) -> tuple[Archive, ...]:
    """The tools' archives and their backports, which come first."""
    wanted = distribution(recipe)
    known = request.archives(wanted, root)
    backports = replace(known[0], suites=(f"{wanted.suite}-backports",), preferred=True)
    return (*known, backports)


class EmulatorLock:
    """The lock of a recipe's emulator, in a file below `directory` (that of all its drivers).

    `committed` gives the recipe's committed lock, which has it where there is one.
    """

    def __init__(self, recipe: Recipe, root: Path, directory: Path,
                 committed: Callable[[], Lock | None] = lambda: None) -> None:
        self.committed = committed
        self.recipe = recipe
        self.root = root
        self.path = directory / FILE

    def identity(self) -> str:
        """Digest of what is asked for; where this host has it is not part of that."""
        return digest({"format": FORMAT, "packages": list(PACKAGES),
                       "distribution": to_builtins(distribution(self.recipe))})

    def find(self) -> Lock | None:
        """The lock, when it answers what is asked for."""
        kept = self.committed()
        if kept is not None and kept.group(GROUP):
            return kept
        found = lock.read(self.path)
        return found if found is not None and found.request == self.identity() else None

    def make(self, apt: Path) -> None:
        """Resolve the packages now, and write the file; `apt` is the directory for apt's lists.

        Needs the network. Raises `UserError` where the archives do not have them; the file stays as
        it was.
        """
        lock.write(self.resolve(apt), self.path)

    def resolve(self, apt: Path) -> Lock:
        """Resolve the packages now. Raises `UserError` where the archives do not have them."""
        found = archives(self.recipe, self.root)
        request.must_have_keyrings(found)
        wanted = Request(recipe=self.recipe.name, identity=self.identity(),
                         architecture=request.ARCHITECTURE, archives={ARCHIVES: found},
                         groups={GROUP: Group(packages=PACKAGES, archives=ARCHIVES)})
        try:
            return resolve.resolve(wanted, apt)
        except UserError as refusal:
            raise UserError(f"QEMU of {found[-1].suites[0]} cannot be had: {refusal.what}",
                            hint=refusal.hint) from None

    def __str__(self) -> str:
        return os.path.relpath(self.path)
