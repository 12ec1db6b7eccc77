"""What boot tasks need of a run: which QEMU, which plan, which result; on toy stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from katagpu import artifacts, guest, keys, recipe
from katagpu.boot import qemu
from katagpu.boot.qemu import Qemu
from katagpu.booting import Booting
from katagpu.committed import Committed
from katagpu.errors import StepError, UserError
from katagpu.lock import Lock
from katagpu.locks import Locks
from katagpu.plan import Plan
from katagpu.schema import Recipe
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, Store

NAMES = ["boot-check.json", "boot-check.txt", "boot-check.xml", "manifest.json"]
FULL = Qemu(argv=("qemu",), version="11.1", vfio_user=True, why="", identity="full")
OLD = Qemu(argv=("qemu",), version="7.2", vfio_user=False, why="", identity="old")


def kernel(build: Build) -> None:
    """A kernel with a release, which names of results have."""
    build.facts["release"] = "6.1-toy"
    build.put_bytes("vmlinuz", b"kernel")


def image(content: bytes) -> dict[str, Stage]:
    """A guest of two stages, and its manifest."""
    return {
        "kernel": Stage(name="kernel", title="", module="errors", make=kernel,
                        outputs={"vmlinuz": Kind.FILE}),
        "image": Stage(name="image", title="", module="errors", outputs={"image": Kind.FILE},
                       make=lambda build: build.put_bytes("image", content),
                       options={"content": content.decode()}),
        "manifest": Stage(name="manifest", title="", module="errors",
                          outputs={"manifest": Kind.FILE},
                          make=lambda build: build.put_bytes("manifest", b"plain"))}


class Run:
    """A run; `booted` are the QEMUs that checked the guest."""

    def __init__(self, top: Path, content: bytes = b"one") -> None:
        self.root = keys.PACKAGE.parent
        self.store = Store(top / "store")
        self.directory = top / "out/driver"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.content = content
        self.booted: list[tuple[str, bool]] = []

    @functools.cached_property
    def recipe(self) -> Recipe:
        return recipe.load("debian-trixie", self.root)

    @functools.cached_property
    def locks(self) -> Locks:
        return Locks(self.recipe, self.root, self.directory, [], Committed(self.recipe, self.root))

    @functools.cached_property
    def plan(self) -> Plan:
        return self.planned(image(self.content))

    def planned(self, stages: Mapping[str, Stage]) -> Plan:
        return Plan(stages, self.store, self.directory / "logs")

    def boot_stages(self, _recipe: Recipe, emulator: Lock | None, find: Callable[[], Qemu], *,
                    lesser: bool) -> dict[str, Stage]:
        """Toys in place of `guest.boot_stages`."""
        def check(build: Build) -> None:
            found = find()
            self.booted.append((found.identity, lesser))
            for output in ("report", "junit", "log"):
                build.put_bytes(output, f"{output} {lesser}".encode())

        def record(build: Build) -> None:
            build.put_bytes("manifest", b"with " + build.blob("report").read_bytes())

        report = Ref(stage="boot_check", output="report")
        assert emulator is None
        return {
            "boot_check": Stage(
                name="boot_check", title="", module="errors", make=check,
                outputs=dict.fromkeys(("report", "junit", "log"), Kind.FILE),
                options={"lesser": lesser},
                inputs={"image": Ref(stage="image", output="image"),
                        "vmlinuz": Ref(stage="kernel", output="vmlinuz")}),
            "checked_manifest": Stage(
                name="checked_manifest", title="", module="errors", make=record,
                outputs={"manifest": Kind.FILE}, inputs={"report": report})}


Make = Callable[..., Booting]


@pytest.fixture
def booting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes the boot tasks' part of a new run, whose host has this QEMU; None: it must not matter.
    """
    def make(found: Qemu | None, content: bytes = b"one") -> Booting:
        run = Run(tmp_path, content)

        def find(_own: Callable[[], Path]) -> Qemu:
            assert found is not None, "nobody has to look for a QEMU"
            return found

        monkeypatch.setattr(guest, "boot_stages", run.boot_stages)
        monkeypatch.setattr(qemu, "find", find)
        return Booting(run)

    return make


def booted(made: Booting) -> list[tuple[str, bool]]:
    assert isinstance(made.run, Run)
    return made.run.booted


