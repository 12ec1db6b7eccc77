"""vfio-user on the wire: constants, and messages in and out of a socket that never blocks.

Source: the vfio-user Protocol Specification, docs/interop/vfio-user.rst of QEMU, and for regions,
interrupts and flags `<linux/vfio.h>`. All numbers are in the host's byte order.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum

HEADER = struct.Struct("=HHIII")
"""Message id, command, size of the whole message, flags, errno."""
REPLY, NO_REPLY, ERROR, TYPE = 0x1, 0x10, 0x20, 0xF

MAX_TRANSFER = 1 << 20
"""Bytes that one read or write of a region carries; the specification's default."""
MAX_FDS = 8
"""File descriptors in a message. QEMU takes no larger offer than 16."""
MAX_MESSAGE = HEADER.size + 16 + MAX_TRANSFER
KERNEL_MAX_FDS = 253  # SCM_MAX_FD of <net/scm.h>
BACKLOG = 4 * MAX_MESSAGE
"""With so many bytes of replies not yet taken, no more of the client's messages are read."""

CONFIG_REGION, REGIONS, IRQS = 7, 9, 5


class Command(IntEnum):
    """The commands that are answered; any other gets an error."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    RESET = 13


class Malformed(Exception):
    """The stream cannot be trusted any more; the connection ends."""


class Ended(Exception):
    """The client closed its end, between two messages."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """A command. `fds` came with it: who takes one out of the list keeps it."""

    ident: int
    command: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def wants_reply(self) -> bool:
        """False when the client does not wait for an answer."""
        return not self.flags & NO_REPLY

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self.fds)


def close_all(fds: list[int]) -> None:
    """Close descriptors, and forget them."""
    while fds:
        with contextlib.suppress(OSError):  # EIO of a foreign file; the number is free all the same
            os.close(fds.pop())


class Stream:
    """One connection. Neither `receive` nor `flush` blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._in = bytearray()
        self._fds: list[int] = []
        self._out = bytearray()

    def close(self) -> None:
        """End the connection, and close what came with an unfinished message."""
        close_all(self._fds)
        self.sock.close()

    @property
    def pending(self) -> int:
        """Bytes of replies that the client has not taken."""
        return len(self._out)

    def receive(self) -> Message | None:
        """The next whole message, or None when the rest of it is not there yet.

        Reads exactly up to the message's end, for descriptors belong to the message with whose
        bytes they come. Raises `Malformed`, `Ended` and OSError.
        """
        while (missing := self._missing()) > 0:
            try:
                data, control, flags, _ = self.sock.recvmsg(
                    missing, socket.CMSG_SPACE(KERNEL_MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return None
            for level, kind, words in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._fds += array.array("i", words[:len(words) - len(words) % 4])
            if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
                raise Malformed(f"more than {MAX_FDS} file descriptors in one message")
            if not data:
                if self._in:
                    raise Malformed(f"the stream ended after {len(self._in)} bytes of a message")
                raise Ended
            self._in += data
        ident, command, _size, flags, _error = HEADER.unpack_from(self._in)
        message = Message(ident=ident, command=command, flags=flags,
                          payload=bytes(self._in[HEADER.size:]), fds=self._fds)
        self._in, self._fds = bytearray(), []
        return message

    def _missing(self) -> int:
        """Bytes to read until the header, and then the message, is whole."""
        if len(self._in) < HEADER.size:
            return HEADER.size - len(self._in)
        _ident, command, size, flags, _error = HEADER.unpack_from(self._in)
        if not HEADER.size <= size <= MAX_MESSAGE:
            raise Malformed(f"a message of {size} bytes (command {command})")
        if flags & TYPE:
            raise Malformed(f"not a command: flags {flags:#x} (command {command})")
        return int(size) - len(self._in)

    def answer(self, message: Message, payload: bytes = b"", *, errno: int = 0) -> None:
        """Queue the reply to a message that wants one. With `errno` it is an error's."""
        if message.wants_reply:
            body = b"" if errno else payload
            flags = REPLY | ERROR if errno else REPLY
            self._out += HEADER.pack(message.ident, message.command, HEADER.size + len(body),
                                     flags, errno) + body

    def flush(self) -> None:
        """Send what the client takes now. Raises OSError."""
        while self._out:
            try:
                sent = self.sock.send(self._out, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            del self._out[:sent]
