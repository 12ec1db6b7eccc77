"""The lock of one guest, and what a recipe's guests share of it.

Beside each driver's results lies its whole lock. `resolved.json` above them holds every group of
packages that was resolved for the recipe, by what was asked for: a lock that is made takes from it,
so guests with other drivers, or with EXTRA_PKGS, stand on the same packages, whenever they are
built.

Where the recipe has a committed lock, that is the lock of its own guest, and what other guests, and
EXTRA_PKGS, stand on.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from msgspec.structs import replace

from katagpu import driverfile, keys, lock, lockfile, recipe, request, resolve
from katagpu.committed import Committed
from katagpu.errors import UserError
from katagpu.lock import Known, Lock, Resolved
from katagpu.schema import Recipe

SHARED = "resolved.json"


class Locks:
    """The lock of one guest below `directory`, which is that of its driver.

    Packages of one run (`extra`, from EXTRA_PKGS) have a lock of their own beside the recipe's.
    """

    def __init__(self, wanted: Recipe, root: Path, directory: Path, extra: list[str],
                 committed: Committed) -> None:
        self.recipe = wanted
        self.committed = committed
        self.root = root
        more = f"-{keys.digest(sorted(extra))[:12]}" if extra else ""
        self.path = directory / f"lock{more}.json"
        self._shared = directory.parent / SHARED

    @property
    def shared(self) -> Path:
        """What was resolved for the recipe; on a committed lock there is one for each."""
        found = self.committed.read()
        return self._shared if found is None else self._shared.with_name(
            f"resolved-{lockfile.digest(found)[:12]}.json")

    def files(self) -> list[Path]:
        """What an answer is read from; a committed lock is among the recipes."""
        return [self.path, self.shared]

    def find(self) -> Lock | None:
        """The lock, when it answers what the recipe asks for, as the recipe's other guests do.

        Raises `UserError` for a committed one that does not.
        """
        kept = self.committed.lock()
        if kept is not None and self.committed.covers(self.recipe):
            return kept
        found = lock.read(self.path)
        if found is None or found.request != request.identity(self.recipe, self.root):
            return None
        if driverfile.addresses(self.recipe) \
                and not driverfile.pinned(self.recipe, found.downloads):
            return None
        shared = lock.read_resolved(self.shared)
        known = {**({} if shared is None else shared.groups), **self.committed.known()}
        fits = all(known[asked].debs == found.group(name)
                   for name, asked in self.asked().items() if asked in known)
        return replace(found, pins=self.committed.pins(self.recipe)) if fits else None

    def make(self, apt: Path, *, anew: bool, shared: bool = False) -> None:
        """Resolve what is not known, and write the lock; `anew`: nothing is, but what is `shared`.

        `apt` is the store's directory for apt's lists. Needs the network where something is
        resolved. What was written before stays where that fails.
        """
        if self.committed.covers(self.recipe):
            return
        known = self._known(anew=anew and not shared)
        before = None if anew else lock.read(self.path)
        found = resolve.resolve(request.request(self.recipe, self.root), apt, known)
        lock.write(Resolved(groups=known), self.shared)
        pins = driverfile.pin(self.recipe, {} if before is None else before.downloads,
                              apt.with_name("partial"))
        lock.write(replace(found, downloads=pins), self.path)

    def make_shared(self, apt: Path, asked: set[str], *, anew: bool) -> None:
        """Resolve the groups with these digests only, for guests that share them; no lock."""
        known = self._known(anew=anew)
        wanted = request.request(self.recipe, self.root)
        shared = {name: group for name, group in wanted.groups.items()
                  if wanted.digests[name] in asked}
        resolve.resolve(replace(wanted, groups=shared), apt, known)
        lock.write(Resolved(groups=known), self.shared)

    def asked(self) -> dict[str, str]:
        """For each group that the guest asks for the digest of what is asked."""
        return request.digests(self.recipe, self.root)

    def _known(self, *, anew: bool) -> dict[str, Known]:
        kept = self.committed.known()
        shared = None if anew else lock.read_resolved(self.shared)
        if shared is None:
            return kept if kept or anew else self._seed()
        return {**shared.groups, **kept}

    def _seed(self) -> dict[str, Known]:
        """What the locks at hand hold: somebody kept them alone."""
        known: dict[str, Known] = {}
        for version in [*recipe.versions(self.recipe), *self._built()]:
            with contextlib.suppress(UserError):  # of a driver or a format that is no longer read
                other = recipe.with_driver(self.recipe, version)
                found = lock.read(self.shared.parent / version / self.path.name)
                if found is not None and found.request == request.identity(other, self.root):
                    for name, asked in request.digests(other, self.root).items():
                        known.setdefault(asked, Known(debs=found.group(name)))
        return known

    def _built(self) -> list[str]:
        return sorted(path.parent.name for path in self.shared.parent.glob(f"*/{self.path.name}"))

    def __str__(self) -> str:
        return os.path.relpath(self.path)
