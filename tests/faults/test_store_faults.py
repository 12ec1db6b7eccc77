"""A full disk and a read-only store: a clear error, and nothing lost or half-written."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katagpu import sandbox
from katagpu.errors import UserError
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Entry, Form, Root
from katagpu.stages.api import Build, Stage
from katagpu.store import Action, Kind, Store, writing

pytestmark = pytest.mark.root
MEGA = 1 << 20
Tiny = Callable[[int], Path]


def plan(store: Store, logs: Path, make: Callable[[Build], None]) -> Plan:
    """A plan of one stage."""
    stage = Stage(name="toy", title="a toy", module="errors", make=make,
                  outputs={"out": Kind.FILE})
    return Plan({"toy": stage}, store, logs)


def fill(place: Path) -> Path:
    """Leave no space on a file system; remove the file to have it back."""
    path = place / "filler"
    with path.open("wb") as stream:
        while True:
            try:
                os.write(stream.fileno(), bytes(4096))
            except OSError as full:
                assert full.errno == errno.ENOSPC
                return path


def files(store: Store) -> list[str]:
    """What is in a store but locks and its tag."""
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*")
                  if path.is_file() and path.parent.name != "locks"
                  and path.name not in ("CACHEDIR.TAG", "filler"))


def refused(error: pytest.ExceptionInfo[UserError], store: Store) -> bool:
    """Does the error name the store, and give the cure?"""
    return (f"no space left in the store {store.root}" in error.value.what
            and "KATAGPU_STORE" in str(error.value.hint) and error.value.status == 1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A root file system that has its programs from the host's /usr."""
    path = tmp_path / "base"
    for name in ("etc", "usr"):
        (path / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (path / name).symlink_to(f"usr/{name}")
    return path


# full


def test_a_full_disk_while_a_stage_writes(tiny: Tiny, tmp_path: Path) -> None:
    store = Store(tiny(2 * MEGA))

    def big(build: Build) -> None:
        (build.scratch / "big").write_bytes(bytes(4 * MEGA))

    with pytest.raises(UserError) as error:
        plan(store, tmp_path / "logs", big).ensure("toy")
    assert refused(error, store)
    assert files(store) == []


def test_a_full_disk_while_an_output_is_kept_and_then_space_again(
    tiny: Tiny, tmp_path: Path,
) -> None:
    store = Store(tiny(2 * MEGA))

    def late(build: Build) -> None:
        filler = fill(store.root) if not (tmp_path / "space").exists() else None
        try:
            build.put_bytes("out", b"x" * 100_000)
        finally:
            if filler is not None:
                filler.unlink()

    toy = plan(store, tmp_path / "logs", late)
    with pytest.raises(UserError) as error:
        toy.ensure("toy")
    assert refused(error, store)
    assert files(store) == []
    (tmp_path / "space").touch()
    assert toy.ensure("toy").outputs["out"].size == 100_000
    assert store.verify() == []


def test_a_full_disk_while_the_action_is_written(tiny: Tiny) -> None:
    store = Store(tiny(2 * MEGA))
    store.prepare()
    filler = fill(store.root)
    action = Action(stage="toy", key={"much": "x" * 8192}, outputs={}, record={})
    with pytest.raises(UserError) as error:
        store.commit("a" * 64, action)
    assert refused(error, store)
    assert files(store) == [] and store.action("a" * 64) is None
    filler.unlink()
    store.commit("a" * 64, action)
    assert store.action("a" * 64) == action


def test_a_full_disk_while_a_program_writes(tiny: Tiny, tmp_path: Path, base: Path) -> None:
    store = Store(tiny(2 * MEGA))

    def program(build: Build) -> None:
        build.enter(["dd", "if=/dev/zero", "of=/big", "bs=64k", "count=100"],
                    [Root(lower=(base,), upper=build.directory("upper"))],
                    binds=[Bind(source=Path("/usr"), target="/usr")])

    with pytest.raises(UserError) as error:
        plan(store, tmp_path / "logs", program).ensure("toy")
    assert refused(error, store)
    assert files(store) == []
    assert str(store.root) + "/" not in Path("/proc/self/mountinfo").read_text()


def test_no_space_of_the_sandboxs_own_is_not_the_stores(tmp_path: Path, base: Path) -> None:
    (tmp_path / "scratch").mkdir()
    made = Entry(argv=["sh", "-c", "head -c 2000000 /dev/zero > /dev/file"],
                 roots=[Root(lower=(base,), upper=tmp_path / "upper")],
                 binds=[Bind(source=Path("/usr"), target="/usr")], scratch=tmp_path / "scratch")
    with pytest.raises(Exception, match="No space left on device") as error:
        sandbox.enter(made)
    assert "failed in the sandbox" in str(error.value)


@pytest.mark.parametrize("operation", ["capture", "unpack"])
def test_a_full_disk_while_a_tree_is_packed_or_unpacked(
    tiny: Tiny, tmp_path: Path, operation: str,
) -> None:
    place = tiny(2 * MEGA)
    tree, blob = tmp_path / "tree", tmp_path / "blob"
    tree.mkdir()
    (tree / "random").write_bytes(os.urandom(4 * MEGA))
    if operation == "unpack":
        sandbox.capture(tree, blob, Form())
    with pytest.raises(UserError, match="no space left in the store"), writing(place):
        if operation == "capture":
            sandbox.capture(tree, place / "blob", Form(), log=tmp_path / "log")
        else:
            sandbox.unpack(blob, place / "out", overlay=False)


def test_a_full_disk_while_an_artifact_is_restored(tiny: Tiny, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    staged = store.root / "staging" / "new"
    staged.write_bytes(os.urandom(2 * MEGA))
    blob, _size = store.put(staged)
    out = tiny(MEGA)
    (out / "vmlinuz").write_text("older")
    with pytest.raises(OSError, match="No space left"):
        store.copy_out(blob, out / "vmlinuz")
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("vmlinuz", "older")]
    assert store.has(blob), "the store is not to blame"


# read-only


@pytest.fixture
def read_only(tiny: Tiny, tmp_path: Path) -> Iterator[Plan]:
    """A plan whose one stage is made, on a store that was made read-only then."""
    store = Store(tiny(4 * MEGA))
    toy = plan(store, tmp_path / "logs", lambda build: build.put_bytes("out", b"x" * 1000))
    store.prepare()
    with store.lease():
        toy.ensure("toy")
    subprocess.run(["mount", "-o", "remount,ro", store.root], check=True)
    yield plan(store, tmp_path / "logs", lambda build: build.put_bytes("out", b"never"))
    subprocess.run(["mount", "-o", "remount,rw", store.root], check=True)


def test_a_hit_works_on_a_read_only_store(read_only: Plan, tmp_path: Path) -> None:
    read_only.store.prepare()
    with read_only.store.lease() as held:
        assert held
        action = read_only.ensure("toy")
    read_only.store.copy_out(action.outputs["out"].blob, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"x" * 1000
    assert read_only.store.verify() == []
    assert read_only.reason("toy") == "hit"


def test_a_hit_needs_no_lease_file(read_only: Plan) -> None:
    root = read_only.store.root
    subprocess.run(["mount", "-o", "remount,rw", root], check=True)
    (root / "locks" / "lease").unlink()
    subprocess.run(["mount", "-o", "remount,ro", root], check=True)
    with read_only.store.lease() as held:
        assert held
    with pytest.raises(UserError, match="Read-only"), read_only.store.lease(exclusive=True):
        pass


def test_whatever_writes_says_that_the_store_is_read_only(read_only: Plan, tmp_path: Path) -> None:
    store = read_only.store
    new = tmp_path / "new"
    new.write_bytes(b"y")
    actions: list[Callable[[], object]] = [
        lambda: store.commit("b" * 64, Action(stage="x", key={}, outputs={}, record={})),
        lambda: store.drop(next((store.root / "blobs" / "sha256").iterdir()).name),
        lambda: store.lock("e" * 64).__enter__(),
        lambda: store.staging("x", sandbox.remove).__enter__(),
        lambda: Store(store.root / "below").prepare(),
    ]
    for action in actions:
        with pytest.raises(UserError, match=r"cannot write to .*: Read-only") as error:
            action()
        assert str(store.root) in error.value.what
        assert "KATAGPU_STORE" in str(error.value.hint)


def test_a_miss_on_a_read_only_store_is_the_users_to_mend(
    read_only: Plan, tmp_path: Path,
) -> None:
    stage = Stage(name="toy", title="another", module="errors", options={"changed": True},
                  make=lambda build: None, outputs={"out": Kind.FILE})
    other = Plan({"toy": stage}, read_only.store, tmp_path / "logs")
    with pytest.raises(UserError, match="Read-only file system"):
        other.ensure("toy")
