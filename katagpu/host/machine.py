"""The host, below a root prefix: all that is read from it, and all that is changed on it.

Every change goes through `do`, which prints it in a dry run, refuses it before the user agreed, and
remembers how it is undone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from katagpu import log
from katagpu.errors import UserError
from katagpu.host.changes import Change, Place, Remove, Run, Write, below
from katagpu.host.programs import Missing, Programs, Result

Store = Callable[[Path, bytes], None]
PATIENCE = 60.0  # seconds for a write to sysfs


class Refused(UserError):
    """The kernel or a file system refused a change. `number` is the errno."""

    def __init__(self, what: str, *, number: int, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.number = number


def store(path: Path, data: bytes) -> None:
    """Write to an attribute of sysfs: one write(2), to a file that is there.

    A driver that waits for a GPU's last user keeps the writer in the kernel, where no signal
    reaches it, so a child writes. Raises `OSError`; ETIMEDOUT where it is not back in time.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        number = errno.EIO
        try:
            os.setsid()  # a ^C is for us, not for a write that has begun
            handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            os.write(handle, data)
            number = 0
        except OSError as refusal:
            number = refusal.errno or errno.EIO
        finally:
            os.write(writer, number.to_bytes(2, "little"))
            os._exit(0)
    os.close(writer)
    try:
        if not select.select([reader], [], [], PATIENCE)[0]:
            raise OSError(errno.ETIMEDOUT, f"the kernel did not come back within {PATIENCE:.0f} s",
                          str(path))
        number = int.from_bytes(os.read(reader, 2), "little")
    finally:
        os.close(reader)
    os.waitpid(child, 0)
    if number:
        raise OSError(number, os.strerror(number), str(path))


