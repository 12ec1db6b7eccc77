"""The messages of vhost-user: what is answered, and what ends the connection."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from katagpu.boot import vhostuser
from katagpu.boot.vhostuser import PROTOCOL_FEATURES, VERSION_1, Request
from katagpu.boot.vsock import Vsock
from katagpu.errors import StepError, UserError

from .conftest import Connecting
from .frontend import BUFFERS, CID, RINGS, SIZE, FrontEnd


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def pair(one: int, two: int) -> bytes:
    return struct.pack("=II", one, two)


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_is_offered(front: FrontEnd) -> None:
    assert front.ask(Request.GET_FEATURES) == u64(VERSION_1 | PROTOCOL_FEATURES)
    offered = int.from_bytes(front.ask(Request.GET_PROTOCOL_FEATURES), "little")
    assert offered == 1 << 0 | 1 << 3 | 1 << 9
    assert front.ask(Request.GET_QUEUE_NUM) == u64(3)


def test_the_configuration_space_is_the_context_id(front: FrontEnd) -> None:
    asked = struct.pack("=III", 0, 8, 0) + bytes(8)
    assert front.ask(Request.GET_CONFIG, asked) == asked[:12] + struct.pack("<Q", CID)
    asked = struct.pack("=III", 4, 4, 0) + bytes(4)
    assert front.ask(Request.GET_CONFIG, asked) == asked[:12] + bytes(4)


def test_a_configuration_space_of_another_size_is_an_error(front: FrontEnd) -> None:
    asked = struct.pack("=III", 4, 8, 0) + bytes(8)
    assert front.ask(Request.GET_CONFIG, asked) == struct.pack("=III", 4, 0, 0)


def test_no_acknowledgement_where_none_was_negotiated(front: FrontEnd) -> None:
    front.tell(Request.SET_OWNER, flags=1 | 8)
    assert front.ask(Request.GET_QUEUE_NUM) == u64(3)


def test_a_ring_says_where_it_stopped(front: FrontEnd) -> None:
    front.start(buffers=3)
    front.set_ring(1, base=0xFFFE)
    assert front.ask(Request.GET_VRING_BASE, pair(1, 0)) == pair(1, 0xFFFE)
    assert front.ask(Request.GET_VRING_BASE, pair(0, 0)) == pair(0, 0)


def test_eventfds_and_memory_are_let_go_of(front: FrontEnd) -> None:
    front.ask(Request.GET_QUEUE_NUM)  # the device has taken the connection
    before = descriptors()
    front.start()
    assert descriptors() == before + 6 + 2  # eventfds, and Python's own of a mapping
    for index in (0, 1):
        front.ask(Request.GET_VRING_BASE, pair(index, 0))
    assert front.set_memory(()) == 0
    assert descriptors() == before


WRONG = {
    "no such request": (99, b"", 0),
    "an unknown feature": (Request.SET_FEATURES, u64(1 << 29), 0),
    "an unknown extension": (Request.SET_PROTOCOL_FEATURES, u64(1 << 5), 0),
    "a short payload": (Request.SET_FEATURES, b"\0\0\0", 0),
    "memory without a file": (Request.SET_MEM_TABLE, pair(1, 0) + bytes(32), 0),
    "too many regions": (Request.SET_MEM_TABLE, pair(9, 0) + bytes(9 * 32), 1),
    "regions cut off": (Request.SET_MEM_TABLE, pair(1, 0) + bytes(8), 1),
    "more memory than the file has":
        (Request.SET_MEM_TABLE, pair(1, 0) + struct.pack("=QQQQ", 0, 1 << 40, 0, 0), 1),
    "memory beyond all files":
        (Request.SET_MEM_TABLE, pair(1, 0) + struct.pack("=QQQQ", 0, 1 << 63, 0, 1 << 63), 1),
    "a fourth ring": (Request.SET_VRING_NUM, pair(3, 16), 0),
    "a size that is no power of 2": (Request.SET_VRING_NUM, pair(0, 12), 0),
    "no size": (Request.SET_VRING_NUM, pair(0, 0), 0),
    "a ring outside of memory": (
        Request.SET_VRING_ADDR,
        struct.pack("=IIQQQQ", 0, 0, RINGS[1], RINGS[1] + RINGS[3] - 8, RINGS[1], 0), 0),
    "a ring at a guest address": (
        Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, *[RINGS[0]] * 3, 0), 0),
    "a ring that is not aligned": (
        Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, *[RINGS[1] + 2] * 3, 0), 0),
    "polling": (Request.SET_VRING_KICK, u64(1 << 8), 0),
    "a kick without its descriptor": (Request.SET_VRING_KICK, u64(0), 0),
    "two descriptors for a call": (Request.SET_VRING_CALL, u64(0), 2),
    "a configuration to be written": (Request.SET_CONFIG, struct.pack("=III", 0, 8, 0) + bytes(8),
                                      0),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_the_protocol_does_not_allow(
    vsock: Vsock, front: FrontEnd, connecting: Connecting, what: str,
) -> None:
    request, payload, passed = WRONG[what]
    front.start()
    waiting = connecting()
    front.receive()
    before = descriptors()
    status = front.acknowledged(request, payload, tuple(front.files[:1] * passed))
    assert status == 1
    assert front.ended()
    with pytest.raises(StepError, match="broke the protocol"):
        waiting.result(5)
    assert descriptors() <= before - 6 - 2 - 1
    with pytest.raises(StepError, match="broke the protocol"):
        vsock.connect(1024, 5)
    again = FrontEnd(vsock.path)  # the next front end is served
    again.start()
    again.close()


@pytest.mark.parametrize("header", [
    struct.pack("=III", 1, 2, 0), struct.pack("=III", 1, 1, 1 << 20), b"GET / HTTP/1"])
def test_what_is_no_message(front: FrontEnd, header: bytes) -> None:
    front.control.sendall(header)
    assert front.ended()


def test_a_message_in_pieces(front: FrontEnd) -> None:
    message = struct.pack("=III", Request.GET_QUEUE_NUM, 1, 0)
    front.control.sendall(message[:5])
    front.control.sendall(message[5:])
    assert front.reply(Request.GET_QUEUE_NUM) == u64(3)


def test_a_message_without_an_end_does_not_hold_up_the_device(
    vsock: Vsock, front: FrontEnd, monkeypatch: pytest.MonkeyPatch,
) -> None:
    front.control.close()
    monkeypatch.setattr(vhostuser, "_PATIENCE", 0.1)
    slow = FrontEnd(vsock.path)
    slow.control.sendall(b"\1")
    assert slow.ended()
    slow.close()


def test_memory_may_be_replaced_under_running_rings(
    front: FrontEnd, connecting: Connecting,
) -> None:
    front.start()
    front.move_rings()
    other = (BUFFERS[0], BUFFERS[1] + (1 << 32), BUFFERS[2], BUFFERS[3])
    assert front.set_memory((RINGS, other)) == 0
    connecting()
    front.accept()


def test_without_protocol_features_rings_are_enabled_at_once(
    front: FrontEnd, connecting: Connecting,
) -> None:
    front.negotiate()
    front.tell(Request.SET_FEATURES, u64(VERSION_1))
    for index in (0, 1):
        front.set_ring(index, enable=False)
    front.post(SIZE)
    connecting()
    front.accept()


def test_a_disabled_ring_is_left_alone(front: FrontEnd, connecting: Connecting) -> None:
    front.start()
    assert front.acknowledged(Request.SET_VRING_ENABLE, pair(0, 0)) == 0
    connecting()
    with pytest.raises(TimeoutError):
        front.receive(timeout=0.2)
    assert front.acknowledged(Request.SET_VRING_ENABLE, pair(0, 1)) == 0
    front.accept()


def test_a_path_that_is_taken(vsock: Vsock) -> None:
    with pytest.raises(UserError, match="no socket"), Vsock(vsock.path, CID):
        pass


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long"), Vsock(tmp_path / ("x" * 108), CID):
        pass


def test_the_arguments() -> None:
    assert vhostuser.arguments("/a,b", "vhost-user-vsock-pci") == (
        "-chardev", "socket,id=vhost-user-vsock-pci,path=/a,,b",
        "-device", "vhost-user-vsock-pci,chardev=vhost-user-vsock-pci")
