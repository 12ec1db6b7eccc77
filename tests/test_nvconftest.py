"""Kept results of NVIDIA's conftest, with the real make and rules of the same shape as NVIDIA's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from katagpu import nvconftest

MAKEFILE = """\
TESTS := a b
all: conftest/functions.h
conftest/uts_release: FORCE
\t@mkdir -p conftest
\t@[ -f $@ ] || echo release > $@
conftest/header_presence/x.part: conftest.sh conftest/uts_release
\t@mkdir -p $(dir $@)
\t@echo header >> ran; echo 1 > $@
conftest/headers.h: conftest/header_presence/x.part
\t@cat $^ > $@
conftest/compile-tests/%.h: conftest.sh conftest/headers.h
\t@mkdir -p $(dir $@)
\t@echo $* >> ran; echo $* > $@
conftest/functions.h: $(TESTS:%=conftest/compile-tests/%.h)
\t@cat $^ > $@
FORCE:
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


def make_source(directory: Path, tests: str = "a b") -> Path:
    (directory / "nvidia").mkdir(parents=True)
    (directory / "Makefile").write_text(MAKEFILE.replace("a b", tests))
    (directory / "conftest.sh").write_text("#!/bin/sh\n")
    (directory / "Kbuild").write_text("ccflags-y += -Wall\n")
    (directory / "header-presence-tests.mk").write_text("NV_HEADER_PRESENCE_TESTS = x\n")
    (directory / "nvidia/nvidia.Kbuild").write_text("NVIDIA_CFLAGS += -O2\n")
    return directory


def build(source: Path) -> list[str]:
    """Names of the probes that make ran."""
    ran = source / "ran"
    ran.unlink(missing_ok=True)
    subprocess.run(["make", "-C", str(source)], check=True, stdout=subprocess.DEVNULL)
    return ran.read_text().split() if ran.exists() else []


def test_make_takes_what_was_kept(source: Path, tmp_path: Path) -> None:
    assert build(source) == ["header", "a", "b"]
    nvconftest.keep(source, tmp_path / "cache", tmp_path)
    again = make_source(tmp_path / "again")
    assert nvconftest.restore(tmp_path / "cache", again)
    assert build(again) == []
    assert (again / "conftest/functions.h").read_text() == "a\nb\n"


def test_a_probe_that_was_not_kept_runs_alone(source: Path, tmp_path: Path) -> None:
    build(source)
    nvconftest.keep(source, tmp_path / "cache", tmp_path)
    more = make_source(tmp_path / "more", "a b c")
    nvconftest.restore(tmp_path / "cache", more)
    assert build(more) == ["c"]


def test_nothing_kept(source: Path, tmp_path: Path) -> None:
    assert not nvconftest.restore(tmp_path / "cache", source)


@pytest.mark.parametrize("name", [*nvconftest.RULES, "nvidia/nvidia.Kbuild"])
def test_the_key_knows_rules_and_flags(source: Path, name: str) -> None:
    before = nvconftest.key(source, "headers")
    path = source / name
    path.write_text(path.read_text() + "ccflags-y += -DNEW\n")
    assert nvconftest.key(source, "headers") != before


def test_the_key_knows_headers_and_not_sources(source: Path) -> None:
    before = nvconftest.key(source, "headers")
    assert nvconftest.key(source, "other headers") != before
    (source / "nvidia/nv.c").write_text("int x;\n")
    assert nvconftest.key(source, "headers") == before


def test_how_long_the_probes_took(source: Path) -> None:
    assert nvconftest.seconds(source, 1000.0) == 0.0  # nothing was probed
    place = source / "conftest/compile-tests"
    place.mkdir(parents=True)
    for number, time in enumerate((1010.0, 1056.5, 1030.0)):
        (place / f"{number}.h").touch()
        os.utime(place / f"{number}.h", (time, time))
    assert nvconftest.seconds(source, 1000.0) == 56.5
    assert nvconftest.seconds(source, 2000.0) == 0.0
