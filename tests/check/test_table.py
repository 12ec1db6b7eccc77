"""The table as a whole: the sound toy passes, and every check is described and tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from katagpu.check import CHECKS, Allow, Finding, Severity, check_guest, raise_on
from katagpu.errors import StepError

from .toys import LIB, Toy

HERE = Path(__file__).parent


def test_a_sound_guest_has_no_findings(toy: Toy) -> None:
    assert toy.find() == []


def test_every_check_is_described_and_has_a_test() -> None:
    described = (HERE.parents[1] / "docs/checks.md").read_text()
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py")
                    if path.name != "test_table.py")
    for check in CHECKS:
        assert f"`{check.id}`" in described, check.id
        assert f'"{check.id}"' in tests, check.id
        assert check.find.__doc__, check.id
    assert len({check.id for check in CHECKS}) == len(CHECKS)


def test_raise_on_lists_every_error_with_its_cure() -> None:
    def finding(name: str, severity: Severity) -> Finding:
        return Finding(check=name, severity=severity, what=f"what {name}", where=f"/{name}",
                       cure=f"cure {name}")

    raise_on([finding("c", Severity.WARNING), finding("d", Severity.NOTE)])
    with pytest.raises(StepError) as raised:
        raise_on([finding("a", Severity.ERROR), finding("b", Severity.ERROR),
                  finding("c", Severity.WARNING)])
    said = str(raised.value)
    assert "2 errors" in said and "/a: what a [a]" in said and "cure: cure b" in said
    assert "what c" not in said


def test_raise_on_counts_what_one_cause_brings() -> None:
    many = [Finding(check="module-crc", severity=Severity.ERROR, what="differs",
                    where=f"/m{number}.ko", cure="rebuild") for number in range(400)]
    with pytest.raises(StepError) as raised:
        raise_on([*many, replace(many[0], check="elf-needed", where="/last")])
    said = str(raised.value)
    assert "401 errors" in said and "394 more of [module-crc]" in said and "/last" in said
    assert len(said.splitlines()) < 20


def test_an_allowed_finding_is_a_note_with_the_reason(toy: Toy) -> None:
    (toy.root / LIB / "libnvidia-nvvm.so.4").unlink()
    allow = Allow(check="driver-dlopen", where="*libnvidia-nvvm*", what="*missing*",
                  reason="no PTX here")
    severities = {finding.check: finding.severity for finding in toy.find(allow=(allow,))}
    assert severities["driver-dlopen"] is Severity.NOTE
    other = replace(allow, where="/elsewhere")
    assert Severity.ERROR in {finding.severity for finding in toy.find(allow=(other,))}


def test_missing_facts_are_an_error_and_no_traceback(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="nowhere is not there"):
        toy.find(symvers=tmp_path / "nowhere")
    with pytest.raises(StepError):
        check_guest(tmp_path / "no-root", toy.facts)
