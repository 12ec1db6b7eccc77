"""The real probe (katagpu/boot/probe) as a process here, in a mount namespace of its own.

There /sys has one virtio port, /dev/vport0p2 is a terminal of ours, and /dev/kmsg a FIFO; what
comes from the terminal goes to a unix socket and back, as QEMU does it. Needs root and Go.
"""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import socket
import subprocess
import threading
import tty
from pathlib import Path

import pytest

from katagpu.boot import channel

SOURCE = Path(channel.__file__).parent / "probe"
ENTER = """
set -e
mount -t tmpfs none /sys
mkdir -p /sys/class/virtio-ports/vport0p1 /sys/class/virtio-ports/vport0p2
echo other >/sys/class/virtio-ports/vport0p1/name
echo katagpu >/sys/class/virtio-ports/vport0p2/name
mkdir "$1/dev"
mount -t tmpfs none "$1/dev"
cd "$1/dev"
touch vport0p2 hvc1 null kmsg
mount --bind "$2" vport0p2
mount --bind "$3" hvc1
mount --bind /dev/null null
mount --bind "$1/kmsg" kmsg
mount --rbind "$1/dev" /dev
exec "$1/probe"
"""


def build(place: Path) -> Path:
    """The program. Skips where there is no Go, or no right to make a namespace."""
    if shutil.which("go") is None:
        pytest.skip("needs go")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs root, for a mount namespace")
    subprocess.run(["go", "build", "-o", str(place / "probe"), "."], cwd=SOURCE, check=True,
                   env={**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"})
    return place / "probe"


class RealProbe:
    """The probe, running. `path` leads to it, `terminal` is the other end of its /dev/hvc1."""

    def __init__(self, program: Path, place: Path) -> None:
        shutil.copy(program, place / "probe")  # it deletes itself
        os.mkfifo(place / "kmsg")
        self.path = place / "socket"
        self._kmsg = os.open(place / "kmsg", os.O_RDWR)
        self._port, port = pty.openpty()
        self.terminal, terminal = pty.openpty()
        tty.setraw(port)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.path))
        self._listening.listen()
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", ENTER, "sh", place, os.ttyname(port),
             os.ttyname(terminal)], start_new_session=True, stdin=subprocess.DEVNULL)
        self._open = [port, terminal, self._port, self.terminal, self._kmsg]
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            self._connection, _address = self._listening.accept()
            back = threading.Thread(target=self._back)
            self._threads.append(back)
            back.start()
            while data := self._connection.recv(4096):
                while data:
                    data = data[os.write(self._port, data):]

    def _back(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._port, 4096):
                self._connection.sendall(data)

    def log(self, record: str) -> None:
        """One record of /dev/kmsg, which is one read there."""
        os.write(self._kmsg, record.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        # The last of the terminal's other end is gone: reading it fails now.
        for number in self._open[:2]:
            os.close(number)
        for thread in self._threads[1:]:
            thread.join()
            self._connection.close()
        for number in self._open[2:]:
            os.close(number)
        self._listening.close()
