"""What requests and urllib3 raise, in one plain line each."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from katagpu.errors import UserError


class Transient(Exception):
    """A failure that may pass. `pause` is the wait in seconds that the server asked for."""

    def __init__(self, why: str, *, hint: str | None = None, pause: float = 0.0) -> None:
        super().__init__(why)
        self.hint = hint
        self.pause = pause


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Turn what requests and urllib3 raise into one plain line."""
    import requests
    import urllib3
    try:
        yield
    except requests.exceptions.SSLError as failure:
        raise UserError(f"the server's certificate was not accepted: {_root(failure)}", hint=(
            "a company's certificate authority belongs into the system's store "
            "(update-ca-certificates) or into REQUESTS_CA_BUNDLE")) from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema, requests.exceptions.TooManyRedirects) as failure:
        raise UserError(f"this address cannot be fetched: {failure}") from None
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError) as failure:
        why, cure = _reason(failure)
        raise Transient(why, hint=cure) from None


def _chain(failure: BaseException) -> Iterator[BaseException]:
    """A failure and all that it was made from: causes, contexts, urllib3's `reason`, arguments."""
    queue: list[object] = [failure]
    seen: set[int] = set()
    while queue:
        item = queue.pop(0)
        if isinstance(item, BaseException) and id(item) not in seen:
            seen.add(id(item))
            yield item
            queue += [*item.args, getattr(item, "reason", None), item.__cause__, item.__context__]


def _root(failure: BaseException) -> str:
    return str(list(_chain(failure))[-1])


def _reason(failure: BaseException) -> tuple[str, str | None]:
    """Why there is no answer, and the cure."""
    import requests
    import urllib3
    proxy = isinstance(failure, requests.exceptions.ProxyError)
    where = "the proxy (http_proxy, https_proxy)" if proxy else "the server"
    cure = "check the network, and http_proxy and https_proxy where it needs a proxy"
    # urllib3 calls a refused connection a timeout too, so the narrow kinds come first.
    kinds: list[tuple[type[BaseException] | tuple[type[BaseException], ...], str, str | None]] = [
        ((socket.gaierror, urllib3.exceptions.NameResolutionError),
         f"no network: the name of {where} cannot be resolved", cure),
        (ConnectionRefusedError, f"{where} refused the connection", cure),
        ((urllib3.exceptions.IncompleteRead, ConnectionResetError),
         "the connection broke off", None),
        ((TimeoutError, urllib3.exceptions.TimeoutError), f"{where} did not answer in time", cure),
    ]
    causes = list(_chain(failure))
    if any(isinstance(cause, OSError) and cause.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH}
           for cause in causes):
        return f"no network: {where} cannot be reached", cure
    for kind, what, hint in kinds:
        if any(isinstance(cause, kind) for cause in causes):
            return what, hint
    return f"the connection failed ({_root(failure)})", cure
