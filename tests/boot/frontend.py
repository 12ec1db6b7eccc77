"""A vhost-user front end and a guest's vsock driver in one, on memory of its own.

It has two regions: the rings lie in the first, the buffers in the second, whose bytes start in the
middle of its file. Buffers are never reused within a test, rings wrap.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time
from dataclasses import replace
from pathlib import Path

from katagpu.boot.vhostuser import PROTOCOL_FEATURES, VERSION_1, Request
from katagpu.boot.vsockstream import HEADER, HOST, ROOM, Header, Op

CID = 7
SIZE = 16                              # descriptors of a ring
RINGS = (0x4000_0000, 0x7F00_0000_0000, 0, 64 * 1024)          # guest, user, file offset, bytes
BUFFERS = (0x1_0000_0000, 0x7F10_0000_0000, 3 * 4096, 8 << 20)
RING_BYTES = 4096
AVAIL, USED = 1024, 2048               # in a ring's page


class FrontEnd:
    """`start` does what QEMU does until the guest's driver runs."""

    def __init__(self, path: Path, cid: int = CID) -> None:
        self.cid = cid
        self.control = socket.socket(socket.AF_UNIX)
        self.control.settimeout(5)
        self.control.connect(str(path))
        self.files = [os.memfd_create(name) for name in ("rings", "buffers")]
        for file, (_, _, offset, size) in zip(self.files, (RINGS, BUFFERS), strict=True):
            os.ftruncate(file, offset + size)
        self.rings = mmap.mmap(self.files[0], RINGS[3])
        self.buffers = mmap.mmap(self.files[1], BUFFERS[2] + BUFFERS[3])
        self.kicks = [os.eventfd(0) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.errors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.available = [0, 0]
        self.seen = [0, 0]
        self.free = 0
        self.posted: dict[int, tuple[int, int]] = {}

    def close(self) -> None:
        """As a QEMU that was killed."""
        self.control.close()
        for descriptor in (*self.files, *self.kicks, *self.calls, *self.errors):
            os.close(descriptor)

    # messages

    def tell(self, request: int, payload: bytes = b"", descriptors: tuple[int, ...] = (),
             flags: int = 1) -> None:
        """Send one message."""
        socket.send_fds(self.control, [struct.pack("=III", request, flags, len(payload)) + payload],
                        descriptors)

    def reply(self, request: int) -> bytes:
        """The reply to a message."""
        number, flags, size = struct.unpack("=III", self._exactly(12))
        assert (number, flags) == (request, 5)
        return self._exactly(size)

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        """Send a message that has a reply."""
        self.tell(request, payload)
        return self.reply(request)

    def acknowledged(self, request: int, payload: bytes = b"",
                     descriptors: tuple[int, ...] = ()) -> int:
        """Send a message with "need reply"; the status."""
        self.tell(request, payload, descriptors, flags=1 | 8)
        return int.from_bytes(self.reply(request), "little")

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.control.recv(count - len(data))
            if not part:
                raise EOFError("the device hung up")
            data += part
        return data

    def ended(self) -> bool:
        """Whether the device closes the connection."""
        try:
            return self.control.recv(1) == b""
        except ConnectionResetError:
            return True

    # setting up

    def negotiate(self) -> None:
        """Features and memory."""
        self.ask(Request.GET_FEATURES)
        self.tell(Request.SET_OWNER)
        self.ask(Request.GET_PROTOCOL_FEATURES)
        self.tell(Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", 1 << 3 | 1 << 9 | 1))
        assert self.acknowledged(
            Request.SET_FEATURES, struct.pack("=Q", VERSION_1 | PROTOCOL_FEATURES)) == 0
        assert self.set_memory() == 0

    def set_memory(self, regions: tuple[tuple[int, int, int, int], ...] = (RINGS, BUFFERS)) -> int:
        """The memory table; regions as (guest, user, offset, size)."""
        payload = struct.pack("=II", len(regions), 0) + b"".join(
            struct.pack("=QQQQ", guest, size, user, offset)
            for guest, user, offset, size in regions)
        return self.acknowledged(Request.SET_MEM_TABLE, payload, tuple(self.files[:len(regions)]))

    def set_ring(self, index: int, base: int = 0, enable: bool = True) -> None:
        """All of a ring."""
        page = RINGS[1] + index * RING_BYTES
        for request, payload, descriptors in (
                (Request.SET_VRING_NUM, struct.pack("=II", index, SIZE), ()),
                (Request.SET_VRING_BASE, struct.pack("=II", index, base), ()),
                (Request.SET_VRING_ADDR,
                 struct.pack("=IIQQQQ", index, 0, page, page + USED, page + AVAIL, 0), ()),
                (Request.SET_VRING_KICK, struct.pack("=Q", index), (self.kicks[index],)),
                (Request.SET_VRING_CALL, struct.pack("=Q", index), (self.calls[index],)),
                (Request.SET_VRING_ERR, struct.pack("=Q", index), (self.errors[index],)),
                (Request.SET_VRING_ENABLE, struct.pack("=II", index, 1), ())):
            if enable or request != Request.SET_VRING_ENABLE:
                assert self.acknowledged(request, payload, descriptors) == 0

    def move_rings(self) -> None:
        """Other memory with the same bytes for the rings; the device is to be told."""
        os.close(self.files[0])
        self.files[0] = os.memfd_create("moved")
        os.ftruncate(self.files[0], RINGS[3])
        moved = mmap.mmap(self.files[0], RINGS[3])
        moved[:] = self.rings[:]
        self.rings = moved

    def start(self, buffers: int = SIZE) -> FrontEnd:
        """Set up everything, and give the device `buffers` to write to."""
        self.negotiate()
        for index in (0, 1):
            self.set_ring(index)
        self.post(buffers)
        return self

    # rings

    def _u16(self, at: int) -> int:
        return int(struct.unpack_from("<H", self.rings, at)[0])

    def describe(self, ring: int, at: int, address: int, length: int, flags: int = 0,
                 following: int = 0) -> None:
        """Write a descriptor."""
        struct.pack_into("<QIHH", self.rings, ring * RING_BYTES + 16 * at,
                         address, length, flags, following)

    def offer(self, ring: int, head: int, count: int = 1) -> None:
        """Make a chain available, and kick. A `count` other than 1 is a driver's mistake."""
        page = ring * RING_BYTES + AVAIL
        struct.pack_into("<H", self.rings, page + 4 + 2 * (self.available[ring] % SIZE), head)
        self.available[ring] = (self.available[ring] + count) & 0xFFFF
        struct.pack_into("<H", self.rings, page + 2, self.available[ring])
        os.eventfd_write(self.kicks[ring], 1)

    def allocate(self, size: int) -> tuple[int, int]:
        """Memory for a buffer: its place in the mapping, and its guest address."""
        at = self.free
        self.free += size
        assert self.free <= BUFFERS[3], "the test is too long"
        return BUFFERS[2] + at, BUFFERS[0] + at

    def post(self, count: int, size: int = 4096) -> None:
        """Give the device buffers to write to, each of one descriptor."""
        for _ in range(count):
            place, address = self.allocate(size)
            head = self.available[0] % SIZE
            self.posted[head] = (place, size)
            self.describe(0, head, address, size, flags=2)
            self.offer(0, head)

    def send(self, header: Header, data: bytes = b"", *, length: int | None = None) -> None:
        """A packet of the guest, as two descriptors when it has data."""
        self.wait_sent()
        packet = replace(header, length=len(data) if length is None else length).pack()
        place, address = self.allocate(HEADER + len(data))
        self.buffers[place:place + len(packet) + len(data)] = packet + data
        head = 2 * (self.available[1] % (SIZE // 2))
        self.describe(1, head, address, HEADER, flags=1 if data else 0, following=head + 1)
        self.describe(1, head + 1, address + HEADER, len(data))
        self.offer(1, head)

    def wait_sent(self) -> None:
        """Wait until the device took all packets of the guest."""
        deadline = time.monotonic() + 5
        while self._u16(RING_BYTES + USED + 2) != self.available[1]:
            assert time.monotonic() < deadline, "the device takes no packets"
            time.sleep(0.001)

    def receive(self, timeout: float = 5, repost: bool = True) -> tuple[Header, bytes]:
        """The next packet for the guest; its buffer is replaced by a new one with `repost`."""
        deadline = time.monotonic() + timeout
        while self._u16(USED + 2) == self.seen[0]:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.calls[0]], [], [], left)[0]:
                raise TimeoutError("no packet for the guest")
            os.eventfd_read(self.calls[0])
        entry = USED + 4 + 8 * (self.seen[0] % SIZE)
        head, written = struct.unpack_from("<II", self.rings, entry)
        self.seen[0] = (self.seen[0] + 1) & 0xFFFF
        place, size = self.posted.pop(head)
        assert HEADER <= written <= size
        header = Header.unpack(self.buffers[place:place + HEADER])
        assert (header.source, header.target) == (HOST, self.cid)
        assert written == HEADER + header.length
        data = self.buffers[place + HEADER:place + written]
        if repost:
            self.post(1, size)
        return header, data

    def answer(self, header: Header, op: int, data: bytes = b"", *, flags: int = 0,
               room: int = ROOM, forwarded: int = 0, length: int | None = None) -> None:
        """A packet of the guest on the connection of a packet that it got."""
        self.send(Header(source=self.cid, target=HOST, source_port=header.target_port,
                         target_port=header.source_port, op=op, flags=flags, room=room,
                         forwarded=forwarded), data, length=length)

    def accept(self, *, room: int = ROOM) -> Header:
        """Take the host's request for a connection; its header."""
        header, data = self.receive()
        assert (header.op, data) == (Op.REQUEST, b"")
        self.answer(header, Op.RESPONSE, room=room)
        return header
