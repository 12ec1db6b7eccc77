"""Where two outputs differ: the two files, what is told apart at a glance, and diffoscope's report.

diffoscope is no dependency: it needs a good part of a distribution to look into everything. Where
it is not installed, both files are kept for one that is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import zstandard

from katagpu.errors import TookTooLong, UserError
from katagpu.run import run
from katagpu.sameness import Compared
from katagpu.store import Kind, Output, Store

PROGRAM = "diffoscope"
PATIENCE = 1800.0  # seconds for one report
LINES = 40  # of a report on the terminal
MEMBERS = 12  # of a tree that are named
BLOCK = 1 << 20
DIFFERENT = 1  # diffoscope's exit status


def find(given: str | None) -> str | None:
    """The program: the one that was given, of this environment, or of PATH. None: there is none.

    Raises `UserError` where the one that was given is none.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise UserError(f"diffoscope={given}: there is no such program",
                            hint="pip install diffoscope, in any environment, or apt-get install "
                                 "diffoscope")
        return found
    beside = Path(sys.executable).parent / PROGRAM
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(PROGRAM)


def keep(one: Compared, stores: tuple[Store, Store], place: Path) -> tuple[Path, Path]:
    """Both files of an output below `place`, a tree as the tar that it is."""
    name = f"{one.stage}.{one.output}"
    kept = []
    for side, store, output in (("first", stores[0], one.first), ("second", stores[1], one.second)):
        assert output is not None, "both were made"
        ending = ".tar" if output.kind is Kind.TREE else Path(one.name).suffix
        target = place / side / f"{name}{ending}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with store.sound(output.blob).open("rb") as source, target.open("wb") as sink:
            if output.kind is Kind.TREE:
                zstandard.ZstdDecompressor().copy_stream(source, sink)
            else:
                shutil.copyfileobj(source, sink, BLOCK)
        kept.append(target)
    return kept[0], kept[1]


def glance(first: Path, second: Path) -> Iterator[str]:
    """What differs: the members of two tars, or the first byte of two files."""
    if first.suffix != ".tar":
        yield from _bytes(first, second)
        return
    one, other = _members(first), _members(second)
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    for name in names[:MEMBERS]:
        if name not in one or name not in other:
            yield f"/{name}: only in the {'first' if name in one else 'second'}"
        else:
            what = [field for field in one[name] if one[name][field] != other[name][field]]
            yield f"/{name}: {', '.join(what)}"
    if len(names) > MEMBERS:
        yield f"and {len(names) - MEMBERS} more"
    if not names:
        yield "the same members in another order"


def _members(path: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            data = tar.extractfile(member) if member.isreg() else None
            found[member.name] = {
                "content": _digest(data) if data is not None else None,
                "kind": member.type, "mode": member.mode, "owner": (member.uid, member.gid),
                "time": member.mtime, "link": member.linkname, "attributes": member.pax_headers}
    return found


def _digest(stream: IO[bytes]) -> bytes:
    found = hashlib.sha256()
    while data := stream.read(BLOCK):
        found.update(data)
    return found.digest()


def _bytes(first: Path, second: Path) -> Iterator[str]:
    sizes = [path.stat().st_size for path in (first, second)]
    if sizes[0] != sizes[1]:
        yield f"{sizes[0]} bytes and {sizes[1]}"
    at = 0
    with first.open("rb") as one, second.open("rb") as other:
        while True:
            left, right = one.read(BLOCK), other.read(BLOCK)
            if left != right:
                same = next((index for index, (a, b) in enumerate(zip(left, right, strict=False))
                             if a != b), min(len(left), len(right)))
                around = slice(max(0, same - 16), same + 48)
                yield f"from byte {at + same}: {left[around]!r}"
                yield f"{'':>{len(str(at + same)) + 10}}: {right[around]!r}"
                return
            if not left:
                return
            at += len(left)


def report(program: str, first: Path, second: Path, target: Path) -> list[str]:
    """diffoscope's report as text in `target`; its first lines."""
    try:
        done = run([program, "--text", target, "--exclude-directory-metadata=yes", first, second],
                   check=False, timeout=PATIENCE, env={"PATH": os.environ.get("PATH", "")})
    except TookTooLong as late:
        return [str(late)]
    if done.status != DIFFERENT or not target.exists():
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return [f"{program} ended with status {done.status}", *said[-5:]]
    lines = target.read_text(errors="replace").splitlines()
    more = [f"… {len(lines) - LINES} lines more"] if len(lines) > LINES else []
    return [*lines[:LINES], *more]


def days(first: float, last: float) -> re.Pattern[bytes]:
    """What a stamp of one of these days looks like (UTC; seconds since the epoch)."""
    found: dict[str, None] = {}
    for second in {*range(int(first), int(last), 3600), int(last)}:
        day = datetime.fromtimestamp(second, UTC)
        found[rf"{day:%Y-%m-%d}"] = found[rf"{day:%d %b %Y}"] = None
        found[rf"{day:%b} {day.day:2d} (?:\d\d:\d\d:\d\d \S{{1,6}} )?{day:%Y}"] = None
    return re.compile("|".join(found).encode())


def stamps(store: Store, output: Output, words: re.Pattern[bytes]) -> set[str]:
    """Which of these words are in an output, as it is before it is compressed."""
    found: set[bytes] = set()
    tail = b""
    with store.blob(output.blob).open("rb") as raw:
        source: Any = zstandard.ZstdDecompressor().stream_reader(raw) \
            if output.kind is Kind.TREE else raw
        while data := source.read(BLOCK):
            found.update(words.findall(tail + data))
            tail = data[-64:]
    return {word.decode() for word in found}
