"""The committed lock of a recipe as builds use it: exactly, or not at all.

It is the lock of the recipe as it stands. A guest with another driver, or with EXTRA_PKGS, gets a
lock of its own under out/, which has from here whatever both ask for alike.
"""

from __future__ import annotations

import os
from pathlib import Path

from katagpu import lockfile, lockparts, request
from katagpu.errors import UserError
from katagpu.lock import Known, Lock, Pins
from katagpu.lockfile import LockFile
from katagpu.schema import Recipe

SUFFIX = ".lock"


class Committed:
    """`recipes/<name>.lock`; `plain` is the recipe without what one run asks for besides."""

    def __init__(self, plain: Recipe, root: Path) -> None:
        self.plain = plain
        self.root = root
        self.path = root / "recipes" / f"{plain.name}{SUFFIX}"

    def read(self) -> LockFile | None:
        """The file as it is, whatever the recipe asks for. Raises `UserError`."""
        return lockfile.read(self.path, self.plain.name)

    def lock(self) -> Lock | None:
        """The lock, None where there is none.

        Raises `UserError` where it does not answer the recipe any more: it is never resolved anew
        without being asked.
        """
        found = self.read()
        if found is None:
            return None
        stale = self.stale(found)
        if stale:
            start = lockfile.command(self.plain.name)
            raise UserError(
                f"{self} does not answer the recipe any more: {', '.join(stale)}",
                hint=f"`{start} update={','.join(stale)}` moves this and leaves the rest as it is; "
                     f"`{start}` resolves all anew")
        return found.lock()

    def stale(self, found: LockFile) -> list[str]:
        """The parts that are not what the recipe asks for, or that it does not have.

        A guest builds without QEMU, so that may be missing.
        """
        asked = lockparts.asked(self.plain, self.root)
        if lockparts.Part.EMULATOR not in found.parts:
            del asked[lockparts.Part.EMULATOR]
        return sorted({str(part) for part, what in asked.items()
                       if part not in found.parts or found.parts[part].asked != what}
                      | {part for part in found.parts if part not in asked})

    def covers(self, recipe: Recipe) -> bool:
        """Is there one, and does this guest ask for the very same?"""
        return self.path.exists() and (recipe == self.plain or lockparts.asked(
            recipe, self.root) == lockparts.asked(self.plain, self.root))

    def known(self) -> dict[str, Known]:
        """Its packages by what is asked for, for guests that share them."""
        found = self.lock()
        if found is None:
            return {}
        return {asked: Known(debs=found.group(name))
                for name, asked in request.digests(self.plain, self.root).items()}

    def pins(self, recipe: Recipe) -> Pins:
        """What it has beside packages of the parts that this guest asks for too."""
        found = self.read()
        if found is None:
            return Pins()
        mine = lockparts.asked(recipe, self.root)
        parts = {name: part for name, part in found.parts.items()
                 if mine.get(lockparts.Part(name)) == part.asked}
        return LockFile(recipe=found.recipe, archives=found.archives, parts=parts).lock().pins

    def __str__(self) -> str:
        return os.path.relpath(self.path)
