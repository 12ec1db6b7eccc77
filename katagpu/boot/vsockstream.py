"""One stream connection of a virtio-vsock device, and the packets (virtio 1.2, section 5.10.6).

No packet is sent and no ring is touched here: a `Stream` keeps the state of a connection between a
guest's port and a socket of the host, and says which packets are due.
"""

from __future__ import annotations

import socket
import struct
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto

HOST = 2                 # the host's context id
STREAM = 1               # VIRTIO_VSOCK_TYPE_STREAM
NO_MORE_RECEIVED, NO_MORE_SENT = 1, 2  # flags of SHUTDOWN: what its sender will not do any more
BOTH = NO_MORE_RECEIVED | NO_MORE_SENT
ROOM = 256 * 1024        # bytes of a connection that we keep for a slow reader (buf_alloc)
LARGEST = 64 * 1024      # bytes of data in one packet, as Linux has it
CLOSE_TIME = 8.0         # seconds for the guest to confirm a close, as Linux has it
_LAYOUT = struct.Struct("<QQIIIHHIII")
HEADER = _LAYOUT.size
_WRAP = 0xFFFFFFFF       # counters are 32 bits wide and wrap


class Op(IntEnum):
    """What a packet does."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a packet; `room` and `forwarded` are the specification's buf_alloc, fwd_cnt."""

    source: int
    target: int
    source_port: int
    target_port: int
    length: int = 0
    kind: int = STREAM
    op: int
    flags: int = 0
    room: int = 0
    forwarded: int = 0

    def pack(self) -> bytes:
        """Its bytes."""
        return _LAYOUT.pack(self.source, self.target, self.source_port, self.target_port,
                            self.length, self.kind, self.op, self.flags, self.room, self.forwarded)

    @staticmethod
    def unpack(data: bytes) -> Header:
        """Read `HEADER` bytes."""
        source, target, source_port, target_port, length, kind, op, flags, room, forwarded = \
            _LAYOUT.unpack(data)
        return Header(source=source, target=target, source_port=source_port,
                      target_port=target_port, length=length, kind=kind, op=op, flags=flags,
                      room=room, forwarded=forwarded)


class State(Enum):
    """Of a connection that the host asked for."""

    REQUESTED = auto()  # the guest has not answered
    OPEN = auto()
    CLOSING = auto()    # our end is closed, the guest has not confirmed
    GONE = auto()       # the guest's end is closed; what it sent is still to be read


class Broken(Exception):
    """The connection cannot go on and is to be reset."""


@dataclass(kw_only=True)
class Stream:
    """A connection. `ours` is the end of a socket pair whose other end the host's program has."""

    local: int
    port: int
    ours: socket.socket
    answer: Future[None] = field(default_factory=Future)
    state: State = State.REQUESTED
    unread: bytearray = field(default_factory=bytearray)  # from the guest, for the program
    sent: int = 0             # bytes to the guest
    peer_room: int = 0
    peer_forwarded: int = 0
    asked: bool = False       # for credit, since it ran out
    forwarded: int = 0        # bytes from the guest that the program's socket took
    told: int = 0             # `forwarded` as the guest knows it
    ended: bool = False       # the program will not send any more
    said: int = 0             # the guest's SHUTDOWN flags
    deadline: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        """Its place in the device's table."""
        return self.local, self.port

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for."""
        return max(0, self.peer_room - ((self.sent - self.peer_forwarded) & _WRAP))

    def heard(self, header: Header) -> None:
        """Note the guest's room, which every packet tells."""
        self.peer_room, self.peer_forwarded = header.room, header.forwarded
        if self.credit:
            self.asked = False

    def fits(self, length: int) -> bool:
        """Whether the guest may send so much: it knows what room we have."""
        return len(self.unread) + length <= ROOM

    def deliver(self) -> None:
        """Give the program what the guest sent, as far as its socket takes it.

        Raises `Broken` when the program closed its end.
        """
        try:
            while self.unread:
                count = self.ours.send(self.unread)
                del self.unread[:count]
                self.forwarded = (self.forwarded + count) & _WRAP
        except BlockingIOError:
            return
        except OSError as failure:
            raise Broken(str(failure)) from None
        if self.said & NO_MORE_SENT or self.state is State.GONE:
            self._shutdown(socket.SHUT_WR)

    def fetch(self, most: int) -> bytes | None:
        """Bytes from the program for the guest, at most its credit; None when there are none now.

        Empty at the program's end of file. Raises `Broken` when its end is broken.
        """
        try:
            data = self.ours.recv(min(most, self.credit, LARGEST))
        except BlockingIOError:
            return None
        except OSError as failure:
            raise Broken(str(failure)) from None
        self.sent = (self.sent + len(data)) & _WRAP
        self.ended = self.ended or not data
        return data

    def hear_shutdown(self, flags: int) -> None:
        """The guest will not send or receive any more."""
        self.said |= flags & BOTH
        if self.said & NO_MORE_RECEIVED:
            self.ended = True
            self._shutdown(socket.SHUT_RD)

    def owes_credit(self) -> bool:
        """Whether the guest should be told of the room that it has again."""
        return (self.forwarded - self.told) & _WRAP >= ROOM // 4

    def _shutdown(self, how: int) -> None:
        try:
            self.ours.shutdown(how)
        except OSError as failure:
            raise Broken(str(failure)) from None
