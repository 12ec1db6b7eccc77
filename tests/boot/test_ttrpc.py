"""ttRPC and Kata's agent's calls, against a server over a socket pair; the protobuf codec."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from katagpu.boot import kata_agent, protobuf
from katagpu.boot.kata_agent import Serving
from katagpu.boot.ttrpc import CallFailed, Client
from katagpu.errors import StepError, TookTooLong

Serve = Callable[[Callable[[socket.socket], None]], Client]


def frame(stream: int, kind: int, data: bytes, flags: int = 0) -> bytes:
    return struct.pack(">IIBB", len(data), stream, kind, flags) + data


def request(server: socket.socket) -> tuple[int, dict[int, list[protobuf.Value]]]:
    """The stream and the fields of the next request."""
    with server.makefile("rb") as reader:
        length, stream, kind, flags = struct.unpack(">IIBB", reader.read(10))
        assert (kind, flags) == (1, 0)
        return stream, protobuf.decode(reader.read(length))


def response(stream: int, payload: bytes, code: int = 0, said: str = "") -> bytes:
    status = protobuf.encode({1: code, 2: said})
    return frame(stream, 2, protobuf.encode({1: status, 2: payload}))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Runs a server in a thread; its failure is the test's."""
    with contextlib.ExitStack() as stack:
        failures: list[BaseException] = []

        def start(work: Callable[[socket.socket], None]) -> Client:
            ours, theirs = socket.socketpair()
            theirs.settimeout(5)

            def body() -> None:
                try:
                    with theirs:
                        work(theirs)
                except BaseException as failure:
                    failures.append(failure)

            thread = threading.Thread(target=body)
            thread.start()
            stack.callback(thread.join)
            stack.callback(ours.close)
            return Client(ours)

        yield start
    assert not failures


def test_a_call(serve: Serve) -> None:
    def work(server: socket.socket) -> None:
        for expected in (1, 3, 5):
            stream, fields = request(server)
            assert stream == expected
            assert fields == {1: [b"grpc.Health"], 2: [b"Check"], 3: [b"asked"],
                              4: [2_500_000_000]}
            server.sendall(response(stream, b"answer"))

    client = serve(work)
    for _ in range(3):
        assert client.call("grpc.Health", "Check", b"asked", timeout=2.5) == b"answer"


def test_frames_of_others_are_passed_over(serve: Serve) -> None:
    def work(server: socket.socket) -> None:
        stream, _ = request(server)
        server.sendall(frame(stream + 1, 2, b"no protobuf \xff") + frame(stream, 3, b"data", 4)
                       + frame(0, 9, b"") + frame(stream, 77, b"keep alive"))
        server.sendall(response(stream, b"answer"))

    assert serve(work).call("a", "b", b"", timeout=5) == b"answer"


def test_a_frame_in_pieces(serve: Serve) -> None:
    def work(server: socket.socket) -> None:
        stream, _ = request(server)
        for byte in response(stream, b"answer"):
            server.sendall(bytes([byte]))
            time.sleep(0.001)

    assert serve(work).call("a", "b", b"", timeout=5) == b"answer"


def test_an_error_of_the_server(serve: Serve) -> None:
    def work(server: socket.socket) -> None:
        stream, _ = request(server)
        server.sendall(response(stream, b"", 12, "/grpc.X/Y is not supported"))
        stream, _ = request(server)
        server.sendall(response(stream, b"", 99))

    client = serve(work)
    with pytest.raises(CallFailed, match=r"X/Y: UNIMPLEMENTED: .* not supported") as failure:
        client.call("grpc.X", "Y", b"", timeout=5)
    assert failure.value.code == 12
    with pytest.raises(CallFailed, match=r"code 99$"):
        client.call("grpc.X", "Y", b"", timeout=5)


def test_a_deadline_and_its_late_answer(serve: Serve) -> None:
    late = threading.Event()

    def work(server: socket.socket) -> None:
        first, _ = request(server)
        data = response(first, b"late")
        server.sendall(data[:7])  # the header itself is cut in two
        assert late.wait(5)
        server.sendall(data[7:])
        second, _ = request(server)
        server.sendall(response(second, b"in time"))

    client = serve(work)
    started = time.monotonic()
    with pytest.raises(TookTooLong, match="S/slow: no answer within"):
        client.call("S", "slow", b"", timeout=0.2)
    assert time.monotonic() - started < 2
    late.set()
    assert client.call("S", "quick", b"", timeout=5) == b"in time"


def test_a_server_that_keeps_talking_does_not_move_the_deadline(serve: Serve) -> None:
    def work(server: socket.socket) -> None:
        stream, _ = request(server)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(1000):
                server.sendall(frame(stream, 9, b""))
                time.sleep(0.01)

    client = serve(work)
    with pytest.raises(TookTooLong):
        client.call("a", "b", b"", timeout=0.2)


@pytest.mark.parametrize("said", [b"", b"\0\0\0"])
def test_a_connection_that_ends(serve: Serve, said: bytes) -> None:
    def work(server: socket.socket) -> None:
        request(server)
        server.sendall(said)

    with pytest.raises(StepError, match="connection broke"):
        serve(work).call("a", "b", b"", timeout=5)


