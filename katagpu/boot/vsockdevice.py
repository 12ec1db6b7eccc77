"""A virtio-vsock device's packets: between the guest's rings and streams (virtio 1.2, 5.10.6).

The host connects to the guest, by stream sockets; what the guest asks of the host is refused. The
event queue is never used: it tells of migration, and QEMU keeps it.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections import deque
from collections.abc import Iterator

from katagpu.boot.virtqueue import Chain, Ring, RingError
from katagpu.boot.vsockstream import (
    BOTH,
    CLOSE_TIME,
    HEADER,
    HOST,
    NO_MORE_SENT,
    ROOM,
    STREAM,
    Broken,
    Header,
    Op,
    State,
    Stream,
)

MOST_REPLIES = 256       # more are due: the guest has to take some before it is heard again
BURST = 64               # packets of one connection before the others' turn


class Device:
    """The packets between the guest's rings and the streams; used by one thread only."""

    def __init__(self, cid: int) -> None:
        self.cid = cid
        self.streams: dict[tuple[int, int], Stream] = {}
        self.replies: deque[Header] = deque()

    def open(self, stream: Stream) -> None:
        """Ask the guest for a connection."""
        self.streams[stream.key] = stream
        self._say(stream, Op.REQUEST)

    def forget(self, why: Exception) -> None:
        """Drop all connections: the guest does not know them any more."""
        self.replies.clear()
        for stream in tuple(self.streams.values()):
            self._drop(stream, why)

    def give_up(self, stream: Stream) -> None:
        """End a request whose caller does not wait any more."""
        if self.streams.get(stream.key) is stream and stream.state is State.REQUESTED:
            self._reset(stream, TimeoutError("given up"))

    def hang_up(self, stream: Stream) -> None:
        """The program closed its end: tell the guest, which is to confirm it."""
        if stream.state is State.GONE:
            self._drop(stream)
            return
        self._say(stream, Op.SHUTDOWN, BOTH)
        stream.state = State.CLOSING
        stream.deadline = time.monotonic() + CLOSE_TIME
        stream.unread.clear()
        stream.ours.close()

    def expire(self, now: float) -> None:
        """Reset what the guest did not confirm in time."""
        for stream in tuple(self.streams.values()):
            if stream.deadline is not None and stream.deadline <= now:
                self._reset(stream)

    def from_guest(self, ring: Ring) -> bool:
        """Handle the packets of the guest; whether there were any."""
        some = False
        while len(self.replies) < MOST_REPLIES and (chain := ring.take()) is not None:
            self._handle(Header.unpack(chain.read(0, HEADER)), chain)
            ring.give_back(chain, 0)
            some = True
        if some:
            ring.notify()
        return some

    def to_guest(self, ring: Ring) -> bool:
        """Send what is due, as far as the guest has buffers; whether anything was."""
        some = False
        while self.replies and (chain := ring.take()) is not None:
            self._put(ring, chain, self.replies.popleft())
            some = True
        for stream in tuple(self.streams.values()):
            with self._resetting(stream):
                some |= self._send(ring, stream)
        if some:
            ring.notify()
        return some

    def deliver(self) -> None:
        """Give the programs what came for them."""
        for stream in tuple(self.streams.values()):
            if stream.unread:
                with self._resetting(stream):
                    self._deliver(stream)

    def _send(self, ring: Ring, stream: Stream) -> bool:
        """Data of a program for the guest."""
        some = False
        for _ in range(BURST):
            if stream.state is not State.OPEN or stream.ended:
                break
            if not stream.credit:
                if not stream.asked:
                    stream.asked = True
                    self._say(stream, Op.CREDIT_REQUEST)
                    some = True
                break
            chain = ring.take()
            if chain is None:
                break
            if chain.room <= HEADER:
                raise RingError(f"a receive buffer of {chain.room} bytes holds no data")
            try:
                data = stream.fetch(chain.room - HEADER)
            except Broken:
                ring.untake()
                raise
            if not data:
                ring.untake()
                if data is not None:
                    self._say(stream, Op.SHUTDOWN, NO_MORE_SENT)
                    some = True
                break
            self._put(ring, chain, self._header(stream, Op.RW, length=len(data)), data)
            some = True
        return some

    def _put(self, ring: Ring, chain: Chain, header: Header, data: bytes = b"") -> None:
        """One packet into a buffer of the guest, with what the guest should know by now."""
        if chain.readable or chain.room < HEADER:
            raise RingError("a receive buffer is not for the device to write, or holds no header")
        stream = self.streams.get((header.source_port, header.target_port))
        packet = header.pack()
        if stream is not None and header.op != Op.RST:
            stream.told = stream.forwarded
            packet = packet[:-8] + struct.pack("<II", ROOM, stream.forwarded)
        chain.write(packet + data)
        ring.give_back(chain, HEADER + len(data))

    def _header(self, stream: Stream, op: Op, flags: int = 0, length: int = 0) -> Header:
        return Header(source=HOST, target=self.cid, source_port=stream.local,
                      target_port=stream.port, op=op, flags=flags, length=length)

    def _say(self, stream: Stream, op: Op, flags: int = 0) -> None:
        self.replies.append(self._header(stream, op, flags))

    def _handle(self, header: Header, chain: Chain) -> None:
        if header.source != self.cid:
            return  # "drop it": a guest does not speak for others
        stream = self.streams.get((header.target_port, header.source_port))
        if header.kind != STREAM or header.target != HOST or stream is None:
            if header.op != Op.RST:
                self.replies.append(Header(
                    source=header.target, target=self.cid, source_port=header.target_port,
                    target_port=header.source_port, kind=header.kind, op=Op.RST))
            return
        stream.heard(header)
        with self._resetting(stream):
            if header.op == Op.RST:
                self._end(stream)
            elif stream.state is State.REQUESTED:
                if header.op != Op.RESPONSE:
                    raise Broken(f"the guest answers a request with packet {header.op}")
                stream.state = State.OPEN
                stream.answer.set_result(None)
            else:
                self._hear(stream, header, chain)

    def _hear(self, stream: Stream, header: Header, chain: Chain) -> None:
        """A packet of an established connection."""
        match header.op, stream.state:
            case (Op.CREDIT_UPDATE, _) | (Op.RW, State.CLOSING):
                pass
            case Op.CREDIT_REQUEST, State.OPEN:
                self._say(stream, Op.CREDIT_UPDATE)
            case Op.SHUTDOWN, _:
                stream.hear_shutdown(header.flags)
                self._deliver(stream)
            case Op.RW, State.OPEN if not stream.said & NO_MORE_SENT:
                if not stream.fits(header.length):
                    raise Broken("the guest sends more than it has credit for")
                stream.unread += chain.read(HEADER, header.length)
                self._deliver(stream)
            case _:
                raise Broken(f"packet {header.op} has no place here")

    def _deliver(self, stream: Stream) -> None:
        if stream.state is not State.CLOSING:
            stream.deliver()
        if not stream.unread and stream.state is State.GONE:
            self._drop(stream)
        elif not stream.unread and stream.said == BOTH:
            self._reset(stream)  # which confirms it
        elif stream.state is State.OPEN and stream.owes_credit():
            stream.told = stream.forwarded
            self._say(stream, Op.CREDIT_UPDATE)

    def _end(self, stream: Stream) -> None:
        """The guest reset the connection."""
        if stream.state is State.OPEN:
            stream.state = State.GONE
            stream.ended = True
            self._deliver(stream)
        else:
            self._drop(stream, ConnectionRefusedError(
                f"nobody listens on the guest's vsock port {stream.port}"))

    @contextlib.contextmanager
    def _resetting(self, stream: Stream) -> Iterator[None]:
        try:
            yield
        except Broken as failure:
            self._reset(stream, ConnectionResetError(str(failure)))

    def _reset(self, stream: Stream, why: Exception | None = None) -> None:
        known = stream.state is not State.GONE
        self._drop(stream, why)
        if known:
            self._say(stream, Op.RST)

    def _drop(self, stream: Stream, why: Exception | None = None) -> None:
        self.streams.pop(stream.key, None)
        self.replies = deque(header for header in self.replies
                             if (header.source_port, header.target_port) != stream.key
                             or header.op == Op.RST)
        stream.ours.close()
        if not stream.answer.done():
            stream.answer.set_exception(why or ConnectionResetError("the connection was reset"))
