"""Connections through a device, from the front end's and the host program's side."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from katagpu.boot import vsockdevice
from katagpu.boot.vhostuser import Request
from katagpu.boot.vsock import Vsock
from katagpu.boot.vsockstream import BOTH, HOST, NO_MORE_RECEIVED, NO_MORE_SENT, ROOM, Header, Op
from katagpu.errors import StepError

from .conftest import Connecting
from .frontend import BUFFERS, CID, SIZE, FrontEnd

DATA = 4096 - 44  # of a packet, in the front end's buffers


def established(
    front: FrontEnd, connecting: Connecting, *, room: int = ROOM,
) -> tuple[Header, socket.socket]:
    """A connection: the header of its request, and the program's socket."""
    front.start()
    answer = connecting()
    header = front.accept(room=room)
    return header, answer.result(5)


def collect(front: FrontEnd, count: int) -> bytes:
    """Data for the guest, so many bytes of it."""
    data = b""
    while len(data) < count:
        header, part = front.receive()
        assert header.op == Op.RW
        data += part
    return data


# connecting


def test_the_request(front: FrontEnd, connecting: Connecting) -> None:
    front.start()
    connecting(1024, timeout=0.2)
    header, _ = front.receive()
    assert (header.op, header.kind, header.target_port) == (Op.REQUEST, 1, 1024)
    assert (header.room, header.forwarded, header.flags) == (ROOM, 0, 0)


def test_ports_of_the_host_differ(front: FrontEnd, connecting: Connecting) -> None:
    front.start()
    connecting()
    connecting()
    assert front.accept().source_port != front.accept().source_port


def test_a_request_waits_for_the_driver(front: FrontEnd, connecting: Connecting) -> None:
    answer = connecting()
    front.start(buffers=0)
    with pytest.raises(TimeoutError):
        front.receive(timeout=0.1)
    front.post(1)
    front.accept()
    answer.result(5)


def test_a_refused_connection(front: FrontEnd, connecting: Connecting) -> None:
    front.start()
    answer = connecting(77)
    header, _ = front.receive()
    front.answer(header, Op.RST)
    with pytest.raises(ConnectionRefusedError, match="77"):
        answer.result(5)


def test_an_answer_that_is_none(front: FrontEnd, connecting: Connecting) -> None:
    front.start()
    answer = connecting()
    header, _ = front.receive()
    front.answer(header, Op.RW, b"early")
    with pytest.raises(ConnectionResetError):
        answer.result(5)
    assert front.receive()[0].op == Op.RST


def test_no_answer(front: FrontEnd, connecting: Connecting) -> None:
    front.start()
    answer = connecting(timeout=0.1)
    header, _ = front.receive()
    with pytest.raises(TimeoutError, match="1024"):
        answer.result(5)
    reset, _ = front.receive()
    assert (reset.op, reset.source_port) == (Op.RST, header.source_port)
    front.answer(header, Op.RESPONSE)  # too late
    assert front.receive()[0].op == Op.RST


def test_a_request_that_nobody_saw_is_not_sent_later(
    front: FrontEnd, connecting: Connecting,
) -> None:
    with pytest.raises(TimeoutError):
        connecting(timeout=0.05).result(5)
    front.start()
    assert front.receive()[0].op == Op.RST
    with pytest.raises(TimeoutError):
        front.receive(timeout=0.1)


def test_the_guest_may_not_connect_to_the_host(front: FrontEnd) -> None:
    front.start()
    front.send(Header(source=CID, target=HOST, source_port=5, target_port=6, op=Op.REQUEST))
    reset, _ = front.receive()
    assert (reset.op, reset.source_port, reset.target_port) == (Op.RST, 6, 5)


def test_a_packet_of_no_connection_is_reset_and_a_reset_is_not(front: FrontEnd) -> None:
    front.start()
    stray = Header(source=CID, target=HOST, source_port=5, target_port=6, op=Op.RST)
    front.send(stray)
    front.send(Header(source=CID, target=HOST, source_port=7, target_port=8, op=Op.RW), b"x")
    reset, _ = front.receive()
    assert (reset.op, reset.target_port) == (Op.RST, 7)


