"""QEMU's monitor: a real server that speaks the protocol, and one that does not."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu.boot import qmp
from katagpu.boot.qmp import Monitor, Refused
from katagpu.errors import StepError, TookTooLong, UserError

# As QEMU 11.1.3 says it.
GREETING = (b'{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": '
            b'"Debian 1:11.1.3+ds-1~bpo13+1"}, "capabilities": ["oob"]}}\r\n')
Ask = dict[str, Any]


def line(**said: Any) -> bytes:
    """A message."""
    return json.dumps(said).encode() + b"\r\n"


def event(name: str, /, **data: Any) -> bytes:
    """An event; one without data has none."""
    more = {"data": data} if data else {}
    return line(timestamp={"seconds": 1785067200, "microseconds": 1}, event=name, **more)


def fine(asked: Ask) -> bytes:
    """The answer to a command that returns nothing, and its own name to others."""
    nothing = asked["execute"] == "qmp_capabilities"
    return line(**{"return": {} if nothing else asked["execute"]}, id=asked["id"])


def once(asked: Ask) -> bytes | None:
    """The answer to the first command, which ends the negotiation, and to no other."""
    return fine(asked) if asked["id"] == 1 else None


class Peer:
    """A server for one client: what it says first, and then to each command.

    None closes the connection instead; `chunk` bytes go out at a time.
    """

    def __init__(self, path: Path, answer: Callable[[Ask], bytes | None] = fine,
                 greeting: bytes | None = GREETING, chunk: int = 1 << 16) -> None:
        self.path = path
        self.asked: list[Ask] = []
        self.gone = threading.Event()
        self._answer, self._greeting, self._chunk = answer, greeting, chunk
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            connection, _address = self._listener.accept()
            with connection, connection.makefile("rb") as lines:
                said = self._greeting
                while said is not None:
                    self._say(connection, said)
                    self.asked.append(json.loads(lines.readline() or b"null"))
                    said = self._answer(self.asked[-1]) if self.asked[-1] else None
        self.gone.set()

    def _say(self, connection: socket.socket, data: bytes) -> None:
        for at in range(0, len(data), self._chunk):
            connection.sendall(data[at:at + self._chunk])
            if self._chunk < 1 << 16:
                time.sleep(0.001)

    def close(self) -> None:
        """End it; its client has gone."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()


Connecting = Callable[..., tuple[Monitor, Peer]]


@pytest.fixture
def connected(tmp_path: Path) -> Iterator[Connecting]:
    """Makes a server and connects to it."""
    with contextlib.ExitStack() as stack:
        def connect(*words: Any, check: Callable[[], None] = lambda: None,
                    **more: Any) -> tuple[Monitor, Peer]:
            peer = Peer(tmp_path / "qmp", *words, **more)
            stack.callback(peer.close)
            monitor = Monitor.connect(peer.path, check, timeout=2)
            stack.callback(monitor.close)
            return monitor, peer

        yield connect


def test_commands_and_their_answers(connected: Connecting) -> None:
    monitor, peer = connected()
    assert monitor.command("query-status") == "query-status"
    monitor.command("device_add", driver="pci-testdev", **{"mem-bar": 1})
    assert [asked["execute"] for asked in peer.asked] == [
        "qmp_capabilities", "query-status", "device_add"]
    assert len({asked["id"] for asked in peer.asked}) == 3
    assert "arguments" not in peer.asked[1]
    assert peer.asked[2]["arguments"] == {"driver": "pci-testdev", "mem-bar": 1}


def test_events_in_between_are_kept(connected: Connecting) -> None:
    monitor, _peer = connected(
        lambda asked: event("NIC_RX_FILTER_CHANGED") + event(
            "DEVICE_DELETED", path="/machine/peripheral/gpu0", device="gpu0") + fine(asked)
        + event("RESUME"))
    assert monitor.command("device_del", id="gpu0") == "device_del"
    assert monitor.wait_event("DEVICE_DELETED", 1)["device"] == "gpu0"
    assert monitor.wait_event("RESUME", 1) == {}


