"""The vfio-user server, asked over its socket: every command, every error, and rubbish."""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from katagpu.boot.gpu import Gpu
from katagpu.boot.pcifunction import GIB, MIB
from katagpu.boot.trail import EVENTS, PLACES
from katagpu.boot.vfiouser import Server
from katagpu.boot.vfiowire import MAX_MESSAGE
from katagpu.errors import UserError

from .client import (
    CONFIG,
    DMA_MAP,
    DMA_UNMAP,
    GET_INFO,
    GET_IRQ,
    GET_REGION,
    READ,
    RESET,
    VERSION,
    WRITE,
    Client,
    eventfds,
    open_fds,
    wait_for,
)

EVENTFD_TRIGGER, NONE_TRIGGER = 0x24, 0x21
MSI, MSIX = 1, 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    before = open_fds()
    with Server(tmp_path / "gpu", Gpu(msix=True)) as server:
        yield server
    assert open_fds() == before, "descriptors were left open"


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    client = Client(server.path)
    yield client
    client.close()


def test_the_socket_is_there_from_the_start_and_gone_at_the_end(tmp_path: Path) -> None:
    server = Server(tmp_path / "gpu", Gpu())
    assert not server.path.exists()
    with server:
        assert server.path.is_socket()
        assert server.path.stat().st_mode & 0o777 == 0o600
        Client(server.path).close()
        server.stop()
        assert not server.path.exists()
        server.stop()
    assert not [thread for thread in threading.enumerate() if "vfio-user" in thread.name]


