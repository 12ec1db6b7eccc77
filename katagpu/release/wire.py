"""HTTP to a registry: who we are, what is redirected, and what a failure means.

On the standard library, since the installer has nothing else.
"""

from __future__ import annotations

import functools
import http.client
import ipaddress
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from katagpu import log
from katagpu.errors import UserError
from katagpu.release import credentials
from katagpu.release.layout import LARGEST

PAUSES = (1.0, 3.0, 9.0)
"""Seconds before each further try of what may pass."""
TIMEOUT = 60.0
"""Seconds in which a server has to say something."""
PASSING = (408, 429, 500, 502, 503, 504)
HUB = "registry-1.docker.io"
AGENT = "katagpu"
Found = TypeVar("Found")


class Transient(Exception):
    """A failure that may pass."""


class Unreachable(UserError):
    """A registry that did not answer, for as long as was tried."""


@dataclass(frozen=True)
class Answer:
    """An answer that was read; headers by their names in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


def is_loopback(host: str) -> bool:
    """Is a registry's `host[:port]` this machine?"""
    name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@functools.cache
def _context(_file: str | None, more: str | None) -> ssl.SSLContext:
    """What certificates are accepted: the system's, and those that the environment names.

    SSL_CERT_FILE is OpenSSL's own and read by it, REQUESTS_CA_BUNDLE what the other fetches read.
    """
    context = ssl.create_default_context()
    if more:
        try:
            context.load_verify_locations(more)
        except OSError as refusal:
            raise UserError(f"REQUESTS_CA_BUNDLE={more} cannot be read: {refusal}") from None
    return context


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Registries redirect to their storage: the same method is asked there, and TLS is kept.

    urllib asks GET where HEAD was redirected, which an address that is signed for HEAD refuses.
    """

    def redirect_request(self, req: urllib.request.Request, fp: Any, code: int, msg: str,
                         headers: Any, newurl: str) -> urllib.request.Request | None:
        """The request to ask instead; None for what changes something: its answer is this one."""
        if req.get_method() not in ("GET", "HEAD"):
            return None
        if urllib.parse.urlsplit(newurl).scheme not in ("https", req.type):
            raise UserError(f"{req.host} redirects to {newurl[:80]}, without TLS")
        return urllib.request.Request(newurl.replace(" ", "%20"), headers=dict(req.headers),
                                      method=req.get_method(), unverifiable=True,
                                      origin_req_host=req.origin_req_host)

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # new in Python 3.11


class Body:
    """An answer to read. That it breaks off is `Transient`; what its reader does with it is not."""

    def __init__(self, response: Any) -> None:
        self.status: int = response.status
        self._response = response

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at its end. Raises `Transient`."""
        try:
            found = bytes(self._response.read(size))
        except (OSError, http.client.HTTPException) as failure:
            raise Transient(f"the connection broke off ({_words(failure)})") from None
        if not found and getattr(self._response, "length", None):  # what did not come yet
            raise Transient("the answer ended early")
        return found

    def whole(self, most: int) -> bytes:
        """All of it, cut after so many bytes. Raises `Transient`."""
        found = b""
        while len(found) < most:
            more = self.read(most - len(found))
            if not more:
                break
            found += more
        return found

    def explanation(self) -> str:
        """What the registry says of an error, as far as it got."""
        try:
            return said(self.whole(LARGEST), self.status)
        except Transient:
            return f"status {self.status}"


