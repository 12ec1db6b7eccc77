"""A small vfio-user client, written from the specification apart from the server's own code."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION, GET_IRQ = 1, 2, 3, 4, 5, 7
SET_IRQS, READ, WRITE, RESET = 8, 9, 10, 13
CONFIG = 7


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer: `error` is None, or the errno of an error."""

    ident: int
    command: int
    error: int | None
    data: bytes


class Client:
    """A connection. Every read has a timeout, so a server that hangs fails a test."""

    def __init__(self, path: Path, *, agree: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        self.ident = 0
        if agree:
            assert self.version().error is None

    def close(self) -> None:
        self.sock.close()

    def send(self, command: int, payload: bytes = b"", *, fds: list[int] | None = None,
             flags: int = 0, size: int | None = None) -> int:
        """Send a message; `size` lies about its length."""
        self.ident += 1
        whole = struct.pack("=HHIII", self.ident, command,
                            16 + len(payload) if size is None else size, flags, 0) + payload
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        if rest := whole[self.sock.sendmsg([whole], control):]:
            self.sock.sendall(rest)
        return self.ident

    def reply(self) -> Reply:
        ident, command, size, flags, error = struct.unpack("=HHIII", self.exactly(16))
        assert flags & 0xF == 1, "a reply says that it is one"
        data = self.exactly(size - 16)
        assert not (flags & 0x20 and data), "an error has no payload"
        return Reply(ident=ident, command=command, error=error if flags & 0x20 else None, data=data)

    def exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            part = self.sock.recv(count - len(got))
            assert part, f"the server closed the connection after {len(got)} bytes"
            got += part
        return got

    def ask(self, command: int, payload: bytes = b"", fds: list[int] | None = None) -> Reply:
        ident = self.send(command, payload, fds=fds)
        reply = self.reply()
        assert (reply.ident, reply.command) == (ident, command)
        return reply

    def is_closed(self) -> bool:
        """The server ended the connection. Waits for it."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def version(self, major: int = 0, minor: int = 0, data: bytes | None = None) -> Reply:
        if data is None:
            offer = {"capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20,
                                      "write_multiple": True}}
            data = json.dumps(offer).encode() + b"\0"
        return self.ask(VERSION, struct.pack("=HH", major, minor) + data)

    def region(self, index: int) -> tuple[int, int]:
        """A region's flags and size."""
        reply = self.ask(GET_REGION, struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
        assert reply.error is None
        size, flags, found, _cap, length, _offset = struct.unpack("=IIIIQQ", reply.data)
        assert (size, found) == (32, index)
        return flags, length

    def irqs(self, index: int) -> tuple[int, int]:
        """An interrupt type's flags and count."""
        reply = self.ask(GET_IRQ, struct.pack("=IIII", 16, 0, index, 0))
        assert reply.error is None
        size, flags, found, count = struct.unpack("=IIII", reply.data)
        assert (size, found) == (16, index)
        return flags, count

    def set_irqs(self, flags: int, index: int, start: int, count: int, *, data: bytes = b"",
                 fds: list[int] | None = None) -> Reply:
        return self.ask(SET_IRQS, struct.pack("=IIIII", 20 + len(data), flags, index, start,
                                              count) + data, fds)

    def read(self, region: int, offset: int, count: int) -> bytes:
        reply = self.ask(READ, struct.pack("=QII", offset, region, count))
        assert reply.error is None
        assert struct.unpack_from("=QII", reply.data) == (offset, region, count)
        return reply.data[16:]

    def number(self, region: int, offset: int, count: int) -> int:
        return int.from_bytes(self.read(region, offset, count), "little")

    def write(self, region: int, offset: int, data: bytes) -> None:
        reply = self.ask(WRITE, struct.pack("=QII", offset, region, len(data)) + data)
        assert reply.error is None
        assert struct.unpack("=QII", reply.data) == (offset, region, len(data))


def open_fds() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until the server's thread has done something."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to it"
        time.sleep(0.005)


@contextlib.contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    """So many eventfds, closed at the end."""
    made = [os.eventfd(0) for _ in range(count)]
    try:
        yield made
    finally:
        for number in made:
            os.close(number)