def test_version_offers_a_subset_of_what_was_proposed(server: Server) -> None:
    client = Client(server.path, agree=False)
    reply = client.version(0, 7)
    assert struct.unpack_from("=HH", reply.data) == (0, 0)
    assert reply.data.endswith(b"\0")
    assert json.loads(reply.data[4:-1]) == {
        "capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20}}
    assert client.version().error == errno.EINVAL, "a second time"
    client.close()


@pytest.mark.parametrize("data", [b"", b"\0", b"{}\0", b'{"capabilities":{}}'])
def test_version_without_capabilities(server: Server, data: bytes) -> None:
    client = Client(server.path, agree=False)
    assert json.loads(client.version(data=data).data[4:-1]) == {"capabilities": {}}
    client.close()


def test_device_info(client: Client) -> None:
    reply = client.ask(GET_INFO, struct.pack("=IIII", 16, 0, 0, 0))
    assert struct.unpack("=IIII", reply.data) == (16, 3, 9, 5)
    assert client.ask(GET_INFO, struct.pack("=IIII", 15, 0, 0, 0)).error == errno.EINVAL


def test_regions(client: Client) -> None:
    found = [client.region(index) for index in range(9)]
    assert found == [(3, 16 * MIB), (3, 32 * GIB), (0, 0), (3, 32 * MIB), (0, 0), (0, 0), (0, 0),
                     (3, 4096), (0, 0)]
    for argsz, index in ((32, 9), (32, 0xFFFFFFFF), (31, 0)):
        reply = client.ask(GET_REGION, struct.pack("=IIIIQQ", argsz, 0, index, 0, 0, 0))
        assert reply.error == errno.EINVAL


def test_interrupt_types(client: Client) -> None:
    assert [client.irqs(index) for index in range(5)] == [(7, 1), (9, 1), (9, 6), (9, 1), (9, 1)]
    for argsz, index in ((16, 5), (15, 0)):
        assert client.ask(GET_IRQ, struct.pack("=IIII", argsz, 0, index, 0)).error == errno.EINVAL


def test_eventfds_are_kept_until_they_are_taken_back(client: Client) -> None:
    before = open_fds()
    with eventfds(6) as made:
        assert client.set_irqs(EVENTFD_TRIGGER, MSIX, 0, 6, fds=made).error is None
    assert open_fds() == before + 6
    kept = [entry.name for entry in Path("/proc/self/fd").iterdir()
            if "eventfd" in os.path.realpath(entry)]
    assert len(kept) == 6
    assert not any(os.get_inheritable(int(name)) for name in kept), "no child gets them"
    with eventfds(2) as made:
        assert client.set_irqs(EVENTFD_TRIGGER, MSIX, 1, 2, fds=made).error is None
    assert open_fds() == before + 6, "the replaced ones are closed"
    assert client.set_irqs(EVENTFD_TRIGGER, MSIX, 2, 3).error is None
    assert open_fds() == before + 3, "without descriptors: taken back"
    with eventfds(1) as made:  # ACTION_UNMASK
        assert client.set_irqs(0x14, MSIX, 0, 1, fds=made).error is None
    assert open_fds() == before + 4, "one for another action is another one"
    assert client.set_irqs(NONE_TRIGGER, MSIX, 0, 0).error is None
    assert open_fds() == before, "the whole type is off"


def test_masking_needs_no_descriptor(client: Client) -> None:
    assert client.set_irqs(0x09, 0, 0, 1).error is None  # NONE, MASK
    assert client.set_irqs(0x12, 0, 0, 1, data=b"\1").error is None  # BOOL, UNMASK


@pytest.mark.parametrize(("flags", "index", "start", "count", "number", "expected"), [
    (EVENTFD_TRIGGER, MSIX, 0, 7, 7, errno.EINVAL),
    (EVENTFD_TRIGGER, MSIX, 5, 2, 2, errno.EINVAL),
    (EVENTFD_TRIGGER, MSIX, 0, 3, 2, errno.EINVAL),
    (EVENTFD_TRIGGER, 5, 0, 1, 1, errno.EINVAL),
    (EVENTFD_TRIGGER, MSI, 0xFFFFFFFF, 0xFFFFFFFF, 1, errno.EINVAL),
    (0x27, MSI, 0, 1, 1, errno.EINVAL),
    (0x3C, MSI, 0, 1, 1, errno.EINVAL),
    (0x04, MSI, 0, 1, 1, errno.EINVAL),
    (NONE_TRIGGER, MSI, 0, 1, 1, errno.ENOTSUP),
])
def test_refused_interrupts_leave_no_descriptor(
        client: Client, flags: int, index: int, start: int, count: int, number: int,
        expected: int) -> None:
    before = open_fds()
    with eventfds(number) as made:
        assert client.set_irqs(flags, index, start, count, fds=made).error == expected
    assert open_fds() == before


def test_dma_ranges(client: Client) -> None:
    before = open_fds()
    memory = os.memfd_create("ram")
    one = struct.pack("=IIQQQ", 32, 3, 0, 0x1000, 0x1000)
    assert client.ask(DMA_MAP, one, [memory]).error is None
    assert client.ask(DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 0x2000, 0x1000)).error is None
    os.close(memory)
    assert open_fds() == before, "the function does no DMA: it needs no memory of the guest"
    assert client.ask(DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 0x1800, 1)).error == errno.EEXIST
    for address, size in ((1 << 63, 1 << 63), (0x8000, 0)):
        reply = client.ask(DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, address, size))
        assert reply.error == (None if size else errno.EINVAL)
    reply = client.ask(DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, (1 << 64) - 1, 2))
    assert reply.error == errno.EINVAL
    undo = struct.pack("=IIQQ", 24, 0, 0x1000, 0x1000)
    assert client.ask(DMA_UNMAP, undo).data == undo
    assert client.ask(DMA_UNMAP, undo).error == errno.ENOENT
    assert client.ask(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0x2000, 1)).error == errno.ENOENT
    assert client.ask(DMA_UNMAP, struct.pack("=IIQQ", 24, 2, 0, 0)).error is None
    assert client.ask(DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 0, 1 << 63)).error is None


def test_registers_and_the_record_of_accesses(client: Client, server: Server) -> None:
    assert client.number(0, 0, 4) == 0x170000A1
    assert client.number(0, 0xA00, 4) == 0x170A1000
    assert client.number(0, 0xA02, 2) == 0x170A, "any bytes of a register"
    assert client.read(0, 0, 0xA08) == (0x170000A1).to_bytes(4, "little") + bytes(0x9FC) \
        + (0x170A1000).to_bytes(4, "little") + bytes(4)
    assert client.number(1, 32 * GIB - 8, 8) == 0
    client.write(0, 0, b"\xff\xff\xff\xff")
    assert client.number(0, 0, 4) == 0x170000A1, "writes into a BAR change nothing"
    found = {(one.offset, one.size, one.write): (one.times, one.last)
             for one in server.accesses if one.region == 0}
    assert found[0, 4, False] == (2, 0x170000A1)
    assert found[0, 4, True] == (1, 0xFFFFFFFF)
    assert str(server.accesses[0]) == "BAR0+0x0 read 2 times, 4 bytes, last 0x170000a1"


