"""The way into the guest: with the real probe, and with one that fails."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from katagpu.boot import channel
from katagpu.boot.channel import Channel, Gone, Late, Line, parse
from katagpu.errors import StepError

from .fakeguest import FakeGuest
from .realprobe import RealProbe, build

Guests = tuple[FakeGuest, Channel]


def fine() -> None:
    """The machine runs."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe, built; the first time that takes Go half a minute."""
    return build(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def real(program: Path, tmp_path: Path) -> Iterator[tuple[RealProbe, Channel]]:
    """The real probe, and a channel to it."""
    with contextlib.closing(RealProbe(program, tmp_path)) as probe, \
            contextlib.closing(Channel(probe.path, fine)) as guest:
        guest.wait_ready(10)
        yield probe, guest


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Guests]:
    """A probe that can be told to fail, and a channel to it."""
    with contextlib.closing(FakeGuest(tmp_path / "socket")) as probe, \
            contextlib.closing(Channel(tmp_path / "socket", fine)) as guest:
        guest.wait_ready(5)
        yield probe, guest


# the real probe


def test_programs(real: tuple[RealProbe, Channel]) -> None:
    guest = real[1]
    ran = guest.run(["cat", "-"], stdin="naïve\n".encode())
    assert (ran.status, ran.stdout, ran.stderr, ran.argv) == (0, "naïve\n", "", ("cat", "-"))
    ran = guest.shell("echo out; echo err >&2; pwd; exit 7")
    assert (ran.status, ran.said) == (7, ["out", "/", "err"])
    assert guest.shell("kill -9 $$").status == 128 + 9
    assert guest.run(["printf", "\\377"]).stdout == "�"
    env = guest.run(["/usr/bin/env"]).stdout.splitlines()
    assert sorted(env) == sorted(f"{name}={value}" for name, value in channel.ENVIRONMENT.items())
    assert guest.run(["/usr/bin/env"], env={}).stdout == ""
    assert guest.run(["env"], env={"PATH": "/nowhere:/usr/bin", "A": "b=c"}).said == [
        "PATH=/nowhere:/usr/bin", "A=b=c"]
    with pytest.raises(StepError, match=r"in the guest: no-such: .*no such file"):
        guest.run(["no-such"])


def test_a_program_that_takes_too_long_is_ended_with_its_children(
    real: tuple[RealProbe, Channel], tmp_path: Path,
) -> None:
    guest, note = real[1], tmp_path / "pid"
    begun = time.monotonic()
    with pytest.raises(StepError, match=r"sleep .*did not end within 0.3 s"):
        guest.shell(f"sleep 60 & echo $! >{note}; wait", timeout=0.3)
    assert time.monotonic() - begun < 5
    child = Path("/proc") / note.read_text().strip()
    assert guest.until(lambda: not child.exists() or "Z" in (child / "stat").read_text(), 5)


def test_files(real: tuple[RealProbe, Channel], tmp_path: Path) -> None:
    guest, path = real[1], tmp_path / "file"
    data = bytes(range(256)) * 4096  # more than the terminal and the socket hold at once
    guest.write(str(path), data, 0o751)
    assert path.stat().st_mode & 0o777 == 0o751 and path.read_bytes() == data
    assert guest.read(str(path)) == data
    assert guest.exists(str(path)) and not guest.exists(f"{path}x")
    assert guest.text("/proc/self/comm") == "probe\n"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        guest.read("/nowhere")
    with pytest.raises(IsADirectoryError):
        guest.write("/proc", b"")
    assert guest.open("/dev/null") == 0
    assert guest.open("/dev/nvidia0") == errno.ENOENT


def test_requests_run_side_by_side(real: tuple[RealProbe, Channel]) -> None:
    guest = real[1]
    begun = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        said = list(pool.map(lambda number: guest.shell(f"sleep 0.5; echo {number}").stdout,
                             range(20)))
    assert said == [f"{number}\n" for number in range(20)]
    assert time.monotonic() - begun < 5  # ten seconds one after the other


