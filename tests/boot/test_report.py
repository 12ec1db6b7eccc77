"""The report, read back by parsers that are not ours."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from katagpu.boot.facts import SHOWN, Outcome, Verdict, shortened
from katagpu.boot.report import Report

NASTY = "\x1b[31mred\x1b[0m \x00 \x07\x7f\x9b \ud7ff \uffff \U0001f427 <&\"'> ]]> é"
PASSED = Outcome(id="release", boot="cold-plug", title="The release.", seconds=0.25,
                 verdict=Verdict.PASSED, lines=("6.12.117",))
FAILED = Outcome(id="kernel-log", boot="cold-plug", title="The log.", seconds=1.5,
                 verdict=Verdict.FAILED, what="2 lines\nof trouble", lines=(NASTY, "a\nb"),
                 cause="it broke <&>", cure="mend it")
SKIPPED = Outcome(id="hook", boot="hot-plug", title="The hook.", seconds=0.0,
                  verdict=Verdict.SKIPPED, what="there is none")
ALL = Report(recipe="toy", outcomes=[PASSED, FAILED, SKIPPED],
             facts={"qemu": "11.1 \x01", "seconds": 14.2})

# junit-10.xsd of Jenkins' xUnit plugin: children and attributes that each element may have.
SCHEMA: dict[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"testsuite"}, {"name", "time", "tests", "failures", "disabled", "errors"}),
    "testsuite": ({"properties", "testcase", "system-out", "system-err"},
                  {"name", "tests", "failures", "errors", "time", "disabled", "skipped",
                   "timestamp", "hostname", "id", "package"}),
    "properties": ({"property"}, set()),
    "property": (set(), {"name", "value"}),
    "testcase": ({"skipped", "error", "failure", "system-out", "system-err"},
                 {"name", "assertions", "time", "classname", "status", "class", "file", "line"}),
    "failure": (set(), {"type", "message"}),
    "skipped": (set(), {"type", "message"}),
    "system-out": (set(), set()),
}


def obeys(element: ElementTree.Element) -> None:
    """An element and all below it are those of the schema."""
    children, attributes = SCHEMA[element.tag]
    assert set(element.attrib) <= attributes, element.tag
    assert {child.tag for child in element} <= children, element.tag
    for child in element:
        obeys(child)


def junit(report: Report) -> ElementTree.Element:
    data = report.junit()
    assert data.startswith(b"<?xml version='1.0' encoding='utf-8'?>\n") and data.endswith(b">\n")
    top = ElementTree.fromstring(data)
    obeys(top)
    return top


def test_junit() -> None:
    top = junit(ALL)
    assert (top.tag, top.attrib["name"]) == ("testsuites", "boot check of toy")
    first, second = top
    assert first.attrib == {"name": "cold-plug", "tests": "2", "failures": "1", "skipped": "0",
                            "errors": "0", "time": "1.750"}
    assert second.attrib["skipped"] == "1" and second.attrib["tests"] == "1"
    for suite in top:  # counts are those of what is below
        assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
        assert int(suite.attrib["skipped"]) == len(suite.findall("testcase/skipped"))
        assert {each.attrib["name"] for each in suite.iter("property")} == {"qemu", "seconds"}
    passed, failed = first.findall("testcase")
    assert passed.attrib == {"classname": "boot_check.cold-plug", "name": "release",
                             "time": "0.250"}
    assert passed.findtext("system-out") == "The release.\n6.12.117"
    refusal = failed.find("failure")
    assert refusal is not None and refusal.attrib["message"] == "2 lines\nof trouble"
    assert refusal.text == "cause: it broke <&>\ncure: mend it"


def test_what_xml_cannot_have() -> None:
    said = junit(ALL).findtext("testsuite/testcase[@name='kernel-log']/system-out")
    assert said is not None
    assert said.splitlines() == [
        "The log.",
        "\ufffd[31mred\ufffd[0m \ufffd \ufffd\x7f\x9b \ud7ff \ufffd \U0001f427 <&\"'> ]]> é",
        "a", "b"]


def test_lines_of_a_terminal() -> None:
    assert list(ALL.lines()) == [
        "+ cold-plug: release (0.2 s)",
        "x cold-plug: kernel-log (1.5 s)",
        "    The log.",
        "    not so: 2 lines", "      of trouble",
        "    | \ufffd[31mred\ufffd[0m \ufffd \ufffd\ufffd\ufffd \ud7ff \uffff \U0001f427 <&\"'> "
        "]]> é",
        "    | a", "      b",
        "    cause: it broke <&>", "    cure: mend it",
        "- hot-plug: hook (0.0 s): there is none",
        "1 checks passed, 1 failed, 1 had nothing to look at"]


def test_json() -> None:
    found = json.loads(json.dumps(ALL.as_json()))
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert (found["recipe"], found["passed"], found["seconds"]) == ("toy", False, 14.2)
    assert found["checks"][0] == {
        "id": "release", "boot": "cold-plug", "title": "The release.", "verdict": "passed",
        "seconds": 0.25, "lines": ["6.12.117"], "what": "", "cause": "", "cure": ""}


@pytest.mark.parametrize(("outcomes", "passed"), [
    ([PASSED], True), ([PASSED, SKIPPED], True), ([PASSED, FAILED], False), ([FAILED], False),
    ([SKIPPED], False), ([], False)])
def test_passed(outcomes: list[Outcome], passed: bool) -> None:
    """A check that looked at nothing proves nothing."""
    report = Report(recipe="toy", outcomes=outcomes)
    assert report.passed is passed
    junit(report)


def test_evidence_is_shortened() -> None:
    assert shortened(["a", 5]) == ("a", "5")
    assert len(shortened(range(SHOWN))) == SHOWN
    assert shortened(range(SHOWN + 3))[-2:] == (str(SHOWN - 1), "… and 3 more lines")
