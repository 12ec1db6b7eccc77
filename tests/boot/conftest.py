"""A vsock device, a front end on it, connections between them; a guest of words."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from katagpu.boot.vsock import Vsock

from .frontend import CID, FrontEnd
from .scripted import Scripted

Connecting = Callable[..., Future[socket.socket]]


@pytest.fixture
def vsock(tmp_path: Path) -> Iterator[Vsock]:
    with Vsock(tmp_path / "socket", CID) as device:
        yield device


@pytest.fixture
def front(vsock: Vsock) -> Iterator[FrontEnd]:
    """A front end that has connected, and said nothing."""
    end = FrontEnd(vsock.path)
    with contextlib.closing(end):
        yield end


@pytest.fixture
def connecting(vsock: Vsock) -> Iterator[Connecting]:
    """Begins to connect to a port in the background; every socket is closed in the end."""
    made: list[tuple[threading.Thread, Future[socket.socket]]] = []

    def connect(port: int = 1024, timeout: float = 5) -> Future[socket.socket]:
        answer: Future[socket.socket] = Future()

        def work() -> None:
            try:
                connection = vsock.connect(port, timeout)
                connection.settimeout(5)
                answer.set_result(connection)
            except BaseException as failure:
                answer.set_exception(failure)

        thread = threading.Thread(target=work)
        thread.start()
        made.append((thread, answer))
        return answer

    yield connect
    for thread, answer in made:
        thread.join()
        if answer.exception() is None:
            answer.result().close()


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Scripted]]:
    """Makes a session with a guest of words; further words are its facts."""
    with contextlib.ExitStack() as stack:
        yield lambda **facts: stack.enter_context(contextlib.closing(Scripted(tmp_path, **facts)))
