"""The store: what is committed is whole, what is damaged is found, and locks hold."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from katagpu import keys
from katagpu.errors import CorruptBlob, StepError, UserError
from katagpu.store import Action, Kind, Output, Store, default_root


def hexdigest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    made = Store(tmp_path / "store")
    made.prepare()
    return made


def put(store: Store, data: bytes) -> Output:
    """Put bytes into a store."""
    staged = store.root / "staging" / "new"
    staged.write_bytes(data)
    blob, size = store.put(staged)
    return Output(kind=Kind.FILE, identity=blob, blob=blob, size=size)


def commit(store: Store, name: str, *outputs: Output, used: float | None = None) -> str:
    """Commit an action with these outputs, last used so many seconds after the epoch."""
    digest = hexdigest(name.encode())
    store.commit(digest, Action(stage=name, key={"stage": name}, record={"wall": 1.0},
                                outputs={str(index): each for index, each in enumerate(outputs)}))
    if used is not None:
        os.utime(store.root / "actions" / f"{digest}.json", (used, used))
    return digest


def everything(root: Path) -> dict[str, bytes]:
    """All files of a store but its locks."""
    return {str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*") if path.is_file() and path.parent.name != "locks"}


# where


def test_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == Path("/home/somebody/.cache/katagpu")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/x")
    assert default_root() == Path("/var/cache/x/katagpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KATAGPU_STORE", "here")
    assert default_root() == tmp_path / "here"


def test_it_is_marked_as_a_cache(store: Store) -> None:
    tag = (store.root / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_a_file_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"cannot write to .*: Not a directory") as refused:
            Store(place).prepare()
        assert str(tmp_path / "file") in str(refused.value)
        assert "KATAGPU_STORE" in str(refused.value.hint)


def test_where_there_can_be_no_store(tmp_path: Path) -> None:
    for name, target in (("loose", "gone"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    for place, said in ((tmp_path / "loose", "loose is a link to what is not there"),
                        (tmp_path / "loop", "Too many levels of symbolic links"),
                        (tmp_path / ("long" * 100), "File name too long"),
                        (Path("/proc/none"), "No such file or directory")):
        for below in (place, place / "below"):
            with pytest.raises(UserError, match=f"there can be no store at .*{said}") as refused:
                Store(below).prepare()
            assert "KATAGPU_STORE" in str(refused.value.hint)


# blobs


def test_a_blob_is_under_its_digest_read_only_and_out_of_staging(store: Store) -> None:
    output = put(store, b"abc")
    path = store.root / "blobs" / "sha256" / hexdigest(b"abc")
    assert output == Output(kind=Kind.FILE, identity=path.name, blob=path.name, size=3)
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o444
    assert list((store.root / "staging").iterdir()) == []
    assert store.has(path.name) and store.has(path.name, 3) and not store.has(path.name, 4)
    store.drop(path.name)
    assert not store.has(path.name)


def test_putting_good_bytes_again_mends_a_damaged_blob(store: Store) -> None:
    output = put(store, b"good")
    flip(store, output.blob)
    assert put(store, b"good") == output
    assert store.verify() == []


def flip(store: Store, blob: str, at: int = 0) -> None:
    """Flip one bit of a stored blob."""
    path = store.blob(blob)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def test_bytes_are_synced_before_the_name_and_the_name_before_the_action(
    store: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def named(handle: int) -> str:
        return Path(f"/proc/self/fd/{handle}").readlink().name

    def spy_fsync(handle: int) -> None:
        steps.append(("fsync", named(handle)))
        fsync(handle)

    def spy_rename(path: Path, target: Path) -> Path:
        steps.append(("rename", target.name))
        return rename(path, target)

    def spy_replace(path: Path, target: Path) -> Path:
        if target.parent.name != "checked":  # a mark may be lost
            steps.append(("rename", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    monkeypatch.setattr(Path, "replace", spy_replace)
    output = put(store, b"abc")
    digest = commit(store, "stage", output)
    assert [step for step in steps if not step[1].endswith(".part")] == [
        ("fsync", "new"), ("rename", output.blob), ("fsync", "sha256"),
        ("rename", f"{digest}.json"), ("fsync", "actions")]
    part = next(number for number, step in enumerate(steps) if step[1].endswith(".part"))
    assert steps[part][0] == "fsync" and steps[part + 1] == ("rename", f"{digest}.json")


def test_a_blob_is_hashed_again_only_when_something_wrote_to_it(
    store: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = put(store, b"abc")
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return keys.file_digest(path)

    monkeypatch.setattr("katagpu.store.file_digest", counting)
    store.sound(output.blob)
    assert hashed == []
    blob = store.blob(output.blob)
    os.utime(blob)
    store.sound(output.blob)
    store.sound(output.blob)
    assert hashed == [blob]
    found = blob.stat()
    blob.chmod(0o644)
    blob.write_bytes(b"abd")
    os.utime(blob, ns=(found.st_atime_ns, found.st_mtime_ns))  # the same size and time as before
    with pytest.raises(CorruptBlob):
        store.sound(output.blob)
    assert not store.has(output.blob)


def test_copy_out_gives_the_bytes_and_an_ordinary_file(store: Store, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    output = put(store, data)
    target = tmp_path / "vmlinuz-6.12.0"
    target.write_text("older")
    store.copy_out(output.blob, target)
    assert target.read_bytes() == data
    assert target.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "vmlinuz-6.12.0"]


def test_copy_out_of_nothing(store: Store, tmp_path: Path) -> None:
    store.copy_out(put(store, b"").blob, tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize("at", [0, 150_000, 299_999])
def test_copy_out_of_a_damaged_blob_drops_it_and_leaves_the_target(
    store: Store, tmp_path: Path, at: int,
) -> None:
    output = put(store, bytes(300_000))
    flip(store, output.blob, at)
    target = tmp_path / "target"
    target.write_text("older")
    with pytest.raises(CorruptBlob) as damaged:
        store.copy_out(output.blob, target)
    assert damaged.value.digest == output.blob
    assert target.read_text() == "older"
    assert not store.has(output.blob)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "target"]


def test_copy_out_of_a_blob_that_is_gone(store: Store, tmp_path: Path) -> None:
    with pytest.raises(CorruptBlob, match="No such file"):
        store.copy_out(hexdigest(b"x"), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_copy_out_blames_the_target_for_its_own_failure(store: Store, tmp_path: Path) -> None:
    output = put(store, b"abc")
    with pytest.raises(FileNotFoundError):
        store.copy_out(output.blob, tmp_path / "no" / "directory")
    assert store.has(output.blob)


def test_a_copy_that_ends_early_is_an_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = put(store, b"abc")
    monkeypatch.setattr(os, "sendfile", lambda *_words: 0)
    with pytest.raises(OSError, match="ended early"):
        store.copy_out(output.blob, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_copy_out_removes_what_a_killed_copy_left(store: Store, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = tmp_path / f".target-1.2.{gone.pid}.part"
    alive = tmp_path / ".target-1.2.1.part"
    for path in (dead, alive):
        path.write_text("half")
    store.copy_out(put(store, b"abc").blob, tmp_path / "target-1.2")
    assert (dead.exists(), alive.exists()) == (False, True)


# actions


def test_an_action_comes_back_as_it_was(store: Store) -> None:
    output = put(store, b"abc")
    digest = commit(store, "kernel", output)
    action = store.action(digest)
    assert action == Action(stage="kernel", key={"stage": "kernel"}, record={"wall": 1.0},
                            outputs={"0": output})
    assert [found[0] for found in store.actions()] == [digest]


def test_an_action_is_a_miss_without_one_of_its_blobs_or_with_a_shorter_one(store: Store) -> None:
    one, two = put(store, b"one"), put(store, b"two!")
    digest = commit(store, "kernel", one, two)
    store.blob(two.blob).chmod(0o644)
    store.blob(two.blob).write_bytes(b"two")
    assert store.action(digest) is None
    store.drop(two.blob)
    assert store.action(digest) is None


@pytest.mark.parametrize("text", ["", "{", '{"stage": 1}', "\0" * 100])
def test_a_damaged_action_record_is_a_miss(store: Store, text: str) -> None:
    digest = commit(store, "kernel")
    (store.root / "actions" / f"{digest}.json").write_text(text)
    assert store.action(digest) is None
    assert list(store.actions()) == []


def test_actions_come_by_their_last_use(store: Store) -> None:
    old, new = commit(store, "old", used=1000), commit(store, "new", used=2000)
    assert [found[0] for found in store.actions()] == [new, old]
    store.touch(old)
    store.touch("no such action")
    assert [found[0] for found in store.actions()] == [old, new]


@pytest.mark.parametrize("point", ["put", "record"])
def test_a_crash_before_the_action_is_a_miss_and_harms_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, point: str,
) -> None:
    class CrashError(BaseException):
        """The power fails."""

    def crash(*_words: object) -> None:
        raise CrashError

    digest = hexdigest(b"kernel")
    with monkeypatch.context() as patched:
        if point == "put":
            patched.setattr(Path, "rename", crash)
        else:
            patched.setattr(Path, "replace", crash)
        with pytest.raises(CrashError):
            commit(store, "kernel", put(store, b"abc"))
    assert store.action(digest) is None
    assert store.verify() == []
    assert commit(store, "kernel", put(store, b"abc")) == digest
    assert store.action(digest) is not None


# verify, gc


def test_verify_finds_one_flipped_bit_and_drops_that_blob_only(store: Store) -> None:
    good, bad = put(store, b"good" * 1000), put(store, b"bad" * 1000)
    keep, lose = commit(store, "keep", good), commit(store, "lose", good, bad)
    assert store.verify() == []
    flip(store, bad.blob, 1234)
    damaged = store.verify()
    assert [digest for digest, _found in damaged] == [bad.blob]
    assert damaged[0][1] != bad.blob
    assert store.action(keep) is not None
    assert store.action(lose) is None
    assert store.verify() == []


def no_remove(path: Path) -> None:
    """A plain removal."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def test_gc_drops_the_least_recently_used_until_it_fits(store: Store) -> None:
    outputs = [put(store, bytes([number]) * 100) for number in range(4)]
    digests = [commit(store, f"stage{number}", output, used=1000 + number)
               for number, output in enumerate(outputs)]
    store.touch(digests[0])  # now the first is the newest
    records = store.counted() - 400
    assert 200 < store.gc(records + 250, no_remove) <= 200 + records
    assert [store.action(digest) is not None for digest in digests] == [True, False, False, True]
    assert store.usage()["blobs"] == 200


