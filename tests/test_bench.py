"""The arithmetic of `bench`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from katagpu import bench
from katagpu.context import Context


def test_a_ratio_is_the_median_of_pairs() -> None:
    assert bench.ratio([(2.0, 1.0), (30.0, 10.0), (1.0, 1.0)]) == 2.0


def test_both_are_timed_in_turns_after_a_round_that_does_not_count() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.05)

    pairs = bench.in_turns(slow, lambda: order.append("quick"), 2)
    assert order == ["slow", "quick"] * 3
    assert all(0.05 <= one < 5 and other < one for one, other in pairs)


@pytest.mark.parametrize(("pair", "word"), [((1.1, 1.0), "within"), ((1.3, 1.0), "MISSES")])
def test_a_target_is_kept_or_not(pair: tuple[float, float], word: str) -> None:
    line = bench.ratio_line("restore", [pair], 1.2)
    assert line == f"restore: {pair[0]:.2f} ({word} 1.2); {pair[0]:.3f} s over 1.000 s"


def test_stages_are_summed() -> None:
    lines = list(bench.stage_lines({"a": {"wall": 1.0, "cpu": 2.0}, "b": {"wall": 0.5}}))
    assert lines[-1].split() == ["sum", "1.5", "2.0"]
    assert len({len(line) for line in lines}) == 1


def test_sizes_are_sorted_with_their_shares() -> None:
    lines = list(bench.size_lines(200_000_000, {"small": 100, "large": 300}))
    assert lines[0] == "image: 200.0 MB (at most 300.0 MB)"
    assert [line.split()[-1] for line in lines[1:]] == ["large", "small", "unpacked"]
    assert "75.0%" in lines[1]
    assert list(bench.size_lines(0, {}))


@pytest.mark.parametrize(("modules", "said"), [
    ({"hit": False, "wall": 90.0}, "flavour: 1.10 (within 1.15); 110.0 s over 100.0 s of "
     "driver_modules, image; made: driver_modules, rootfs, image"),
    ({"hit": True}, "flavour: not measured, the store has it already (driver_modules)"),
])
def test_a_change_is_compared_with_what_it_needs(modules: dict[str, Any], said: str) -> None:
    build = {"steps": [
        {"step": "lock: resolve", "wall": 9.0}, {"stage": "kernel", "hit": True},
        {"stage": "driver_modules", **modules},
        {"stage": "rootfs", "hit": False, "wall": 5.0},
        {"stage": "image", "hit": False, "wall": 10.0}]}
    assert bench.change_line("flavour", 110.0, build, ["driver_modules", "image"]) == said


def test_what_was_asked_for_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[object]] = []

    def call(argv: list[object], _cwd: Path) -> None:
        called.append(argv)
        time.sleep(0.001)

    monkeypatch.setattr(bench, "_call", call)
    asked = {"all": "1", "recipe": "ubuntu-lts", "driver": "580.95.05"}
    bench._no_op(Context(tmp_path, asked, {}), rounds=1)
    assert called[0] == [tmp_path / "doitw", "recipe=ubuntu-lts", "driver=580.95.05", "build_image"]
    called.clear()
    bench._no_op(Context(tmp_path, {}, {}), rounds=1)
    assert called[0] == [tmp_path / "doitw", "build_image"]
