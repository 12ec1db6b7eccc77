"""The manifest: what it says of a toolkit whose packages are given as files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import guest, keys, recipe
from katagpu.lock import Deb, Lock
from katagpu.schema import DriverSource, Recipe, ToolkitSource
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind, Output, Store

REPOSITORY = keys.PACKAGE.parent

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def package(place: Path, file: str, name: str, version: str) -> Path:
    """A package, in a file whose name says nothing."""
    control = place / name / "DEBIAN/control"
    control.parent.mkdir(parents=True, exist_ok=True)
    control.write_text(f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
                       "Maintainer: nobody <nobody@localhost>\nDescription: for a test\n")
    subprocess.run(["dpkg-deb", "-Zxz", "--root-owner-group", "--build", place / name,
                    place / file], check=True, capture_output=True)
    return place / file


@pytest.fixture
def given(tmp_path: Path) -> Recipe:
    """The default recipe with two packages of the toolkit as files."""
    package(tmp_path, "one.deb", "nvidia-container-toolkit", "1.17.8-1")
    package(tmp_path, "two.deb", "libnvidia-container1", "1:1.17.9~rc1-1")
    default = recipe.load("debian-trixie", REPOSITORY)
    return replace(default, toolkit=replace(
        default.toolkit, source=ToolkitSource.DEBS, version=None,
        debs=(str(tmp_path / "one.deb"), str(tmp_path / "two.deb"))))


def stage(chosen: Recipe) -> Stage:
    """The manifest's stage; the lock has what the toolkit's packages depend on."""
    seccomp = Deb(package="libseccomp2", version="2.6", architecture="amd64", url="", size=1,
                  sha256="1" * 64)
    lock = Lock(recipe=chosen.name, request="", groups={"toolkit": (seccomp,)})
    return guest.stages(chosen, lock, REPOSITORY)["manifest"]


def made(chosen: Recipe, place: Path, text: str = "word") -> dict[str, Any]:
    """The manifest, made of inputs that are all one file."""
    store = Store(place / "store")
    store.prepare()
    (place / "word").write_text(text)
    blob, size = store.put(place / "word")
    found = stage(chosen)
    inputs = dict.fromkeys(found.inputs, Output(kind=Kind.FILE, identity=blob, blob=blob,
                                                size=size))
    build = Build(found, store, inputs, place, place / "log")
    found.make(build)
    content: dict[str, Any] = json.loads(store.sound(build.outputs["manifest"].blob).read_bytes())
    return content


def test_packages_given_as_files_are_listed(given: Recipe, tmp_path: Path) -> None:
    found = made(given, tmp_path)
    assert found["packages"] == {"libseccomp2": "2.6", "nvidia-container-toolkit": "1.17.8-1",
                                 "libnvidia-container1": "1:1.17.9~rc1-1"}
    assert found["toolkit"] == {
        "source": "debs", "version": "1.17.8-1", "mode": "cdi", "files": {
            name: {"sha256": keys.file_digest(tmp_path / name),
                   "size": (tmp_path / name).stat().st_size} for name in ("one.deb", "two.deb")}}


def test_the_gpus_of_nvidias_own_list_are_in_it(tmp_path: Path) -> None:
    default = recipe.load("debian-trixie", REPOSITORY)
    chosen = replace(default, driver=replace(default.driver, source=DriverSource.RUNFILE))
    for place, text in (("some", '["1eb8", "20b7"]'), ("none", "[]")):
        (tmp_path / place).mkdir()
        found = made(chosen, tmp_path / place, text)["driver"]
        assert found["source"] == "runfile"
        assert found.get("supported_ids") == (["1eb8", "20b7"] if place == "some" else None)


def test_a_toolkit_without_files_has_none(tmp_path: Path) -> None:
    found = made(recipe.load("debian-trixie", REPOSITORY), tmp_path)
    assert found["packages"] == {"libseccomp2": "2.6"}
    assert found["toolkit"] == {"source": "go", "version": "v1.17.8", "mode": "cdi"}


def test_another_file_makes_the_manifest_anew(given: Recipe, tmp_path: Path) -> None:
    def digest() -> str:
        found = stage(given)
        return keys.digest(found.key(dict.fromkeys(found.inputs, "0")))

    before = digest()
    assert digest() == before
    package(tmp_path, "two.deb", "libnvidia-container1", "1.18.0-1")
    assert digest() != before


def test_the_plan_does_not_read_packages(tmp_path: Path) -> None:
    """A run with nothing to do imports what it needs for its keys, and no more."""
    (tmp_path / "bad.deb").write_text("no package")
    code = ("import sys; from pathlib import Path; from msgspec.structs import replace\n"
            "from katagpu import guest, recipe; from katagpu.lock import Lock\n"
            "from katagpu.schema import ToolkitSource\n"
            f"root = Path({str(REPOSITORY)!r}); found = recipe.load('debian-trixie', root)\n"
            "found = replace(found, toolkit=replace(found.toolkit, version=None,\n"
            f"    source=ToolkitSource.DEBS, debs=({str(tmp_path / 'bad.deb')!r},)))\n"
            "lock = Lock(recipe='', request='', groups={})\n"
            "stage = guest.stages(found, lock, root)['manifest']\n"
            "stage.key({}); assert list(stage.files) == ['deb/bad.deb'], stage.files\n"
            "assert not [name for name in sys.modules if name.partition('.')[0] == 'debian']\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