def test_gc_keeps_what_a_kept_action_needs_and_counts_it_once(store: Store) -> None:
    shared, own = put(store, b"s" * 100), put(store, b"o" * 50)
    old = commit(store, "old", shared, own, used=1000)
    new = commit(store, "new", shared, used=2000)
    store.gc(store.counted() - 1, no_remove)
    assert store.action(new) is not None and store.action(old) is None
    assert store.has(shared.blob) and not store.has(own.blob)


def test_gc_of_a_fitting_store_drops_only_what_no_action_names(store: Store) -> None:
    output = put(store, b"tree")
    digest = commit(store, "kernel", output)
    package = put(store, b"a fetched package")
    unpacked = store.root / "unpacked" / "tree-x"
    unpacked.mkdir()
    (unpacked / "file").write_text("unpacked")
    (unpacked / "link").hardlink_to(unpacked / "file")
    (store.root / "partial" / "x.part").write_text("broken off")
    (store.root / "actions" / ".x.json.1.2.part").write_text("half")
    mark = (store.root / "checked" / package.blob).stat().st_size
    assert store.gc(10**9, no_remove) == mark + sum(
        map(len, ("a fetched package", "unpacked", "broken off", "half")))
    assert store.action(digest) is not None
    assert not store.has(package.blob) and not unpacked.exists()
    assert sorted(path.name for path in (store.root / "actions").iterdir()) == [f"{digest}.json"]
    assert store.gc(10**9, no_remove) == 0