def shown(made: Booting) -> list[str]:
    return sorted(path.name for path in made.run.directory.iterdir() if path.is_file()
                  and not path.name.startswith("."))


def test_a_check_and_its_results(booting: Make) -> None:
    made = booting(FULL)
    assert made.checked() is None
    assert made.check() == artifacts.BOOT_CHECK
    assert booted(made) == [("full", False)] and shown(made) == NAMES
    assert (made.run.directory / "boot-check.txt").read_text() == "log False"
    assert (made.run.directory / "manifest.json").read_text() == "with report False"
    assert made.checked() is made.plan


def test_what_was_proven_needs_no_qemu(booting: Make) -> None:
    """Not the next time, and not where the results have gone."""
    booting(FULL).check()
    again = booting(None)
    (again.run.directory / "boot-check.json").unlink()
    assert again.checked() is None, "nobody asked for it here"
    again.check()
    assert booted(again) == [] and shown(again) == NAMES and again.checked() is again.plan


def test_the_lesser_check_stands_apart(booting: Make) -> None:
    """A QEMU that can do more checks again; one that can do less keeps what was proven."""
    old = booting(OLD)
    old.check()
    assert booted(old) == [("old", True)]
    assert (old.run.directory / "boot-check.txt").read_text() == "log True"
    assert (found := old.checked()) is not None and found is not old.plan
    again = booting(OLD)
    again.check()
    assert booted(again) == []
    full = booting(FULL)
    full.check()
    assert booted(full) == [("full", False)]
    assert (full.run.directory / "boot-check.txt").read_text() == "log False"
    older = booting(None)
    older.check()
    assert (older.run.directory / "boot-check.txt").read_text() == "log False"


def test_another_guest_is_not_checked_by_this_one_s_result(booting: Make) -> None:
    booting(FULL).check()
    other = booting(FULL, b"two")
    assert other.checked() is None
    other.drop_old()
    assert shown(other) == ["manifest.json"]
    other.check()
    assert booted(other) == [("full", False)] and shown(other) == NAMES
    other.drop_old()
    assert shown(other) == NAMES


def test_a_check_that_fails_leaves_nothing(
    booting: Make, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_build: Build) -> None:
        raise StepError("the guest did not pass its boot check")

    made = booting(FULL)
    stages = made.plan.stages
    object.__setattr__(stages["boot_check"], "make", refuse)
    with pytest.raises(StepError, match="did not pass"):
        made.check()
    assert shown(made) == [] and made.checked() is None


def test_no_qemu(booting: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_own: Callable[[], Path]) -> Qemu:
        raise UserError("there is no QEMU that can boot the guest")

    made = booting(FULL)
    monkeypatch.setattr(qemu, "find", none)
    with pytest.raises(UserError, match="no QEMU"):
        made.check()
    assert shown(made) == []


def test_the_lock_of_our_own_qemu(
    booting: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:
    """It is made once, above the drivers' directories; a refusal keeps the old one."""
    made = booting(FULL)
    asked: list[Path] = []
    monkeypatch.setattr(made.lock, "make", asked.append)
    assert made.lock.path == made.run.directory.parent / "boot-lock.json"
    made.renew_lock()
    assert asked == [], "nobody has resolved it before"
    made.make_lock(anew=False)
    assert asked == [made.store.root / "apt"]
    monkeypatch.setattr(made.lock, "find", lambda: Lock(recipe="", request="", groups={}))
    made.make_lock(anew=False)
    assert len(asked) == 1
    made.lock.path.write_text("{}")
    made.renew_lock()
    assert len(asked) == 2

    def refuse(_apt: Path) -> None:
        raise UserError("QEMU of trixie-backports cannot be had")

    monkeypatch.setattr(made.lock, "make", refuse)
    made.renew_lock()
    assert "stays as it was" in capfd.readouterr().err


def test_a_shell_needs_a_terminal(booting: Make) -> None:
    """That is said before anything is made or booted."""
    made = booting(None)
    with pytest.raises(UserError, match="have to be a terminal"):
        made.shell()
    assert not made.store.root.exists()


def test_what_a_check_gets(booting: Make) -> None:
    made = booting(FULL)
    with made.inputs("look") as build:
        assert build.blob("image").read_bytes() == b"one"
        assert build.log == made.run.directory / "logs/look.log"
        scratch = build.scratch
    assert booted(made) == [] and not scratch.exists()