@pytest.mark.parametrize("said", [
    b"HTTP/1.1 400 Bad Request\r\n", frame(1, 2, b"\xff\xff"), frame(1, 2, b"\x0a\x7f"),
    frame(1, 2, b"\x0b"), frame(1, 2, protobuf.encode({1: 5})), frame(1, 2, b"\x80" * 11)])
def test_what_is_no_answer(serve: Serve, said: bytes) -> None:
    def work(server: socket.socket) -> None:
        request(server)
        server.sendall(said)

    with pytest.raises(StepError) as failure:
        serve(work).call("a", "b", b"", timeout=5)
    assert type(failure.value) is StepError


def test_a_request_that_is_too_large(serve: Serve) -> None:
    with pytest.raises(StepError, match="too large"):
        serve(lambda _: None).call("a", "b", bytes(4 << 20), timeout=5)


# the agent


@pytest.mark.parametrize(("payload", "status"), [
    (b"", Serving.UNKNOWN), (b"\x08\x01", Serving.SERVING), (b"\x08\x02", Serving.NOT_SERVING)])
def test_check(serve: Serve, payload: bytes, status: Serving) -> None:
    def work(server: socket.socket) -> None:
        stream, fields = request(server)
        assert (fields[1], fields[2]) == ([b"grpc.Health"], [b"Check"])
        server.sendall(response(stream, payload))

    assert kata_agent.check(serve(work), timeout=5) is status


def test_a_health_that_is_not_known(serve: Serve) -> None:
    def work(server: socket.socket) -> None:
        server.sendall(response(request(server)[0], b"\x08\x07"))

    with pytest.raises(StepError, match="health is 7"):
        kata_agent.check(serve(work), timeout=5)


def test_guest_details(serve: Serve) -> None:
    # Written out by hand: field 1 varint 128 MiB; 2 the agent's details; 3 true; 9 is unknown.
    agent = (b"\x0a\x053.2.1" b"\x10\x01" b"\x1a\x03blk" b"\x1a\x04mmio" b"\x22\x02fs"
             b"\x28\x01" b"\x32\x06policy" b"\x49" + bytes(8))
    payload = b"\x08\x80\x80\x80\x40" b"\x12" + bytes([len(agent)]) + agent + b"\x18\x01"

    def work(server: socket.socket) -> None:
        stream, fields = request(server)
        assert (fields[1], fields[2]) == ([b"grpc.AgentService"], [b"GetGuestDetails"])
        assert fields[3] == [b"\x08\x01\x10\x01"]
        server.sendall(response(stream, payload))

    details = kata_agent.guest_details(serve(work), timeout=5)
    assert details == kata_agent.GuestDetails(
        memory_block_bytes=128 << 20, memory_probe=True, version="3.2.1", init_daemon=True,
        device_handlers=("blk", "mmio"), storage_handlers=("fs",), supports_seccomp=True,
        extra_features=("policy",))


# protobuf


def test_the_wire_format() -> None:
    # The examples of the encoding's documentation.
    assert protobuf.encode({1: 150}) == bytes.fromhex("089601")
    assert protobuf.encode({2: "testing"}) == bytes.fromhex("120774657374696e67")
    assert protobuf.encode({1: 0, 2: "", 3: False, 4: b""}) == b""
    fields = protobuf.decode(bytes.fromhex("089601" "120774657374696e67" "1d01000000"
                                           "21ffffffffffffffff"))
    assert fields == {1: [150], 2: [b"testing"], 3: [1], 4: [2**64 - 1]}
    assert protobuf.decode(b"\x08" + b"\xff" * 9 + b"\x01") == {1: [2**64 - 1]}


@pytest.mark.parametrize("data", ["08", "0880", "1207aa", "0d0000", "0b", "0f", "08" + "80" * 11])
def test_what_is_no_message(data: str) -> None:
    with pytest.raises(StepError):
        protobuf.decode(bytes.fromhex(data))


def test_a_field_of_another_type() -> None:
    fields = protobuf.decode(bytes.fromhex("0801" "12012a" "1a01ff"))
    with pytest.raises(StepError, match="field 1"):
        protobuf.text(fields, 1)
    with pytest.raises(StepError, match="field 2"):
        protobuf.integer(fields, 2)
    with pytest.raises(StepError, match="UTF-8"):
        protobuf.strings(fields, 3)


def test_defaults_and_messages_in_parts() -> None:
    """Absent fields have their default; of a field that comes twice the last counts, and a nested
    message is put together (the encoding's "Last One Wins").
    """
    assert protobuf.message({}, 1) == {} and protobuf.raw({}, 1) == b""
    assert (protobuf.text({}, 1), protobuf.strings({}, 1), protobuf.integer({}, 1)) == ("", [], 0)
    parts = protobuf.decode(protobuf.encode({2: protobuf.encode({1: 5})})
                            + protobuf.encode({2: protobuf.encode({1: 6, 3: "x"}), 4: b"\xff"}))
    assert protobuf.message(parts, 2) == {1: [5, 6], 3: [b"x"]}
    assert protobuf.integer(protobuf.message(parts, 2), 1) == 6
    assert protobuf.raw(parts, 4) == b"\xff"
    with pytest.raises(ValueError, match="negative"):
        protobuf.encode({1: -1})
