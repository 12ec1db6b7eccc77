"""The list of a guest's files, in the format of mtree(5): one line for each path, sorted by bytes.

Canonical: the same tree gives the same bytes. Times are left out, which say nothing of content.
`mtree -p DIRECTORY -f files.mtree` and `bsdtar` read it too.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from katagpu.keys import file_digest
from katagpu.tree import ATTRIBUTES

HEAD = "#mtree"
_PLAIN = re.compile(rb"[^!-~]|[#*?\[\\]")
_ESCAPED = re.compile(rb"\\([0-7]{3})")


class Kind(StrEnum):
    """Types of files, by mtree's words."""

    FILE = "file"
    DIRECTORY = "dir"
    LINK = "link"
    CHARACTER = "char"
    BLOCK = "block"
    FIFO = "fifo"
    SOCKET = "socket"


_KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.LINK,
          stat.S_IFCHR: Kind.CHARACTER, stat.S_IFBLK: Kind.BLOCK, stat.S_IFIFO: Kind.FIFO,
          stat.S_IFSOCK: Kind.SOCKET}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A path below the root, without a leading slash; empty for the root itself.

    `size` in bytes, of files alone; `content` is a file's SHA-256, a link's target, or a device's
    numbers. `attributes` are extended ones (capabilities), as `name:hex` with commas between.
    Bytes that are not UTF-8 are surrogates, as everywhere in Python.
    """

    path: str
    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int = 0
    content: str = ""
    attributes: str = ""


def scan(root: Path) -> list[Entry]:
    """All entries below a root, and the root, in the order of their bytes."""
    found = [_entry("", root)]
    for directory, names, files in os.walk(root):
        below = os.path.relpath(directory, root)
        prefix = "" if below == "." else f"{below}/"
        found += [_entry(prefix + name, Path(directory, name)) for name in (*names, *files)]
    return sorted(found, key=lambda entry: os.fsencode(entry.path))


def _entry(path: str, place: Path) -> Entry:
    status = place.lstat()
    kind = _KINDS[stat.S_IFMT(status.st_mode)]
    content = ""
    if kind is Kind.FILE:
        content = file_digest(place)
    elif kind is Kind.LINK:
        content = os.readlink(place)  # noqa: PTH115 (a Path would tidy it)
    elif kind in (Kind.CHARACTER, Kind.BLOCK):
        content = f"{os.major(status.st_rdev)},{os.minor(status.st_rdev)}"
    names = (name for name in sorted(os.listxattr(place, follow_symlinks=False))
             if name.startswith(ATTRIBUTES) and not name.startswith("user.overlay."))
    attributes = ",".join(f"{name}:{os.getxattr(place, name, follow_symlinks=False).hex()}"
                          for name in names)
    return Entry(path=path, kind=kind, mode=stat.S_IMODE(status.st_mode), uid=status.st_uid,
                 gid=status.st_gid, size=status.st_size if kind is Kind.FILE else 0,
                 content=content, attributes=attributes)


def render(entries: list[Entry]) -> bytes:
    """The list as a file."""
    return b"\n".join([HEAD.encode(), *map(_line, entries), b""])


def _line(entry: Entry) -> bytes:
    words = [_escaped(f"./{entry.path}" if entry.path else "."), b"type=" + entry.kind.encode(),
             b"mode=0%o" % entry.mode, b"uid=%d" % entry.uid, b"gid=%d" % entry.gid]
    if entry.kind is Kind.FILE:
        words += [b"size=%d" % entry.size, b"sha256digest=" + entry.content.encode()]
    elif entry.kind is Kind.LINK:
        words.append(b"link=" + _escaped(entry.content))
    elif entry.content:
        words.append(b"device=linux," + entry.content.encode())
    if entry.attributes:
        words.append(b"tags=" + _escaped(entry.attributes))
    return b" ".join(words)


def _escaped(text: str) -> bytes:
    return _PLAIN.sub(lambda found: b"\\%03o" % found[0][0], os.fsencode(text))


def _plain(data: bytes) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), data))


def parse(data: bytes) -> Iterator[Entry]:
    """The entries of a list. Raises `ValueError` for what `render` does not write."""
    lines = data.split(b"\n")
    if lines[0] != HEAD.encode() or lines[-1] != b"":
        raise ValueError("it does not begin and end as a file list does")
    for number, line in enumerate(lines[1:-1], 2):
        try:
            yield _parsed(line)
        except (ValueError, KeyError) as bad:
            raise ValueError(f"line {number} is not an entry ({bad})") from None


def _parsed(line: bytes) -> Entry:
    path, *words = line.split(b" ")
    facts = dict(word.split(b"=", 1) for word in words)
    kind = Kind(facts[b"type"].decode())
    content = facts.get(b"sha256digest") or facts.get(b"link") or facts.get(
        b"device", b"").removeprefix(b"linux,")
    return Entry(path=_plain(path).removeprefix(".").removeprefix("/"), kind=kind,
                 mode=int(facts[b"mode"], 8), uid=int(facts[b"uid"]), gid=int(facts[b"gid"]),
                 size=int(facts.get(b"size", 0)), content=_plain(content),
                 attributes=_plain(facts.get(b"tags", b"")))
