"""What changed between two finished builds: data in, data out.

Paths that carry the driver's version or the kernel's release are the same file in both builds, so a
driver bump shows what a library became, and not one file gone and another new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from katagpu.filelist import Entry, Kind
from katagpu.finished import Finished

LISTED_APART = ("schema", "packages", "parts", "checks", "boot_check")
"""Fields of the manifest that are not among the facts."""
LONGEST_LIST = 40  # entries that are shown


class How(StrEnum):
    """How a file differs."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"
    RENAMED = "renamed"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A value that differs; None: it is not there."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes before and after; `same` says that the bytes themselves are."""

    name: str
    before: int | None
    after: int | None
    same: bool = False

    @property
    def delta(self) -> int:
        """By how much it grew."""
        return (self.after or 0) - (self.before or 0)


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """A file that differs; `what` are the properties. A renamed one has another name only.

    `path` is today's, `was` the earlier one where it is another.
    """

    path: str
    how: How
    before: Entry | None
    after: Entry | None
    was: str | None = None
    what: tuple[str, ...] = ()

    @property
    def entry(self) -> Entry:
        """What it is, or was."""
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def delta(self) -> int:
        """By how many bytes the guest grew."""
        return (self.after.size if self.after else 0) - (self.before.size if self.before else 0)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs. None: one of the builds does not have it, and `lacks` says which.

    `parts` and `sizes` are all of them, those that are the same too.
    """

    before: str
    after: str
    facts: tuple[Change, ...]
    checks: tuple[Change, ...]
    packages: tuple[Change, ...]
    parts: tuple[Size, ...]
    config: tuple[Change, ...] | None
    sizes: tuple[Size, ...] | None
    files: tuple[FileChange, ...] | None
    lacks: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Is nothing of what was compared different?"""
        return not (self.facts or self.checks or self.packages or self.config or self.files
                    or any(not part.same for part in self.parts))


def compare(before: Finished, after: Finished) -> Comparison:
    """The differences between two builds."""
    config = sizes = files = None
    if before.config is not None and after.config is not None:
        config = tuple(_changes(before.config, after.config))
    if before.sizes is not None and after.sizes is not None:
        sizes = tuple(sorted(
            (Size(name=name, before=before.sizes.get(name), after=after.sizes.get(name),
                  same=before.sizes.get(name) == after.sizes.get(name))
             for name in {**before.sizes, **after.sizes}), key=lambda size: -abs(size.delta)))
    if before.files is not None and after.files is not None:
        files = tuple(_files(before, after))
    return Comparison(
        before=before.name, after=after.name, facts=tuple(_facts(before, after)),
        checks=tuple(_checks(before.manifest.checks, after.manifest.checks)),
        packages=tuple(_changes(before.manifest.packages, after.manifest.packages)),
        parts=tuple(_parts(before, after)), config=config, sizes=sizes, files=files,
        lacks=(*before.lacks, *after.lacks))


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Change]:
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            yield Change(name=name, before=before.get(name), after=after.get(name))


def _facts(before: Finished, after: Finished) -> Iterator[Change]:
    """In the manifest's own order."""
    was, now = (dict(_leaves(one.facts)) for one in (before, after))
    order = list({**now, **was})
    yield from sorted(_changes(was, now), key=lambda change: order.index(change.name))


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The fields of a manifest, dotted, as text."""
    for name, child in value.items():
        if not prefix and name in LISTED_APART:
            continue
        if isinstance(child, dict) and set(child) == {"sha256", "size"}:
            yield prefix + name, f"sha256:{child['sha256']} ({child['size']} bytes)"
        elif isinstance(child, dict):
            yield from _leaves(child, f"{prefix}{name}.")
        elif isinstance(child, list):
            yield prefix + name, _listed([str(each) for each in child])
        elif isinstance(child, bool):
            yield prefix + name, "yes" if child else "no"
        else:
            yield prefix + name, "none" if child is None else str(child)


def _listed(entries: list[str]) -> str:
    """A list in a line; of a long one (the GPUs of a driver) how long it is, and its digest."""
    if len(entries) <= LONGEST_LIST:
        return ", ".join(entries) or "none"
    return f"{len(entries)} entries (sha256:{hashlib.sha256(repr(entries).encode()).hexdigest()})"


def _checks(before: tuple[str, ...], after: tuple[str, ...]) -> Iterator[Change]:
    for line in before:
        if line not in after:
            yield Change(name="check", before=line, after=None)
    for line in after:
        if line not in before:
            yield Change(name="check", before=None, after=line)


def _parts(before: Finished, after: Finished) -> Iterator[Size]:
    was, now = before.manifest.parts, after.manifest.parts
    for name in {**now, **was}:
        old, new = was.get(name), now.get(name)
        yield Size(name=name, before=old.size if old else None, after=new.size if new else None,
                   same=old == new)


class _Versions:
    """Puts marks in the place of a build's own versions, in paths and in links' targets."""

    def __init__(self, build: Finished) -> None:
        driver = build.facts.get("driver")
        version = driver.get("version") if isinstance(driver, dict) else None
        self.marks = [(text, f"\0{mark}") for mark, text in
                      (("kernel", build.manifest.kernel_release), ("driver", version)) if text]

    def marked(self, text: str) -> str:
        """The text without versions."""
        for version, mark in self.marks:
            text = text.replace(version, mark)
        return text

    def entries(self, files: Mapping[str, Entry]) -> dict[str, Entry]:
        """The files by their paths without versions."""
        return {self.marked(path): entry for path, entry in files.items()}


def _files(before: Finished, after: Finished) -> Iterator[FileChange]:
    """Largest change first; then by path."""
    old, new = _Versions(before), _Versions(after)
    was, now = old.entries(before.files or {}), new.entries(after.files or {})
    found = []
    for key in {**was, **now}:
        one, two = was.get(key), now.get(key)
        if one is None or two is None:
            entry = one or two
            assert entry is not None
            found.append(FileChange(path=entry.path, how=How.REMOVED if two is None else How.ADDED,
                                    before=one, after=two))
            continue
        what = tuple(_what(one, two, old, new))
        moved = one.path != two.path or (one.kind is Kind.LINK and one.content != two.content)
        if what or moved:
            found.append(FileChange(
                path=two.path, how=How.CHANGED if what else How.RENAMED, before=one, after=two,
                was=one.path if one.path != two.path else None, what=what))
    yield from sorted(found, key=lambda change: (-abs(change.delta), change.path))


def _what(one: Entry, two: Entry, old: _Versions, new: _Versions) -> Iterator[str]:
    """The properties in which a file differs, as words."""
    if one.kind is not two.kind:
        yield f"type {one.kind} → {two.kind}"
    elif one.kind is Kind.LINK:
        if old.marked(one.content) != new.marked(two.content):
            yield f"target {one.content} → {two.content}"
    elif one.kind is Kind.FILE:
        if one.content != two.content:
            yield "content"
    elif one.content != two.content:
        yield f"device {one.content} → {two.content}"
    if one.mode != two.mode:
        yield f"mode {one.mode:04o} → {two.mode:04o}"
    if (one.uid, one.gid) != (two.uid, two.gid):
        yield f"owner {one.uid}:{one.gid} → {two.uid}:{two.gid}"
    if one.attributes != two.attributes:
        yield f"attributes {one.attributes or 'none'} → {two.attributes or 'none'}"


def as_json(found: Comparison) -> dict[str, Any]:
    """All of it, as JSON can hold it; sizes in bytes."""
    return {**asdict(found), "same": found.same}
