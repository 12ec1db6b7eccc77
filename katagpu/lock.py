"""The lock: exactly which bytes a recipe's packages are, and what is asked for to make one.

What was resolved is kept by what was asked for (`Known`), so that the locks of a recipe's drivers
share all that they ask for alike, however far apart they are made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from katagpu.aptview import Pin
from katagpu.errors import UserError

FORMAT = 1
GUEST = "guest"  # the archives of the guest's distribution


class Deb(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One binary package; `size` in bytes.

    `url` is where this host has it. Of a committed lock it is below the public address of the
    archive that `archive` names (`Pins`).
    """

    package: str
    version: str
    architecture: str
    url: str
    size: int
    sha256: str
    archive: str = ""


class File(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file that is no package: of a public address, or of a path as the recipe has it.

    `signer` is the fingerprint of the key that its signature is good with; `size` in bytes.
    """

    sha256: str
    size: int
    url: str | None = None
    path: str | None = None
    signer: str | None = None


class Pins(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What only a committed lock has.

    `archives` are public addresses by the names in `Deb.archive`, `files` by `part/name`, `modules`
    Go's sums as in go.sum.
    """

    archives: dict[str, str] = {}
    files: dict[str, File] = {}
    modules: dict[str, str] = {}


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved recipe. `request` is the digest of what was asked for.

    `downloads` are the digests, by address, of files of which the recipe gives none.
    """

    recipe: str
    request: str
    groups: dict[str, tuple[Deb, ...]]
    downloads: dict[str, str] = {}
    pins: Pins = Pins()
    format: int = FORMAT

    def group(self, name: str) -> tuple[Deb, ...]:
        """The packages of a group, sorted by name; empty for one that the recipe lacks."""
        return self.groups.get(name, ())

    def version(self, group: str, package: str) -> str | None:
        """The version of one package of a group."""
        return next((deb.version for deb in self.group(group) if deb.package == package), None)


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """A group that was resolved.

    `installed` is what dpkg's status says of each package once it is there, for groups on this one.
    """

    debs: tuple[Deb, ...]
    installed: dict[str, str] = {}


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """All that was resolved for a recipe, by the digest of what was asked for."""

    groups: dict[str, Known]
    format: int = FORMAT


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """An apt archive: suites and components below one address, and the keyring that signs it.

    A suite that ends in a slash is a flat archive's (sources.list(5)), without components. From
    `preferred` suites packages come before those of the others, as with apt's Default-Release.
    """

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    keyring: str
    preferred: bool = False


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """An archive beside the distribution's; its `keyring` is a path or URL of a key.

    `fingerprint` is that of the key, which a URL needs.
    """

    archive: Archive
    fingerprint: str | None = None


class LocalDeb(msgspec.Struct, frozen=True, kw_only=True):
    """A package given as a file."""

    path: str
    sha256: str


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A set of packages to resolve with all that they depend on.

    `files` are packages that are at hand: what they depend on is locked, they are not.
    `on` names a group that is installed already: only what comes in addition is locked. `alone`
    locks the named packages without their dependencies (sources shipped as packages). `archives`
    names the set of archives that it comes from, the same as what it is `on`. What `pins` name
    comes from `repository`, by its name in the request, and from nowhere else.
    """

    archives: str = GUEST
    packages: tuple[str, ...] = ()
    files: tuple[LocalDeb, ...] = ()
    on: str | None = None
    alone: bool = False
    repository: str | None = None
    pins: tuple[Pin, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """All that a lock answers.

    `archives` are sets by name, one for each kind of root. `digests` say of each group what it and
    those below ask for.
    """

    recipe: str
    identity: str
    architecture: str
    archives: dict[str, tuple[Archive, ...]]
    groups: dict[str, Group]
    repositories: dict[str, Repository] = {}
    digests: dict[str, str] = {}


Form = TypeVar("Form", Lock, Resolved)


def read(path: Path) -> Lock | None:
    """The lock in a file, or None where there is none (or one of an older format)."""
    return _read(path, Lock)


def read_resolved(path: Path) -> Resolved | None:
    """What was resolved for a recipe, or None where nothing was (or in an older format)."""
    return _read(path, Resolved)


def _read(path: Path, kind: type[Form]) -> Form | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as bad:
        raise UserError(f"{path} is not a lock: {bad}", hint="remove it, and run ./doitw lock") \
            from None
    return found if found.format == FORMAT else None


def write(lock: Lock | Resolved, path: Path) -> None:
    """Write a lock as text that can be reviewed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(lock), indent=1) + b"\n")
    part.replace(path)
