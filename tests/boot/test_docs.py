"""docs/boot.md lists the checks that there are."""

from __future__ import annotations

from pathlib import Path

from katagpu.boot import docs
from katagpu.boot.table import TABLE, name, title
from katagpu.chips import KNOWN


def test_the_table_of_checks_is_that_of_the_code(repository: Path) -> None:
    text = (repository / "docs/boot.md").read_text()
    assert text == docs.updated(text), "run: .venv/bin/python -m katagpu.boot.docs docs/boot.md"
    for machine, checks in TABLE.items():
        for check in checks:
            (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name(check)}` |")]
            assert machine in row and title(check) in row


def test_each_check_has_a_title_and_an_id_of_its_own() -> None:
    for checks in TABLE.values():
        assert len({name(check) for check in checks}) == len(checks)
        assert all(title(check).endswith(".") for check in checks)
    assert "Ünknown" not in docs.updated(f"a\n{docs.BEGIN}\nÜnknown\n{docs.END}\nz")


def test_the_known_devices_are_named(repository: Path) -> None:
    words = (repository / "docs/boot.md").read_text()
    lacking = [f"{device:04x}" for device in KNOWN if f"{device:04x}" not in words]
    assert not lacking