class Machine:
    """A host. Paths are the host's own, absolute; `root` is where its `/` is.

    Tests give `attributes`, what takes writes to sysfs, and `search`, a PATH with programs.
    """

    def __init__(self, root: Path = Path("/"), *, dry_run: bool = False, yes: bool = False,
                 quiet: bool = False, attributes: Store = store,
                 search: str | None = None) -> None:
        self.root = str(root)
        self.dry_run = dry_run
        self.changes: list[Change] = []
        self.programs = Programs(self.root, search)
        self._yes = yes
        self._quiet = quiet
        self._agreed = False
        self._locked = False
        self._store = attributes
        self._journal: list[tuple[Change, tuple[Change, ...]]] = []

    # looks

    def path(self, path: str, *, follow: bool = True) -> Path:
        """Where a path of the host is for us; `follow`: its last name too, where it is a link."""
        return Path(below(self.root, path, follow=follow))

    def raw(self, path: str) -> bytes | None:
        """A file's bytes; None where it cannot be read."""
        try:
            return self.path(path).read_bytes()
        except OSError:
            return None

    def text(self, path: str) -> str | None:
        """A file's text without white space around it; None where it cannot be read."""
        found = self.raw(path)
        return None if found is None else found.decode(errors="replace").strip()

    def exists(self, path: str) -> bool:
        """Is it there? (A link to nothing is not, nor what we may not see.)"""
        try:
            self.path(path).stat()
        except OSError:
            return False
        return True

    def names(self, path: str) -> list[str]:
        """What is in a directory, sorted; nothing where there is none."""
        try:
            return sorted(entry.name for entry in self.path(path).iterdir())
        except OSError:
            return []

    def link(self, path: str) -> str | None:
        """The last name of what a link points at: of `driver`, the driver's name."""
        try:
            return str(self.path(path, follow=False).readlink()).rstrip("/").rpartition("/")[2]
        except OSError:
            return None

    def real(self, path: str) -> str:
        """The path with all links followed, as the host sees it."""
        if self.root == "/":
            return os.path.realpath(path)
        found = below(self.root, path)
        return found[len(self.root):] or "/"

    def ask(self, argv: Sequence[str], *, timeout: float = 30.0, stdin: str = "") -> Result:
        """Run a program that changes nothing; in a dry run too. Raises `Missing`, `TooLong`."""
        return self.programs.run(argv, timeout, stdin)

    # changes

    def agree(self, what: str) -> None:
        """Get the user's word before the first change. Raises `UserError` where there is none.

        `what` says what will change, in one line.
        """
        if self.dry_run or self._yes or self._agreed:
            self._agreed = True
            return
        if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
            raise UserError(f"this would {what}, and nobody can be asked: there is no terminal",
                            hint="--yes does it unasked; --dry-run prints what it would do")
        sys.stderr.write(f"This will {what}.\nGo on? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UserError("nothing was changed")
        self._agreed = True

    def write(self, path: str, text: str, *, undo: Sequence[Change] = ()) -> None:
        """Write to sysfs. `undo` is done, in this order, when a later step fails."""
        self.do(Write(path, text), undo)

    def place(self, path: str, text: str, *, mode: int = 0o644) -> None:
        """Write a file; what was there before comes back when a later step fails."""
        self.do(Place(path, text, mode))

    def remove(self, path: str) -> None:
        """Remove a file; it comes back when a later step fails."""
        if os.path.lexists(self.path(path, follow=False)):
            self.do(Remove(path))

    def run(self, argv: Sequence[str], *, timeout: float = 60.0, undo: Sequence[Change] = (),
            atomic: bool = False) -> Result:
        """Run a program that changes something. Raises `UserError` where its status is not 0.

        It may have done a part of it by then, which is undone too, unless it is `atomic`.
        """
        return self.do(Run(tuple(argv), timeout), undo, atomic=atomic) \
            or Result(tuple(argv), 0, "", "")

    def do(self, change: Change, undo: Sequence[Change] = (), *,
           atomic: bool = False) -> Result | None:
        """Make a change, or print it in a dry run.

        One that fails is undone with the others where it may be done, or half of it.
        """
        if not (self._agreed or self.dry_run):
            raise AssertionError(f"{change} before the user agreed")
        self.changes.append(change)
        if self.dry_run:
            if not self._quiet:
                for line in change.lines():
                    sys.stdout.write(line + "\n")
            return None
        if isinstance(change, (Place, Remove)):
            undo = (*undo, self._as_before(change.path))
        try:
            found = self._make(change)
        except KeyboardInterrupt:  # it may be done, and may not
            self._journal.append((change, tuple(undo)))
            raise
        except UserError as failure:
            begun = not atomic and _begun(change, failure)
            self._journal.append((change, tuple(undo) if begun else ()))
            raise
        self._journal.append((change, tuple(undo)))
        return found

    def also(self, undo: Sequence[Change]) -> None:
        """Say how the last change, one that failed too, is undone: only its outcome tells."""
        if self._journal:
            change, before = self._journal[-1]
            self._journal[-1] = (change, (*before, *undo))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All of the changes in here, or none: they are undone in reverse when one fails."""
        start = len(self._journal)
        try:
            with self._alone():
                yield
        except BaseException as failure:
            said = self._undo(start)
            if isinstance(failure, UserError) and said:
                failure.what += "".join(f"\n  {line}" for line in said)
                failure.args = (failure.what,)
            else:
                for line in said:
                    log.note(line)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Be the only run that changes this host: a lock on a directory, which leaves nothing."""
        if self.dry_run or self._locked:
            yield
            return
        place = self.path("/sys/bus/pci")
        handle = os.open(place if place.is_dir() else self.root, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError("another run of katagpu host is changing this host",
                                hint="wait for it") from None
            self._locked = True
            yield
        finally:
            self._locked = False
            os.close(handle)

    def _undo(self, start: int) -> list[str]:
        """Undo what was done since, newest first; what is to be said of it."""
        todo = self._journal[start:]
        del self._journal[start:]
        said: list[str] = []
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for _, steps in reversed(todo):
                for step in steps:
                    line = step.lines()[0].rstrip(":")
                    try:
                        self._make(step)
                        said.append(f"undone by: {line}")
                    except UserError as refusal:
                        said.append(f"NOT undone: {line}: {refusal.what}")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        return said

    def _as_before(self, path: str) -> Change:
        """The change that brings a file back to what it is now."""
        found = self.raw(path)
        if found is None:
            return Remove(path)
        return Place(path, found.decode(errors="surrogateescape"),
                     self.path(path).stat().st_mode & 0o7777)

    def _make(self, change: Change) -> Result | None:
        if isinstance(change, Run):
            found = self.programs.run(change.argv, change.timeout)
            if found.status != 0:
                denied = any(os.strerror(number) in found.said
                             for number in (errno.EACCES, errno.EPERM))
                raise UserError(f"`{' '.join(change.argv)}` failed with status {found.status}:"
                                f"\n    {found.said}", hint=HINTS[errno.EPERM] if denied else None)
            return found
        try:
            if isinstance(change, Write):
                self._store(self.path(change.path), change.text.encode())
            elif isinstance(change, Place):
                _place(self.path(change.path), change)
            elif isinstance(change, Remove):
                with contextlib.suppress(FileNotFoundError):
                    self.path(change.path, follow=False).unlink()
        except OSError as refusal:
            raise refused(getattr(change, "path", ""), refusal) from None
        return None


def _begun(change: Change, failure: UserError) -> bool:
    """May a change that failed be done, or a part of it?"""
    if isinstance(change, Run):
        return not isinstance(failure, Missing)
    return isinstance(failure, Refused) and failure.number == errno.ETIMEDOUT


def _place(path: Path, change: Place) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.katagpu-part")
    try:
        with part.open("wb") as stream:
            os.fchmod(stream.fileno(), change.mode)
            stream.write(change.text.encode(errors="surrogateescape"))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


HINTS: dict[int, str] = {
    errno.EACCES: "run it as root: sudo",
    errno.EPERM: "run it as root: sudo; in a container, a privileged one. Where root is refused "
                 "too, the kernel is locked down",
    errno.EROFS: "that file system is read-only here: run it on the host itself, or in a container "
                 "that has it writable",
    errno.ENOSPC: "there is no space left there",
    errno.EBUSY: "something uses it",
    errno.ENODEV: "the driver does not take this function: dmesg | tail says why",
    errno.ETIMEDOUT: "the driver waits for something that uses the GPU: dmesg | tail may name it; "
                     "where nothing does, only a reboot helps",
}


def refused(path: str, refusal: OSError) -> Refused:
    """What a refusal of the kernel means."""
    number = refusal.errno or 0
    return Refused(f"{path}: {refusal.strerror or refusal}", number=number,
                   hint=HINTS.get(number))


def data(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """Changes for `--json`."""
    return [change.data() for change in changes]