def test_the_kernel_s_log(real: tuple[RealProbe, Channel]) -> None:
    probe, guest = real
    probe.log("6,1,1000000,-;pci 0000:01:00.0: added\n SUBSYSTEM=pci\n DEVICE=+pci:0000:01:00.0\n")
    line = guest.wait_line(r"pci 0000", timeout=5)
    assert line == Line(level=6, kernel=True, at=1.0, text="pci 0000:01:00.0: added")
    mark = guest.mark()
    assert guest.wait_line("pci", since=mark, timeout=0.3) is None
    probe.log("12,2,2500000,-;systemd[1]: Reached\\x0atarget \\xe2\\x80\\x94 done\n")
    assert guest.wait_line("Reached", since=mark, timeout=5) == Line(
        level=4, kernel=False, at=2.5, text="systemd[1]: Reached\ntarget — done")
    assert str(guest.lines()[0]) == "[    1.000] pci 0000:01:00.0: added"
    assert guest.lines(guest.mark()) == []


def test_a_shell_on_a_terminal(real: tuple[RealProbe, Channel]) -> None:
    probe, guest = real
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(guest.terminal, "/dev/hvc1", 33, 99, {"PATH": "/usr/bin:/bin"})
        os.write(probe.terminal, b"stty size; echo $((6 * 7))\nexit\n")
        ended.result(10)
    said = os.read(probe.terminal, 1 << 16).decode()
    assert "33 99" in said and "\n42" in said
    with pytest.raises(FileNotFoundError, match="/dev/hvc7"):
        guest.terminal("/dev/hvc7", 1, 1, {})


def test_what_is_no_request_does_not_stop_the_probe(real: tuple[RealProbe, Channel]) -> None:
    guest = real[1]
    guest._socket.sendall(b"no JSON\n\n{\"do\": 3}\n")
    with pytest.raises(StepError, match="no program"):
        guest.run([])
    assert guest.shell("echo yes").stdout == "yes\n"
    with pytest.raises(StepError, match="unknown request dance"):
        guest._ok(do="dance", path="floor")


# a probe that fails


def test_no_ready_word(tmp_path: Path) -> None:
    with contextlib.closing(FakeGuest(tmp_path / "socket", ready=False)), \
            contextlib.closing(Channel(tmp_path / "socket", fine)) as guest:
        begun = time.monotonic()
        with pytest.raises(Gone, match=r"first process: no answer within 0 s"):
            guest.wait_ready(0.3)
        assert time.monotonic() - begun < 2


def test_a_guest_that_goes_silent(fake: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, guest = fake
    monkeypatch.setattr(channel, "PATIENCE", 0.1)
    probe.silent = True
    for ask in (lambda: guest.run(["true"], timeout=0.1), lambda: guest.read("/a"),
                lambda: guest.open("/a"), lambda: guest.write("/a", b"")):
        with pytest.raises(Late, match="no answer within 0 s"):
            ask()
    probe.silent = False
    probe.tables.programs["true"] = (0, "again", "")
    # An answer that comes after its time is nobody's.
    probe.say(id=probe.asked[0]["id"], status=0, stdout="")
    assert guest.run(["true"]).stdout == "again"


def test_a_guest_that_hangs_up(fake: Guests) -> None:
    probe, guest = fake
    probe.silent = True
    threading.Timer(0.2, probe.hang_up).start()
    with pytest.raises(Gone, match="run: the connection to the guest is closed"):
        guest.run(["true"])
    with pytest.raises(Gone):
        guest.read("/a")
    with pytest.raises(Gone):
        guest.wait_line("never", timeout=10)


def test_a_machine_that_ends_while_something_waits(tmp_path: Path) -> None:
    """What became of the machine is said, and it is gone for whoever asks."""
    over = threading.Event()

    def alive() -> None:
        if over.is_set():
            raise StepError("QEMU ended with status 1: no memory", hint="buy some")

    with contextlib.closing(FakeGuest(tmp_path / "socket")) as probe, \
            contextlib.closing(Channel(tmp_path / "socket", alive)) as guest:
        guest.wait_ready(5)
        probe.silent = True
        waits: tuple[Callable[[], object], ...] = (
            lambda: guest.run(["true"]), lambda: guest.wait_line("x", timeout=60),
            lambda: guest.terminal("/dev/hvc1", 1, 1, {}))
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(work) for work in waits]
            time.sleep(0.1)
            over.set()
            for each in waiting:
                with pytest.raises(Gone, match="ended with status 1") as gone:
                    each.result(5)
                assert gone.value.hint == "buy some" and not isinstance(gone.value, Late)


