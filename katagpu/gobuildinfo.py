"""Which Go modules a program was compiled from, as the Go linker wrote it into the program.

The format is that of Go's debug/buildinfo since 1.18, where the strings lie in the section itself:
a magic of 14 bytes, the pointer size, flags, from byte 32 on two strings, each after its length as
a varint: Go's version, and the modules between two sentinels of 16 bytes.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"\xff Go buildinf:"
ALIGN, HEADER, SENTINEL = 16, 32, 16
INLINE = 2  # flag: the strings follow


@dataclass(frozen=True, kw_only=True)
class Module:
    """A module; `sum` is its h1: digest (go.sum), empty where the linker did not know it."""

    path: str
    version: str
    sum: str = ""


@dataclass(frozen=True, kw_only=True)
class BuildInfo:
    """Go's version, the module of the program itself, and those that were compiled into it."""

    go: str
    main: Module | None
    modules: tuple[Module, ...]


def read(path: Path) -> BuildInfo | None:
    """What a program says; None for one that is not Go's, or of a Go before 1.18."""
    with path.open("rb") as stream:
        if stream.read(4) != b"\x7fELF":
            return None
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = data.find(MAGIC)
            while place >= 0 and place % ALIGN:  # the words may be anywhere, as in this module
                place = data.find(MAGIC, place + 1)
            if place < 0 or len(data) < place + HEADER or not data[place + 15] & INLINE:
                return None
            version, after = _string(data, place + HEADER)
            modules, _end = _string(data, after)
    return _parse(version.decode(errors="replace"),
                  modules[SENTINEL:-SENTINEL].decode(errors="replace"))


def _string(data: mmap.mmap, place: int) -> tuple[bytes, int]:
    length = shift = 0
    while True:
        byte = data[place]
        place += 1
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return data[place:place + length], place + length


def _parse(version: str, text: str) -> BuildInfo:
    main, modules = None, list[Module]()
    for line in text.splitlines():
        kind, *words = line.split("\t")
        if kind not in ("mod", "dep", "=>") or len(words) < 2:
            continue
        module = Module(path=words[0], version=words[1], sum=words[2] if len(words) > 2 else "")
        if kind == "mod":
            main = module
        elif kind == "dep":
            modules.append(module)
        elif modules:  # what was compiled in place of the one before
            modules[-1] = module
    return BuildInfo(go=version.removeprefix("go").split()[0], main=main, modules=tuple(modules))
