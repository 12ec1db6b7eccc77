"""What several tests use: a real HTTP server on the loopback, and a tiny file system."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# Under nohup, and in the background of a script, these are ignored by what is started, and
# programs here keep to that. Tests send them.
for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Page:
    """What a path answers. The first `cuts` answers break off after `cut_at` bytes of the body."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    etag: str | None = '"1"'
    ranges: bool = True
    cuts: int = 0
    cut_at: int = 0
    fails: list[int] = field(default_factory=list)
    pause: float = 0.0


@dataclass
class Site:
    """A server: its pages by path, and the requests that came (path, Range, If-Range, status)."""

    base: str = ""
    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[tuple[str, str | None, str | None, int]] = field(default_factory=list)

    def add(self, name: str, page: Page | bytes) -> str:
        """Serve a page, and give its address."""
        self.pages[f"/{name}"] = page if isinstance(page, Page) else Page(body=page)
        return f"{self.base}/{name}"

    def ranges(self) -> list[str | None]:
        """The Range of each request."""
        return [wanted for _, wanted, _, _ in self.asked]


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_words: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            """Answer by the page."""
            page = site.pages.get(self.path, Page(status=404))
            wanted, match = self.headers.get("Range"), self.headers.get("If-Range")
            status = page.fails.pop(0) if page.fails else page.status
            start = 0
            if status == 200 and wanted and page.ranges and match in {None, page.etag}:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                status = 206 if start < len(page.body) else 416
            site.asked.append((self.path, wanted, match, status))
            body = page.body[start:] if status in {200, 206} else page.headers.get("X", "").encode()
            self.send_response(status)
            for name, value in page.headers.items():
                self.send_header(name, value)
            if page.etag and status in {200, 206}:
                self.send_header("ETag", page.etag)
            if status == 206:
                self.send_header("Content-Range",
                                 f"bytes {start}-{len(page.body) - 1}/{len(page.body)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if page.cuts:
                page.cuts -= 1
                self.wfile.write(body[:page.cut_at])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            for at in range(0, len(body), 65536):
                self.wfile.write(body[at:at + 65536])
                time.sleep(page.pause)

    return Handler


@pytest.fixture
def site() -> Iterator[Site]:
    """An HTTP server on the loopback."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(site))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    site.base = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def page() -> type[Page]:
    """The class of a page."""
    return Page


@pytest.fixture
def repository() -> Path:
    """The root of this repository."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def no_host_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's proxies, and our own variables, do not reach the tests."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("KATAGPU_") or name == "EXTRA_PKGS":
            monkeypatch.delenv(name)


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a tmpfs of so many bytes. Skips where it cannot be mounted."""
    made: list[Path] = []

    def make(size: int) -> Path:
        place = tmp_path / f"tiny{len(made)}"
        place.mkdir()
        argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(argv, capture_output=True).returncode:
            pytest.skip("needs root, to mount a tmpfs")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", str(place)], check=True)
