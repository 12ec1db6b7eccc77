"""One file on its way: resumed, tried again, checked, placed whole or not at all.

It grows in `<dest>.part`; `<dest>.part.tag` keeps the validator (RFC 9110, 13.1.5) with which a
later run may ask for the rest. `fetch` is the way in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from katagpu import log
from katagpu.errors import UserError
from katagpu.neterrors import Transient, network

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 18
TIMEOUT = (15.0, 60.0)  # seconds: to connect, and without a byte
RETRY_AFTER_LIMIT = 30.0  # seconds
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}


SUPERSEDED = ("mirrors drop or replace a file when a newer version supersedes it: a store that has "
              "it supplies it (KATAGPU_STORE), or a mirror that keeps old versions "
              "(`distribution.mirror` in the recipe; for Debian, a day of "
              "https://snapshot.debian.org); `./doitw lock` takes the newer one")
"""What to do where the mirror has not a package that the lock names, or another one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A file to fetch: `what` is its name as the user knows it, `size` is in bytes.

    `cure` is what to do where the address has no such file, or another one.
    """

    url: str
    what: str
    sha256: str | None = None
    size: int | None = None
    cure: str = "is the address right, and does the server still have this version?"


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What came: SHA-256 in hex and size in bytes."""

    sha256: str
    size: int


class Gone(UserError):
    """The server does not have the file (404, 410), or not any more."""


class Progress(Protocol):
    """Who is told how far the downloads are, in bytes."""

    def expect(self, size: int) -> None:
        """A file whose size was not known has `size` bytes."""

    def add(self, size: int) -> None:
        """`size` more bytes are here (negative: were thrown away)."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the downloads of one call have in common. `pauses` are seconds before further tries."""

    session: requests.Session
    progress: Progress
    pauses: Sequence[float]
    stop: threading.Event = field(default_factory=threading.Event)


