"""The way from the host to a guest's vsock ports: the host's kernel, or a device of our own.

With a working `/dev/vhost-vsock` (module vhost_vsock) the guest gets `vhost-vsock-pci` and sockets
are AF_VSOCK; else `vhost-user-vsock-pci`, served by `vsock.Vsock`, with shared guest memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from katagpu.boot import vhostuser
from katagpu.boot.vsock import DEVICE, Vsock
from katagpu.errors import TookTooLong

KERNEL_DEVICE = Path("/dev/vhost-vsock")
USER_CID = 3             # the first that a guest may have; each device of ours has its own space
PAUSE = 0.1              # seconds between two attempts to connect
_SET_GUEST_CID = 0x4008AF60  # VHOST_VSOCK_SET_GUEST_CID, _IOW(0xAF, 0x60, __u64), linux/vhost.h
_CONNECT_TIMEOUT = 6     # SO_VM_SOCKETS_CONNECT_TIMEOUT, linux/vm_sockets.h
_TRIES = 64


class Connect(Protocol):
    """One attempt to connect. Raises `OSError` when nobody answers, or answers yet."""

    def __call__(self, port: int, timeout: float) -> socket.socket: ...


@dataclass(frozen=True, kw_only=True)
class Link:
    """How a guest is reached. `how` says which way and why, for the report.

    `arguments` are QEMU's; `descriptors` must be open in QEMU under the same numbers.
    """

    how: str
    cid: int
    arguments: Sequence[str]
    descriptors: tuple[int, ...]
    attempt: Connect

    def connect(self, port: int, *, timeout: float) -> socket.socket:
        """A connection to the guest's port, tried until somebody listens there.

        Raises `TookTooLong` when nobody does within `timeout` seconds, `StepError` when the device
        failed.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self.attempt(port, max(0.0, deadline - time.monotonic()))
            except OSError as failure:
                if time.monotonic() + PAUSE >= deadline:
                    raise TookTooLong(f"nothing could be reached on the guest's vsock port {port} "
                                      f"within {timeout:.0f} s: {failure}") from None
            time.sleep(PAUSE)


@contextlib.contextmanager
def link(directory: Path, *, device: Path = KERNEL_DEVICE) -> Iterator[Link]:
    """A way to a guest, whose memory must be shared (`vhostuser.arguments`).

    A socket is made in `directory` where the host's kernel is of no use. QEMU must be started and
    have ended inside. Raises `UserError` when there can be no socket.
    """
    reserved, why = None, ""
    try:
        reserved = reserve(device)
    except OSError as failure:
        why = f"{device}: {failure.strerror}"
    if reserved is None:
        with Vsock(directory / "vsock", USER_CID) as vsock:
            yield Link(how=f"vhost-user device ({why})", cid=USER_CID, descriptors=(),
                       arguments=vhostuser.arguments(str(vsock.path), DEVICE),
                       attempt=vsock.connect)
        return
    descriptor, cid = reserved
    try:
        yield Link(how=f"{device}, context id {cid}", cid=cid, descriptors=(descriptor,),
                   arguments=("-device",
                              f"vhost-vsock-pci,guest-cid={cid},vhostfd={descriptor}"),
                   attempt=lambda port, timeout: connect_kernel(cid, port, timeout))
    finally:
        os.close(descriptor)


def _random_cid() -> int:
    # 0, 1 and 2 are special, and so is the largest (VMADDR_CID_ANY).
    return 3 + secrets.randbelow(0xFFFFFFFF - 3)


def reserve(device: Path, *, choose: Callable[[], int] = _random_cid,
            ioctl: Callable[[int, int, bytes], object] = fcntl.ioctl) -> tuple[int, int]:
    """The kernel's device, open and bound to a context id that no other guest has, and that id.

    It stays ours as long as the descriptor is open, so nobody can take it before QEMU runs. Raises
    `OSError` when the host's kernel cannot do it.
    """
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            cid = choose()
            try:
                ioctl(descriptor, _SET_GUEST_CID, struct.pack("=Q", cid))
            except OSError as failure:
                if failure.errno != errno.EADDRINUSE:
                    raise
                continue
            return descriptor, cid
        raise OSError(errno.EADDRINUSE, f"{_TRIES} context ids were all in use")
    except BaseException:
        os.close(descriptor)
        raise


def connect_kernel(cid: int, port: int, timeout: float) -> socket.socket:
    """An AF_VSOCK connection. Raises `OSError` when nobody listens, or the guest is not up."""
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        whole = int(timeout)
        connection.setsockopt(socket.AF_VSOCK, _CONNECT_TIMEOUT,
                              struct.pack("@ll", whole, int((timeout - whole) * 1e6) or 1))
        connection.setblocking(False)
        try:
            connection.connect((cid, port))
        except BlockingIOError:
            poll = select.poll()
            poll.register(connection, select.POLLOUT)
            if not poll.poll(timeout * 1000):
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
            if code := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code)) from None
        connection.setblocking(True)
    except BaseException:
        connection.close()
        raise
    return connection
