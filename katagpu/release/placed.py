"""What is placed of a release: `.placed` in its directory has digests of files, targets of links.

    <sha256>  NAME          a file; drop-ins as they are placed are `config/NAME`
    ->  NAME  TARGET        a link

Earlier versions wrote names alone: their digests are those of SHA256SUMS, their links those of
release.json, and of their drop-ins no more is known than that they have to be there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from katagpu.errors import UserError
from katagpu.release import layout
from katagpu.release.host import CONFIG, DROP_INS

RECORD = ".placed"
_LINK = "->"


@dataclass(frozen=True)
class Placed:
    """What was placed: digests of files (None: not known) and targets of links, by name."""

    digests: Mapping[str, str | None]
    links: Mapping[str, str]


def render(placed: Placed) -> bytes:
    """The text of the record."""
    lines = [*(f"{digest}  {name}" for name, digest in placed.digests.items()),
             *(f"{_LINK}  {name}  {target}" for name, target in placed.links.items())]
    return "".join(f"{line}\n" for line in lines).encode()


def read(directory: Path) -> Placed:
    """What the record of an installed release says. Raises `OSError`, `UserError`."""
    digests: dict[str, str | None] = {}
    links: dict[str, str] = {}
    for line in (directory / RECORD).read_text(errors="replace").splitlines():
        words = line.split("  ")
        if words[0] == _LINK and len(words) == 3:
            links[words[1]] = words[2]
        elif len(words) == 2:
            digests[words[1]] = layout.sha256(words[0])
        elif len(words) == 1:
            return _of_names(directory)
        else:
            raise UserError(f"{directory / RECORD} is damaged")
    return Placed(digests, links)


def _of_names(directory: Path) -> Placed:
    """What the record of an earlier version says."""
    names = (directory / RECORD).read_text().split()
    sums = layout.parse_sums((directory / layout.SUMS).read_bytes(), str(directory))
    release = layout.parse((directory / layout.RELEASE).read_bytes(), str(directory))
    digests: dict[str, str | None] = {name: sums.get(name, "not listed") for name in names}
    digests.update({f"{CONFIG}/{file.source}": None for file in release.files
                    if file.source in DROP_INS})
    return Placed(digests, {file.link: file.name for file in release.files
                            if file.link is not None and file.name in names})


def damaged(directory: Path) -> Iterator[str]:
    """The files and links of an installed release that are not as they were placed."""
    try:
        layout.parse_sums((directory / layout.SUMS).read_bytes(), str(directory))
    except (OSError, UserError):
        yield layout.SUMS
        return
    try:
        placed = read(directory)
    except (OSError, UserError):
        yield RECORD
        return
    for name, digest in placed.digests.items():
        path = directory / name
        if path.is_symlink() or not path.is_file() or digest not in (None, layout.digest(path)):
            yield name
    for name, target in placed.links.items():
        path = directory / name
        if not path.is_symlink() or str(path.readlink()) != target:
            yield name


def is_drop_in(directory: Path, name: str, data: bytes) -> bool:
    """Is this a drop-in as an installed release placed it? Its copy there may be damaged."""
    path = directory / CONFIG / name
    try:
        if path.is_file() and path.read_bytes() == data:
            return True
        return read(directory).digests.get(f"{CONFIG}/{name}") == hashlib.sha256(data).hexdigest()
    except (OSError, UserError):
        return False
