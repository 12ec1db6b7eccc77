"""vhost-user, the device's side of it (QEMU's docs/interop/vhost-user.rst).

The front end (QEMU) passes guest memory, rings and eventfds over a unix socket; a `Session` keeps
what it was told. Guest memory must be shared with QEMU for that:

    -object memory-backend-memfd,id=ram,size=2G,share=on -machine memory-backend=ram

No live migration, no reconnection to a running guest: the guest of a check needs neither.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

from katagpu.boot.virtqueue import LARGEST_RING, Memory, Ring, RingError

VERSION_1 = 1 << 32            # VIRTIO_F_VERSION_1
PROTOCOL_FEATURES = 1 << 30    # VHOST_USER_F_PROTOCOL_FEATURES

_HEADER = struct.Struct("=III")
_VERSION, _REPLY, _NEED_REPLY = 1, 4, 8
_LARGEST_PAYLOAD = 4096
_REGIONS = 8
_NO_DESCRIPTOR = 1 << 8        # of SET_VRING_KICK, _CALL, _ERR
_PATIENCE = 10.0               # seconds for the rest of a message that has begun


class Request(IntEnum):
    """The messages that are understood."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    GET_CONFIG = 24
    SET_CONFIG = 25


class Protocol(IntFlag):
    """Extensions of the protocol that are offered."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    CONFIG = 1 << 9


OFFERED = Protocol.MQ | Protocol.REPLY_ACK | Protocol.CONFIG


class ProtocolError(Exception):
    """The front end sent what the protocol does not allow; the connection is of no more use."""


class Gone(Exception):
    """The front end closed the connection."""


@dataclass(kw_only=True)
class _Message:
    number: int
    flags: int
    payload: bytes
    descriptors: list[int]

    def unpack(self, layout: str) -> tuple[int, ...]:
        wanted = struct.Struct("=" + layout)
        if len(self.payload) != wanted.size:
            raise ProtocolError(f"{_name(self.number)} has {len(self.payload)} bytes, not "
                                f"{wanted.size}")
        return wanted.unpack(self.payload)

    def u64(self) -> int:
        return self.unpack("Q")[0]


def _name(number: int) -> str:
    try:
        return Request(number).name
    except ValueError:
        return f"vhost-user request {number}"


@dataclass(kw_only=True)
class Session:
    """A device as one front end sees it: `queues` rings, `config` as its configuration space.

    `handle` serves one message of `control`, a connected unix stream socket. `on_stop` is called
    with the index of a ring that the front end stopped.
    """

    control: socket.socket
    queues: int
    config: bytes
    features: int = VERSION_1
    on_stop: Callable[[int], None] = lambda _index: None
    memory: Memory = field(default_factory=Memory)
    acknowledged: int = 0
    protocol: int = 0

    def __post_init__(self) -> None:
        self.rings = [Ring(memory=self.memory) for _ in range(self.queues)]
        self.control.settimeout(_PATIENCE)

    def close(self) -> None:
        """Let go of the guest's memory, its eventfds and the connection."""
        for ring in self.rings:
            ring.stop()
            ring.enabled = False
        self.memory.regions = ()
        self.control.close()

    def handle(self) -> None:
        """Read one message and do what it says.

        Raises `Gone` at the end of the connection, `ProtocolError` when there is no going on.
        """
        try:
            message = self._read()
            try:
                answer = self._do(message)
            except (ProtocolError, RingError) as failure:
                self._acknowledge(message, 1)
                raise ProtocolError(f"{_name(message.number)}: {failure}") from None
            finally:
                for descriptor in message.descriptors:  # those that nobody took
                    os.close(descriptor)
            if answer is None:
                self._acknowledge(message, 0)
            else:
                self._reply(message, answer)
        except TimeoutError:
            raise ProtocolError("the front end began a message and did not end it") from None
        except OSError as failure:
            raise Gone(str(failure)) from None

    def _acknowledge(self, message: _Message, status: int) -> None:
        if message.flags & _NEED_REPLY and self.protocol & Protocol.REPLY_ACK:
            self._reply(message, struct.pack("=Q", status))

    def _reply(self, message: _Message, payload: bytes) -> None:
        header = _HEADER.pack(message.number, _VERSION | _REPLY, len(payload))
        self.control.sendall(header + payload)

    def _read(self) -> _Message:
        descriptors: list[int] = []
        try:
            header = self._exactly(_HEADER.size, descriptors)
            number, flags, size = _HEADER.unpack(header)
            if flags & 3 != _VERSION or size > _LARGEST_PAYLOAD:
                raise ProtocolError(f"no vhost-user header: {header.hex()}")
            payload = self._exactly(size, descriptors)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return _Message(number=number, flags=flags, payload=payload, descriptors=descriptors)

    def _exactly(self, count: int, descriptors: list[int]) -> bytes:
        data = b""
        while len(data) < count:
            part, found, _, _ = socket.recv_fds(self.control, count - len(data), _REGIONS)
            descriptors += found
            if not part:
                raise Gone("the front end closed the connection")
            data += part
        return data

    def _do(self, message: _Message) -> bytes | None:
        """The reply's payload, None for a message that has no reply of its own."""
        values = {Request.GET_FEATURES: self.features | PROTOCOL_FEATURES,
                  Request.GET_PROTOCOL_FEATURES: OFFERED, Request.GET_QUEUE_NUM: self.queues}
        for request, value in values.items():
            if message.number == request:
                return struct.pack("=Q", value)
        match message.number:
            case Request.GET_CONFIG:
                return self._get_config(message)
            case Request.GET_VRING_BASE:
                index, _ = message.unpack("II")
                ring = self._ring(index)
                self.on_stop(index)
                return struct.pack("=II", index, ring.stop())
            case Request.SET_FEATURES:
                self._set_features(message.u64())
            case Request.SET_PROTOCOL_FEATURES:
                self.protocol = _offered(message.u64(), OFFERED)
            case Request.SET_MEM_TABLE:
                self._set_memory(message)
            case Request.SET_OWNER | Request.RESET_OWNER:
                pass  # the first means nothing here, the second is deprecated
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                self._set_descriptor(message)
            case _:
                self._set_ring(message)
        return None

    def _set_features(self, wanted: int) -> None:
        self.acknowledged = _offered(wanted, self.features | PROTOCOL_FEATURES)
        if not wanted & PROTOCOL_FEATURES:  # "the ring starts directly in the enabled state"
            for ring in self.rings:
                ring.enabled = True

    def _get_config(self, message: _Message) -> bytes:
        if len(message.payload) < 12:
            raise ProtocolError("too short")
        offset, size, flags = struct.unpack_from("=III", message.payload)
        if offset + size > len(self.config):
            return struct.pack("=III", offset, 0, flags)
        return struct.pack("=III", offset, size, flags) + self.config[offset:offset + size]

    def _set_memory(self, message: _Message) -> None:
        if len(message.payload) < 8:
            raise ProtocolError("too short")
        count, _ = struct.unpack_from("=II", message.payload)
        if not count <= _REGIONS or count != len(message.descriptors):
            raise ProtocolError(f"{count} regions, {len(message.descriptors)} descriptors")
        fields = message.unpack("II" + count * "QQQQ")[2:]
        self.memory.replace(
            (*fields[4 * at:4 * at + 4], descriptor)  # type: ignore[misc]
            for at, descriptor in enumerate(message.descriptors))
        for ring in self.rings:
            ring.unmap()

    def _set_ring(self, message: _Message) -> None:
        match message.number:
            case Request.SET_VRING_ADDR:
                index, _flags, descriptors, used, avail, _log = message.unpack("IIQQQQ")
                self._ring(index).place((descriptors, used, avail))
            case Request.SET_VRING_NUM:
                index, size = message.unpack("II")
                if not 0 < size <= LARGEST_RING or size & size - 1:
                    raise ProtocolError(f"a split ring cannot have {size} descriptors")
                self._ring(index).size = size
            case Request.SET_VRING_BASE:
                index, base = message.unpack("II")
                self._ring(index).next = base & 0xFFFF
            case Request.SET_VRING_ENABLE:
                index, on = message.unpack("II")
                self._ring(index).enabled = bool(on)
            case Request.SET_CONFIG:
                raise ProtocolError("the configuration space is read-only")
            case _:
                raise ProtocolError("not understood")

    def _set_descriptor(self, message: _Message) -> None:
        value = message.u64()
        name = {Request.SET_VRING_KICK: "kick", Request.SET_VRING_CALL: "call"}.get(
            Request(message.number), "error")
        ring = self._ring(value & 0xFF)
        if value & _NO_DESCRIPTOR:
            if name == "kick":
                raise ProtocolError("a ring without a kick would have to be polled")
            ring.own(name, None)
            return
        if len(message.descriptors) != 1:
            raise ProtocolError(f"{len(message.descriptors)} descriptors")
        descriptor = message.descriptors.pop()
        os.set_blocking(descriptor, False)
        ring.own(name, descriptor)

    def _ring(self, index: int) -> Ring:
        if index >= self.queues:
            raise ProtocolError(f"there is no ring {index}")
        return self.rings[index]


def _offered(wanted: int, offered: int) -> int:
    if wanted & ~offered:
        raise ProtocolError(f"features {wanted & ~offered:#x} were not offered")
    return wanted


def listen(path: str) -> socket.socket:
    """A listening unix socket. Raises `OSError` when the path is too long or taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(1)
    except OSError:
        listener.close()
        raise
    return listener


def arguments(path: str, device: str) -> Sequence[str]:
    """QEMU's arguments for a vhost-user device at a socket.

    The guest's memory must be shared: `-object memory-backend-memfd,share=on`.
    """
    quoted = path.replace(",", ",,")
    return ("-chardev", f"socket,id={device},path={quoted}",
            "-device", f"{device},chardev={device}")
