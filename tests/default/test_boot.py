"""The default guest in a virtual machine, with a GPU that is emulated: it passes, twice for one."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from katagpu import artifacts
from katagpu.boot import table
from katagpu.context import Context

WITHOUT_A_GPU_OF_ITS_OWN = {  # nothing to look at in the default guest
    "verity", "extension", "signatures", "agent-runs", "agent-answers", "agent-details", "hook"}


@pytest.fixture(scope="module")
def results(context: Context) -> dict[str, bytes]:
    """What the check leaves, by the file's name."""
    return {item.name: (context.directory / item.name).read_bytes()
            for item in context.booting.check()}


def test_every_check_passes_that_has_something_to_look_at(results: dict[str, bytes]) -> None:
    report = json.loads(results["boot-check.json"])
    assert "over vfio-user" in report["gpu"], "a QEMU without it makes the lesser check"
    verdicts = {(each["boot"], each["id"]): each["verdict"] for each in report["checks"]}
    assert list(verdicts) == [(boot, table.name(check)) for boot, checks in table.TABLE.items()
                              for check in checks]
    skipped = {name for (_boot, name), verdict in verdicts.items() if verdict == "skipped"}
    assert skipped == WITHOUT_A_GPU_OF_ITS_OWN
    assert {verdict for verdict in verdicts.values() if verdict != "skipped"} == {"passed"}


def test_the_evidence_is_the_guests(results: dict[str, bytes]) -> None:
    report = json.loads(results["boot-check.json"])
    lines = {each["id"]: "\n".join(each["lines"]) for each in report["checks"]}
    assert "NVIDIA A30" in lines["cold-model"]
    assert "BAR1 64-bit 32 GiB at 0x" in lines["hot-addresses"]
    assert "RmInitAdapter failed! (0x62:" in lines["firmware"]
    assert "pciehp" in lines["hot-plug"]
    assert "GPUs 0, 1" in lines["cdi-again"]
    for boot in table.TABLE:
        assert report[f"{boot} memory used"] > 0 and report[f"{boot} ready after"] > 0


def test_junit_has_a_case_for_each(results: dict[str, bytes]) -> None:
    top = ElementTree.fromstring(results["boot-check.xml"])
    assert [suite.get("name") for suite in top] == list(table.TABLE)
    for suite in top:
        cases = suite.findall("testcase")
        assert suite.get("tests") == str(len(cases)) and suite.get("failures") == "0"
        assert all((case.findtext("system-out") or "").strip() for case in cases)


def test_it_is_kept_and_recorded(context: Context, results: dict[str, bytes]) -> None:
    again = Context(context.root, {}, environment={})
    checked = again.booting.checked()
    assert checked is not None and checked.reason("boot_check") == "hit"
    manifest = json.loads((context.directory / "manifest.json").read_text())
    found = manifest["boot_check"]
    assert found["passed"] is True
    assert found["checks"]["cold-plug: cold-model"] == "passed"
    assert found["counts"]["failed"] == 0
    assert artifacts.CHECKED in again.artifacts("build_image")
    assert results["boot-check.txt"].decode().splitlines()[-1].endswith("had nothing to look at")
