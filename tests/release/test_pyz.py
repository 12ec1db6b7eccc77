"""The installer as one file: the same bytes, an old Python, nothing but the standard library."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from katagpu.release import installer, pyz
from tests import hosttree
from tests.release import toyrelease
from tests.release.conftest import Keys

OLD = ("python3.9", "python3.10", str(Path.home() / ".pyenv/versions/3.9.18/bin/python"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """It."""
    path = tmp_path / "katagpu-install.pyz"
    pyz.write(path)
    return path


def test_the_same_bytes(file: Path, tmp_path: Path) -> None:
    pyz.write(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize(("name", "packed"), [
    *((name, pyz.MODULES) for name in pyz.MODULES),
    *((name, pyz.HOST_MODULES) for name in sorted(pyz.HOST_MODULES))])
def test_modules_are_of_the_standard_library_and_of_python_3_9(
        name: str, packed: tuple[str, ...]) -> None:
    tree = ast.parse((pyz.PACKAGE / name).read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom) else [])
        for word in found:
            top, *inner = word.split(".")
            if top != "katagpu":
                assert top in sys.stdlib_module_names | {"__future__"}, word
            else:
                paths = {"/".join(inner) + ".py", "/".join(inner[:-1]) + ".py"}
                paths.add("/".join([*inner, "__init__.py"]))
                assert paths & set(packed), f"{name} imports {word}, which is not packed"


def works(python: str, file: Path, tmp_path: Path, keys: Keys) -> None:
    """Install, status, rollback, uninstall with nothing but this Python and openssl."""
    first = toyrelease.make(tmp_path / "r", "1.0.0", keys.signer)
    second = toyrelease.make(tmp_path / "r", "1.1.0", keys.signer, "two")

    def run(*words: object) -> tuple[int, str]:
        said = subprocess.run(
            [python, "-I", "-W", "error", file, *map(str, words), "--prefix", tmp_path / "host"],
            env={"PATH": "/usr/bin:/bin"}, cwd="/", capture_output=True, text=True)
        assert "Traceback" not in said.stderr
        return said.returncode, said.stdout + said.stderr

    (tmp_path / "host").mkdir()
    for place in (first, second):
        assert run("install", place, "--key", keys.public)[0] == 0
    assert "current: toy-1.1.0 (intact)" in run("status")[1]
    assert run("rollback")[0] == 0
    assert "current: toy-1.0.0 (intact)" in run("status")[1]
    status, said = run("install", tmp_path / "none", "--unverified")
    assert status == 1
    assert "error: there is no release" in said
    assert run("uninstall")[0] == 0
    assert not [path for path in (tmp_path / "host").rglob("*") if not path.is_dir()]


def test_on_this_python(file: Path, tmp_path: Path, keys: Keys) -> None:
    works(sys.executable, file, tmp_path, keys)


def test_on_an_old_python(file: Path, tmp_path: Path, keys: Keys) -> None:
    for name in OLD:
        found = shutil.which(name)
        if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
            works(found, file, tmp_path, keys)
            return
    pytest.skip("there is no Python 3.9 or 3.10 here")


@pytest.fixture
def host_file(tmp_path: Path) -> Path:
    """`katagpu-host.pyz`."""
    path = tmp_path / "katagpu-host.pyz"
    pyz.write_host(path)
    return path


def test_the_host_file_has_the_same_bytes(host_file: Path, tmp_path: Path) -> None:
    pyz.write_host(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == host_file.read_bytes()
    with zipfile.ZipFile(host_file) as archive:
        names = archive.namelist()
        assert "katagpu/host/cli.py" in names
        assert not [name for name in names if "__pycache__" in name or "release" in name]


@pytest.mark.parametrize("python", [sys.executable, *OLD])
def test_the_host_file_runs(python: str, host_file: Path, tmp_path: Path) -> None:
    if not shutil.which(python) or subprocess.run([python, "-c", ""],
                                                  capture_output=True).returncode:
        pytest.skip(f"there is no {python} here")
    hosttree.switch(tmp_path / "root")

    def run(*words: str) -> tuple[int, str, str]:
        said = subprocess.run([python, "-I", "-W", "error", host_file, *words, "--root",
                               tmp_path / "root"], env={"PATH": "/usr/bin:/bin"}, cwd="/",
                              capture_output=True, text=True)
        assert "Traceback" not in said.stderr
        return said.returncode, said.stdout, said.stderr

    assert len(json.loads(run("gpus", "--json")[1])["gpus"]) == 2
    assert run("check")[0] == 1
    status, said, _ = run("bind", "18:00.0", "--dry-run")
    assert status == 0
    assert "echo vfio-pci > /sys/bus/pci/devices/0000:19:00.0/driver_override" in said
    assert run("persist", "18:00.0", "--yes")[0] == 0
    assert run("persist", "--remove", "--yes")[0] == 0
    status, _, said = run("bind", "0000:16:02.0", "--yes")
    assert status == 1
    assert "is not NVIDIA's" in said


def test_an_older_python_is_told(file: Path) -> None:
    said = subprocess.run([sys.executable, "-c", f"""
import sys, runpy
sys.version_info = (3, 8, 1)
runpy.run_path({str(file)!r}, run_name="__main__")
"""], capture_output=True, text=True)
    assert said.returncode == 1
    assert "Python 3.9 or newer is needed" in said.stderr


def test_it_can_be_executed(file: Path) -> None:
    assert os.access(file, os.X_OK)
    said = subprocess.run([file, "--help"], capture_output=True, text=True)
    assert said.returncode == 0
    for word in ("install", "rollback", "uninstall", "status"):
        assert word in said.stdout


@pytest.mark.parametrize("words", [[], ["install"], ["install", "x"], ["what"],
                                   ["install", "x", "--key", "k", "--unverified"]])
def test_command_lines_that_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        installer.main(words)
    assert refusal.value.code == 2
