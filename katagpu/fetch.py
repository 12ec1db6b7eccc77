"""Files by HTTP, HTTPS and file URLs, side by side, with one bar on a terminal.

Proxies come from the caller where it has some (packages have apt's), else from the environment,
certificates from that or from the system's store.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from katagpu.download import SUPERSEDED, Download, Fetched, Gone, Job, Shared

if TYPE_CHECKING:
    import requests
    from requests.adapters import HTTPAdapter

__all__ = ["SUPERSEDED", "Fetched", "Gone", "Job", "fetch", "fetch_all"]

PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try; a try that brought new bytes starts the row again."""

CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
SYSTEM_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


class Bar:
    """One bar for all files of a call, on a terminal only."""

    def __init__(self, what: str, total: int) -> None:
        self._lock = threading.Lock()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm
            self._bar = tqdm(desc=f"  {what}", total=total or None, unit="B", unit_scale=True,
                             leave=False, file=sys.stderr)

    def expect(self, size: int) -> None:
        """A file whose size was not known has `size` bytes."""
        if self._bar is not None:
            with self._lock:
                self._bar.total = (self._bar.total or 0) + size
                self._bar.refresh()

    def add(self, size: int) -> None:
        """`size` more bytes are here (negative: were thrown away)."""
        if self._bar is not None:
            with self._lock:
                self._bar.update(size)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def fetch(job: Job, dest: Path, *, pauses: Sequence[float] = PAUSES) -> Fetched:
    """Fetch one file to `dest`, as `fetch_all` does."""
    return fetch_all([(job, dest)], pauses=pauses)[0]


def fetch_all(
    jobs: Sequence[tuple[Job, Path]], *, workers: int = 8, pauses: Sequence[float] = PAUSES,
    proxies: Mapping[str, str] | None = None,
) -> list[Fetched]:
    """Fetch files side by side, each to its own path; results are in the order of `jobs`.

    A destination that already has its job's digest is not fetched again. The first failure stops
    the rest; what has come is kept for the next time. `proxies` go before the environment's, but
    not before its no_proxy: by `http`, `https` or `http://HOST`, empty for none. Raises
    `UserError`, and `Gone` for a file that the server does not have.
    """
    if not jobs:
        return []
    what = jobs[0][0].what if len(jobs) == 1 else f"{len(jobs)} files"
    bar = Bar(what, sum(job.size or 0 for job, _ in jobs))
    with contextlib.closing(bar), _session(workers, proxies or {}) as session:
        shared = Shared(session=session, progress=bar, pauses=pauses)
        downloads = [Download(job, dest, shared) for job, dest in jobs]
        if len(downloads) == 1:
            return [downloads[0].run()]
        with ThreadPoolExecutor(workers, thread_name_prefix="fetch") as pool:
            futures = [pool.submit(download.run) for download in downloads]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                if (failure := future.exception()) is not None:
                    shared.stop.set()
                    pool.shutdown(cancel_futures=True)
                    raise failure
        return [future.result() for future in futures]


@contextlib.contextmanager
def _session(workers: int, proxies: Mapping[str, str]) -> Iterator[requests.Session]:
    import requests
    with requests.Session() as session:
        # The bytes are wanted as they are stored: sizes and ranges count those.
        session.headers.update({"Accept-Encoding": "identity", "User-Agent": "katagpu"})
        given = next((os.environ[name] for name in CERTIFICATES if os.environ.get(name)), None)
        system = str(SYSTEM_CERTIFICATES) if SYSTEM_CERTIFICATES.is_file() else True
        session.verify = given or system
        for scheme in ("http://", "https://"):
            session.mount(scheme, _adapter(workers, proxies))
        yield session


def _adapter(workers: int, proxies: Mapping[str, str]) -> HTTPAdapter:
    """What sends a session's requests, redirected ones too; a session's own proxies would come
    after those of the environment."""
    from requests.adapters import HTTPAdapter
    from requests.utils import should_bypass_proxies

    class Adapter(HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *words: Any, **more: Any,
                 ) -> requests.Response:
            if not should_bypass_proxies(request.url or "", no_proxy=None):
                more["proxies"] = {**(more.get("proxies") or {}), **proxies}
            return super().send(request, *words, **more)

    return Adapter(pool_maxsize=workers)
