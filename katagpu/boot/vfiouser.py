"""A PCI function for QEMU's `vfio-user-pci`, served on a Unix socket by a thread of this process.

    with Server(path, Gpu(device=0x20b7)) as server:
        ...  # QMP: device_add vfio-user-pci socket={"type": "unix", "path": path} bus=rp0
        server.accesses

Nothing that a client sends can block or end the process: a message that cannot be right ends its
connection, and `events` says why.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from katagpu.boot.pcifunction import Device
from katagpu.boot.trail import Access, Trail
from katagpu.boot.vfiosession import Refused, Session
from katagpu.boot.vfiowire import BACKLOG, Ended, Malformed, Stream
from katagpu.errors import UserError

LONGEST_PATH = 107
"""Bytes of a socket's path: sun_path has 108 with the closing zero (unix(7))."""
BURST = 64  # messages of one client before others, and stop(), are looked at


class Served(Protocol):
    """What can be served: a `Function`, a `Gpu`."""

    def power_on(self) -> Device:
        """The function at work."""
        ...


class Server:
    """Serves one function to one client at a time; a second one is turned away.

    The function keeps its state when a client goes and another comes, as the specification asks.
    The socket exists, and accepts, from `__enter__` on. Raises `UserError` there where the path
    is too long, taken, or cannot be made. Stop it after QEMU: one whose function goes away exits
    with "DMA mapping failed" when its guest's memory next changes.
    """

    def __init__(self, path: Path, function: Served) -> None:
        self.path = path
        self.device = function.power_on()
        self.trail = Trail()
        self._stack = contextlib.ExitStack()
        self._thread: threading.Thread | None = None
        self._client: tuple[Stream, Session] | None = None

    @property
    def accesses(self) -> tuple[Access, ...]:
        """What was read and written, by first appearance; bounded."""
        return self.trail.accesses

    @property
    def events(self) -> tuple[str, ...]:
        """Connections, resets, interrupts, refusals; the last ones."""
        return self.trail.events

    def __enter__(self) -> Self:
        if len(os.fsencode(self.path)) > LONGEST_PATH:
            raise UserError(f"{self.path}: too long for a socket's path, which has at most"
                            f" {LONGEST_PATH} bytes", hint="choose a shorter work directory")
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            self._listener.setblocking(False)
            try:
                self._listener.bind(os.fsencode(self.path))
                stack.callback(self.path.unlink, missing_ok=True)
                self.path.chmod(0o600)
                self._listener.listen()
            except OSError as error:
                raise UserError(f"{self.path}: cannot be a socket: {error.strerror}",
                                hint="another run may use it, or one left it behind: remove it,"
                                     " or choose another path") from None
            self._waker, self._woken = socket.socketpair()
            stack.enter_context(self._waker)
            stack.enter_context(self._woken)
            selector = stack.enter_context(selectors.DefaultSelector())
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._run, args=(selector,), daemon=True,
                                            name=f"vfio-user {self.path.name}")
            self._thread.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End the connection and the thread, and remove the socket. May be called again."""
        if self._thread is not None:
            with contextlib.suppress(OSError):
                self._waker.send(b"x")
            self._thread.join()
            self._thread = None
        self._stack.close()

    def _run(self, selector: selectors.BaseSelector) -> None:
        """The thread. Should it ever fail, the client still sees its connection end."""
        try:
            while self._turn(selector):
                pass
        finally:
            self._listener.close()
            self._end(selector, "the server stopped")

    def _turn(self, selector: selectors.BaseSelector) -> bool:
        """Wait, and do what is there to do. False when it is time to stop."""
        for key, _ in selector.select():
            if key.fileobj is self._woken:
                return False
            if key.fileobj is self._listener:
                self._accept(selector)
            elif self._client is not None and key.fileobj is self._client[0].sock:
                self._serve(selector, *self._client)
        return True

    def _accept(self, selector: selectors.BaseSelector) -> None:
        """A new client: the only one, or turned away."""
        with contextlib.suppress(OSError):  # it is gone again
            sock, _ = self._listener.accept()
            if self._client is not None and _is_gone(self._client[0].sock):
                self._end(selector, "the client went")
            if self._client is not None:
                self.trail.event("a second client was turned away")
                sock.close()
                return
            self._client = Stream(sock), Session(self.device, self.trail)
            selector.register(sock, selectors.EVENT_READ)
            self.trail.event("a client connected")

    def _serve(self, selector: selectors.BaseSelector, stream: Stream, session: Session) -> None:
        """Answer some of the messages that are there."""
        try:
            stream.flush()
            for _ in range(BURST):
                if stream.pending >= BACKLOG or not self._answer(stream, session):
                    break
        except Ended:
            self._end(selector, "the client went")
        except Malformed as error:
            self._end(selector, f"connection ended: {error}")
        except OSError as error:
            self._end(selector, f"connection ended: {error.strerror}")
        else:
            wanted = selectors.EVENT_READ if stream.pending < BACKLOG else 0
            wanted |= selectors.EVENT_WRITE if stream.pending else 0
            selector.modify(stream.sock, wanted)

    def _answer(self, stream: Stream, session: Session) -> bool:
        """Answer one message. False when there is no whole one."""
        message = stream.receive()
        if message is None:
            return False
        try:
            stream.answer(message, session.answer(message))
        except Refused as error:
            self.trail.event(f"refused: {error}")
            stream.answer(message, errno=error.number)
        finally:
            message.close()
        stream.flush()
        return True

    def _end(self, selector: selectors.BaseSelector, why: str) -> None:
        """End the connection, when there is one."""
        if self._client is not None:
            stream, session = self._client
            self._client = None
            selector.unregister(stream.sock)
            # All of it before the client sees the end.
            self.trail.event(why)
            session.close()
            stream.close()


def _is_gone(sock: socket.socket) -> bool:
    """The other end is closed, though messages of it may still wait here."""
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))
