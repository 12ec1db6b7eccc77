"""A comparison of two builds as text: grouped, largest first, long lists cut with a count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from katagpu import log
from katagpu.compare import Change, Comparison, FileChange, How, Size
from katagpu.filelist import Kind

LONGEST = 12
"""How many lines of a list are shown."""
SHORT = 60
PACKAGES = ("added", "removed", "with other versions")
SYMBOLS = ("newly set", "no longer set", "with other values")
SIGNS = {How.ADDED: "+", How.REMOVED: "-", How.CHANGED: "~", How.RENAMED: "="}


def text(found: Comparison, *, everything: bool = False) -> Iterator[str]:
    """The lines. `everything`: no list is cut, and no directory stands for what is in it."""
    longest = None if everything else LONGEST
    yield f"{found.before} → {found.after}"
    if any(change.name == "recipe" for change in found.facts):
        yield "These are guests of different recipes."
    if found.same:
        yield "Nothing differs."
    yield from _section("Guest", [*(_fact(change, everything) for change in found.facts),
                                  *(_sign(change) for change in found.checks)], None)
    yield from _sizes(found, longest)
    yield from _section(_title("Packages", found.packages, PACKAGES),
                        list(_packages(found.packages, everything)), longest)
    if found.config is not None:
        yield from _section(_title("Kernel config", found.config, SYMBOLS), [
            f"CONFIG_{_plain(change.name)}: {_set(change.before)} → {_set(change.after)}"
            for change in found.config], longest)
    if found.files is not None:
        yield from _files(found.files, everything)
    if found.lacks:
        yield from _section("Not compared", list(found.lacks), None)


def _section(title: str, lines: Sequence[str], longest: int | None) -> Iterator[str]:
    if not lines:
        return
    yield ""
    yield title
    yield from (f"  {line}" for line in _cut(lines, longest))


def _cut(lines: Sequence[str], longest: int | None) -> Iterator[str]:
    """At most so many lines; a line that says how many are left out is not longer than one."""
    if longest is None or len(lines) <= longest + 1:
        yield from lines
        return
    yield from lines[:longest]
    yield f"… and {len(lines) - longest} more (all=1 lists them)"


def _plain(word: str) -> str:
    """A name without what a terminal would obey."""
    return word if word.isprintable() else word.encode("unicode_escape", "replace").decode()


def _short(value: str | None, everything: bool) -> str:
    if value is None:
        return "absent"
    value = _plain(value)
    return value if everything or len(value) <= SHORT else f"{value[:SHORT - 1]}…"


def _fact(change: Change, everything: bool) -> str:
    return (f"{change.name}: {_short(change.before, everything)} → "
            f"{_short(change.after, everything)}")


def _sign(change: Change) -> str:
    return f"+ {change.after}" if change.before is None else f"- {change.before}"


def _set(value: str | None) -> str:
    return "not set" if value is None else _plain(value)


def _title(what: str, changes: Sequence[Change], words: tuple[str, str, str]) -> str:
    added = sum(change.before is None for change in changes)
    removed = sum(change.after is None for change in changes)
    counts = zip((added, removed, len(changes) - added - removed), words, strict=True)
    return f"{what}: {', '.join(f'{count} {word}' for count, word in counts if count)}"


# sizes


def _signed(delta: int) -> str:
    return f"{'-' if delta < 0 else '+'}{log.size(abs(delta))}" if delta else ""


def _sizes(found: Comparison, longest: int | None) -> Iterator[str]:
    told = {name for name, changes in (
        ("kernel_config", found.config), ("files", found.files), ("sizes", found.sizes),
        ("extension_files", found.files), ("extension_sizes", found.sizes)) if changes}
    rows = [part for part in found.parts if not part.same and part.name not in told]
    lines = [_size(part) for part in sorted(rows, key=lambda part: -abs(part.delta))]
    if found.sizes is not None:
        total = Size(name="in the guest, unpacked",
                     before=sum(size.before or 0 for size in found.sizes),
                     after=sum(size.after or 0 for size in found.sizes))
        inner = [_size(size) for size in found.sizes if not size.same]
        if inner:
            lines += [_size(total), *(f"  {line}" for line in _cut(inner, longest))]
    yield from _section("Sizes", lines, None)


def _size(size: Size) -> str:
    if size.before is None or size.after is None:
        change = "new" if size.before is None else "gone"
        return f"{_signed(size.delta):>10}  {_plain(size.name)} ({change})"
    if size.delta == 0:
        return f"{'same size':>10}  {_plain(size.name)}: {log.size(size.after)}, other bytes"
    return (f"{_signed(size.delta):>10}  {_plain(size.name)}: {log.size(size.before)} → "
            f"{log.size(size.after)}")


# packages


def _packages(changes: Sequence[Change], everything: bool) -> Iterator[str]:
    """Those with the same two versions in one line, the largest group first."""
    groups: dict[tuple[str | None, str | None, str], list[str]] = {}
    for change in changes:
        alone = everything or None in (change.before, change.after)
        groups.setdefault((change.before, change.after, change.name if alone else ""),
                          []).append(change.name)
    for (before, after, _), names in sorted(groups.items(), key=lambda item: -len(item[1])):
        if before is None:
            yield f"+ {names[0]} {after}"
        elif after is None:
            yield f"- {names[0]} {before}"
        else:
            more = f" … ({len(names)})" if len(names) > 4 else ""
            yield f"~ {before} → {after}: {', '.join(names[:4])}{more}"


# files


def _files(changes: Sequence[FileChange], everything: bool) -> Iterator[str]:
    counts = []
    for how in How:
        chosen = [change for change in changes if change.how is how]
        size = _signed(sum(change.delta for change in chosen))
        word = "that only carry another version" if how is How.RENAMED else str(how)
        if chosen:
            counts.append(f"{len(chosen)} {word}{f' ({size})' if size else ''}")
    lines: list[str] = []
    for how in How:
        chosen = [change for change in changes if change.how is how]
        if how in (How.ADDED, How.REMOVED) and not everything:
            rows = list(_folded(chosen))
        elif how is How.RENAMED and not everything:
            rows = []
        else:
            rows = [_file(change) for change in chosen]
        lines += _cut(rows, None if everything else LONGEST)
    if changes:
        yield from _section(f"Files: {', '.join(counts)}", lines, None)


def _file(change: FileChange) -> str:
    """One file; that its name carries another version goes without saying."""
    what = [_plain(word) for word in change.what if word != "content" or change.delta == 0]
    more = f" ({'; '.join(what)})" if what else ""
    was = f", was {_plain(change.was)}" if change.how is How.RENAMED and change.was else ""
    return f"{SIGNS[change.how]} {_signed(change.delta):>10}  {_plain(change.path)}{more}{was}"


def _folded(changes: Sequence[FileChange]) -> Iterator[str]:
    """A directory that is all new or gone stands for what is in it; largest first."""
    whole = {change.path for change in changes if change.entry.kind is Kind.DIRECTORY}
    rows: dict[str, list[FileChange]] = {}
    for change in changes:
        parts = change.path.split("/")
        tops = ("/".join(parts[:length]) for length in range(1, len(parts) + 1))
        rows.setdefault(next((top for top in tops if top in whole), change.path),
                        []).append(change)
    deltas = {top: sum(change.delta for change in inner) for top, inner in rows.items()}
    for top in sorted(rows, key=lambda top: (-abs(deltas[top]), top)):
        if top not in whole:
            yield _file(rows[top][0])
            continue
        inner = f" ({len(rows[top]) - 1} in it)" if len(rows[top]) > 1 else ""
        yield f"{SIGNS[rows[top][0].how]} {_signed(deltas[top]):>10}  {_plain(top)}/{inner}"
