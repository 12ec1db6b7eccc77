"""The functions that run programs: `run` to their end, `start` beside us.

Children get a clean environment and a process group of their own, write to the step's log, and die
with us: the parent-death signal belongs to the thread that forked (prctl(2), PR_SET_PDEATHSIG), so
all of them are forked by one thread that lives as long as the process. A child whose parent died
before that signal was set finds another parent, and does not start the program.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from katagpu.errors import StepError, TookTooLong, UserError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLEAN: Mapping[str, str] = {"PATH": PATH, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8", "HOME": "/"}
TAIL_LINES = 25
# $0 is our process id. A shell puts PWD into the environment, which is not clean.
_GUARD = '[ "$PPID" = "$0" ] || exit 137; unset PWD OLDPWD; exec "$@"'

_live: set[int] = set()
_live_lock = threading.Lock()
_scratch: set[Path] = set()
_ending = threading.Event()
_requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_spawner: threading.Thread | None = None
_spawner_pid = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished program: exit status (negative: signal), stdout if it was asked for.

    `stderr` is there when there was no log to write it to.
    """

    status: int
    stdout: bytes
    stderr: bytes = b""


def _serve() -> None:
    while True:
        _requests.get()()


def _spawn(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    global _spawner, _spawner_pid
    with _live_lock:
        if _spawner is None or _spawner_pid != os.getpid():
            _spawner = threading.Thread(target=_serve, name="spawner", daemon=True)
            _spawner.start()
            _spawner_pid = os.getpid()
    future: Future[subprocess.Popen[bytes]] = Future()

    def request() -> None:
        try:
            process = start()
        except BaseException as failure:
            future.set_exception(failure)
        else:
            with _live_lock:
                _live.add(process.pid)
            future.set_result(process)

    _requests.put(request)
    return future.result()


def kill_all() -> None:
    """End every program that is still running, with its process group.

    Called by signal handlers, so it takes no lock: the interrupted code may hold it.
    """
    for pid in tuple(_live):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory with a short path (a socket's has 107 bytes at most), removed in the end.

    A signal that ends us removes it too; SIGKILL leaves it to whoever clears the temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="katagpu-", ignore_cleanup_errors=True) as name:
        place = Path(name)
        _scratch.add(place)
        try:
            yield place
        finally:
            _scratch.discard(place)


def die_cleanly_on_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP end our programs and then us, with status 128 + signal.

    The store is crash-only (staging, rename), so only `scratch` needs to be undone. A signal that
    is ignored when we start stays so: nohup(1) asks for that, and a shell without job control for
    what it runs in the background.
    """

    def handler(number: int, _frame: FrameType | None) -> None:
        _ending.set()
        kill_all()
        for place in tuple(_scratch):
            shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.write(2, f"\ninterrupted by {signal.Signals(number).name}; "
                        "run the same command again to go on\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, at most 16 KiB of it."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 16384))
        text = stream.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def _must_exist(program: str, cwd: Path | None, path: str) -> None:
    """Raises `UserError` when the program is not there, `StepError` when its directory is not."""
    if cwd is not None and not cwd.is_dir():
        raise StepError(f"cannot run {program} in {cwd}: there is no such directory")
    found = (os.access((cwd or Path()) / program, os.X_OK) if "/" in program
             else shutil.which(program, path=path) is not None)
    if not found:
        raise UserError(f"the program {program!r} is not installed",
                        hint="./doitw setup installs what the build host needs")


def _guarded(words: Sequence[str]) -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _GUARD, str(os.getpid()),
            *words]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a program with its group, and let go of its pipes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def run(
    argv: Sequence[str | Path],
    *,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    capture: bool = False,
    check: bool = True,
    timeout: float | None = None,
    pass_fds: Sequence[int] = (),
    again: Sequence[str | Path] | None = None,
) -> Result:
    """Run a program to its end.

    `env` is added to the clean environment. Output is appended to `log` (else dropped), except
    stdout when `capture`. `again` is the command to show for a rerun where it is not `argv`.
    `timeout` is in seconds. Raises `UserError` when the program is not there, `StepError` when it
    fails (unless `check` is off), `TookTooLong` when it does not end.
    """
    words = [str(word) for word in argv]
    environment = {**CLEAN, **(env or {})}
    _must_exist(words[0], cwd, environment["PATH"])
    sink: IO[bytes] | int = subprocess.DEVNULL
    with contextlib.ExitStack() as stack:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            sink = stack.enter_context(log.open("ab"))
            sink.write(f"$ {shlex.join(words)}\n".encode())
            sink.flush()
        out: IO[bytes] | int = subprocess.PIPE if capture else sink
        errors: IO[bytes] | int = sink if log is not None else subprocess.PIPE
        process = _spawn(lambda: subprocess.Popen(
            _guarded(words),
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=out, stderr=errors, cwd=cwd, env=environment,
            start_new_session=True, pass_fds=pass_fds))
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            raise TookTooLong(f"{words[0]} did not end within {timeout:.0f} s",
                              hint=f"it was: {shlex.join(words)}") from None
        except BaseException:
            _end(process)
            raise
        finally:
            with _live_lock:
                _live.discard(process.pid)
    if _ending.is_set():  # we killed it ourselves: its thread has nothing to report
        threading.Event().wait()
    if check and process.returncode != 0:
        said = tail(log) if log is not None else (stderr or b"").decode(errors="replace").strip()
        raise failure(words, process.returncode, said, log, again)
    return Result(status=process.returncode, stdout=stdout or b"", stderr=stderr or b"")


class Running:
    """A program that runs beside us, with its process group."""

    def __init__(self, process: subprocess.Popen[bytes], argv: Sequence[str], log: Path) -> None:
        self.pid = process.pid
        self.argv = tuple(argv)
        self.log = log
        self._process = process
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit status (negative: signal), None while it runs."""
        with self._lock:
            if self._process.returncode is None and os.waitid(
                    os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self._reap()
            return self._process.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status once it has ended; `timeout` in seconds. Raises `TookTooLong`."""
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise TookTooLong(f"{self.argv[0]} did not end within {timeout:.0f} s",
                                  hint=f"its log: {self.log}")
            time.sleep(0.02)
        return status

    def stop(self) -> None:
        """Kill it with its group where it still runs. May be called again."""
        with self._lock:
            if self._process.returncode is None:
                self._reap()

    def _reap(self) -> None:
        """Kill what is left of the group while its number is still ours, then let it go."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with _live_lock:
            _live.discard(self.pid)
        self._process.wait()


def start(
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    terminal: bool = False,
) -> Running:
    """Start a program that runs beside us until it ends, is stopped, or we end.

    It has what `run` gives a program: the clean environment with `env`, a process group of its own,
    and the signal when we die. Output is appended to `log`; with `terminal` stdin and stdout are
    ours, and stderr alone goes there. Raises `UserError` when the program is not there.
    """
    words = [str(word) for word in argv]
    environment = {**CLEAN, **(env or {})}
    _must_exist(words[0], cwd, environment["PATH"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as sink:
        sink.write(f"$ {shlex.join(words)}\n".encode())
        sink.flush()
        process = _spawn(lambda: subprocess.Popen(
            _guarded(words), stdin=None if terminal else subprocess.DEVNULL,
            stdout=None if terminal else sink, stderr=sink, cwd=cwd, env=environment,
            start_new_session=True, pass_fds=pass_fds))
    return Running(process, words, log)


def failure(
    argv: Sequence[str], status: int, said: str, log: Path | None,
    again: Sequence[str | Path] | None = None,
) -> StepError:
    """The error of a program that failed: its last lines, the log, and how to run it again."""
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    where = f"\n  whole log: {log}" if log is not None else ""
    command = shlex.join(str(word) for word in (again or argv))
    return StepError(f"{argv[0]} ended with {how}:\n{said}{where}", hint=f"run it again: {command}")