class Download:
    """A job, its destination, and how far it is."""

    def __init__(self, job: Job, dest: Path, shared: Shared) -> None:
        self.job = job
        self.dest = dest
        self.part = dest.with_name(dest.name + ".part")
        self.tag = dest.with_name(dest.name + ".part.tag")
        self.shared = shared
        self.at = 0
        self.digest = hashlib.sha256()
        self.total = job.size

    def run(self) -> Fetched:
        """Fetch, check and place the file."""
        if (here := self._already()) is not None:
            return here
        with disk(self.part):
            self.dest.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as part:
                # Another process may have brought it while we waited for the lock.
                if (here := self._already()) is not None:
                    self._drop()
                    return here
                self._fill(part)
                os.fsync(part)
                self.part.replace(self.dest)
                self.tag.unlink(missing_ok=True)
        return Fetched(sha256=self.digest.hexdigest(), size=self.at)

    def _already(self) -> Fetched | None:
        if self.job.sha256 is None or not self.dest.is_file():
            return None
        with self.dest.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != self.job.sha256:
            return None
        size = self.dest.stat().st_size
        self.shared.progress.add(size)
        return Fetched(sha256=found, size=size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The part file, ours alone. A second process waits for the first one."""
        while True:
            part = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(part, fcntl.LOCK_EX)
                # The process before us may have renamed or removed the file that we hold.
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(part).st_ino == self.part.stat().st_ino:
                        break
            except BaseException:
                os.close(part)
                raise
            os.close(part)
        try:
            yield part
        finally:
            os.close(part)

    def _drop(self) -> None:
        self.part.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)

    def _fill(self, part: int) -> None:
        """Bring the whole file and check it; a resumed one that is wrong is fetched anew."""
        resumed = self._resume(part)
        if self.job.sha256 != self.digest.hexdigest():
            self._try_until_here(part)
        if resumed and self.job.sha256 not in {None, self.digest.hexdigest()}:
            log.warn(f"{self.job.what}: the resumed download is damaged; fetching it anew")
            self._restart(part)
            self._try_until_here(part)
        found = self.digest.hexdigest()
        if self.job.sha256 not in {None, found}:
            self._drop()
            raise UserError(
                f"{self.job.what}: {self.job.url} is not what was asked for\n"
                f"  expected sha256 {self.job.sha256}\n  got      sha256 {found} "
                f"({log.size(self.at)})",
                hint=self.job.cure)

    def _resume(self, part: int) -> bool:
        """Take over what an earlier run left, if the rest can be asked for safely."""
        if not self.tag.exists() and self.job.sha256 is None:
            os.ftruncate(part, 0)
        while block := os.read(part, CHUNK):
            self.digest.update(block)
            self.at += len(block)
        self.shared.progress.add(self.at)
        return self.at > 0

    def _restart(self, part: int) -> None:
        os.ftruncate(part, 0)
        os.lseek(part, 0, os.SEEK_SET)
        self.shared.progress.add(-self.at)
        self.at = 0
        self.digest = hashlib.sha256()
        self.tag.unlink(missing_ok=True)

    def _try_until_here(self, part: int) -> None:
        pauses = list(self.shared.pauses)
        while True:
            before = self.at
            try:
                if urlsplit(self.job.url).scheme == "file":
                    return self._copy(part)
                return self._request(part)
            except Transient as failure:
                if self.at > before:
                    pauses = list(self.shared.pauses)
                if not pauses:
                    raise UserError(f"{self.job.what}: {self.job.url}: {failure}", hint=(
                        failure.hint or "run the same command again, it goes on from there"
                    )) from None
                pause = max(pauses.pop(0), min(failure.pause, RETRY_AFTER_LIMIT))
                log.warn(f"{self.job.what}: {failure}; trying again in {pause:g} s")
                if self.shared.stop.wait(pause):
                    raise self._stopped() from None

    def _stopped(self) -> UserError:
        return UserError(f"{self.job.what}: stopped, because another download failed")

    def _copy(self, part: int) -> None:
        """A file URL."""
        source = Path(unquote(urlsplit(self.job.url).path))
        self._restart(part)
        try:
            stream = source.open("rb", buffering=0)
        except OSError as failure:
            raise Gone(f"{self.job.what}: cannot read {source}: {failure.strerror}",
                       hint=self.job.cure) from None
        with stream:
            self._expect(os.fstat(stream.fileno()).st_size)
            while block := stream.read(CHUNK):
                self._write(part, block)

    def _request(self, part: int) -> None:
        """Ask for what is missing, and write it."""
        if self.job.sha256 is None and not self.tag.exists():
            self._restart(part)  # nothing would tell whether the rest is of the same file
        with network(), self.shared.session.get(
                self.job.url, stream=True, timeout=TIMEOUT, headers=self._range()) as response:
            if response.status_code == 416 and self.at:
                self._restart(part)
                raise Transient("what an earlier run left does not fit the file")
            refuse(self.job, response)
            self._place(part, response)
            length = response.headers.get("Content-Length", "")
            if length.isdigit():
                self._expect(self.at + int(length))
            for block in response.raw.stream(CHUNK, decode_content=False):
                if self.at == 0:
                    self._refuse_page(block, response.url)
                self._write(part, block)
        if self.total is not None and self.at < self.total:
            raise Transient(f"it ended after {self.at} of {self.total} bytes")

    def _range(self) -> dict[str, str]:
        if not self.at:
            return {}
        asked = {"Range": f"bytes={self.at}-"}
        if self.tag.exists():
            asked["If-Range"] = self.tag.read_text()
        return asked

    def _place(self, part: int, response: requests.Response) -> None:
        """Go on where the part ends if the server does, else start again."""
        if response.status_code == 206:
            start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if start is None or int(start[1]) != self.at:
                self._restart(part)
                raise Transient("the server sent another range than was asked for")
            return
        self._restart(part)
        validator = response.headers.get("ETag", "")
        if not validator or validator.startswith("W/"):
            # A weak validator must not be used for ranges (RFC 9110, 13.1.5).
            validator = response.headers.get("Last-Modified", "")
        if validator:
            self.tag.write_text(validator)

    def _expect(self, size: int) -> None:
        """Compare the announced size with the wanted one before gigabytes are fetched."""
        if self.job.size not in {None, size}:
            raise UserError(
                f"{self.job.what}: {self.job.url} has {size} bytes, expected {self.job.size}",
                hint=self.job.cure)
        if self.total is None:
            self.shared.progress.expect(size)
        self.total = size

    def _refuse_page(self, block: bytes, url: str) -> None:
        """Captive portals and proxies answer 200 with a page of their own."""
        start = block[:512].lstrip().lower()
        if start.startswith((b"<!doctype html", b"<html")) and not self.job.url.endswith(".html"):
            raise UserError(
                f"{self.job.what}: {self.job.url} gave a web page instead of the file"
                + (f" (redirected to {url})" if url != self.job.url else ""),
                hint="a proxy or a login page answered: open the address in a browser")

    def _write(self, part: int, block: bytes) -> None:
        if self.shared.stop.is_set():
            raise self._stopped()
        view = memoryview(block)
        while view:
            view = view[os.write(part, view):]
        self.digest.update(block)
        self.at += len(block)
        self.shared.progress.add(len(block))


def refuse(job: Job, response: requests.Response) -> None:
    """Raise for every status that does not bring the file."""
    status = response.status_code
    said = f"{job.what}: {job.url}: status {status} {response.reason or ''}".rstrip()
    if status in {200, 206}:
        return
    if status in TRANSIENT:
        after = response.headers.get("Retry-After", "")
        raise Transient(f"the server answered {status} {response.reason or ''}".rstrip(),
                        pause=float(after) if after.isdigit() else 0.0)
    if status in {404, 410}:
        raise Gone(f"{said}: the server does not have it (any more)", hint=job.cure)
    if status in {401, 403, 407}:
        raise UserError(f"{said}: access was refused", hint=(
            "the address needs a login (~/.netrc) or the proxy does (http_proxy, https_proxy)"))
    raise UserError(said)


def mount_point(path: Path) -> Path:
    """The file system that `path`, or the nearest directory above it, is on."""
    here = path.absolute()
    while not here.exists():
        here = here.parent
    while not here.is_mount():
        here = here.parent
    return here


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn a full, read-only or failing file system into an error that names it."""
    try:
        yield
    except OSError as failure:
        if failure.errno in {errno.ENOSPC, errno.EDQUOT}:
            path.unlink(missing_ok=True)
            raise UserError(f"no space left on {mount_point(path)} while writing {path}", hint=(
                "make room there, or move the store: KATAGPU_STORE=DIRECTORY")) from None
        raise UserError(f"cannot write {path}: {failure.strerror} "
                        f"(file system {mount_point(path)})") from None
