"""Results in `out/`: restored from the store, and whole again whatever happened to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu import artifacts
from katagpu.artifacts import Artifact, Outcome
from katagpu.errors import CorruptBlob
from katagpu.plan import Plan
from katagpu.recipe import load
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind, Store

WANTED = (Artifact(stage="kernel", output="vmlinuz", name="vmlinuz-{release}", link="vmlinuz.link"),
          Artifact(stage="image", output="image", name="guest.image"))
NAME = "vmlinuz-6.1-toy"


def toy_kernel(build: Build) -> None:
    """A kernel with a release."""
    build.facts["release"] = build.options.get("release", "6.1-toy")
    build.put_bytes("vmlinuz", b"kernel " * 1000)


@pytest.fixture
def outcome(tmp_path: Path) -> Outcome:
    """A directory for two artifacts of toy stages that are made."""
    stages = {
        "kernel": Stage(name="kernel", title="", module="errors", make=toy_kernel,
                        outputs={"vmlinuz": Kind.FILE}),
        "image": Stage(name="image", title="", module="errors", outputs={"image": Kind.FILE},
                       make=lambda build: build.put_bytes("image", b"image " * 1000)),
    }
    plan = Plan(stages, Store(tmp_path / "store"), tmp_path / "logs")
    for name in stages:
        plan.ensure(name)
    return Outcome(tmp_path / "out", plan)


def test_restored_under_kata_s_names(outcome: Outcome) -> None:
    assert not outcome.complete(WANTED)
    outcome.restore(WANTED)
    assert outcome.complete(WANTED)
    assert (outcome.directory / NAME).read_bytes() == b"kernel " * 1000
    assert (outcome.directory / "vmlinuz.link").readlink() == Path(NAME)
    shown = {path.name for path in outcome.directory.iterdir() if path.name[0] != "."}
    assert shown == {NAME, "vmlinuz.link", "guest.image"}
    assert (outcome.directory / "guest.image").stat().st_mode & 0o777 == 0o644
    assert set(outcome.files(WANTED)) == {outcome.directory / name for name in shown}


def test_a_new_kernel_takes_the_old_ones_place(outcome: Outcome) -> None:
    outcome.restore(WANTED)
    (outcome.directory / "vmlinuz-mine").write_text("not ours")
    newer = Stage(name="kernel", title="", module="errors", make=toy_kernel,
                  outputs={"vmlinuz": Kind.FILE}, options={"release": "6.2-toy"})
    plan = Plan({**outcome.plan.stages, "kernel": newer}, outcome.plan.store, outcome.plan.logs)
    plan.ensure("kernel")
    Outcome(outcome.directory, plan).restore(WANTED)
    shown = {path.name for path in outcome.directory.iterdir() if path.name[0] != "."}
    assert shown == {"vmlinuz-6.2-toy", "vmlinuz.link", "guest.image", "vmlinuz-mine"}
    assert (outcome.directory / "vmlinuz.link").readlink() == Path("vmlinuz-6.2-toy")


def alter(path: Path) -> None:
    """Other bytes of the same size, and the old time."""
    before = path.stat()
    path.write_bytes(b"?" * before.st_size)
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("harm", [
    lambda top: (top / NAME).unlink(),
    lambda top: alter(top / NAME),
    lambda top: (top / NAME).write_bytes(b""),
    lambda top: (top / "vmlinuz.link").unlink(),
    lambda top: ((top / "vmlinuz.link").unlink(), (top / "vmlinuz.link").symlink_to("elsewhere")),
    lambda top: ((top / "vmlinuz.link").unlink(), (top / "vmlinuz.link").touch()),
    lambda top: (top / artifacts.STATE).unlink(),
    lambda top: (top / artifacts.STATE).write_text("{"),
], ids=["deleted", "altered", "emptied", "no link", "wrong link", "file for a link", "no state",
        "bad state"])
def test_what_was_harmed_comes_back(outcome: Outcome, harm: Callable[[Path], object]) -> None:
    outcome.restore(WANTED)
    harm(outcome.directory)
    assert not outcome.complete(WANTED)
    outcome.restore(WANTED)
    assert outcome.complete(WANTED)
    assert (outcome.directory / "vmlinuz.link").read_bytes() == b"kernel " * 1000


def test_what_is_intact_is_not_written_again(outcome: Outcome) -> None:
    outcome.restore(WANTED)
    before = (outcome.directory / "guest.image").stat()
    (outcome.directory / NAME).unlink()
    outcome.restore(WANTED)
    assert (outcome.directory / "guest.image").stat() == before


def test_a_damaged_blob_is_found_and_nothing_half_is_left(outcome: Outcome) -> None:
    action = outcome.plan.action("image")
    assert action is not None
    blob = outcome.plan.store.blob(action.outputs["image"].blob)
    blob.chmod(0o644)
    blob.write_bytes(b"?" * blob.stat().st_size)
    with pytest.raises(CorruptBlob):
        outcome.restore(WANTED)
    assert not blob.exists()
    assert not (outcome.directory / "guest.image").exists()
    assert not list(outcome.directory.glob("*.part"))
    outcome.plan.forget()
    assert not outcome.complete(WANTED)
    outcome.plan.ensure("image")
    outcome.restore(WANTED)
    assert outcome.complete(WANTED)


def test_another_guest_s_state_is_not_trusted(outcome: Outcome) -> None:
    """The same names with other content: what is there is not what is wanted."""
    outcome.restore(WANTED)
    stages = dict(outcome.plan.stages)
    stages["image"] = Stage(name="image", title="", module="errors", options={"new": 1},
                            outputs={"image": Kind.FILE},
                            make=lambda build: build.put_bytes("image", b"IMAGE " * 1000))
    plan = Plan(stages, outcome.plan.store, outcome.plan.logs)
    plan.ensure("image")
    other = Outcome(outcome.directory, plan)
    assert not other.complete(WANTED)
    other.restore(WANTED)
    assert (outcome.directory / "guest.image").read_bytes() == b"IMAGE " * 1000


def test_announced_with_sizes(outcome: Outcome, capfd: pytest.CaptureFixture[str]) -> None:
    outcome.restore(WANTED)
    outcome.announce(WANTED)
    said = capfd.readouterr().err
    assert f"   7.0 kB  {NAME}  (vmlinuz.link)" in said
    assert "   6.0 kB  guest.image" in said


@pytest.mark.parametrize("task", ["build_kernel", "build_headers", "build_rootfs",
                                  "install_driver", "install_toolkit", "build_initrd",
                                  "build_image"])
def test_names_of_each_task_are_unique(task: str, repository: Path) -> None:
    found = artifacts.of(load("debian-trixie", repository), task)
    names = [artifact.name for artifact in found]
    assert len(set(names)) == len(names)
    assert task.startswith("install_") or found
