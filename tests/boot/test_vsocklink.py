"""Which way to a guest is taken. The kernel's own needs /dev/vhost-vsock; its parts are tried."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from pathlib import Path

import pytest

from katagpu.boot import vsocklink
from katagpu.boot.vsockstream import Op
from katagpu.errors import StepError, TookTooLong

from .frontend import FrontEnd


def test_without_the_device_it_is_ours(tmp_path: Path) -> None:
    with vsocklink.link(tmp_path, device=tmp_path / "none") as link:
        assert "vhost-user" in link.how and "No such file" in link.how
        assert link.cid == vsocklink.USER_CID
        assert f"socket,id=vhost-user-vsock-pci,path={tmp_path}/vsock" in link.arguments
        assert (tmp_path / "vsock").is_socket()
    assert not (tmp_path / "vsock").exists()


def test_a_device_that_does_not_work_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "device").touch()
    with vsocklink.link(tmp_path, device=tmp_path / "device") as link:
        assert "Inappropriate ioctl" in link.how
        assert not link.descriptors


@pytest.mark.skipif(not vsocklink.KERNEL_DEVICE.exists(), reason="needs /dev/vhost-vsock")
def test_the_kernels_device_is_taken_and_two_guests_differ(tmp_path: Path) -> None:
    with vsocklink.link(tmp_path) as one, vsocklink.link(tmp_path) as two:
        assert one.cid != two.cid
        assert one.arguments[1] == f"vhost-vsock-pci,guest-cid={one.cid},vhostfd=" \
                                   f"{one.descriptors[0]}"
        with pytest.raises(TookTooLong):
            one.connect(1024, timeout=0.2)


def test_a_context_id_in_use_is_passed_over(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    wanted = iter([5, 6, 7])
    asked = []

    def ioctl(_descriptor: int, request: int, argument: bytes) -> None:
        asked.append((request, *struct.unpack("=Q", argument)))
        if asked[-1][1] < 7:
            raise OSError(errno.EADDRINUSE, "in use")

    descriptor, cid = vsocklink.reserve(device, choose=lambda: next(wanted), ioctl=ioctl)
    os.close(descriptor)
    assert cid == 7
    assert asked == [(0x4008AF60, 5), (0x4008AF60, 6), (0x4008AF60, 7)]


def test_context_ids_that_are_all_in_use(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()

    def ioctl(_descriptor: int, _request: int, _argument: bytes) -> None:
        raise OSError(errno.EADDRINUSE, "in use")

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="all in use"):
        vsocklink.reserve(device, ioctl=ioctl)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_random_context_id_is_a_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    for pick, cid in ((lambda _: 0, 3), (lambda most: most - 1, 0xFFFFFFFE)):
        monkeypatch.setattr("secrets.randbelow", pick)
        assert vsocklink._random_cid() == cid


def test_connecting_goes_on_until_somebody_listens(tmp_path: Path) -> None:
    with vsocklink.link(tmp_path, device=tmp_path / "none") as link, \
            contextlib.closing(FrontEnd(tmp_path / "vsock", cid=link.cid)) as front:
        front.start()

        def guest() -> None:
            for _ in range(2):
                front.answer(front.receive()[0], Op.RST)
            front.accept()

        thread = threading.Thread(target=guest)
        thread.start()
        link.connect(1024, timeout=5).close()
        thread.join()


def test_nobody_listens(tmp_path: Path) -> None:
    with vsocklink.link(tmp_path, device=tmp_path / "none") as link, \
            pytest.raises(TookTooLong, match=r"port 1024 .*did not answer"):
        link.connect(1024, timeout=0.2)


def test_a_broken_device_is_not_tried_again(tmp_path: Path) -> None:
    with vsocklink.link(tmp_path, device=tmp_path / "none") as link, \
            contextlib.closing(FrontEnd(tmp_path / "vsock", cid=link.cid)) as front:
        front.tell(99)
        assert front.ended()
        with pytest.raises(StepError, match="broke the protocol"):
            link.connect(1024, timeout=5)


def test_the_kernels_sockets() -> None:
    """Where a host has vsock loopback (VMADDR_CID_LOCAL), an AF_VSOCK connection is tried."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((1, 0xFFFFFFFF))
            listener.listen()
            port = listener.getsockname()[1]
            connection = vsocklink.connect_kernel(1, port, 2)
        except OSError as failure:
            pytest.skip(f"the host's kernel has no vsock loopback: {failure}")
        with connection, listener.accept()[0] as other:
            other.sendall(b"hello")
            assert connection.recv(10) == b"hello"
    with pytest.raises(OSError):
        vsocklink.connect_kernel(1, port, 1)