def test_the_limit_is_for_all_but_ccache(store: Store) -> None:
    old, new = (commit(store, name, put(store, name.encode() * 100), used=used)
                for name, used in (("old", 1000), ("new", 2000)))
    for name in ("apt", "ccache"):
        (store.root / name).mkdir()
        (store.root / name / "file").write_bytes(bytes(5000))
    assert store.usage()["ccache"] == store.usage()["apt"] == 5000
    assert store.counted() == sum(store.usage().values()) - 5000
    store.gc(store.counted(), no_remove)
    assert store.action(old) is not None
    store.gc(store.counted() - 1, no_remove)
    assert store.action(old) is None and store.action(new) is not None


# locks


HOLD = """
import sys, time
from pathlib import Path
from katagpu.store import Store
store = Store(Path(sys.argv[1]))
store.prepare()
kind, name = sys.argv[2:4]
how = {"lock": lambda: store.lock(name), "lease": lambda: store.lease(),
       "staging": lambda: store.staging(name, lambda path: path.rmdir())}[kind]
with how() as held:
    print(held, flush=True)
    sys.stdin.read()
"""


def holder(store: Store, kind: str, name: str, repository: Path) -> subprocess.Popen[str]:
    """Another process that holds a lock, lease or staging directory until it is told."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(store.root), kind, name],
                               cwd=repository, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    return process


def test_a_lock_waits_for_another_process_and_says_so(store: Store, repository: Path) -> None:
    said: list[str] = []
    with holder(store, "lock", "a" * 64, repository) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        with store.lock("b" * 64, lambda: said.append("another")):
            pass
        assert said == []
        taken = threading.Event()

        def take() -> None:
            with store.lock("a" * 64, lambda: said.append("wait")):
                taken.set()

        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.3)
        assert said == ["wait"]
        other.stdin.close()
        assert taken.wait(20)
        thread.join()


def test_a_lock_of_a_killed_process_is_free(store: Store, repository: Path) -> None:
    with holder(store, "lock", "a" * 64, repository) as other:
        assert other.stdout is not None
        other.stdout.readline()
        other.kill()
        with store.lock("a" * 64):
            pass


def test_threads_exclude_each_other(store: Store) -> None:
    inside = 0
    most = 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with store.lock("x"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_lease_of_another_process_stops_gc_and_not_a_build(
    store: Store, repository: Path,
) -> None:
    with holder(store, "lease", "", repository) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        with store.lease(exclusive=True) as free:
            assert not free
        with store.lease() as free:
            assert free
        other.stdin.close()
    with store.lease(exclusive=True) as free:
        assert free


# staging


def test_staging_is_gone_afterwards_also_when_the_work_failed(store: Store) -> None:
    for failure in (None, StepError("no")):
        try:
            with store.staging("kernel", no_remove) as path:
                (path / "file").write_text("")
                assert path.parent == store.root / "staging"
                if failure:
                    raise failure
        except StepError as seen:
            assert seen is failure
        assert list((store.root / "staging").iterdir()) == []


def test_what_a_killed_run_left_is_swept_and_a_live_one_is_not(
    store: Store, repository: Path,
) -> None:
    with holder(store, "staging", "live", repository) as live, \
            holder(store, "staging", "dead", repository) as dead:
        assert live.stdout is not None and dead.stdout is not None and live.stdin is not None
        living, left = Path(live.stdout.readline().strip()), Path(dead.stdout.readline().strip())
        dead.kill()
        dead.wait()
        assert left.is_dir()
        with store.staging("mine", no_remove) as mine:
            assert not left.exists()
            assert living.is_dir() and mine.is_dir()
        assert sorted(path.name for path in (store.root / "staging").iterdir()) == [
            living.name, f"{living.name}.lock"]
        live.stdin.close()


def test_what_cannot_be_swept_is_said_and_does_not_stop_a_build(
    store: Store, capfd: pytest.CaptureFixture[str],
) -> None:
    stale = store.root / "staging" / "old-1-2"
    stale.mkdir()
    (store.root / "staging" / "old-1-2.lock").write_text("")

    def refuse(path: Path) -> None:
        if path == stale:
            raise StepError("its owner is another")
        no_remove(path)

    with store.staging("mine", refuse):
        pass
    assert stale.is_dir()
    assert "old-1-2 cannot be removed: its owner is another" in capfd.readouterr().err
    with store.staging("mine", no_remove):
        pass
    assert list((store.root / "staging").iterdir()) == []


def test_a_sweep_between_making_and_holding_a_lock_file_does_not_take_it(
    store: Store, monkeypatch: pytest.MonkeyPatch,
) -> None:
    locks = store.root / "staging"
    real = fcntl.flock
    swept: list[Path] = []

    def late(handle: int, how: int) -> None:
        if not swept:
            swept.extend(locks.glob("*.lock"))
            swept[0].unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with store.staging("mine", no_remove) as path:
        assert swept
        assert path.with_name(f"{path.name}.lock").exists()


def test_a_part_of_a_killed_run_goes_and_one_of_a_live_run_stays(store: Store) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead = store.root / "actions" / f".x.json.{gone.pid}.2.part"
    alive = store.root / "actions" / f".x.json.{os.getpid()}.2.part"
    for part in (dead, alive):
        part.write_text("half")
    with store.staging("run", shutil.rmtree):
        assert alive.exists() and not dead.exists()


def test_a_store_with_a_blank_in_its_path_is_refused(tmp_path: Path) -> None:
    """apt would take what stands behind the blank for a suite."""
    with pytest.raises(UserError, match="has a blank in its path"):
        Store(tmp_path / "my store").prepare()
    assert not (tmp_path / "my store").exists()
