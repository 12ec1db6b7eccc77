"""The guest's shell on a terminal of ours: a program runs it, on a pseudo-terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from katagpu.boot import terminal
from katagpu.errors import UserError

REPOSITORY = Path(__file__).parent.parent.parent
PROGRAM = """
import sys
from pathlib import Path
from katagpu.boot import kata, runner, terminal
from katagpu.boot.accel import Accel, Kind
from katagpu.boot.facts import Facts
from katagpu.boot.gpu import Gpu
from katagpu.boot.qemu import Qemu
from katagpu.kataconfig import KataSettings, render_drop_in

place, what = Path(sys.argv[1]), sys.argv[2]
terminal.must_be_one()
guest = runner.Guest(
    recipe="toy", facts=Facts(release="", build_id=None, config=place, root_format="erofs"),
    configuration=kata.read(render_drop_in(KataSettings(kernel="/k", image="/i"))),
    vmlinuz=place, vmlinux=place, root=place, probe=place, helpers={})
qemu = Qemu(argv=(sys.executable, "tests/boot/fakeqemu.py", what), version="", vfio_user=True,
            env={"PYTHONPATH": "."}, why="", identity="")
terminal.shell(guest, runner.Setting(
    qemu=qemu, accel=Accel(kind=Kind.TCG, why="TCG: a test"), gpu=Gpu(), logs=place / "logs"))
"""


@contextlib.contextmanager
def started(place: Path, what: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The program on a terminal, and that terminal's other end."""
    ours, theirs = pty.openpty()
    try:
        termios.tcsetwinsize(theirs, (40, 132))
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(place), what], cwd=REPOSITORY, stdin=theirs,
            stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TERM": "xterm"})
        try:
            yield ours, process
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(ours)
        os.close(theirs)


def read(number: int, words: str, seconds: float = 20) -> str:
    """What comes until these words do."""
    said, end = "", time.monotonic() + seconds
    while words not in said and time.monotonic() < end:
        if select.select([number], [], [], 0.1)[0]:
            said += os.read(number, 4096).decode()
    assert words in said, said
    return said


def raw(number: int) -> bool:
    return not termios.tcgetattr(number)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)


def test_every_key_is_the_guest_s_until_the_shell_ends(tmp_path: Path) -> None:
    with started(tmp_path, "shell") as (ours, process):
        said = read(ours, "40 132 xterm")
        assert "boot_shell: TCG: a test" in said and "`exit` ends the machine" in said
        assert raw(ours)
        os.write(ours, b"\x03")  # Ctrl-C is a byte for the guest
        read(ours, "got 03")
        assert process.wait(20) == 0
        assert not raw(ours), "the terminal is as it was"


def test_a_guest_that_does_not_come_up(tmp_path: Path) -> None:
    with started(tmp_path, "panics") as (ours, process):
        read(ours, "Gone: QEMU ended with status 0")
        assert process.wait(20) == 1
        assert not raw(ours)


def test_no_terminal() -> None:
    with pytest.raises(UserError, match="have to be a terminal"):
        terminal.must_be_one()