class Wire:
    """Requests to one repository of a registry."""

    def __init__(self, registry: str, repository: str, *, timeout: float = TIMEOUT,
                 pauses: Sequence[float] = PAUSES) -> None:
        self.registry = registry
        self.repository = repository
        self.timeout = timeout
        self.pauses = pauses
        self._tokens: dict[str, str] = {}  # authorization by what it allows
        self._opener = urllib.request.build_opener(
            _Redirects(),
            urllib.request.HTTPSHandler(context=_context(
                os.environ.get("SSL_CERT_FILE"), os.environ.get("REQUESTS_CA_BUNDLE"))))
        self._base: str | None = None

    def url(self, path: str) -> str:
        """An address below this repository."""
        if self._base is None:
            self._base = f"{self._scheme()}://" + (
                HUB if self.registry == credentials.DOCKER_HUB else self.registry)
        return f"{self._base}/v2/{self.repository}/{path}"

    def joined(self, url: str, further: str) -> str:
        """The address to which an answer from `url` sends us. Raises `UserError` for what is none.
        """
        try:
            return urllib.parse.urljoin(url, further)
        except ValueError as bad:
            raise UserError(f"{self.registry} sends us to {further[:80]!r}: {bad}") from None

    def _scheme(self) -> str:
        """https; on this machine http too, as Docker has it, where no TLS is spoken."""
        if not is_loopback(self.registry):
            return "https"
        parts = urllib.parse.urlsplit(f"//{self.registry}")
        plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE
        try:
            with socket.create_connection((parts.hostname or "", parts.port or 443), 5) as raw, \
                    plain.wrap_socket(raw):
                return "https"
        except OSError:
            return "http"

    def patiently(self, what: str, attempt: Callable[[], Found]) -> Found:
        """Try until it goes or the pauses are used up. Raises `UserError` then."""
        for pause in [*self.pauses, None]:
            try:
                return attempt()
            except Transient as failure:
                if pause is None:
                    raise self.gave_up(what, failure) from None
                log.note(f"{what}: {failure}; another try in {pause:.0f} s")
                time.sleep(pause)
        raise AssertionError("unreachable")

    def gave_up(self, what: str, failure: Transient) -> UserError:
        """The error of what did not pass."""
        return Unreachable(f"{what}: {failure} ({self.registry})", hint=(
            "is the registry up, and reached (http_proxy, https_proxy, no_proxy)? The same command "
            "goes on where this one stopped"))

    def ask(self, method: str, url: str, *, body: bytes | None = None,
            headers: Mapping[str, str] | None = None, push: bool = False) -> Answer:
        """One request; the answer, whatever its status. Raises `Transient`, `UserError`."""
        status, found, data, final = self.send(
            method, url, lambda response: response.whole(LARGEST + 1), body=body, headers=headers,
            push=push)
        if len(data) > LARGEST:
            raise UserError(f"{self.registry} answers with more than {LARGEST} bytes to {method} "
                            f"{url}")
        return Answer(status=status, headers=found, body=data, url=final)

    def send(self, method: str, url: str, read: Callable[[Body], Found], *,
             body: bytes | None = None, headers: Mapping[str, str] | None = None,
             push: bool = False) -> tuple[int, dict[str, str], Found, str]:
        """One request, with credentials where they are asked for; `read` gets the response.

        Raises `Transient` for what may pass, `UserError` for what will not, and what `read` raises.
        """
        scope = f"repository:{self.repository}:{'pull,push' if push else 'pull'}"
        for first in (True, False):
            request = self._request(url, data=body, method=method, headers=headers or {})
            self._must_keep_tls(url)
            if scope in self._tokens and self._ours(url):
                # Not sent on where it redirects to: storage has no business with it.
                request.add_unredirected_header("Authorization", self._tokens[scope])
            with self._open(request) as response:
                found = {name.lower(): value for name, value in response.headers.items()}
                if response.status == 401 and first and self._ours(response.url):
                    self._tokens.pop(scope, None)
                    self._authorise(found.get("www-authenticate", ""), scope)
                    continue
                if response.status in PASSING:
                    raise Transient(f"the registry answered {response.status}")
                if response.status in (401, 403):
                    raise self._refusal(response, push=push)
                return response.status, found, read(Body(response)), response.url
        raise AssertionError("unreachable")

    def _refusal(self, response: Any, *, push: bool) -> UserError:
        """The error of who may not. Nobody but the registry itself is told who we are."""
        words = Body(response).explanation()
        if not self._ours(response.url):
            return UserError(f"{urllib.parse.urlsplit(response.url).netloc}, to which "
                             f"{self.registry} sends us, refuses: {words}",
                             hint="its storage has to let in whom it sends there: tell who runs it")
        return UserError(f"{self.registry} refuses {'to push to' if push else 'to pull from'} "
                         f"{self.repository} ({words})",
                         hint=f"docker login {self.registry}, with an account that may")

    def _must_keep_tls(self, url: str) -> None:
        """An upload may go on elsewhere; never from TLS to none."""
        ours = urllib.parse.urlsplit(self.url("")).scheme
        if urllib.parse.urlsplit(url).scheme not in ("https", ours):
            raise UserError(f"{self.registry} sends us to {url[:80]}, without TLS",
                            hint="a proxy before it that speaks TLS has to tell it so "
                                 "(X-Forwarded-Proto)")

    def _request(self, url: str, *, data: bytes | None = None, method: str | None = None,
                 headers: Mapping[str, str]) -> urllib.request.Request:
        """A request. Raises `UserError` for an address that is none: registries name some."""
        try:
            _origin(url.encode("ascii").decode())
            return urllib.request.Request(url, data=data, method=method,
                                          headers={"User-Agent": AGENT, **headers})
        except ValueError as bad:
            raise UserError(f"{self.registry} cannot be asked for {url[:80]!r}: {bad}") from None

    def _ours(self, url: str) -> bool:
        """Is an address of this registry? Uploads and redirections may go elsewhere."""
        return _origin(url) == _origin(self.url(""))

    def _open(self, request: urllib.request.Request) -> Any:
        try:
            return self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as answer:
            return answer
        except ssl.SSLError as failure:
            raise _untrusted(failure) from None
        except urllib.error.URLError as failure:
            reason = failure.reason
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise _untrusted(reason) from None
            if isinstance(reason, socket.gaierror):
                raise UserError(f"the name of {self.registry} cannot be resolved",
                                hint="check the name, and the network") from None
            raise Transient(f"no connection ({_words(reason)})") from None
        except (OSError, http.client.HTTPException) as failure:
            raise Transient(f"no answer ({_words(failure)})") from None
        except ValueError as bad:  # of a name that is none, or a token with line breaks in it
            raise UserError(f"{self.registry} cannot be asked for {request.full_url[:80]}: {bad}") \
                from None

    def _authorise(self, header: str, scope: str) -> None:
        """Get what a challenge asks for. Raises `UserError` where we do not have it."""
        scheme, parameters = credentials.challenge(header)
        known = credentials.find(self.registry, self.repository)
        if scheme == "basic":
            if known is None or not known.user:
                raise UserError(f"{self.registry} wants a user and a password",
                                hint=f"docker login {self.registry}; looked into "
                                f"{', '.join(map(str, credentials.files()))}")
            self._tokens[scope] = known.basic
        elif scheme == "bearer" and "realm" in parameters:
            self._tokens[scope] = f"Bearer {self._token(parameters, scope, known)}"
        else:
            raise UserError(f"{self.registry} asks for an authentication that is not known here: "
                            f"{header[:80]!r}")

    def _token(self, parameters: Mapping[str, str], scope: str,
               known: credentials.Credentials | None) -> str:
        """A token of the registry's token service (distribution's token and OAuth2 protocols)."""
        realm = parameters["realm"]
        if urllib.parse.urlsplit(realm).scheme != "https" and not (
                is_loopback(self.registry) and is_loopback(urllib.parse.urlsplit(realm).netloc)):
            raise UserError(f"{self.registry} sends passwords to {realm}, without TLS")
        query = {"service": parameters.get("service", ""), "scope": scope}
        body = None
        if known is not None and known.token:
            body = urllib.parse.urlencode({**query, "grant_type": "refresh_token",
                                           "client_id": AGENT,
                                           "refresh_token": known.token}).encode()
        else:
            realm += ("&" if "?" in realm else "?") + urllib.parse.urlencode(query)
        request = self._request(realm, data=body, headers={})
        if known is not None and known.user:
            request.add_unredirected_header("Authorization", known.basic)
        with self._open(request) as response:
            if response.status in PASSING:
                raise Transient(f"the registry's token service answered {response.status}")
            data = Body(response).whole(LARGEST)
            try:
                found = json.loads(data)
                token = found.get("token") or found.get("access_token")
            except (ValueError, AttributeError):
                token = None
        if response.status != 200 or not token:
            raise UserError(f"{self.registry} gives no token for {scope} "
                            f"({said(data, response.status)})",
                            hint=f"docker login {self.registry}")
        return str(token)


def _origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)


def _untrusted(failure: ssl.SSLError) -> UserError:
    return UserError(f"the registry's certificate was not accepted: {failure}", hint=(
        "a certificate authority of your own belongs into the system's store "
        "(update-ca-certificates), or into the file that SSL_CERT_FILE names"))


def _words(failure: object) -> str:
    if isinstance(failure, socket.timeout):
        return "the registry did not answer in time"
    if isinstance(failure, http.client.IncompleteRead):
        return "the answer ended early"
    return str(failure) or type(failure).__name__


def said(body: bytes, status: int) -> str:
    """What a registry says of an error (OCI distribution, error codes), or the status."""
    try:
        errors = json.loads(body)["errors"]
        words = [str(error.get("message") or error.get("code")) for error in errors]
        details = [str(error["detail"])[:200] for error in errors
                   if isinstance(error.get("detail"), str)]
        return "; ".join([*words, *details]) or f"status {status}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"status {status}"
