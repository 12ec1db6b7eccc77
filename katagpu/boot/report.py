"""The report of a boot check: for programs (JSON, JUnit's XML) and for people."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from xml.etree import ElementTree

from katagpu.boot.facts import Outcome, Verdict

_CONTROL = re.compile("[\x00-\x08\n-\x1f\x7f-\x9f]")  # a terminal may obey it
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, Char


@dataclass(frozen=True, kw_only=True)
class Report:
    """All outcomes, and what is known of the machines. `facts` are numbers and words by name."""

    recipe: str
    outcomes: Sequence[Outcome]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def count(self, verdict: Verdict) -> int:
        """How many checks ended so."""
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    @property
    def passed(self) -> bool:
        """Did no check fail, and at least one pass?"""
        return self.count(Verdict.FAILED) == 0 < self.count(Verdict.PASSED)

    def as_json(self) -> dict[str, Any]:
        """For the manifest and for programs."""
        return {"recipe": self.recipe, "passed": self.passed, **self.facts,
                "counts": {str(verdict): self.count(verdict) for verdict in Verdict},
                "checks": [asdict(outcome) for outcome in self.outcomes]}

    def junit(self) -> bytes:
        """JUnit's XML, as CI systems read it: a suite for each machine, a case for each check."""
        top = ElementTree.Element("testsuites", name=f"boot check of {self.recipe}")
        for boot in dict.fromkeys(outcome.boot for outcome in self.outcomes):
            mine = [outcome for outcome in self.outcomes if outcome.boot == boot]
            suite = ElementTree.SubElement(
                top, "testsuite", name=boot, tests=str(len(mine)),
                failures=str(sum(each.verdict is Verdict.FAILED for each in mine)),
                skipped=str(sum(each.verdict is Verdict.SKIPPED for each in mine)),
                errors="0", time=f"{sum(each.seconds for each in mine):.3f}")
            properties = ElementTree.SubElement(suite, "properties")
            for name, value in self.facts.items():
                ElementTree.SubElement(properties, "property", name=name, value=_clean(str(value)))
            for outcome in mine:
                _case(suite, outcome)
        ElementTree.indent(top)
        text: bytes = ElementTree.tostring(top, encoding="utf-8", xml_declaration=True)
        return text + b"\n"

    def lines(self) -> Iterator[str]:
        """For the terminal: a line for each check, and all that is known of a failure."""
        for outcome in self.outcomes:
            for line in _lines(outcome):
                # A line of the guest's log may be several, and none may look like one of ours.
                for number, part in enumerate(line.splitlines()):
                    yield _CONTROL.sub("\ufffd", part if number == 0 else f"      {part}")
        yield (f"{self.count(Verdict.PASSED)} checks passed, {self.count(Verdict.FAILED)} failed, "
               f"{self.count(Verdict.SKIPPED)} had nothing to look at")


def _case(suite: ElementTree.Element, outcome: Outcome) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=f"boot_check.{outcome.boot}",
                                  name=outcome.id, time=f"{outcome.seconds:.3f}")
    if outcome.verdict is Verdict.FAILED:
        failure = ElementTree.SubElement(case, "failure", message=_clean(outcome.what))
        failure.text = _clean(f"cause: {outcome.cause}\ncure: {outcome.cure}")
    if outcome.verdict is Verdict.SKIPPED:
        ElementTree.SubElement(case, "skipped", message=_clean(outcome.what))
    said = ElementTree.SubElement(case, "system-out")
    said.text = _clean("\n".join((outcome.title, *outcome.lines)))


def _clean(text: str) -> str:
    """Text without the characters that XML cannot have; a kernel's log may have any."""
    return _NO_XML.sub("\ufffd", text)


def _lines(outcome: Outcome) -> Iterator[str]:
    mark = {Verdict.PASSED: "+", Verdict.FAILED: "x", Verdict.SKIPPED: "-"}[outcome.verdict]
    words = f"{mark} {outcome.boot}: {outcome.id} ({outcome.seconds:.1f} s)"
    if outcome.verdict is Verdict.SKIPPED:
        yield f"{words}: {outcome.what}"
        return
    yield words
    if outcome.verdict is Verdict.FAILED:
        yield f"    {outcome.title}"
        yield f"    not so: {outcome.what}"
        yield from (f"    | {line}" for line in outcome.lines)
        yield f"    cause: {outcome.cause}"
        yield f"    cure: {outcome.cure}"
