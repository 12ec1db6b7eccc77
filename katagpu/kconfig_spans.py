"""Symbols that only some kernels have: sections of a fragment that say which.

    #: new in 6.10              kernels before 6.10 may lack these
    #: gone in 6.9              kernels from 6.9 on may lack these
    #: new in 5.19, gone in 6.9
    #: end                      what follows is asked of every kernel

A section ends at the next such line or with the file. Its symbols are asked of every kernel, since
stable releases take many of them over; only the audit forgives a kernel outside of the span
that has no such symbol, or no prompt for it. For Kconfig itself these lines are comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from katagpu.errors import UserError
from katagpu.kconfig import Finding, Kind
from katagpu.kconfig_tree import Tree, read_tree

Version = tuple[int, ...]

_MARK = "#:"
_SPAN = re.compile(r"(?:new in ([\d.]+))?(?:(?:^|(?<=\d), )gone in ([\d.]+))?")
_NUMBER = re.compile(r"\d+(?:\.\d+){1,2}")


@dataclass(frozen=True, kw_only=True)
class Span:
    """The kernels that have a section's symbols: from `new` on, and before `gone`."""

    new: str | None = None
    gone: str | None = None

    def covers(self, kernel: str) -> bool:
        """Whether a kernel of this version (as `6.12.117`) has to have the symbols."""
        return ((self.new is None or _version(kernel) >= _version(self.new))
                and not self.is_over(kernel))

    def is_over(self, kernel: str) -> bool:
        """Whether a kernel comes after the last one that has to have the symbols."""
        return self.gone is not None and _version(kernel) >= _version(self.gone)


def _version(text: str) -> Version:
    found = _NUMBER.match(text)
    assert found is not None, text
    return tuple(int(part) for part in found[0].split("."))


def read_spans(path: Path) -> dict[int, Span]:
    """The span of each line of a fragment that is in a section.

    Raises `UserError` for a section line that is not understood.
    """
    found: dict[int, Span] = {}
    current: Span | None = None
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.startswith(_MARK):
            current = _parse(line.removeprefix(_MARK).strip(), f"{path}:{number}")
        elif current is not None:
            found[number] = current
    return found


def _parse(text: str, where: str) -> Span | None:
    if text == "end":
        return None
    match = _SPAN.fullmatch(text)
    numbers = [number for number in match.groups() if number] if match else []
    if not numbers or not all(_NUMBER.fullmatch(number) for number in numbers):
        raise UserError(f"{where}: this section is not understood: {text!r}", hint=(
            "`#: new in 6.10`, `#: gone in 6.9`, `#: new in 5.19, gone in 6.9`, or `#: end`"))
    assert match is not None
    span = Span(new=match[1], gone=match[2])
    if span.new and span.gone and _version(span.new) >= _version(span.gone):
        raise UserError(f"{where}: no kernel is from {span.new} on and before {span.gone}")
    return span


def forgive(findings: Sequence[Finding], paths: Iterable[Path], kernel: str, kernel_tree: Path,
            arch: str) -> list[Finding]:
    """The findings after the sections of the fragments `paths` forgave this kernel what it lacks.

    What a kernel does not have yet becomes an allowed finding; of what is gone nothing is left to
    say. `kernel` is the version, `kernel_tree` the source. Raises `UserError` as `read_spans` does.
    """
    spans = {path: read_spans(path) for path in paths}
    tree: Tree | None = None
    result = []
    for finding in findings:
        span = _span(finding, spans)
        if span is not None and not span.covers(kernel):
            if finding.kind is Kind.LOST and tree is None:
                tree = read_tree(kernel_tree, arch)
            if finding.kind is Kind.UNKNOWN or (tree and not _asks(tree, finding.symbol)):
                if span.is_over(kernel):
                    continue
                finding = replace(finding, kind=Kind.ALLOWED, message=(
                    f"{finding.request}: new in Linux {span.new}, and not in {kernel}"))
        result.append(finding)
    return result


def _span(finding: Finding, spans: Mapping[Path, Mapping[int, Span]]) -> Span | None:
    request = finding.request
    if finding.kind not in (Kind.UNKNOWN, Kind.LOST) or request is None:
        return None
    return spans.get(request.path, {}).get(request.line)


def _asks(tree: Tree, symbol: str) -> bool:
    return any(definition.prompt for definition in tree.definitions.get(symbol, ()))
