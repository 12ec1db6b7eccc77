"""A proxy before a real registry that can break things: connections, answers, digests, time."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Fault:
    """What happens to the requests that it fits.

    `cut`: so many bytes of the body reach the registry, and the connection breaks off. `lose`: the
    registry gets all, and its answer is lost. `status` is answered with `headers` and `body`, and
    nothing reaches the registry. `answer` changes the registry's answer.
    """

    method: str
    path: str
    times: int = 1
    cut: int | None = None
    lose: bool = False
    status: int | None = None
    pause: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    answer: Callable[[bytes], bytes] | None = None
    short: int | None = None  # the answer's body breaks off after so many bytes
    chunked: bool = False  # the body of a `status` is given in chunks, as it is sent


@dataclass
class Proxy:
    """The proxy, and what came: method and path."""

    host: str
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0  # bytes of bodies
    token: str | None = None  # the bearer token that is wanted, and given at /token
    tls: bool = False
    authorizations: list[str | None] = field(default_factory=list)

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request."""
        for one in self.faults:
            if one.method == method and one.path in path and one.times > 0:
                one.times -= 1
                return one
        return None

    def count(self, method: str, path: str = "") -> int:
        """How many such requests came."""
        return sum(one == method and path in where for one, where in self.asked)


class Handler(BaseHTTPRequestHandler):
    """Sends requests on; `proxy` and `registry` are set where it is made."""

    proxy: Proxy
    registry: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_words: object) -> None:
        """Quiet."""

    def _go(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.proxy.asked.append((self.command, self.path))
        self.proxy.sent += len(body)
        self.proxy.authorizations.append(self.headers.get("Authorization"))
        if self.proxy.token is not None and self._unknown(self.proxy.token):
            return
        fault = self.proxy.fault(self.command, self.path) or Fault("", "")
        time.sleep(fault.pause)
        if fault.status is not None:
            self._answer(fault.status, fault.headers, fault.body, fault.short,
                         chunked=fault.chunked)
            return
        if fault.cut is not None:
            self._cut(body[:fault.cut], len(body))
            return
        there = http.client.HTTPConnection(self.registry, timeout=30)
        there.request(self.command, self.path, body=body, headers={
            **dict(self.headers), **({"X-Forwarded-Proto": "https"} if self.proxy.tls else {})})
        answer = there.getresponse()
        data = answer.read()
        headers = {**dict(answer.headers), **fault.headers}
        there.close()
        if fault.lose:
            self.close_connection = True
            return
        self._answer(answer.status, headers, fault.answer(data) if fault.answer else data,
                     fault.short)

    def _unknown(self, token: str) -> bool:
        """Ask for a token, or give one, as distribution's token protocol has it."""
        given = self.headers.get("Authorization")
        if self.path.startswith("/token"):
            status = 200 if given is None or given.startswith("Basic ") else 401
            self._answer(status, {}, json.dumps({"token": token}).encode())
            return True
        if given == f"Bearer {token}":
            return False
        self._answer(401, {"WWW-Authenticate": f'Bearer realm="http://{self.proxy.host}/token",'
                           'service="toy",scope="something"'}, b"{}")
        return True

    def _cut(self, body: bytes, whole: int) -> None:
        """Send part of a body on, and hang up on both sides."""
        there = http.client.HTTPConnection(self.registry, timeout=30)
        there.putrequest(self.command, self.path, skip_host=True)
        for name, value in self.headers.items():
            there.putheader(name, value)
        there.endheaders(body)
        assert len(body) < whole
        time.sleep(0.3)
        there.close()
        self.close_connection = True

    def _answer(self, status: int, headers: dict[str, str], body: bytes,
                short: int | None = None, *, chunked: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        size = headers.get("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header(*(("Transfer-Encoding", "chunked") if chunked
                           else ("Content-Length", size or "0")))
        self.end_headers()
        with contextlib.suppress(OSError):  # nobody waited
            self.wfile.write(body[:short])
        if short is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _go


@contextmanager
def before(registry: str, tls: tuple[Path, Path] | None = None) -> Iterator[Proxy]:
    """Run one before a registry; it speaks TLS where it gets a certificate and its key."""
    proxy = Proxy(host="", tls=tls is not None)
    handler = type("Bound", (Handler,), {"proxy": proxy, "registry": registry})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    proxy.host = f"127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
