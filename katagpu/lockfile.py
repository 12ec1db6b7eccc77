"""The committed lock, `recipes/<name>.lock`: text for review, one line for each package.

The first line has the digest of all others, so that an edit by hand, or a merge that went wrong, is
found. Packages are named by public archives and paths below them, never by where the host that
made the lock had them from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from katagpu.errors import UserError
from katagpu.lock import FORMAT, Deb, File, Lock, Pins

KIND = "lock of katagpu"


class LockedDeb(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A package: its file is at `path` below the archive of this name; `size` in bytes."""

    package: str
    version: str
    architecture: str
    size: int
    sha256: str
    archive: str
    path: str


class LockedPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True,
                 omit_defaults=True):
    """A part of a lock; `asked` is the digest of what the recipe asks for."""

    asked: str
    packages: dict[str, tuple[LockedDeb, ...]] = {}
    files: dict[str, File] = {}
    modules: dict[str, str] = {}


class LockFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A committed lock. `archives` are public addresses by name."""

    kind: str = KIND
    format: int = FORMAT
    recipe: str
    archives: dict[str, str]
    parts: dict[str, LockedPart]

    def lock(self) -> Lock:
        """As builds read it."""
        groups = {name: tuple(self._deb(deb) for deb in debs)
                  for part in self.parts.values() for name, debs in part.packages.items()}
        files = {f"{name}/{file}": found for name, part in self.parts.items()
                 for file, found in part.files.items()}
        modules = {name: found for part in self.parts.values()
                   for name, found in part.modules.items()}
        downloads = {file.url: file.sha256 for file in files.values() if file.url is not None}
        return Lock(recipe=self.recipe, request=digest(self), groups=groups, downloads=downloads,
                    pins=Pins(archives=self.archives, files=files, modules=modules))

    def _deb(self, deb: LockedDeb) -> Deb:
        return Deb(package=deb.package, version=deb.version, architecture=deb.architecture,
                   size=deb.size, sha256=deb.sha256, archive=deb.archive,
                   url=f"{self.archives[deb.archive]}/{deb.path}")


def text(lock: LockFile) -> str:
    """The file's text: sorted, and the same for the same lock."""
    body = _body(lock)
    return f'{{\n "sha256": "{_digest(body.encode())}",\n{body}'


def digest(lock: LockFile) -> str:
    """What identifies a lock: the digest in its first line."""
    return _digest(_body(lock).encode())


def _body(lock: LockFile) -> str:
    found = msgspec.to_builtins(lock)
    head = {name: found[name] for name in ("kind", "format", "recipe", "archives")}
    return _text({**head, "parts": found["parts"]}).removeprefix("{\n") + "\n"


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _text(value: Any, depth: int = 0) -> str:
    """JSON in which what is in a list has one line."""
    start = " " * (depth + 1)
    if isinstance(value, Mapping) and value:
        names = value if depth == 0 else sorted(value)
        inner = [f"{start}{json.dumps(name)}: {_text(value[name], depth + 1)}" for name in names]
        return "{\n" + ",\n".join(inner) + "\n" + " " * depth + "}"
    if isinstance(value, list | tuple) and value:
        inner = [f"{start}{json.dumps(item, ensure_ascii=False)}" for item in value]
        return "[\n" + ",\n".join(inner) + "\n" + " " * depth + "]"
    return json.dumps(value, ensure_ascii=False)


def read(path: Path, recipe: str) -> LockFile | None:
    """The committed lock of a recipe, or None where there is none.

    Raises `UserError` for one that was edited, that is another recipe's, or of another format.
    """
    try:
        data = path.read_bytes().replace(b"\r\n", b"\n")
    except FileNotFoundError:
        return None
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}") from None
    again = f"`{command(recipe)}` makes it anew"
    kept = f"take it back from git (git checkout -- {path}), or {again}"
    if b"<<<<<<< " in data:
        raise UserError(f"{path} has conflict markers of a merge",
                        hint=f"take one side of it whole, or {again}")
    head, _, body = data.partition(b",\n")
    try:
        said = msgspec.json.decode(head + b"}").get("sha256")
        found = msgspec.json.decode(b"{\n" + body)
        if (found.get("kind"), found.get("format")) != (KIND, FORMAT):
            raise UserError(f"{path} is not a lock that this version of katagpu reads", hint=again)
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, TypeError):
        raise UserError(f"{path} is not a lock, or was edited by hand", hint=kept) from None
    if said != _digest(body):
        raise UserError(f"{path} was edited by hand: its content has the SHA-256 "
                        f"{_digest(body)[:12]}…, and its first line says {str(said)[:12]}…",
                        hint=f"{kept}; a part of it moves with "
                             f"`{command(recipe)} update=PART`")
    if found.get("recipe") not in (None, recipe):
        raise UserError(f"{path} is the lock of another recipe, {found['recipe']!r}",
                        hint=f"`{command(recipe)}` makes the lock of {recipe}")
    try:
        return _whole(msgspec.convert(found, LockFile))
    except msgspec.ValidationError as wrong:
        raise UserError(f"{path} is not a lock that this version of katagpu reads: {wrong}",
                        hint=again) from None


def _whole(lock: LockFile) -> LockFile:
    """A lock that names every archive that it has. Raises `msgspec.ValidationError` for others."""
    for name, part in lock.parts.items():
        for debs in part.packages.values():
            for deb in debs:
                if deb.archive not in lock.archives:
                    raise msgspec.ValidationError(f"{deb.package} of the part {name} is of the "
                                                  f"archive {deb.archive!r}, which has no address")
    return lock


def command(recipe: str) -> str:
    """The command line that makes the lock of a recipe."""
    return f"./doitw recipe={recipe} lock"


def write(lock: LockFile, path: Path) -> None:
    """Write it, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text(lock))
    part.replace(path)
