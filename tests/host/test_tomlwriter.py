"""What is written as TOML is read as it was."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from katagpu.host import tomlreader, tomlwriter

DATA = Path(__file__).parent / "data" / "kata"
VALUES: list[dict[str, Any]] = [
    {}, {"a": 1, "b": True, "c": "x\n\"\\\x7fé", "d": [1, [2.5, "x"]], "e": -0.5},
    {"t": {"x": 1, "u": {"v": {}}}, "top": 2}, {"a b": {"c.d": 1, "": 2, "é": 3}},
    {"t": {"disks": [{"name": "a", "more": {"x": 1}}, {"name": "b"}], "after": {"y": 1}}, "z": []},
    {"list": [{"x": 1}, 2], "one": [{"a": [{"b": 1}]}]}, {"inf": float("inf")}]


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_round_trip(values: dict[str, Any]) -> None:
    text = tomlwriter.dumps(values)
    assert tomllib.loads(text) == values
    assert tomlreader.loads(text) == values


@pytest.mark.parametrize("path", sorted(DATA.glob("*.toml")), ids=lambda path: path.name)
def test_configurations_in_kata_s_shape(path: Path) -> None:
    values = tomllib.loads(path.read_text())
    assert tomllib.loads(tomlwriter.dumps(values)) == values


def test_a_date_stays_one() -> None:
    values = tomllib.loads("d = 2026-11-27T09:13:36Z")
    assert tomllib.loads(tomlwriter.dumps(values)) == values
