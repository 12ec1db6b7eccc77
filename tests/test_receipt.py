"""Receipts: a build with nothing to do is known by the marks of its files, and by nothing less."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu import receipt


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one result, and a receipt for `build_image`."""
    (tmp_path / "katagpu/stages").mkdir(parents=True)
    (tmp_path / "katagpu/stages/kernel.py").write_text("1")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/toy.yaml").write_text("name: toy")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/image").write_text("image")
    (tmp_path / "out/link").symlink_to("image")
    sign(tmp_path, {})
    return tmp_path


def sign(root: Path, values: dict[str, str], environment: dict[str, str] | None = None) -> None:
    """Write the receipt of a run with these parameters."""
    files: list[str | Path] = [*receipt.inputs(root), root / "out/image", root / "out/link"]
    receipt.write(receipt.place(root, "build_image", values, environment or {}), "all there",
                  receipt.look(files))


def ask(root: Path, *argv: str, **environment: str) -> list[str] | None:
    """What a command line is answered."""
    return receipt.nothing_to_do(root, argv, "build_image", environment)


def test_nothing_to_do(root: Path) -> None:
    assert ask(root) == ask(root, "build_image") == ["all there"]
    assert ask(root, "build_image", "build_image") == ["all there"] * 2


def edit(path: Path, text: str) -> None:
    """Other text of the same length, and the times of before."""
    before = path.stat()
    time.sleep(0.01)  # the kernel's clock for files ticks at 4 ms
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [
    lambda root: (root / "recipes/toy.yaml").write_text("name: other"),
    lambda root: edit(root / "recipes/toy.yaml", "name: tob"),
    lambda root: (root / "recipes/new.yaml").touch(),
    lambda root: (root / "katagpu/stages/kernel.py").unlink(),
    lambda root: (root / "patches").mkdir(),
    lambda root: (root / "dodo.py").touch(),
    lambda root: (root / "out/image").unlink(),
    lambda root: edit(root / "out/image", "IMAGE"),
    lambda root: (root / "out/link").unlink(),
    lambda root: next((root / "out/.receipts").iterdir()).write_text("{"),
    lambda root: next((root / "out/.receipts").iterdir()).write_text("[]"),
    lambda root: next((root / "out/.receipts").iterdir()).unlink(),
])
def test_every_doubt_means_the_full_answer(root: Path, change: Callable[[Path], object]) -> None:
    change(root)
    assert ask(root) is None


def test_python_s_caches_do_not_count(root: Path) -> None:
    cache = root / "katagpu/__pycache__"
    cache.mkdir()
    sign(root, {})
    (cache / "x.pyc").touch()
    assert ask(root) == ["all there"]


@pytest.mark.parametrize("argv", [
    ["recipe=other"], ["driver=1.2", "build_image"], ["build_kernel"], ["build_image", "list"],
    ["-a", "build_image"], ["run", "build_image"], ["build_image", "-n1"],
])
def test_other_command_lines_are_not_answered(root: Path, argv: list[str]) -> None:
    assert ask(root, *argv) is None


def test_parameters_and_extra_packages_have_receipts_of_their_own(root: Path) -> None:
    assert ask(root, EXTRA_PKGS="gcc") is None
    sign(root, {"recipe": "toy", "driver": "1"}, {"EXTRA_PKGS": "gcc make"})
    said = ask(root, "driver=1", "recipe=toy", "build_image", EXTRA_PKGS=" gcc  make")
    assert said == ["all there"]


def test_what_changed_during_the_build_is_seen_afterwards(root: Path) -> None:
    marks = receipt.look(receipt.inputs(root))
    time.sleep(0.01)
    (root / "recipes/toy.yaml").write_text("changed meanwhile")
    receipt.write(receipt.place(root, "build_image", {}, {}), "all there", marks)
    assert ask(root) is None
