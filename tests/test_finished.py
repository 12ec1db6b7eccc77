"""Reading a finished build: what is there, and what is said where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu import finished
from katagpu.errors import UserError
from tests import toybuild


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build below out/."""
    return toybuild.write(tmp_path / "out/toy/550.163.01")


def test_a_build_is_read_whole(build: Path) -> None:
    found = finished.read(build, "toy/550")
    assert (found.name, found.lacks) == ("toy/550", ())
    assert found.manifest.packages == toybuild.PACKAGES
    assert found.config == {"SMP": "y", "NR_CPUS": "8", "PCI": "y"}
    assert found.sizes == toybuild.SIZES
    assert found.files == toybuild.guest()
    assert finished.read(build / "manifest.json", "x").files == found.files


@pytest.mark.parametrize("file", ["files.mtree", "sizes.json", "config-6.1-toy"])
def test_a_file_that_is_gone_or_altered(build: Path, file: str) -> None:
    path = build / file
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"?")
    with pytest.raises(UserError, match=r"is not the file that the manifest of it names") as said:
        finished.read(build, "it")
    assert str(path) in str(said.value)
    path.unlink()
    with pytest.raises(UserError, match=f"it lacks {file}") as said:
        finished.read(build, "it")
    assert "./doitw build_image restores it" in str(said.value)
    found = finished.read(build / "manifest.json", "it")  # a manifest alone was asked for
    assert found.lacks == (f"it has no {file}",)


@pytest.mark.parametrize(("file", "content"), [
    ("files.mtree", "#mtree\nword\n"), ("sizes.json", "[]"), ("sizes.json", '{"a": "b"}')])
def test_a_file_that_is_not_what_it_should_be(build: Path, file: str, content: str) -> None:
    (build / file).write_text(content)
    parts = json.loads((build / "manifest.json").read_text())
    del parts["parts"]["files"], parts["parts"]["sizes"]
    (build / "manifest.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match=f"{file} is damaged"):
        finished.read(build, "it")


def test_a_build_of_before_there_were_lists(build: Path) -> None:
    manifest = json.loads((build / "manifest.json").read_text())
    del manifest["parts"]["files"]
    (build / "manifest.json").write_text(json.dumps(manifest))
    (build / "files.mtree").unlink()
    found = finished.read(build, "it")
    assert found.files is None
    assert found.lacks == ("it is of a version that wrote no files.mtree",)


def test_base_and_driver_s_disk_are_one_guest(tmp_path: Path) -> None:
    place = toybuild.write(tmp_path / "split", disk=toybuild.disk(),
                           disk_sizes={"licences": 5, "GSP firmware": 9})
    found = finished.read(place, "it")
    top = "run/kata-extensions/gpu"
    assert found.files is not None and found.lacks == ()
    assert set(found.files) == set(toybuild.guest()) | {
        top, f"{top}/usr", f"{top}/usr/lib/libcuda.so.550.163.01", f"{top}/usr/lib/libcuda.so.1"}
    assert all(entry.path == path for path, entry in found.files.items())
    assert found.files[f"{top}/usr/lib/libcuda.so.550.163.01"].size == 700
    assert found.sizes == {**toybuild.SIZES, "licences": 15, "GSP firmware": 9}


@pytest.mark.parametrize(("file", "lost"), [("files-extension.mtree", "files"),
                                            ("sizes-extension.json", "sizes")])
def test_half_of_a_guest_is_not_compared(tmp_path: Path, file: str, lost: str) -> None:
    place = toybuild.write(tmp_path / "split", disk=toybuild.disk())
    (place / file).unlink()
    with pytest.raises(UserError, match=f"it lacks {file}"):
        finished.read(place, "it")
    found = finished.read(place / "manifest.json", "it")
    assert getattr(found, lost) is None
    assert found.lacks == (f"it has no {file}",)
    path = place / "manifest.json"  # as of before the disk was listed
    manifest = json.loads(path.read_text())
    del manifest["parts"][f"extension_{lost}"]
    path.write_text(json.dumps(manifest))
    found = finished.read(place, "it")
    assert getattr(found, lost) is None
    assert found.lacks == (f"it is of a version that wrote no {file}",)


def test_the_lists_of_another_build_s_disk_are_not_read(build: Path) -> None:
    (build / "files-extension.mtree").write_text("left by an earlier model")
    assert finished.read(build, "it").files == toybuild.guest()


def edit(**fields: object) -> Callable[[Path], object]:
    """Other fields in the manifest."""
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(("harm", "said"), [
    (lambda path: path.unlink(), "it is no build: it has no manifest.json"),
    (lambda path: path.write_bytes(b""), "is not a manifest"),
    (lambda path: path.write_bytes(path.read_bytes()[:300]), "is not a manifest"),
    (lambda path: path.write_bytes(b"\xff\xfe"), "is not a manifest"),
    (lambda path: path.write_text("[]"), "is not a manifest"),
    (edit(packages=["libc6"]), r"is not a manifest: .*\.packages"),
    (edit(parts={"image": 7}), "is not a manifest"),
    (edit(kernel_release="../../etc/x"), "is not a manifest"),
    (edit(schema=2), "is a manifest of schema 2"),
])
def test_what_is_no_manifest(build: Path, harm: Callable[[Path], object], said: str) -> None:
    harm(build / "manifest.json")
    with pytest.raises(UserError, match=said) as error:
        finished.read(build, "it")
    assert error.value.hint


def test_how_a_build_is_named(build: Path, tmp_path: Path) -> None:
    name = "toy/550.163.01"
    for word in ("out/toy/550.163.01", "toy/550.163.01", "550.163.01", str(build)):
        place, called = finished.find(word, tmp_path, "toy")
        assert (place.resolve(), called) == (build, name)
    assert finished.find("out/toy/550.163.01/manifest.json", tmp_path, "x") == (
        build / "manifest.json", f"{name}/manifest.json")
    elsewhere = toybuild.write(tmp_path / "release")
    assert finished.find(str(elsewhere), tmp_path, "toy") == (elsewhere, str(elsewhere))
    with pytest.raises(UserError, match="there is no build '535'") as error:
        finished.find("535", tmp_path, "toy")
    assert "below out/ are: toy/550.163.01" in str(error.value)
    with pytest.raises(UserError, match="and none below out/"):
        finished.find("535", tmp_path / "release", "toy")
    assert finished.builds(tmp_path) == [name]
