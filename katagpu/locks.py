"""The lock of one guest, and what a recipe's guests share of it.

Beside each driver's results lies its whole lock. `resolved.json` above them holds every group of
packages that was resolved for the recipe, by what was asked for: a lock that is made takes from it,
so guests with other drivers, or with EXTRA_PKGS, stand on the same packages, whenever they are
built.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from msgspec.structs import replace

from katagpu import driverfile, keys, lock, recipe, request, resolve
from katagpu.errors import UserError
from katagpu.lock import Known, Lock, Resolved
from katagpu.schema import Recipe

SHARED = "resolved.json"


class Locks:
    """The lock of one guest below `directory`, which is that of its driver.

    Packages of one run (`extra`, from EXTRA_PKGS) have a lock of their own beside the recipe's.
    """

    def __init__(self, wanted: Recipe, root: Path, directory: Path, extra: list[str]) -> None:
        self.recipe = wanted
        self.root = root
        more = f"-{keys.digest(sorted(extra))[:12]}" if extra else ""
        self.path = directory / f"lock{more}.json"
        self.shared = directory.parent / SHARED

    def files(self) -> list[Path]:
        """What an answer is read from."""
        return [self.path, self.shared]

    def find(self) -> Lock | None:
        """The lock, when it answers what the recipe asks for, as the recipe's other guests do."""
        found = lock.read(self.path)
        if found is None or found.request != request.identity(self.recipe, self.root):
            return None
        if driverfile.addresses(self.recipe) \
                and not driverfile.pinned(self.recipe, found.downloads):
            return None
        shared = lock.read_resolved(self.shared)
        known = {} if shared is None else shared.groups
        fits = all(known[asked].debs == found.group(name)
                   for name, asked in self.asked().items() if asked in known)
        return found if fits else None

    def make(self, apt: Path, *, anew: bool, shared: bool = False) -> None:
        """Resolve what is not known, and write the lock; `anew`: nothing is, but what is `shared`.

        `apt` is the store's directory for apt's lists. Needs the network where something is
        resolved. What was written before stays where that fails.
        """
        known = {} if anew and not shared else self._known()
        before = None if anew else lock.read(self.path)
        found = resolve.resolve(request.request(self.recipe, self.root), apt, known)
        lock.write(Resolved(groups=known), self.shared)
        pins = driverfile.pin(self.recipe, {} if before is None else before.downloads,
                              apt.with_name("partial"))
        lock.write(replace(found, downloads=pins), self.path)

    def make_shared(self, apt: Path, asked: set[str], *, anew: bool) -> None:
        """Resolve the groups with these digests only, for guests that share them; no lock."""
        known = {} if anew else self._known()
        wanted = request.request(self.recipe, self.root)
        shared = {name: group for name, group in wanted.groups.items()
                  if wanted.digests[name] in asked}
        resolve.resolve(replace(wanted, groups=shared), apt, known)
        lock.write(Resolved(groups=known), self.shared)

    def asked(self) -> dict[str, str]:
        """For each group that the guest asks for the digest of what is asked."""
        return request.digests(self.recipe, self.root)

    def _known(self) -> dict[str, Known]:
        shared = lock.read_resolved(self.shared)
        return self._seed() if shared is None else dict(shared.groups)

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