@pytest.mark.parametrize(("region", "offset", "count"), [
    (0, 16 * MIB, 4), (0, 16 * MIB - 2, 4), (2, 0, 4), (6, 0, 4), (8, 0, 1), (9, 0, 1),
    (CONFIG, 4094, 4), (CONFIG, 0, 0), (0, (1 << 64) - 4, 4), (1, 0, (1 << 20) + 1)])
def test_accesses_outside_of_regions_are_refused(
        client: Client, server: Server, region: int, offset: int, count: int) -> None:
    reply = client.ask(READ, struct.pack("=QII", offset, region, count))
    assert reply.error == errno.EINVAL
    if count <= 1 << 20:
        payload = struct.pack("=QII", offset, region, count) + bytes(count)
        assert client.ask(WRITE, payload).error == errno.EINVAL
    assert not server.accesses
    assert any(event.startswith("refused: read of ") or "a read of" in event
               for event in server.events)


def test_the_largest_transfer(client: Client) -> None:
    assert client.read(1, 0, 1 << 20) == bytes(1 << 20)
    client.write(1, 0, bytes(1 << 20))


def test_reset_and_state_over_connections(client: Client, server: Server) -> None:
    client.write(CONFIG, 4, b"\6\0")
    client.write(CONFIG, 0x14, (0x4000000000).to_bytes(8, "little"))
    client.close()
    wait_for(lambda: "the client went" in server.events)
    again = Client(server.path)
    assert again.number(CONFIG, 4, 2) == 6, "the function outlives a client"
    assert server.device.decodes_memory
    assert server.device.addresses() == {0: 0, 1: 0x4000000000, 3: 0}
    assert again.ask(RESET).error is None
    assert again.number(CONFIG, 4, 2) == 0
    assert server.device.addresses() == {0: 0, 1: 0, 3: 0}
    assert "reset" in server.events
    again.close()


@pytest.mark.parametrize("command", [0, 6, 11, 12, 14, 15, 16, 17, 18, 0xFFFF])
def test_other_commands_get_an_error(client: Client, command: int) -> None:
    with eventfds(1) as made:
        assert client.ask(command, bytes(64), made).error == errno.ENOTSUP
    assert client.ask(RESET).error is None


def test_no_reply_is_honoured(client: Client, server: Server) -> None:
    client.send(WRITE, struct.pack("=QII", 4, CONFIG, 2) + b"\2\0", flags=0x10)
    client.send(READ, struct.pack("=QII", 0, 9, 4), flags=0x10)  # an error, not told either
    client.send(99, flags=0x10)
    assert client.number(CONFIG, 4, 2) == 2, "the next reply is the next question's"
    assert sum(event.startswith("refused") for event in server.events) == 2


def test_messages_in_pieces_and_in_one(client: Client) -> None:
    whole = b"".join(
        struct.pack("=HHIII", ident, READ, 32, 0, 0) + struct.pack("=QII", 0, 0, 4)
        for ident in range(40))
    for byte in whole[:96]:
        client.sock.send(bytes([byte]))
        time.sleep(0.0005)
    client.sock.sendall(whole[96:])
    assert [client.reply().ident for _ in range(40)] == list(range(40))


def test_descriptors_belong_to_the_message_they_come_with(client: Client) -> None:
    before = open_fds()
    ask = struct.pack("=HHIII", 7, 8, 36, 0, 0) + struct.pack("=IIIII", 20, 0x24, MSI, 0, 1)
    with eventfds(1) as made:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", made))]
        client.sock.send(struct.pack("=HHIII", 6, RESET, 16, 0, 0))
        client.sock.sendmsg([ask[:20]], control)
        client.sock.send(ask[20:] + struct.pack("=HHIII", 8, RESET, 16, 0, 0))
    assert [client.reply().error for _ in range(3)] == [None, None, None]
    assert open_fds() == before + 1