def test_a_packet_in_the_name_of_another_guest_is_dropped(
    front: FrontEnd, connecting: Connecting,
) -> None:
    request, program = established(front, connecting)
    front.send(Header(source=CID + 1, target=HOST, source_port=1024,
                      target_port=request.source_port, op=Op.RST))
    front.answer(request, Op.RW, b"still here")
    assert program.recv(100) == b"still here"


def test_another_type_of_socket_is_reset_by_its_type(
    front: FrontEnd, connecting: Connecting,
) -> None:
    request, _ = established(front, connecting)
    front.send(Header(source=CID, target=HOST, source_port=1024, kind=2,
                      target_port=request.source_port, op=Op.RW), b"x")
    reset, _ = front.receive()
    assert (reset.op, reset.kind) == (Op.RST, 2)


# data


def test_data_both_ways(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    program.sendall(b"question")
    header, data = front.receive()
    assert (header.op, data) == (Op.RW, b"question")
    front.answer(request, Op.RW, b"answer", forwarded=8)
    assert program.recv(100) == b"answer"


def test_many_packets_wrap_the_rings(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    sent = os.urandom(DATA * 3 * SIZE)
    program.sendall(sent)
    assert collect(front, len(sent)) == sent
    for at in range(0, len(sent), DATA):
        front.answer(request, Op.RW, sent[at:at + DATA], forwarded=len(sent))
    got = b""
    while len(got) < len(sent):
        got += program.recv(65536)
    assert got == sent


def test_two_connections_do_not_mix(front: FrontEnd, connecting: Connecting) -> None:
    front.start()
    answers = [connecting(port) for port in (1, 2)]
    requests = [front.accept(), front.accept()]
    for request in requests:
        front.answer(request, Op.RW, str(request.target_port).encode())
    assert [answer.result(5).recv(10) for answer in answers] == [b"1", b"2"]


def test_a_buffer_of_several_descriptors(front: FrontEnd, connecting: Connecting) -> None:
    front.start(buffers=2)
    answer = connecting()
    request, _ = front.receive(repost=False)
    front.answer(request, Op.RESPONSE)
    parts = [front.allocate(size) for size in (20, 24, 3, 100)]
    for at, ((_, address), size) in enumerate(zip(parts, (20, 24, 3, 100), strict=True)):
        front.describe(0, 8 + at, address, size, flags=2 | (at < 3), following=9 + at)
    program = answer.result(5)
    program.sendall(b"first")
    assert front.receive(repost=False)[1] == b"first"
    front.offer(0, 8)
    program.sendall(b"scattered")
    deadline = time.monotonic() + 5
    while front.buffers[parts[3][0]:parts[3][0] + 6] != b"ttered":
        assert time.monotonic() < deadline
    assert front.buffers[parts[2][0]:parts[2][0] + 3] == b"sca"
    header = Header.unpack(front.buffers[parts[0][0]:parts[0][0] + 20]
                           + front.buffers[parts[1][0]:parts[1][0] + 24])
    assert (header.op, header.length) == (Op.RW, 9)


# credit


def test_nothing_is_sent_without_credit(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting, room=1000)
    program.sendall(b"x" * 1500)
    assert collect(front, 1000) == b"x" * 1000
    assert front.receive()[0].op == Op.CREDIT_REQUEST
    with pytest.raises(TimeoutError):
        front.receive(timeout=0.2)
    front.answer(request, Op.CREDIT_UPDATE, room=1000, forwarded=300)
    assert collect(front, 300) == b"x" * 300
    assert front.receive()[0].op == Op.CREDIT_REQUEST
    front.answer(request, Op.CREDIT_UPDATE, room=1000, forwarded=1300)
    assert collect(front, 200) == b"x" * 200


@pytest.mark.parametrize(("room", "forwarded"), [(10, 0), (1000, 5000)])
def test_credit_that_cannot_be_is_none(
    front: FrontEnd, connecting: Connecting, room: int, forwarded: int,
) -> None:
    request, program = established(front, connecting, room=100)
    program.sendall(b"x" * 100)
    collect(front, 100)
    assert front.receive()[0].op == Op.CREDIT_REQUEST
    program.sendall(b"y")
    front.answer(request, Op.CREDIT_UPDATE, room=room, forwarded=forwarded)
    with pytest.raises(TimeoutError):
        front.receive(timeout=0.2)
    front.answer(request, Op.CREDIT_UPDATE, room=100, forwarded=100)
    assert collect(front, 1) == b"y"


def test_a_credit_request_is_answered(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    front.answer(request, Op.RW, b"12345")
    assert program.recv(10) == b"12345"
    front.answer(request, Op.CREDIT_REQUEST)
    header, _ = front.receive()
    assert (header.op, header.room, header.forwarded) == (Op.CREDIT_UPDATE, ROOM, 5)


def test_a_slow_reader(front: FrontEnd, connecting: Connecting) -> None:
    """The guest is told of room as the program reads, and not before."""
    request, program = established(front, connecting)
    sent = os.urandom(4 * ROOM)
    done = told = 0
    got = b""
    while done < len(sent):
        if done - told < ROOM:
            part = sent[done:done + min(32768, ROOM - (done - told))]
            front.answer(request, Op.RW, part)
            done += len(part)
            continue
        while len(got) < done:
            got += program.recv(65536)
        header, _ = front.receive()
        assert (header.op, header.room) == (Op.CREDIT_UPDATE, ROOM)
        assert told < header.forwarded <= done
        told = header.forwarded
    while len(got) < done:
        got += program.recv(65536)
    assert got == sent


def test_a_guest_that_sends_beyond_its_credit(front: FrontEnd, connecting: Connecting) -> None:
    """It is reset as soon as the program's socket and our room are full."""
    request, program = established(front, connecting)
    room = ROOM + program.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    for _ in range(room // 32768 + 2):
        front.answer(request, Op.RW, b"x" * 32768)
    while (header := front.receive()[0]).op == Op.CREDIT_UPDATE:
        pass
    assert header.op == Op.RST
    while program.recv(65536):
        pass


# waiting


@pytest.mark.parametrize("state", [
    "idle", "data without credit", "data without buffers", "half closed by the program",
    "half closed by the guest", "closed without credit", "closed and not confirmed",
    "data that nobody reads"])
def test_waiting_costs_nothing(
    vsock: Vsock, front: FrontEnd, connecting: Connecting, monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    request, program = established(
        front, connecting, room=0 if "without credit" in state else ROOM)
    if "without buffers" in state:
        program.sendall(b"x" * DATA * (SIZE + 1))
    if "without credit" in state:
        program.sendall(b"x")
    if state == "half closed by the program":
        program.shutdown(socket.SHUT_WR)
    if state == "half closed by the guest":
        front.answer(request, Op.SHUTDOWN, flags=NO_MORE_SENT)
    if state.startswith("closed"):
        program.close()
    if state == "data that nobody reads":
        for _ in range(ROOM // 32768):
            front.answer(request, Op.RW, b"x" * 32768)
    time.sleep(0.1)
    rounds = 0
    once = vsock._once

    def counted() -> None:
        nonlocal rounds
        rounds += 1
        once()

    monkeypatch.setattr(vsock, "_once", counted)
    time.sleep(0.3)
    assert rounds <= 1


# endings


def test_the_program_ends_its_direction(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    program.sendall(b"all")
    program.shutdown(socket.SHUT_WR)
    assert front.receive()[1] == b"all"
    header, _ = front.receive()
    assert (header.op, header.flags) == (Op.SHUTDOWN, NO_MORE_SENT)
    front.answer(request, Op.RW, b"still")
    assert program.recv(10) == b"still"


def test_the_program_closes(vsock: Vsock, front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    program.sendall(b"last")
    program.close()
    assert front.receive()[1] == b"last"
    flags = 0
    while flags != BOTH:
        header, _ = front.receive()
        assert header.op == Op.SHUTDOWN
        flags |= header.flags
    front.answer(request, Op.RW, b"ignored")
    front.answer(request, Op.RST)
    front.wait_sent()
    with pytest.raises(TimeoutError):
        front.receive(timeout=0.1)
    assert not vsock._device.streams


def test_a_close_that_is_not_confirmed(
    vsock: Vsock, front: FrontEnd, connecting: Connecting, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vsockdevice, "CLOSE_TIME", 0.1)
    _, program = established(front, connecting)
    program.close()
    while (header := front.receive()[0]).op == Op.SHUTDOWN:
        pass
    assert header.op == Op.RST
    assert not vsock._device.streams


def test_the_guest_ends_its_direction(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    front.answer(request, Op.RW, b"all")
    front.answer(request, Op.SHUTDOWN, flags=NO_MORE_SENT)
    assert (program.recv(10), program.recv(10)) == (b"all", b"")
    program.sendall(b"more")
    assert front.receive()[1] == b"more"


def test_the_guest_does_not_read_any_more(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    front.answer(request, Op.SHUTDOWN, flags=NO_MORE_RECEIVED)
    front.answer(request, Op.RW, b"but writes")
    assert program.recv(20) == b"but writes"
    with pytest.raises(BrokenPipeError):
        program.sendall(b"x")


def test_the_guest_closes(vsock: Vsock, front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    front.answer(request, Op.RW, b"all")
    front.answer(request, Op.SHUTDOWN, flags=BOTH)
    assert front.receive()[0].op == Op.RST
    assert (program.recv(10), program.recv(10)) == (b"all", b"")
    assert not vsock._device.streams


def test_data_before_a_close_outlast_a_slow_reader(
    front: FrontEnd, connecting: Connecting,
) -> None:
    request, program = established(front, connecting)
    sent = os.urandom(ROOM)
    for at in range(0, ROOM, 32768):
        front.answer(request, Op.RW, sent[at:at + 32768])
    front.answer(request, Op.SHUTDOWN, flags=BOTH)
    front.wait_sent()
    got = b""
    while part := program.recv(65536):
        got += part
    assert got == sent


@pytest.mark.parametrize("size", [3, ROOM])
def test_the_guest_resets(
    vsock: Vsock, front: FrontEnd, connecting: Connecting, size: int,
) -> None:
    request, program = established(front, connecting)
    sent = os.urandom(size)
    for at in range(0, size, 32768):
        front.answer(request, Op.RW, sent[at:at + 32768])
    front.answer(request, Op.RST)
    front.wait_sent()
    got = b""
    while part := program.recv(65536):
        got += part
    assert got == sent
    deadline = time.monotonic() + 5
    while vsock._device.streams:
        assert time.monotonic() < deadline


def test_a_packet_that_has_no_place(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    front.answer(request, Op.RESPONSE)
    assert front.receive()[0].op == Op.RST
    assert program.recv(1) == b""


def test_the_machine_is_killed(
    vsock: Vsock, front: FrontEnd, connecting: Connecting,
) -> None:
    _, program = established(front, connecting)
    waiting = connecting()
    front.receive()
    front.control.close()
    assert program.recv(1) == b""
    with pytest.raises(ConnectionResetError, match="closed the vsock device"):
        waiting.result(5)
    assert vsock.failure is None


def test_the_guest_reboots(vsock: Vsock, front: FrontEnd, connecting: Connecting) -> None:
    _, program = established(front, connecting)
    bases = [struct.unpack("=II", front.ask(
        Request.GET_VRING_BASE, struct.pack("=II", index, 0)))[1] for index in (0, 1)]
    assert program.recv(1) == b""
    for index in (0, 1):
        front.set_ring(index, base=bases[index])
    connecting()
    front.accept()


def test_the_end_of_the_device(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(device: Vsock) -> None:
        try:
            device.connect(1, 5)
        except OSError as failure:
            failures.append(failure)

    with Vsock(tmp_path / "socket", CID) as device:
        thread = threading.Thread(target=work, args=(device,))
        thread.start()
        while not device._device.streams:
            time.sleep(0.001)
    thread.join(5)
    assert [type(failure) for failure in failures] == [ConnectionResetError]
    assert not device.path.exists()
    with pytest.raises(StepError, match="has ended"):
        device.connect(1, 5)


# guests that break the rules

OUTSIDE = BUFFERS[0] + BUFFERS[3]


def broken(front: FrontEnd, how: str) -> None:
    """Offer the device something that it must not follow, on the ring that it reads."""
    _, address = front.allocate(4096)
    header = Header(source=CID, target=HOST, source_port=1, target_port=2, op=Op.RST)
    place = BUFFERS[2] + address - BUFFERS[0]
    front.buffers[place:place + 44] = header.pack()
    entries: dict[str, list[tuple[int, int, int, int]]] = {
        "outside of memory": [(OUTSIDE, 44, 0, 0)],
        "across the end": [(OUTSIDE - 40, 44, 0, 0)],
        "an address that wraps": [(2**64 - 4, 44, 0, 0)],
        "a length that wraps": [(address, 2**32 - 1, 0, 0)],
        "a front end's address": [(BUFFERS[1], 44, 0, 0)],
        "a circle": [(address, 44, 1, 1), (address, 44, 1, 0)],
        "a circle of one": [(address, 44, 1, 0)],
        "a chain out of the ring": [(address, 44, 1, SIZE)],
        "indirect": [(address, 48, 4, 0)],
        "writable first": [(address, 44, 1 | 2, 1), (address, 44, 0, 0)],
        "no header": [(address, 43, 0, 0)],
        "a writable header": [(address, 44, 2, 0)],
        "more buffers than the ring has": [(address, 44, 0, 0)],
    }
    for at, (where, length, flags, following) in enumerate(entries.get(how, [])):
        front.describe(1, at, where, length, flags, following)
    if how == "a head out of the ring":
        front.offer(1, SIZE)
    elif how == "more buffers than the ring has":
        front.offer(1, 0, count=SIZE + 1)
    else:
        front.offer(1, 0)


@pytest.mark.parametrize("how", [
    "outside of memory", "across the end", "an address that wraps", "a length that wraps",
    "a front end's address", "a circle", "a circle of one", "a chain out of the ring", "indirect",
    "writable first", "no header", "a writable header", "a head out of the ring",
    "more buffers than the ring has"])
def test_a_driver_that_breaks_its_ring(
    vsock: Vsock, front: FrontEnd, connecting: Connecting, how: str,
) -> None:
    front.start()
    waiting = connecting()
    front.receive()
    broken(front, how)
    with pytest.raises(StepError, match="driver broke the device"):
        waiting.result(5)
    assert os.eventfd_read(front.errors[1]) == 1
    with pytest.raises(StepError, match="driver broke the device"):
        vsock.connect(1, 5)
    # The front end is still answered, and may set the ring up again.
    for index in (0, 1):
        front.ask(Request.GET_VRING_BASE, struct.pack("=II", index, 0))


def test_a_packet_longer_than_its_buffer(front: FrontEnd, connecting: Connecting) -> None:
    request, program = established(front, connecting)
    waiting = connecting()
    front.receive()
    front.answer(request, Op.RW, b"abc", length=1000)
    with pytest.raises(StepError, match="997 bytes short"):
        waiting.result(5)
    assert program.recv(10) == b""


@pytest.mark.parametrize(("flags", "size"), [(0, 4096), (2, 43)])
def test_a_buffer_that_the_device_cannot_fill(
    front: FrontEnd, connecting: Connecting, flags: int, size: int,
) -> None:
    front.start(buffers=0)
    waiting = connecting()
    _, address = front.allocate(size)
    front.describe(0, 0, address, size, flags)
    front.offer(0, 0)
    with pytest.raises(StepError, match="driver broke the device"):
        waiting.result(5)
    assert os.eventfd_read(front.errors[0]) == 1


def test_a_buffer_that_holds_a_header_and_no_data(
    front: FrontEnd, connecting: Connecting,
) -> None:
    front.start(buffers=1)
    answer = connecting()
    request, _ = front.receive(repost=False)
    front.answer(request, Op.RESPONSE)
    program = answer.result(5)
    program.sendall(b"x")
    front.post(1, size=44)
    with pytest.raises(ConnectionResetError):  # its data were not read
        program.recv(1)
    assert os.eventfd_read(front.errors[0]) == 1


def test_a_guest_that_takes_no_answers_is_not_heard_without_end(
    vsock: Vsock, front: FrontEnd,
) -> None:
    front.start(buffers=0)
    stray = Header(source=CID, target=HOST, source_port=5, target_port=6, op=Op.RW)
    for _ in range(vsockdevice.MOST_REPLIES):
        front.send(stray)
    front.wait_sent()
    front.send(stray)
    time.sleep(0.1)
    assert len(vsock._device.replies) == vsockdevice.MOST_REPLIES
    front.post(SIZE)
    for _ in range(vsockdevice.MOST_REPLIES + 1):
        assert front.receive()[0].op == Op.RST