def test_an_event_is_taken_once_and_others_stay(connected: Connecting) -> None:
    def answer(asked: Ask) -> bytes:
        if asked["execute"] == "qmp_capabilities":
            return fine(asked)
        return fine(asked) + event("A", n=1) + event("B", n=2) + event("A", n=3) + event("A", n=4)

    monitor, _peer = connected(answer)
    monitor.command("go")
    assert monitor.wait_event("A", 1, lambda data: data["n"] > 1) == {"n": 3}
    assert monitor.wait_event("A", 1) == {"n": 1}
    assert monitor.wait_event("A", 1) == {"n": 4}
    with pytest.raises(TookTooLong, match=r"no event A of QEMU within 0 s; others: B$"):
        monitor.wait_event("A", 0.1)
    assert monitor.wait_event("B", 0.1) == {"n": 2}
    with pytest.raises(TookTooLong, match=r"others: none$"):
        monitor.wait_event("B", 0.1)


def test_a_refusal_leaves_the_connection_as_it_was(connected: Connecting) -> None:
    def answer(asked: Ask) -> bytes:
        if asked["execute"] != "device_add":
            return fine(asked)
        return line(id=asked["id"], error={
            "class": "GenericError", "desc": "'vfio-user-pci' is not a valid device model name"})

    monitor, _peer = connected(answer)
    with pytest.raises(Refused) as refused:
        monitor.command("device_add", driver="vfio-user-pci")
    assert (refused.value.command, refused.value.kind) == ("device_add", "GenericError")
    assert refused.value.said == "'vfio-user-pci' is not a valid device model name"
    assert refused.value.what == ("QEMU refuses device_add: 'vfio-user-pci' is not a valid device "
                                  "model name")
    assert monitor.command("query-status") == "query-status"


@pytest.mark.parametrize("chunk", [1, 7])
def test_messages_come_in_pieces(connected: Connecting, chunk: int) -> None:
    monitor, _peer = connected(
        lambda asked: event("E", name="Gerät é") + line(**{"return": "…"}, id=asked["id"]),
        chunk=chunk)
    assert monitor.command("query-name") == "…"
    assert monitor.wait_event("E", 1) == {"name": "Gerät é"}


def test_the_answer_to_a_command_that_was_given_up_is_not_the_next_one_s(
    connected: Connecting, monkeypatch: pytest.MonkeyPatch,
) -> None:
    late: list[bytes] = []

    def answer(asked: Ask) -> bytes:
        if asked["execute"] == "slow":
            late.append(fine(asked))
            return b""
        return b"".join([*late, fine(asked)])

    monitor, _peer = connected(answer)
    with monkeypatch.context() as patched:
        patched.setattr(qmp, "SECONDS", 0.2)
        with pytest.raises(TookTooLong, match="the answer to slow of QEMU's monitor did not come"):
            monitor.command("slow")
    assert monitor.command("query-status") == "query-status"


@pytest.mark.parametrize("said", [
    b"(qemu) \n", b"[]\r\n", b'"QMP"\r\n', b"\xff\xfe\r\n", b"\r\n", b'{"QMP": \r\n'])
@pytest.mark.parametrize("when", ["greeting", "answer"])
def test_garbage(connected: Connecting, said: bytes, when: str) -> None:
    with pytest.raises(StepError, match="what is not of its protocol"):
        if when == "greeting":
            connected(greeting=said)
        else:
            connected(lambda _asked: said)


@pytest.mark.parametrize("more", [{}, {"error": None}, {"error": "no"}])
def test_an_answer_that_is_none(connected: Connecting, more: dict[str, object]) -> None:
    with pytest.raises(StepError, match="what is not of its protocol"):
        connected(lambda asked: line(id=asked["id"], **more))


def test_another_program_s_socket(connected: Connecting) -> None:
    with pytest.raises(StepError, match=r"this is not QEMU's monitor: it says .*guest-agent"):
        connected(greeting=line(hello="guest-agent"))


