"""Which patches apply, and that they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from katagpu.errors import StepError, UserError
from katagpu.patches import Target, apply, lifted, load_series, patch_argv, select

SHIPPED = Path(__file__).parent.parent / "patches"
FIX = """\
Why.

--- a/sub/file.c
+++ b/sub/file.c
@@ -1,3 +1,3 @@
 one
-two
+two, 0
 three
"""
ENTRY = """\
- patch: fix.patch
  target: driver-open
  versions: ["550.163.*", "570.1"]
  when: {grep: {file: include/linux/pci.h, pattern: 'resize\\([^)]*exclude'}}
  reason: because
- patch: fix.patch
  target: driver-closed
  versions: ["*"]
  reason: always
"""


@pytest.fixture
def series(tmp_path: Path) -> Path:
    (tmp_path / "fix.patch").write_text(FIX)
    path = tmp_path / "series.yaml"
    path.write_text(ENTRY)
    return path


def headers(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "headers" / "include" / "linux" / "pci.h"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return tmp_path / "headers"


@pytest.mark.parametrize(("target", "version", "header", "count"), [
    (Target.DRIVER_OPEN, "550.163.01", "int resize(int a,\n int exclude);", 1),
    (Target.DRIVER_OPEN, "570.1", "int resize(int a,\n int exclude);", 1),
    (Target.DRIVER_OPEN, "570.10", "int resize(int a,\n int exclude);", 0),
    (Target.DRIVER_OPEN, "550.163.01", "int resize(int a); int exclude;", 0),
    (Target.DRIVER_CLOSED, "1", "", 1),
    (Target.KERNEL, "6.12.117", "int resize(int exclude);", 0),
])
def test_a_patch_is_taken_by_target_version_and_condition(
        series: Path, tmp_path: Path, target: Target, version: str, header: str, count: int,
) -> None:
    chosen = select(load_series(series), target, version, headers(tmp_path, header))
    assert [each.path.name for each in chosen] == ["fix.patch"] * count


def test_the_kernels_that_patches_lift(series: Path) -> None:
    series.write_text(ENTRY.replace("reason: because", "reason: because\n  lifts: ['6.15']"))
    found = load_series(series)
    assert lifted(found, Target.DRIVER_OPEN, "550.163.01") == {"6.15"}
    assert lifted(found, Target.DRIVER_OPEN, "570.10") == frozenset()
    assert lifted(found, Target.DRIVER_CLOSED, "550.163.01") == frozenset()


def test_a_condition_on_a_missing_header_is_an_error(series: Path, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"include/linux/pci\.h"):
        select(load_series(series), Target.DRIVER_OPEN, "550.163.01", tmp_path)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("  reason: because\n", "", "entry 1 must have the fields"),
    ("  reason: because\n", "  reason: ''\n", "entry 1 gives no reason"),
    ("driver-open", "driver", "target is one of kernel, driver-open, driver-closed, not 'driver'"),
    ("fix.patch", "gone.patch", "there is no patch"),
    ('["*"]', "'*'", "entry 2: versions is a list"),
    ("  reason: always\n", "  reason: always\n  lifts: '6.15'\n", "entry 2: lifts is a list"),
    ("  reason: always\n", "  reason: always\n  if: 1\n", "entry 2 must have"),
    ("file: include", "files: include", "when is grep: with file and pattern"),
    ("resize\\(", "resize(", "not a regular expression"),
    (ENTRY, "a: 1", "a patch series is a list"),
    (ENTRY, "[", "cannot be read"),
])
def test_a_bad_series_is_a_user_error(series: Path, old: str, new: str, message: str) -> None:
    series.write_text(ENTRY.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        load_series(series)


def test_the_command_line() -> None:
    assert patch_argv(Path("/p/fix.patch"), Path("/src")) == [
        "patch", "-p1", "--forward", "--fuzz=0", "--reject-file=-", "--no-backup-if-mismatch",
        "--directory=/src", "--input=/p/fix.patch"]


def source(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "source" / "sub" / "file.c"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file


def test_a_patch_is_applied_once(series: Path, tmp_path: Path) -> None:
    file = source(tmp_path, "one\ntwo\nthree\n")
    patches = load_series(series)[:1]
    apply(patches, tmp_path / "source", log=tmp_path / "log")
    assert file.read_text() == "one\ntwo, 0\nthree\n"
    with pytest.raises(StepError, match="previously applied"):
        apply(patches, tmp_path / "source", log=tmp_path / "log")
    assert file.read_text() == "one\ntwo, 0\nthree\n"
    assert [each.name for each in file.parent.iterdir()] == ["file.c"]


def test_a_patch_that_does_not_fit_exactly_is_refused(series: Path, tmp_path: Path) -> None:
    file = source(tmp_path, "one\ntwo\nthree changed\n")
    with pytest.raises(StepError, match="FAILED"):
        apply(load_series(series)[:1], tmp_path / "source", log=tmp_path / "log")
    assert file.read_text() == "one\ntwo\nthree changed\n"


@pytest.mark.parametrize("target", list(Target))
def test_a_shipped_series_is_complete(target: Target) -> None:
    directory = SHIPPED / target
    patches = load_series(directory / "series.yaml")
    assert {each.path for each in patches} == set(directory.glob("*.patch"))
    assert {each.target for each in patches} <= {target}