RUBBISH = {
    "a size below the header": (lambda client: client.send(RESET, size=15), "15 bytes"),
    "a size of nothing": (lambda client: client.send(RESET, size=0), "0 bytes"),
    "too large": (lambda client: client.send(WRITE, size=MAX_MESSAGE + 1), str(MAX_MESSAGE + 1)),
    "huge": (lambda client: client.send(WRITE, size=0xFFFFFFFF), "4294967295 bytes"),
    "a reply": (lambda client: client.send(RESET, flags=1), "not a command"),
    "no command at all": (lambda client: client.sock.send(b"GET / HTTP/1.1\r\n\r\n"), "bytes"),
    "short payload": (lambda client: client.send(READ, bytes(15)), "15 bytes of payload"),
    "short map": (lambda client: client.send(DMA_MAP, bytes(31)), "31 bytes of payload"),
    "a write that lacks data": (
        lambda client: client.send(WRITE, struct.pack("=QII", 0, 0, 8) + bytes(4)), "carries 4"),
    "missing booleans": (
        lambda client: client.send(8, struct.pack("=IIIII", 20, 0x12, MSIX, 0, 6)), "booleans"),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_ends_the_connection_and_no_more(server: Server, kind: str) -> None:
    send, said = RUBBISH[kind]
    before = open_fds()
    client = Client(server.path)
    send(client)  # type: ignore[no-untyped-call]
    assert client.is_closed()
    client.close()
    assert server.events[-1].startswith("connection ended: ") and said in server.events[-1]
    wait_for(lambda: open_fds() == before)
    again = Client(server.path)
    assert again.number(0, 0, 4) == 0x170000A1
    again.close()


@pytest.mark.parametrize("data", [
    b"{", b"[]\0", b"\xff\xfe\0", b'{"capabilities":[]}\0', b"[" * 100_000, b"1" * 10_000, b"null"])
def test_bad_version_data_ends_the_connection(server: Server, data: bytes) -> None:
    client = Client(server.path, agree=False)
    client.send(VERSION, bytes(4) + data)
    assert client.is_closed()
    assert "version data" in server.events[-1]
    client.close()


@pytest.mark.parametrize(("command", "payload", "said"), [
    (VERSION, struct.pack("=HH", 1, 0), "protocol version 1.0"),
    (VERSION, b"\0\0\0", "without a version"),
    (GET_INFO, bytes(16), "before a version"),
    (99, b"", "before a version")])
def test_no_talk_without_a_version(server: Server, command: int, payload: bytes,
                                   said: str) -> None:
    client = Client(server.path, agree=False)
    client.send(command, payload)
    assert client.is_closed()
    assert said in server.events[-1]
    client.close()


def test_too_many_descriptors(server: Server) -> None:
    before = open_fds()
    client = Client(server.path)
    message = struct.pack("=HHIIIIIIII", 1, 8, 36, 0, 0, 20, 0x24, MSIX, 0, 6)
    with eventfds(9) as made:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", made))]
        client.sock.sendmsg([message], control)
        assert client.is_closed()
    client.close()
    assert "file descriptors" in server.events[-1]
    wait_for(lambda: open_fds() == before)


def test_a_client_that_dies_within_a_message(server: Server) -> None:
    before = open_fds()
    client = Client(server.path)
    with eventfds(1) as made:
        client.set_irqs(EVENTFD_TRIGGER, MSI, 0, 1, fds=made)
        client.send(8, bytes(4), fds=made, size=36)
    client.close()
    wait_for(lambda: "20 bytes of a message" in server.events[-1])
    wait_for(lambda: open_fds() == before)


def test_a_second_client_is_turned_away(client: Client, server: Server) -> None:
    client.sock.send(b"\0")  # half a message does not keep the server from it
    second = Client(server.path, agree=False)
    assert second.is_closed()
    second.close()
    assert server.events[-1] == "a second client was turned away"
    client.sock.send(struct.pack("=HHIII", 0, RESET, 16, 0, 0)[1:])
    assert client.reply().error is None


def test_a_new_client_right_after_the_old_one(server: Server) -> None:
    for _ in range(200):
        client = Client(server.path)
        for _ in range(100):
            client.send(WRITE, struct.pack("=QII", 0, 1, 4) + bytes(4), flags=0x10)
        client.close()
    assert "a second client was turned away" not in server.events


def test_a_client_that_takes_no_replies_does_not_fill_the_memory(server: Server) -> None:
    client = Client(server.path)
    client.sock.settimeout(1)
    ask = struct.pack("=HHIII", 0, READ, 32, 0, 0) + struct.pack("=QII", 0, 1, 1 << 20)
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 64 << 20:
            sent += client.sock.send(ask * 64)
    client.sock.settimeout(10)
    kept = [one.times for one in server.accesses if one.region == 1]
    assert kept and kept[0] < 16, "it reads on only as far as its replies are taken"
    for _ in range(kept[0] + 8):
        assert client.reply().error is None, "and goes on when they are"
    client.close()


def test_stop_with_a_client_that_waits(tmp_path: Path) -> None:
    with Server(tmp_path / "gpu", Gpu()) as server:
        client = Client(server.path)
        client.sock.send(b"\0\0\0")
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert client.is_closed()
    assert server.events[-1] == "the server stopped"
    client.close()


def test_two_servers_at_once(tmp_path: Path) -> None:
    with Server(tmp_path / "a", Gpu()) as one, Server(tmp_path / "b", Gpu(device=0x2335)) as two:
        clients = Client(one.path), Client(two.path)
        for turn in range(200):
            assert clients[turn % 2].number(0, 0, 4) == (0x170000A1, 0x180000A1)[turn % 2]
        assert [client.number(CONFIG, 2, 2) for client in clients] == [0x20B7, 0x2335]
        clients[0].write(CONFIG, 4, b"\2\0")
        assert one.device.decodes_memory and not two.device.decodes_memory
        for client in clients:
            client.close()


def test_the_record_is_bounded(client: Client, server: Server) -> None:
    ask = struct.Struct("=HHIIIQII")
    for offset in range(PLACES + 50):
        client.sock.send(ask.pack(0, READ, 32, 0, 0, 4 * offset, 0, 4))
        client.reply()
    client.read(0, 0, 4)
    assert len(server.accesses) == PLACES and server.trail.dropped == 50
    assert server.accesses[0].times == 2
    for _ in range(EVENTS + 5):
        client.ask(RESET)
    assert server.events == ("reset",) * EVENTS


def test_random_bytes_never_end_the_server(server: Server) -> None:
    dice = random.Random(11)
    before = open_fds()
    for turn in range(300):
        client = Client(server.path, agree=bool(turn % 3))
        payload = dice.randbytes(dice.randrange(80))
        with contextlib.suppress(BrokenPipeError), eventfds(dice.randrange(4)) as made:
            client.send(dice.randrange(1, 14), payload, fds=made, flags=dice.choice([0, 0x10]))
            client.sock.send(dice.randbytes(dice.randrange(1, 60)))
        client.close()
        wait_for(lambda: open_fds() == before)
    client = Client(server.path)
    assert client.number(0, 0xA00, 4) == 0x170A1000
    client.close()


@pytest.mark.parametrize("length", [107, 108])
def test_the_longest_path(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("x" * (length - len(str(tmp_path)) - 1))
    before = open_fds()
    if length == 107:
        with Server(path, Gpu()):
            Client(path).close()
    else:
        with pytest.raises(UserError, match="at most 107 bytes"), Server(path, Gpu()):
            pass
    assert not path.exists() and open_fds() == before


def test_a_path_in_use(server: Server) -> None:
    before = open_fds()
    with pytest.raises(UserError, match="Address already in use"), Server(server.path, Gpu()):
        pass
    assert open_fds() == before
    client = Client(server.path)
    assert client.ask(RESET).error is None, "the first server is still there"
    client.close()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"), Server(tmp_path / "no/gpu", Gpu()):
        pass