def test_a_flood_without_a_line_ends_in_time(
    connected: Connecting, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor, _peer = connected(lambda asked: fine(asked) if asked["id"] == 1 else b"x" * 100_000)
    monkeypatch.setattr(qmp, "SECONDS", 0.2)
    with pytest.raises(TookTooLong):
        monitor.command("query-status")


def ended() -> None:
    """What a check says of a QEMU that has ended."""
    raise StepError("QEMU ended with status 1")


@pytest.mark.parametrize(("answer", "greeting"), [
    (fine, None), (lambda _asked: None, GREETING),
    (once, GREETING)],
    ids=["before the greeting", "after it", "after a command"])
def test_a_connection_that_is_closed(
    connected: Connecting, answer: Callable[[Ask], bytes | None], greeting: bytes | None,
) -> None:
    begun = time.monotonic()
    with pytest.raises(StepError, match=r"^QEMU ended with status 1"):
        monitor, _peer = connected(answer, greeting, check=ended)
        monitor.command("quit")
    assert time.monotonic() - begun < 1.5, "what became of QEMU is known at once"


def test_a_connection_that_is_closed_though_qemu_runs(connected: Connecting) -> None:
    monitor, peer = connected(once)
    with pytest.raises(StepError, match=r"^QEMU closed its monitor"):
        monitor.command("quit")
    assert peer.gone.wait(5)


def test_qemu_that_ends_a_moment_after_its_socket(connected: Connecting) -> None:
    end = time.monotonic() + 60

    def check() -> None:
        if time.monotonic() > end:
            ended()

    monitor, _peer = connected(once, check=check)
    end = time.monotonic() + 0.3
    with pytest.raises(StepError, match=r"^QEMU ended with status 1"):
        monitor.command("quit")


def test_no_answer_of_a_qemu_that_has_ended(
    connected: Connecting, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qmp, "SECONDS", 0.2)
    monitor, _peer = connected(lambda asked: fine(asked) if asked["id"] == 1 else b"", check=ended)
    with pytest.raises(StepError, match=r"^QEMU ended with status 1"):
        monitor.command("stop")


def test_a_monitor_that_takes_nothing(
    connected: Connecting, monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy = threading.Event()

    def answer(asked: Ask) -> bytes | None:
        if asked["execute"] == "qmp_capabilities":
            return fine(asked)
        busy.wait(10)
        return None

    monitor, _peer = connected(answer)
    monkeypatch.setattr(qmp, "SECONDS", 0.3)
    try:
        with pytest.raises(TookTooLong, match="the answer to one"):
            monitor.command("one")
        with pytest.raises(TookTooLong, match="QEMU does not take two"):
            monitor.command("two", text="x" * 10_000_000)
    finally:
        busy.set()


def test_it_may_be_closed_twice_and_is_of_no_use_then(connected: Connecting) -> None:
    monitor, peer = connected(check=ended)
    monitor.close()
    monitor.close()
    assert peer.gone.wait(5)
    for ask in (lambda: monitor.command("query-status"), lambda: monitor.wait_event("A", 5)):
        with pytest.raises(StepError, match="QEMU ended with status 1"):
            ask()


def test_it_waits_until_somebody_listens(tmp_path: Path) -> None:
    peers: list[Peer] = []
    timer = threading.Timer(0.3, lambda: peers.append(Peer(tmp_path / "qmp")))
    timer.start()
    with contextlib.closing(Monitor.connect(tmp_path / "qmp", timeout=10)) as monitor:
        assert monitor.command("query-status") == "query-status"
    timer.join()
    peers[0].close()


def test_nobody_listens(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(TookTooLong, match="does not answer: No such file or directory"):
        Monitor.connect(tmp_path / "qmp", timeout=0.2)
    left = socket.socket(socket.AF_UNIX)  # of a QEMU that was killed
    left.bind(str(tmp_path / "qmp"))
    left.close()
    with pytest.raises(TookTooLong, match="does not answer: Connection refused"):
        Monitor.connect(tmp_path / "qmp", timeout=0.2)
    with pytest.raises(StepError, match="QEMU ended with status 1"):
        Monitor.connect(tmp_path / "qmp", ended, timeout=20)
    assert time.monotonic() - begun < 3


def test_a_monitor_that_somebody_else_holds(tmp_path: Path) -> None:
    """QEMU serves one client, and lets others wait."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(0)
        with pytest.raises(TookTooLong, match="the greeting of QEMU's monitor did not come"):
            Monitor.connect(tmp_path / "qmp", timeout=0.2)


def test_a_monitor_for_which_too_many_wait(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(0)
        other.connect(str(tmp_path / "qmp"))
        with pytest.raises(TookTooLong, match="does not answer: Resource temporarily unavailable"):
            Monitor.connect(tmp_path / "qmp", timeout=0.2)


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    room = qmp.LONGEST - len(str(tmp_path).encode()) - 1
    if room < 4:
        pytest.skip("the directory's own path is long")
    peer = Peer(tmp_path / ("x" * room))
    Monitor.connect(peer.path).close()
    peer.close()
    for name in ("x" * (room + 1), "é" * (room // 2 + 1)):
        with pytest.raises(UserError, match="the path of a socket is too long") as refused:
            Monitor.connect(tmp_path / name, ended)
        assert "at most 107 bytes" in str(refused.value.hint)
