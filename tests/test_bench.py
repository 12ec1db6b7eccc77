"""The arithmetic of `bench`."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import bench, recipe
from katagpu.context import Context
from katagpu.keys import PACKAGE
from katagpu.schema import KernelModule
from tests.test_stages_argv import Recorder, stage


def test_a_ratio_is_the_median_of_pairs() -> None:
    assert bench.ratio([(2.0, 1.0), (30.0, 10.0), (1.0, 1.0)]) == 2.0


def test_the_other_module_in_any_recipe(repository: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    for name in ("recipes", "keys", "kernel-configs"):
        if (repository / name).is_dir():
            shutil.copytree(repository / name, root / name)
    path = root / "recipes/debian-trixie.yaml"
    text = path.read_text()
    section = '  - {source: debian, version: "535.216.01"}'
    for written in (text, text.replace("  kernel_module: open\n", ""),
                    f"{text}\nother_drivers:\n{section}\n"):
        for version in (None, "535.216.01"):
            path.write_text(written)
            plain = recipe.load(path.stem, root)
            was = recipe.load(path.stem, root, driver=version)
            path.write_text(bench.other_module(plain, was.driver.version, KernelModule.CLOSED))
            found = recipe.load(path.stem, root, driver=version)
            assert found.driver.kernel_module is KernelModule.CLOSED
            assert replace(found.driver, kernel_module=KernelModule.OPEN) == was.driver


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


COLD_KERNEL = {"wall": 600.0, "ccache": {"hits": 0, "misses": 2900}}
COLD_DRIVER = {"wall": 100.0, "ccache": {"hits": 0, "misses": 400}, "conftest_kept": False,
               "times": {"conftest": 56.0, "compile": 41.0}}


@pytest.mark.parametrize(("name", "change", "why"), [
    ("kernel", {}, None), ("driver_modules", {}, None),
    ("kernel", {"ccache": {"hits": 2000, "misses": 900}},
     "2000 of 2900 compilations came from ccache"),
    ("driver_modules", {"conftest_kept": True}, "the results of conftest were kept"),
    ("kernel", {"ccache": ...}, "nothing is known of ccache's part"),
    ("base", {"ccache": ...}, None),
])
def test_a_time_is_cold_only_where_no_cache_helped(
        name: str, change: dict[str, Any], why: str | None) -> None:
    record = {**(COLD_DRIVER if name == "driver_modules" else COLD_KERNEL), **change}
    known = {field: value for field, value in record.items() if value is not ...}
    assert bench.warmth(name, known) == why


NEEDS = {"toolchain": [], "base": [], "kernel": ["toolchain"], "driver_modules": ["kernel"],
         "image": ["base", "driver_modules"]}


def test_a_whole_cold_build_is_between_the_longest_way_and_the_sum() -> None:
    records: dict[str, dict[str, Any]] = {
        "toolchain": {"wall": 60.0}, "base": {"wall": 75.0}, "kernel": COLD_KERNEL,
        "driver_modules": COLD_DRIVER, "image": {"wall": 20.0}}
    [line] = bench.cold_lines(records, NEEDS.__getitem__)
    assert line == ("whole cold build_image: 13 min 00 s on the longest way, 14 min 15 s one stage "
                    "after another; at most 40 min 00 s: within")
    records["kernel"] = {"wall": 2500.0, "ccache": {"hits": 0, "misses": 9}}
    assert "MISSES" in next(bench.cold_lines(records, NEEDS.__getitem__))
    records["kernel"] = {"wall": 20.0, "ccache": {"hits": 7, "misses": 2}}
    assert list(bench.cold_lines(records, NEEDS.__getitem__)) == [
        "whole cold build_image: not known: kernel (7 of 9 compilations came from ccache)"]


def test_where_the_time_of_a_module_build_went() -> None:
    assert bench.driver_line(COLD_DRIVER) == (
        "driver modules, wall: conftest 56.0 s, compiling 41.0 s, all 100.0 s")
    assert "conftest kept from before, compiling" in bench.driver_line(
        {**COLD_DRIVER, "conftest_kept": True})
    assert "nothing is known" in bench.driver_line({"wall": 1.0})


@pytest.mark.parametrize(("made", "said"), [
    (["kernel_source"], "a comment: made kernel_source; and nothing after it"),
    (["kernel_source", "kernel"],
     "a comment: made kernel_source, kernel; MISSES: it should be kernel_source alone"),
    ([], "a comment: made nothing; MISSES: it should be kernel_source alone"),
])
def test_a_stage_with_the_same_output_runs_alone(made: list[str], said: str) -> None:
    steps: list[dict[str, Any]] = [{"step": "lock", "wall": 1.0}, {"stage": "image", "hit": True}]
    build = {"steps": [*steps, *({"stage": name, "hit": False} for name in made)]}
    assert bench.cutoff_line("a comment", build, "kernel_source") == said


def test_cpu_seconds_are_compared() -> None:
    assert bench.cpu_line("kernel", 600.0, 1200.0, 0.6) == (
        "kernel: 0.50 (within 0.6); 600 over 1200 CPU seconds")
    assert "MISSES 0.1" in bench.cpu_line("warm", 2.0, 10.0, 0.1)


def test_the_yardstick_is_built_as_the_kernel_is(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe.load("debian-trixie", PACKAGE.parent)
    monkeypatch.setattr("katagpu.stages.kbuild.tree", lambda build: build.directory("linux"))
    monkeypatch.setattr("katagpu.bench.jobs", lambda: 7)
    build = Recorder(stage(chosen, "kernel"), tmp_path)
    build.ccache = False
    bench.defconfig(build)
    assert build.ran == [
        ["make", "ARCH=x86_64", "-j7", "-C", "/usr/src/linux", "O=/katagpu/kernel/build",
         "x86_64_defconfig"],
        ["make", "ARCH=x86_64", "-j7", "bzImage", "modules"]]
    assert all(env["CCACHE_DISABLE"] == "1" for env in build.environments)
