"""The way into the running guest: requests to the probe, and the kernel's log from it.

The other end is probe/main.go, whose protocol this is: one JSON object a line.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from katagpu.errors import StepError

ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
               "LANG": "C.UTF-8"}
PATIENCE = 15.0  # seconds, for what takes milliseconds


class Gone(StepError):
    """The guest does not answer: it hangs, or its machine has ended."""


class Late(Gone):
    """It did not answer in time, and its machine runs."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A program of the guest that ended; status 128 + n is signal n."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def said(self) -> list[str]:
        """All lines of both outputs."""
        return [*self.stdout.splitlines(), *self.stderr.splitlines()]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the kernel's log. `level` is syslog's (0 to 7), `at` seconds since boot.

    Programs of the guest can write there too: `kernel` says whether the kernel did.
    """

    level: int
    kernel: bool
    at: float
    text: str

    def __str__(self) -> str:
        return f"[{self.at:9.3f}] {self.text}"


def parse(record: str) -> Line:
    """A record of /dev/kmsg (the kernel's Documentation/ABI/testing/dev-kmsg).

    Lines after the first are a dictionary of the device; in the text `\\xNN` is a byte that is no
    printable ASCII.
    """
    head, _semicolon, rest = record.partition(";")
    priority, _sequence, micros = head.split(",")[:3]
    text = rest.split("\n", 1)[0]
    return Line(level=int(priority) & 7, kernel=int(priority) >> 3 == 0, at=int(micros) / 1e6,
                text=re.sub(r"(?:\\x[0-9a-f]{2})+", _unescaped, text))


def _unescaped(found: re.Match[str]) -> str:
    return bytes.fromhex(found[0].replace("\\x", "")).decode(errors="replace")


class Channel:
    """A connection to the probe, used by several threads. Close it at the end.

    `alive` raises `StepError` when the machine has ended, which is `Gone` then; it is asked while
    an answer is waited for. All times that are given here, in seconds, are those of an idle host:
    they are taken `slow` times.
    """

    def __init__(self, path: Path, alive: Callable[[], None], *, slow: float = 1.0) -> None:
        self._asked_alive = alive
        self.slow = slow
        self._numbers = itertools.count(1)
        self._waiting: dict[int, dict[str, Any] | None] = {}
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._lines: list[Line] = []
        self._ready = False
        self._closed = False
        self._socket = self._connect(path)
        self._thread = threading.Thread(target=self._receive, name="probe", daemon=True)
        self._thread.start()

    def _alive(self) -> None:
        try:
            self._asked_alive()
        except StepError as ended:
            raise Gone(ended.what, hint=ended.hint) from ended

    def _connect(self, path: Path) -> socket.socket:
        end = time.monotonic() + PATIENCE
        while True:
            found = socket.socket(socket.AF_UNIX)
            try:
                found.connect(str(path))
            except OSError as refusal:
                found.close()
                self._alive()
                if time.monotonic() > end:
                    raise Late(f"QEMU does not open {path}: {refusal}") from None
                time.sleep(0.02)
            else:
                return found

    def _receive(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as stream:
            for line in stream:
                self._take(line)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self, line: bytes) -> None:
        # The guest's own programs may write to the port: what is no message is passed over.
        with contextlib.suppress(ValueError, TypeError, AttributeError), self._changed:
            said = json.loads(line)
            if said.get("ready"):
                self._ready = True
            if "kernel" in said:
                self._lines.append(parse(said["kernel"]))
            if said.get("id") in self._waiting:
                self._waiting[said["id"]] = said
            self._changed.notify_all()

    def _wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout * self.slow
        while True:
            with self._changed:
                if done():
                    return
                closed = self._closed
                self._changed.wait(min(0.25, max(0.0, end - time.monotonic())))
                if done():
                    return
            self._alive()
            if closed:
                raise Gone(f"{what}: the connection to the guest is closed")
            if time.monotonic() > end:
                raise Late(f"{what}: no answer within {timeout * self.slow:.0f} s")

    def wait_ready(self, timeout: float) -> None:
        """Wait until the probe runs. Raises `Gone`."""
        self._wait(lambda: self._ready, timeout, "the guest's first process")

    def _ask(self, timeout: float, **asked: Any) -> dict[str, Any]:
        number = next(self._numbers)
        with self._changed:
            self._waiting[number] = None
        try:
            with self._sending:
                self._socket.sendall(json.dumps({"id": number, **asked}).encode() + b"\n")
            self._wait(lambda: self._waiting[number] is not None, timeout, f"{asked['do']}")
            found = self._waiting[number]
        except OSError as failure:
            self._alive()
            raise Gone(f"{asked['do']}: {failure.strerror}") from None
        finally:
            with self._changed:
                del self._waiting[number]
        assert found is not None
        return found

    def run(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None,
            stdin: bytes = b"", timeout: float = PATIENCE) -> Ran:
        """Run a program in the guest, in `env` alone (default: a path and a locale).

        `timeout` is in seconds. Raises `StepError` when it cannot be started or does not end in
        time, `Gone` when the guest does not answer.
        """
        words = ENVIRONMENT if env is None else env
        found = self._ask(timeout + PATIENCE, do="run", argv=list(argv),
                          seconds=timeout * self.slow,
                          env=[f"{name}={value}" for name, value in words.items()],
                          stdin=base64.b64encode(stdin).decode())
        if found.get("error"):
            raise StepError(f"in the guest: {' '.join(argv)}: {found['error']}")
        return Ran(argv=tuple(argv), status=found["status"], seconds=found.get("seconds", 0.0),
                   stdout=_text(found, "stdout"), stderr=_text(found, "stderr"))

    def shell(self, script: str, *, timeout: float = PATIENCE) -> Ran:
        """Run a script with the guest's shell."""
        return self.run(["/bin/sh", "-c", script], timeout=timeout)

    def read(self, path: str) -> bytes:
        """A file's content. Raises `FileNotFoundError` and its like."""
        return base64.b64decode(self._ok(do="read", path=path).get("stdout", ""))

    def text(self, path: str) -> str:
        """A file's content as text."""
        return self.read(path).decode(errors="replace")

    def exists(self, path: str) -> bool:
        """Is there such a file or directory?"""
        return self.run(["test", "-e", path]).status == 0

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file. Raises `OSError`."""
        self._ok(do="write", path=path, data=base64.b64encode(data).decode(), mode=mode)

    def open(self, path: str) -> int:
        """Open a device for reading and writing, and close it; the error number, 0 for none."""
        return int(self._ask(PATIENCE * 2, do="open", path=path).get("errno", 0))

    def terminal(self, path: str, rows: int, columns: int, env: Mapping[str, str]) -> None:
        """Run a shell on a terminal of the guest until it ends. Raises `OSError`, `Gone`."""
        found = self._ask(10**9, do="shell", path=path, rows=rows, columns=columns,
                          env=[f"{name}={value}" for name, value in env.items()])
        if found.get("errno"):
            raise OSError(found["errno"], os.strerror(found["errno"]), path)

    def _ok(self, **asked: Any) -> dict[str, Any]:
        found = self._ask(PATIENCE * 2, **asked)
        if found.get("errno"):
            raise OSError(found["errno"], os.strerror(found["errno"]), asked["path"])
        if found.get("error"):
            raise StepError(f"in the guest: {asked['path']}: {found['error']}")
        return found

    def lines(self, since: int = 0) -> list[Line]:
        """The kernel's log from a line number on."""
        with self._changed:
            return self._lines[since:]

    def mark(self) -> int:
        """The number of the next line of the kernel's log."""
        with self._changed:
            return len(self._lines)

    def wait_line(self, pattern: str, *, since: int = 0, timeout: float = PATIENCE) -> Line | None:
        """The first line that a regular expression is found in; None when none comes in time.

        Raises `Gone` when the guest is.
        """
        found: list[Line] = []

        def there() -> bool:
            found.extend(line for line in self._lines[since:] if re.search(pattern, line.text))
            return bool(found)

        with contextlib.suppress(Late):
            self._wait(there, timeout, "a line of the kernel's log")
        return found[0] if found else None

    def until(self, done: Callable[[], bool], timeout: float, step: float = 0.1) -> bool:
        """Ask again and again until it is so; False when it is not in time."""
        end = time.monotonic() + timeout * self.slow
        while not done():
            if time.monotonic() > end:
                return False
            time.sleep(step)
        return True

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._socket.close()


def _text(found: Mapping[str, Any], name: str) -> str:
    return base64.b64decode(found.get(name, "")).decode(errors="replace")
