"""QEMU's monitor: commands, their answers, and events, over a unix socket.

The protocol is QEMU's docs/interop/qmp-spec: one JSON object per line; a greeting, then
`qmp_capabilities`, then commands, whose answers carry their id, with events in between. The library
qemu.qmp is for asyncio; its synchronous part is under the GPL 2 and calls itself a legacy.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from katagpu.errors import StepError, TookTooLong, UserError

SECONDS = 30.0  # for one command; the slowest, device_add, takes less than one
LONGEST = 107  # bytes of a unix socket's path, unix(7)

Event = Mapping[str, Any]


class Refused(StepError):
    """QEMU's answer to a command is an error; `kind` is its class, `said` its words."""

    def __init__(self, command: str, kind: str, said: str) -> None:
        super().__init__(f"QEMU refuses {command}: {said}")
        self.command = command
        self.kind = kind
        self.said = said


class Monitor:
    """A connection, for one thread.

    `check` is called when there is no answer (yet): it raises what became of QEMU, where it ended.
    """

    def __init__(self, connection: socket.socket, check: Callable[[], None]) -> None:
        self._socket = connection
        self._check = check
        self._read = b""
        self._events: list[Event] = []
        self._last = 0

    @classmethod
    def connect(cls, path: Path, check: Callable[[], None] = lambda: None, *,
                timeout: float = 20.0) -> Monitor:
        """Connect as soon as QEMU listens at `path`, at most `timeout` seconds from now on.

        Raises `UserError` for a path that is too long, `TookTooLong`, and what `check` raises.
        """
        if len(str(path).encode()) > LONGEST:
            raise UserError(f"the path of a socket is too long: {path}",
                            hint=f"it has at most {LONGEST} bytes; use a shorter directory")
        end = time.monotonic() + timeout
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout)  # else it waits for a place in a queue that is full
            try:
                connection.connect(str(path))
                break
            except OSError as refusal:  # not there, or nobody listens yet
                connection.close()
                check()
                if time.monotonic() > end:
                    raise TookTooLong(f"QEMU's monitor at {path} does not answer: "
                                      f"{refusal.strerror}") from None
            time.sleep(0.01)
        monitor = cls(connection, check)
        try:
            monitor.greet(max(1.0, end - time.monotonic()))
        except BaseException:
            monitor.close()
            raise
        return monitor

    def greet(self, timeout: float = SECONDS) -> None:
        """Take the greeting, and leave capabilities negotiation mode."""
        greeting = self._message(time.monotonic() + timeout, "the greeting")
        if "QMP" not in greeting:
            raise StepError(f"this is not QEMU's monitor: it says {json.dumps(greeting)[:200]}")
        self.command("qmp_capabilities")

    def command(self, command: str, /, **arguments: Any) -> Any:
        """Give a command; what it returns. Names with a dash go in as `**{"a-b": 1}`.

        Raises `Refused`, `TookTooLong` after 30 s, and `StepError` when QEMU ended.
        """
        self._last += 1
        asked: dict[str, Any] = {"execute": command, "id": self._last}
        if arguments:
            asked["arguments"] = arguments
        end = time.monotonic() + SECONDS
        try:
            self._socket.settimeout(SECONDS)
            self._socket.sendall(json.dumps(asked).encode() + b"\n")
        except TimeoutError:
            raise TookTooLong(f"QEMU does not take {command}") from None
        except OSError as refusal:
            self._ended(refusal)
        while True:
            found = self._message(end, f"the answer to {command}")
            if "event" in found:
                self._events.append(found)
            elif found.get("id") == self._last:  # an older one is of a command given up
                error = found.get("error")
                if isinstance(error, dict):
                    raise Refused(command, str(error.get("class")), str(error.get("desc")))
                if "return" not in found:
                    raise _foreign(json.dumps(found))
                return found["return"]

    def wait_event(self, name: str, timeout: float,
                   match: Callable[[Mapping[str, Any]], bool] = lambda _data: True) -> Event:
        """The data of the next event of this name that matches, at most `timeout` seconds from now.

        Events that came earlier and nobody took count; each is taken once, others stay. Raises
        `TookTooLong`, which names what came instead, and `StepError` when QEMU ended.
        """
        end = time.monotonic() + timeout
        seen = 0
        while True:
            for event in self._events[seen:]:
                data: Event = event.get("data", {})
                if event["event"] == name and match(data):
                    self._events.remove(event)
                    return data
            seen = len(self._events)
            try:
                found = self._message(end, f"the event {name}")
            except TookTooLong as late:
                others = ", ".join(dict.fromkeys(str(one["event"]) for one in self._events))
                raise TookTooLong(f"no event {name} of QEMU within {timeout:.0f} s; "
                                  f"others: {others or 'none'}") from late
            if "event" in found:
                self._events.append(found)

    def _message(self, end: float, what: str) -> dict[str, Any]:
        """The next message, at the latest at `end` (monotonic)."""
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0:
                self._check()
                raise TookTooLong(f"{what} of QEMU's monitor did not come in time")
            try:
                self._socket.settimeout(left)
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError as refusal:
                self._ended(refusal)
            if not data:
                self._ended(None)
            self._read += data
        line, _newline, self._read = self._read.partition(b"\n")
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise _foreign(line.decode(errors="replace"))
        return found

    def _ended(self, refusal: OSError | None) -> None:
        """The connection is gone. Raises always."""
        end = time.monotonic() + 2
        while time.monotonic() < end:  # the program ends a moment after its sockets
            self._check()
            time.sleep(0.02)
        why = f": {refusal.strerror}" if refusal is not None else ""
        raise StepError(f"QEMU closed its monitor{why}")

    def close(self) -> None:
        """Let go of the connection. May be called again."""
        with contextlib.suppress(OSError):
            self._socket.close()


def _foreign(said: str) -> StepError:
    return StepError(f"QEMU's monitor says what is not of its protocol: {said[:200]!r}")
