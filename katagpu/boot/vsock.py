"""The host's end of vsock where it has no `/dev/vhost-vsock`: a vhost-user device of our own.

    with Vsock(path, cid=3) as vsock:
        ...start QEMU with vhostuser.arguments(path, vsock.DEVICE, memory)...
        stream = vsock.connect(1024, timeout=10)   # an ordinary socket

One front end at a time. Everything of the device happens in one thread of this process.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from katagpu.boot import vhostuser
from katagpu.boot.virtqueue import Ring, RingError
from katagpu.boot.vsockdevice import Device
from katagpu.boot.vsockstream import State, Stream
from katagpu.errors import StepError, UserError

DEVICE = "vhost-user-vsock-pci"
RX, TX, QUEUES = 0, 1, 3
FIRST_PORT = 0x10000


class Vsock:
    """Serves the guest `cid` to a front end at the unix socket `path`, between enter and exit.

    `failure` says what ended the device, if something did: the guest's driver or the front end
    broke the protocol. Raises `UserError` when there can be no socket at the path.
    """

    def __init__(self, path: Path, cid: int) -> None:
        self.path = path
        self.cid = cid
        self.failure: StepError | None = None
        self._device = Device(cid)
        self._session: vhostuser.Session | None = None
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended = False
        self._next_port = FIRST_PORT

    def __enter__(self) -> Vsock:
        try:
            self._listener = vhostuser.listen(str(self.path))
        except OSError as failure:
            raise UserError(f"{self.path}: no socket can be made there ({failure})",
                            hint="take a path that is free, and shorter than 108 bytes") from None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._serve, name="vsock", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._post(self._end)
        self._thread.join()
        self._listener.close()
        os.close(self._wake)
        self.path.unlink(missing_ok=True)

    def connect(self, port: int, timeout: float) -> socket.socket:
        """A connection to the guest's port: the end of a socket pair, to be closed by the caller.

        Before the guest's driver is up the request waits. Raises `ConnectionRefusedError` when
        nobody listens, `ConnectionResetError` when the guest goes away, `TimeoutError` after
        `timeout` seconds, and `StepError` when the device failed.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        stream = Stream(local=0, port=port, ours=ours)
        if not self._post(lambda: self._open(stream)):
            ours.close()
            theirs.close()
            raise self.failure or StepError("the vsock device has ended")
        try:
            stream.answer.result(timeout)
        except BaseException as failure:
            theirs.close()
            self._post(lambda: self._device.give_up(stream))
            if isinstance(failure, TimeoutError):
                raise TimeoutError(f"the guest's vsock port {port} did not answer within "
                                   f"{timeout:.0f} s") from None
            raise
        return theirs

    def _post(self, ask: Callable[[], None]) -> bool:
        """Have something done by the device's thread; false when that has ended."""
        with self._lock:
            if not self._ended:
                self._asked.put(ask)
                os.eventfd_write(self._wake, 1)
            return not self._ended

    def _open(self, stream: Stream) -> None:
        if self.failure is not None:
            stream.ours.close()
            stream.answer.set_exception(self.failure)
            return
        while (self._next_port, stream.port) in self._device.streams:
            self._next_port += 1
        stream.local = self._next_port
        self._next_port = max(FIRST_PORT, (self._next_port + 1) & 0xFFFFFFFF)
        self._device.open(stream)

    def _end(self) -> None:
        self._ended = True

    def _serve(self) -> None:
        try:
            while not self._ended:
                self._once()
        except BaseException as failure:
            # A defect of ours: whoever waits learns of it.
            self.failure = StepError(f"the vsock device failed: {failure!r}")
            raise
        finally:
            with self._lock:
                self._ended = True
            while not self._asked.empty():
                self._asked.get()()
            self._hang_up(self.failure or ConnectionResetError("the vsock device has ended"))

    def _once(self) -> None:
        """Wait for something to happen, and do what follows from it."""
        poll = select.poll()
        control = self._session.control if self._session else self._listener
        poll.register(self._wake, select.POLLIN)
        poll.register(control, select.POLLIN)
        kicks = self._register_rings(poll)
        streams = self._register_streams(poll)
        events = dict(poll.poll(self._patience()))
        if self._wake in events:
            os.eventfd_read(self._wake)
        for descriptor in kicks & events.keys():
            self._kicked(descriptor)
        for descriptor in streams.keys() & events.keys():
            stream = streams[descriptor]
            if events[descriptor] & (select.POLLHUP | select.POLLERR) and stream.ended:
                self._device.hang_up(stream)
        while not self._asked.empty():
            self._asked.get()()
        if control.fileno() in events:
            self._control()
        self._device.expire(time.monotonic())
        self._device.deliver()
        self._move()

    def _patience(self) -> float | None:
        """Milliseconds to the next deadline, None when there is none."""
        deadlines = [stream.deadline for stream in self._device.streams.values()
                     if stream.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1 if deadlines else None

    def _register_rings(self, poll: select.poll) -> set[int]:
        found = set()
        for ring in self._rings():
            if ring.kick is not None and not ring.broken:
                poll.register(ring.kick, select.POLLIN)
                found.add(ring.kick)
        return found

    def _register_streams(self, poll: select.poll) -> dict[int, Stream]:
        """What a stream waits for. Without credit its program's data stay where they are."""
        found = {}
        receiver = self._ring(RX)
        ready = receiver is not None and self._can_take(receiver)
        for stream in self._device.streams.values():
            if stream.state not in (State.OPEN, State.GONE):
                continue
            events = select.POLLOUT if stream.unread else 0
            if not stream.ended and stream.credit and ready:
                events |= select.POLLIN
            # An end is always told of, so that one is only watched that is not full of data.
            if events or stream.ended:
                poll.register(stream.ours, events)
                found[stream.ours.fileno()] = stream
        return found

    def _rings(self) -> list[Ring]:
        return self._session.rings if self._session else []

    def _ring(self, index: int) -> Ring | None:
        """A ring that runs."""
        rings = self._rings()
        return rings[index] if rings and rings[index].running else None

    def _can_take(self, ring: Ring) -> bool:
        try:
            return ring.waiting() > 0
        except RingError as failure:
            self._failed(ring, failure)
            return False

    def _kicked(self, descriptor: int) -> None:
        try:
            os.eventfd_read(descriptor)
        except BlockingIOError:
            pass
        except OSError as failure:
            for ring in self._rings():
                if ring.kick == descriptor:
                    self._failed(ring, RingError(f"its kick cannot be read: {failure}"))

    def _control(self) -> None:
        """A new front end, or its next message."""
        if self._session is None:
            control, _ = self._listener.accept()
            self.failure = None
            self._session = vhostuser.Session(
                control=control, queues=QUEUES, config=struct.pack("<Q", self.cid),
                on_stop=lambda _index: self._device.forget(
                    ConnectionResetError("the guest stopped its vsock device")))
            return
        try:
            self._session.handle()
        except vhostuser.Gone:
            self._hang_up(ConnectionResetError("the virtual machine closed the vsock device"))
        except vhostuser.ProtocolError as failure:
            self.failure = StepError(f"vsock: the virtual machine broke the protocol: {failure}")
            self._hang_up(self.failure)

    def _hang_up(self, why: Exception) -> None:
        self._device.forget(why)
        if self._session is not None:
            self._session.close()
            self._session = None

    def _move(self) -> None:
        """Packets in both directions, until there is nothing to do."""
        moves = ((self._ring(TX), self._device.from_guest), (self._ring(RX), self._device.to_guest))
        moved = True
        while moved:
            moved = False
            for ring, move in moves:
                if ring is not None and ring.running:
                    try:
                        moved |= move(ring)
                    except RingError as failure:
                        self._failed(ring, failure)

    def _failed(self, ring: Ring, why: RingError) -> None:
        ring.fail()
        self.failure = StepError(f"vsock: the guest's driver broke the device: {why}")
        self._device.forget(self.failure)
