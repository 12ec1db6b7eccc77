"""What is taken out of an overlay after an installer has run in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from katagpu import harvest


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Path]:
    """A merged root with /lib as a link, and the upper directory in which an installer wrote."""
    root, upper = tmp_path / "root", tmp_path / "upper"
    for top in (root, upper):
        (top / "usr/lib/modules/6.1/video").mkdir(parents=True)
        (top / "usr/bin").mkdir()
        (top / "usr/lib/libnew.so.1").write_text("library")
        (top / "usr/lib/modules/6.1/video/nvidia.ko").write_text("module")
        (top / "usr/lib/libnew.so").symlink_to("libnew.so.1")
        (top / "usr/bin/nvidia-modprobe").write_text("program")
        (top / "usr/bin/nvidia-modprobe").chmod(0o4755)
    (root / "lib").symlink_to("usr/lib")
    (root / "usr/bin/of-the-base").write_text("was there before")
    return root, upper


def test_taken_files_are_moved_without_their_user_id(merged: tuple[Path, Path],
                                                     tmp_path: Path) -> None:
    root, upper = merged
    target = tmp_path / "taken"
    target.mkdir()
    before = os.umask(0o077)
    try:
        answer = harvest.take(root, str(upper), str(target), [
            "/lib/libnew.so.1", "/usr/lib/libnew.so", "/usr/bin/nvidia-modprobe",
            "/usr/bin/of-the-base", "/usr/bin"])
    finally:
        os.umask(before)
    assert answer == {"missing": ["/usr/bin/of-the-base", "/usr/bin"],
                      "taken": {"/lib/libnew.so.1": 7, "/usr/bin/nvidia-modprobe": 7}}
    assert (target / "usr/lib/libnew.so").readlink() == Path("libnew.so.1")
    assert (target / "usr/bin/nvidia-modprobe").stat().st_mode & 0o7777 == 0o755
    assert (target / "usr/lib").stat().st_mode & 0o777 == 0o755
    assert not (upper / "usr/lib/libnew.so.1").exists()


def test_files_are_found_by_name_where_the_installer_put_them(merged: tuple[Path, Path]) -> None:
    root, upper = merged
    assert harvest.find(root, str(upper), ["libnew.so.1", "of-the-base"]) == {
        "libnew.so.1": ["/usr/lib/libnew.so.1"]}
    assert harvest.find(root, str(upper), []) == {}


def test_modules_and_texts(merged: tuple[Path, Path]) -> None:
    root, _upper = merged
    assert harvest.modules(root, "/lib/modules/6.1") == ["/lib/modules/6.1/video/nvidia.ko"]
    assert harvest.modules(root, "/lib/modules/6.2") == []
    assert harvest.read(root, "/usr/bin/of-the-base") == "was there before"
    assert harvest.read(root, "/var/log/none") == ""
