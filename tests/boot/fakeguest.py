"""A guest of words: the probe's end of the channel on a unix socket, answering from tables.

The protocol's other end is the real one (katagpu/boot/channel.py); QEMU's monitor is a socket too.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Said = tuple[int, str, str]  # status, stdout, stderr
Request = dict[str, Any]


@dataclass
class Tables:
    """What a guest answers. `programs`: the first expression that is found in a command line.

    `files` are contents, or an error number; `exists` further paths; `opens` error numbers.
    """

    programs: dict[str, Said | str | Callable[[Request], Said | str]] = field(default_factory=dict)
    files: dict[str, str | bytes | int] = field(default_factory=dict)
    exists: set[str] = field(default_factory=set)
    opens: dict[str, int] = field(default_factory=dict)

    def run(self, asked: Request) -> Said:
        line = " ".join(asked["argv"])
        for pattern, said in self.programs.items():
            if re.search(pattern, line):
                found = said(asked) if callable(said) else said
                return (0, found, "") if isinstance(found, str) else found
        if match := re.fullmatch(r"test -e (\S+)", line):
            there = match[1] in self.exists or isinstance(self.files.get(match[1]), str | bytes)
            return (0 if there else 1, "", "")
        if line.startswith("/bin/sh -c cd /sys/bus/pci/devices"):
            return (0, "", "")
        return (127, "", f"{line}: not in the table")

    def answer(self, asked: Request) -> dict[str, Any]:
        if asked["do"] == "run":
            status, out, err = self.run(asked)
            return {"status": status, "stdout": coded(out), "stderr": coded(err), "seconds": 0.01}
        path = asked["path"]
        if asked["do"] == "open":
            return {"errno": self.opens.get(path, 0)}
        if asked["do"] == "write":
            self.files[path] = base64.b64decode(asked["data"])
            return {}
        content = self.files.get(path, errno.ENOENT)
        if isinstance(content, int):
            return {"errno": content, "error": f"open {path}"}
        return {"stdout": coded(content)}


def coded(data: str | bytes) -> str:
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


class Served:
    """A server of one connection on a unix socket. Close it at the end."""

    def __init__(self, path: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self.connected = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            connection, _address = self._listening.accept()
        except OSError:
            return
        self._connection = connection
        self.begin()
        self.connected.set()
        with contextlib.suppress(OSError), connection.makefile("rb") as lines:
            for line in lines:
                self.take(json.loads(line))

    def begin(self) -> None:
        """The first words."""

    def take(self, asked: Request) -> None:
        """One request."""

    def say(self, **said: Any) -> None:
        self.raw(json.dumps(said).encode() + b"\n")

    def raw(self, data: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            assert self._connection is not None
            self._connection.sendall(data)

    def hang_up(self) -> None:
        """End the connection, as a machine that ends does."""
        assert self.connected.wait(5)
        assert self._connection is not None
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        if self._connection is not None:
            self.hang_up()
        self._thread.join()
        self._listening.close()
        if self._connection is not None:
            self._connection.close()


class FakeGuest(Served):
    """The probe. While `silent` is set it takes requests and does not answer."""

    def __init__(self, path: Path, *, ready: bool = True) -> None:
        self.tables = Tables()
        self.asked: list[Request] = []
        self.silent = False
        self._ready = ready
        self._clock = 0
        super().__init__(path)

    def begin(self) -> None:
        if self._ready:
            self.say(ready=True)

    def take(self, asked: Request) -> None:
        self.asked.append(asked)
        if not self.silent:
            self.say(id=asked["id"], **self.tables.answer(asked))

    def ran(self) -> list[str]:
        """The command lines that were run."""
        return [" ".join(asked["argv"]) for asked in self.asked if asked["do"] == "run"]

    def log(self, text: str, *, level: int = 6, kernel: bool = True) -> None:
        """A line of the kernel's log."""
        assert self.connected.wait(5)
        self._clock += 1
        priority = level if kernel else level | 1 << 3
        self.say(kernel=f"{priority},{self._clock},{self._clock * 1000},-;{text}")


class FakeMonitor(Served):
    """QEMU's monitor: each command runs `done[its name]`, and all are kept in `asked`."""

    def __init__(self, path: Path) -> None:
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.done: dict[str, Callable[[Mapping[str, Any]], None]] = {}
        super().__init__(path)

    def begin(self) -> None:
        self.say(QMP={"version": {}, "capabilities": []})

    def take(self, asked: Request) -> None:
        words = asked.get("arguments", {})
        self.asked.append((asked["execute"], words))
        if asked["execute"] in self.done:
            self.done[asked["execute"]](words)
        self.say(**{"return": {}, "id": asked["id"]})