def test_a_socket_that_nobody_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended() -> None:
        raise StepError("QEMU ended with status 1")

    with pytest.raises(Gone, match="QEMU ended"):
        Channel(tmp_path / "socket", ended)
    monkeypatch.setattr(channel, "PATIENCE", 0.1)
    with pytest.raises(Gone, match=r"does not open .*/socket"):
        Channel(tmp_path / "socket", fine)


def test_a_busy_host_is_given_more_time(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same factor for what is waited for here and in the guest."""
    monkeypatch.setattr(channel, "PATIENCE", 0.0)
    with contextlib.closing(FakeGuest(tmp_path / "socket")) as probe, \
            contextlib.closing(Channel(tmp_path / "socket", fine, slow=5)) as guest:
        guest.wait_ready(5)
        asked = time.monotonic()
        assert guest.wait_line("never", timeout=0.1) is None
        assert not guest.until(lambda: False, 0.1)
        assert time.monotonic() - asked >= 1
        probe.silent = True
        with pytest.raises(Late, match="no answer within 1 s"):
            guest.run(["true"], timeout=0.2)
        assert probe.asked[-1]["seconds"] == 1


def test_a_socket_that_is_opened_late(tmp_path: Path) -> None:
    made: list[FakeGuest] = []
    timer = threading.Timer(0.2, lambda: made.append(FakeGuest(tmp_path / "socket")))
    timer.start()
    with contextlib.closing(Channel(tmp_path / "socket", fine)) as guest:
        guest.wait_ready(5)
    timer.join()
    made[0].close()


@pytest.mark.parametrize("words", [
    b"\n", b"no JSON\n", b"5\n", b"[]\n", b"\xff\xfe\n", b'{"kernel": 5}\n', b'{"id": []}\n',
    b'{"kernel": "no record"}\n', b'{"kernel": "6,1"}\n', b'{"kernel": "a,b,c;d"}\n',
    b'{"id": 999, "status": 0}\n'])
def test_words_that_are_no_message_are_passed_over(fake: Guests, words: bytes) -> None:
    """A program of the guest can write to the port, or what the firmware left is in it."""
    probe, guest = fake
    probe.raw(words)
    probe.log("after it")
    assert guest.wait_line("after it", timeout=5) is not None
    assert guest.mark() == 1
    probe.tables.programs["true"] = "well"
    assert guest.run(["true"]).stdout == "well"


def test_an_answer_in_pieces(fake: Guests) -> None:
    probe, guest = fake
    for byte in b'{"kernel": "4,1,5,-;slow"}\n':
        probe.raw(bytes([byte]))
    assert guest.wait_line("slow", timeout=5) == Line(level=4, kernel=True, at=5e-6, text="slow")


def test_until_asks_again_and_gives_up(fake: Guests) -> None:
    guest, asked = fake[1], iter([False, False, True])
    assert guest.until(lambda: next(asked), 5, step=0.01)
    assert not guest.until(lambda: False, 0.05, step=0.01)


@pytest.mark.parametrize(("record", "line"), [
    # Documentation/ABI/testing/dev-kmsg's own examples
    ("7,160,424069,-;pci_root PNP0A03:00: host bridge window [io  0x0000-0x0cf7] (ignored)\n"
     " SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A03:00",
     Line(level=7, kernel=True, at=0.424069,
          text="pci_root PNP0A03:00: host bridge window [io  0x0000-0x0cf7] (ignored)")),
    ("30,340,5690716,-;udevd[80]: starting version 181",
     Line(level=6, kernel=False, at=5.690716, text="udevd[80]: starting version 181")),
    # a newer kernel's caller (PRINTK_CALLER), a continued line, an empty text
    ("4,5,6,-,caller=T1;with it", Line(level=4, kernel=True, at=6e-6, text="with it")),
    ("4,5,6,c;a;b", Line(level=4, kernel=True, at=6e-6, text="a;b")),
    ("4,5,6,-;", Line(level=4, kernel=True, at=6e-6, text="")),
    # a backslash is \x5c itself; other bytes are UTF-8, or not
    (r"4,5,6,-;\x5cx41 \x1b[31m \xc3\xa9 \xff",
     Line(level=4, kernel=True, at=6e-6, text="\\x41 \x1b[31m é �"))])
def test_a_record(record: str, line: Line) -> None:
    assert parse(record) == line
