"""A real guest: QEMU, a kernel, and a Go program as /init that answers like Kata's agent.

The QEMU (tests/machines.py) has vhost-user-vsock-pci, the kernel virtio-vsock built in. Go's
modules come from where Go is told to take them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from katagpu import newc
from katagpu.boot import kata_agent, vsocklink
from katagpu.boot.kata_agent import Serving
from katagpu.boot.ttrpc import CallFailed, Client
from katagpu.errors import TookTooLong
from tests.machines import KERNEL, NEEDS_KERNEL, QEMU

MEMORY = 256 << 20
READY = 60.0  # seconds; about 2 under TCG on an idle machine

pytestmark = [
    pytest.mark.slow,
    *NEEDS_KERNEL,
    pytest.mark.skipif(shutil.which("go") is None, reason="needs go"),
]


@dataclass(kw_only=True)
class Guest:
    """A guest that runs."""

    link: vsocklink.Link
    machine: subprocess.Popen[bytes]
    serial: Path


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initrd with the toy agent as its only file."""
    place = tmp_path_factory.mktemp("initrd")
    subprocess.run(["go", "build", "-trimpath", "-ldflags=-s -w", "-o", place / "init", "."],
                   cwd=Path(__file__).parent / "agent", check=True,
                   env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"})
    with tarfile.open(place / "tar", "w") as tar:
        tar.add(place / "init", "init")
    with (place / "initrd").open("wb") as target:
        newc.write(lambda: (place / "tar").open("rb"), target, time=0)
    return place / "initrd"


@pytest.fixture
def guest(initrd: Path, tmp_path: Path) -> Iterator[Guest]:
    serial = tmp_path / "serial"
    with vsocklink.link(tmp_path) as link:
        machine = subprocess.Popen(
            [*shlex.split(QEMU), "-nodefaults", "-no-user-config", "-display", "none", "-M", "q35",
             "-accel", "tcg", "-cpu", "max", "-m", f"{MEMORY}b", "-kernel", KERNEL,
             "-initrd", initrd, "-append", "console=ttyS0 panic=-1", "-no-reboot",
             "-serial", f"file:{serial}",
             "-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on",
             "-machine", "memory-backend=ram", *link.arguments], pass_fds=link.descriptors)
        try:
            yield Guest(link=link, machine=machine, serial=serial)
        finally:
            machine.kill()
            machine.wait()
            if serial.exists():
                print(serial.read_text(errors="replace")[-4000:])


def test_the_agent(guest: Guest) -> None:
    started = time.monotonic()
    with guest.link.connect(kata_agent.PORT, timeout=READY) as connection:
        print(f"connected after {time.monotonic() - started:.2f} s ({guest.link.how})")
        client = Client(connection)
        for _ in range(20):
            assert kata_agent.check(client, timeout=5) is Serving.SERVING
        details = kata_agent.guest_details(client, timeout=5)
        assert details.version == "3.99.0-toy"
        assert details.init_daemon and details.supports_seccomp and details.memory_probe
        assert details.memory_block_bytes == 128 << 20
        assert details.device_handlers == ("blk", "vfio-pci-gk")
        assert details.extra_features == ("host: connection reset by peer",)
        with pytest.raises(CallFailed, match="UNIMPLEMENTED"):
            client.call("grpc.AgentService", "NoSuchMethod", b"", timeout=5)


def test_ports_and_data(guest: Guest) -> None:
    with guest.link.connect(1025, timeout=READY) as echo:
        with pytest.raises(TookTooLong, match="nobody listens"):
            guest.link.connect(4000, timeout=0.5)
        with guest.link.connect(1026, timeout=5) as closed:
            assert closed.recv(1) == b""
        sent = os.urandom(4 << 20)

        def send() -> None:
            echo.sendall(sent)
            echo.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        started = time.monotonic()
        thread.start()
        time.sleep(0.5)  # until the credit of both directions is used up
        got = bytearray()
        while part := echo.recv(1 << 16):
            got += part
        thread.join()
        print(f"4 MiB there and back in {time.monotonic() - started:.2f} s")
        assert got == sent


def test_a_guest_that_is_killed(guest: Guest) -> None:
    with guest.link.connect(1025, timeout=READY) as echo:
        guest.machine.kill()
        guest.machine.wait()
        assert echo.recv(1) == b""
    with pytest.raises(TookTooLong):
        guest.link.connect(1025, timeout=0.5)
