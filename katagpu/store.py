"""Two stores, one idea: blobs by content, and actions that say which blobs an action made.

Layout (the blob part is that of an OCI image layout):

    blobs/sha256/<hex>   bytes
    checked/<hex>        the state in which a blob's bytes were last hashed
    actions/<hex>.json   for an action: its key, outputs and record
    unpacked/<name>/     trees and sources unpacked for use: disposable
    staging/ locks/ partial/ ccache/

Everything is committed by fsync and rename, the action last, so a reader sees all or nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import threading
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from katagpu import log
from katagpu.errors import CorruptBlob, StepError, UserError
from katagpu.files import clone_or_copy as clone_or_copy
from katagpu.files import make_directories, tree_size
from katagpu.files import sync as sync
from katagpu.files import writing as writing
from katagpu.keys import file_digest, readable_digest

TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# made by katagpu; safe to delete\n"
DIRECTORIES = ("blobs/sha256", "checked", "actions", "unpacked", "staging", "locks", "partial")


class Kind(StrEnum):
    """What an output is."""

    FILE = "file"
    TREE = "tree"


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """One output of an action.

    `identity` is the SHA-256 of a file's bytes, or of a tree's uncompressed tar (OCI's diffID).
    `blob` is the SHA-256 of the stored bytes and `size` their number.
    """

    kind: Kind
    identity: str
    blob: str
    size: int


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """What was done: the stage, the whole key (for `why`), the outputs and how it went."""

    stage: str
    key: dict[str, Any]
    outputs: dict[str, Output]
    record: dict[str, Any]


# Made here, before there are threads: what msgspec 0.22 learns of a struct when it first decodes it
# is seen half-made by a second thread, which crashes.
ACTION = msgspec.json.Decoder(Action)


def default_root() -> Path:
    """`KATAGPU_STORE`, else katagpu under the user's XDG cache directory."""
    given = os.environ.get("KATAGPU_STORE")
    if given:
        return Path(given).absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "katagpu"


class Store:
    """A store below one directory; safe for several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the directories. Raises `UserError` where that is not allowed, or apt could not."""
        if any(letter.isspace() for letter in str(self.root)):
            raise UserError(f"the store {str(self.root)!r} has a blank in its path, which an apt "
                            "source cannot have", hint="set KATAGPU_STORE to a path without one")
        make_directories(self.root, DIRECTORIES)
        with writing(self.root):
            tag = self.root / "CACHEDIR.TAG"
            if not tag.exists():
                tag.write_text(TAG)

    # blobs and trees

    def blob(self, digest: str) -> Path:
        """Where a blob's bytes are, if they are."""
        return self.root / "blobs" / "sha256" / digest

    def has(self, digest: str, size: int | None = None) -> bool:
        """Is the blob there (and of this size)? The bytes are not read."""
        try:
            found = self.blob(digest).stat().st_size
        except OSError:
            return False
        return size is None or found == size

    def drop(self, digest: str) -> None:
        """Forget a blob; actions that need it become misses."""
        with writing(self.root):
            self.blob(digest).unlink(missing_ok=True)

    def put(self, path: Path, digest: str | None = None) -> tuple[str, int]:
        """Move a file of the staging area into the store; its SHA-256 and size.

        It takes the place of a blob that is there: that one may be damaged.
        """
        with writing(self.root):
            digest = digest or file_digest(path)
            size = path.stat().st_size
            target = self.blob(digest)
            path.chmod(0o444)
            sync(path)
            path.rename(target)
            sync(target.parent)
            self._note_sound(digest, self._mark(digest))
        return digest, size

    # Hashing costs more than copying. A blob whose bytes were hashed is marked with what any later
    # write through the file system changes; `verify` hashes whatever the marks say.

    def _mark(self, digest: str) -> str:
        found = self.blob(digest).stat()
        return f"{found.st_size} {found.st_ino} {found.st_mtime_ns} {found.st_ctime_ns}"

    def _note_sound(self, digest: str, mark: str) -> None:
        with contextlib.suppress(OSError):  # the mark saves time and is never needed
            path = self.root / "checked" / digest
            part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
            part.write_text(mark)
            part.replace(path)

    def _is_marked(self, digest: str) -> bool:
        try:
            return (self.root / "checked" / digest).read_text() == self._mark(digest)
        except OSError:
            return False

    def sound(self, digest: str) -> Path:
        """The blob, its bytes verified. Raises `CorruptBlob`; the blob is dropped then."""
        path = self.blob(digest)
        if self._is_marked(digest):
            return path
        with contextlib.suppress(OSError):
            mark = self._mark(digest)
            if file_digest(path) == digest:
                self._note_sound(digest, mark)
                return path
        found = readable_digest(path)
        self.drop(digest)
        raise CorruptBlob(digest, found)

    def copy_out(self, digest: str, target: Path) -> None:
        """Copy a verified blob to a file, all or nothing.

        Raises `CorruptBlob` (the blob is dropped) when its bytes are not what they should be.
        """
        source = self.sound(digest)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            if not Path("/proc", left.suffixes[-2][1:]).exists():  # of a killed run
                left.unlink(missing_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as writer:
                clone_or_copy(source, writer.fileno())
            part.chmod(0o644)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    # actions

    def _action_path(self, digest: str) -> Path:
        return self.root / "actions" / f"{digest}.json"

    def action(self, digest: str) -> Action | None:
        """The action, if it is known and all its blobs are there."""
        try:
            action = ACTION.decode(self._action_path(digest).read_bytes())
        except (OSError, msgspec.DecodeError):
            return None
        if not all(self.has(output.blob, output.size) for output in action.outputs.values()):
            return None
        return action

    def touch(self, digest: str) -> None:
        """Note that an action was used now (for LRU); a read-only store does not mind."""
        with contextlib.suppress(OSError):
            os.utime(self._action_path(digest))

    def commit(self, digest: str, action: Action) -> None:
        """Write the action record: from here on it is a hit."""
        self._write(self._action_path(digest), msgspec.json.encode(action))

    def actions(self) -> Iterator[tuple[str, float, Action]]:
        """All actions: digest, last use (seconds since the epoch), record; newest first."""
        used = {}
        for path in (self.root / "actions").glob("*.json"):
            with contextlib.suppress(OSError):
                used[path] = path.stat().st_mtime
        for path in sorted(used, key=lambda path: used[path], reverse=True):
            with contextlib.suppress(OSError, msgspec.DecodeError):
                yield path.stem, used[path], ACTION.decode(path.read_bytes())

    def forget(self, digest: str) -> None:
        """Drop an action record."""
        self._action_path(digest).unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes) -> None:
        with writing(self.root):
            part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
            try:
                part.write_bytes(data)
                sync(part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            sync(path.parent)

    # locks and scratch

    @contextlib.contextmanager
    def lock(self, name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the lock of this name; others of any process wait, after calling `waiting`."""
        with contextlib.ExitStack() as stack:
            with writing(self.root):
                held = stack.enter_context((self.root / "locks" / name).open("a"))
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(held, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def lease(self, *, exclusive: bool = False) -> Iterator[bool]:
        """A build holds a shared lease while it runs; gc needs the exclusive one.

        Yields False when an exclusive lease was asked for and a build is running. On a store that
        may only be read, a build goes without where there is no lease to hold.
        """
        path = self.root / "locks" / "lease"
        free = True
        with contextlib.ExitStack() as stack:
            try:
                with writing(self.root):
                    held = stack.enter_context(path.open("a" if exclusive or not path.exists()
                                                         else "r"))
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
            except BlockingIOError:
                free = False
            except UserError:
                if exclusive:
                    raise
            yield free

    @contextlib.contextmanager
    def staging(self, name: str, remove: Callable[[Path], None]) -> Iterator[Path]:
        """A scratch directory on the store's file system, gone afterwards.

        `remove` deletes a directory whose files may belong to subordinate ids. What a killed run
        left behind is removed by the next one: its lock is free.
        """
        self._sweep(remove)
        path = self.root / "staging" / f"{name}-{os.getpid()}-{time.monotonic_ns():x}"
        lock = path.with_name(f"{path.name}.lock")
        with writing(self.root):
            handle = _own(lock)
        try:
            with writing(self.root):
                path.mkdir()
            yield path
        finally:
            try:
                remove(path)
                lock.unlink(missing_ok=True)
            finally:
                os.close(handle)

    def _sweep(self, remove: Callable[[Path], None]) -> None:
        """Remove what killed runs left; what cannot go now is left to the next sweep."""
        for lock in (self.root / "staging").glob("*.lock"):
            try:
                handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(handle, lock):
                    remove(lock.with_suffix(""))
                    lock.unlink()
            except BlockingIOError:
                pass
            except (OSError, StepError) as refusal:
                log.warn(f"a killed run's {lock.with_suffix('')} cannot be removed: {refusal}")
            finally:
                os.close(handle)
        for directory in ("actions", "checked"):  # .<name>.<pid>.<thread>.part
            for part in (self.root / directory).glob(".*.part"):
                if not Path("/proc", part.name.split(".")[-3]).exists():
                    with contextlib.suppress(OSError):
                        part.unlink(missing_ok=True)

    # care

    def verify(self) -> list[tuple[str, str]]:
        """Re-hash every blob; drop and return the damaged ones as (digest, found)."""
        damaged = []
        for path in sorted((self.root / "blobs" / "sha256").iterdir()):
            found = readable_digest(path)
            if found != path.name and path.exists():
                damaged.append((path.name, found))
                self.drop(path.name)
        return damaged

    def usage(self) -> dict[str, int]:
        """Bytes by directory of the store."""
        return {path.name: tree_size(path) for path in self.root.glob("*/")}

    def counted(self) -> int:
        """Bytes that the store's limit is for: all but ccache, which keeps a limit of its own."""
        return sum(tree_size(path) for path in self.root.glob("*/") if path.name != "ccache")

    def gc(self, limit: int, remove: Callable[[Path], None]) -> int:
        """Drop least recently used actions until the store fits `limit` bytes; bytes freed.

        Unpacked copies, downloads that were broken off, and blobs that no action names (fetched
        packages) go first. The caller holds the exclusive lease: nobody needs them now.
        """
        before = self.counted()
        self._sweep(remove)
        for part in (self.root / "actions").glob(".*.part"):  # with the exclusive lease: nobody's
            part.unlink(missing_ok=True)
        for name in ("unpacked", "partial"):
            for entry in (self.root / name).iterdir():
                remove(entry)
        keep: set[str] = set()
        total = self.counted() - tree_size(self.root / "blobs")
        for digest, _used, action in self.actions():
            blobs = {output.blob: output.size for output in action.outputs.values()}
            cost = sum(size for blob, size in blobs.items() if blob not in keep)
            if total + cost > limit:
                self.forget(digest)
                continue
            total += cost
            keep.update(blobs)
        for path in (self.root / "blobs" / "sha256").iterdir():
            if path.name not in keep:
                path.unlink()
        for path in (self.root / "checked").iterdir():
            if not self.has(path.name):
                path.unlink()
        return before - self.counted()


def _own(path: Path) -> int:
    """Create and lock a file. A sweep may take it away between the two: then once more."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _is(handle, path):
            return handle
        os.close(handle)


def _is(handle: int, path: Path) -> bool:
    """Is the open file still the one at `path`?"""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
