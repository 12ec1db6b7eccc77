"""A registry: blobs, manifests and referrers (OCI distribution specification 1.1).

Uploads go in chunks and go on where they broke off. What is pulled is hashed. A registry without
the referrers interface, as Debian's, gets the specification's fallback: a tag `sha256-<digest>`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from katagpu import log
from katagpu.errors import UserError
from katagpu.release.reference import Reference
from katagpu.release.wire import PAUSES, TIMEOUT, Answer, Body, Transient, Wire, said

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ACCEPT = f"{MANIFEST}, {INDEX}"
EMPTY = "application/vnd.oci.empty.v1+json"
OCTETS = "application/octet-stream"
CHUNK = 16 << 20
PAGES = 100  # of a list of referrers
DIGEST = re.compile("sha256:[0-9a-f]{64}")
_NEXT = re.compile(r"<([^<>]*)>\s*;[^,<]*\brel=\"?next\b")  # RFC 8288

def descriptor(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    """The descriptor of some content."""
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}",
            "size": len(data), **more}


class Registry:
    """One repository. `pauses` are the seconds before each further try of what may pass."""

    def __init__(self, where: Reference, *, timeout: float = TIMEOUT,
                 pauses: Sequence[float] = PAUSES, chunk: int = CHUNK) -> None:
        self.where = where
        self.chunk = chunk
        self.wire = Wire(where.registry, where.repository, timeout=timeout, pauses=pauses)

    # blobs

    def has_blob(self, digest: str, size: int) -> bool:
        """Is a blob there?"""
        def head() -> Answer:
            return self.wire.ask("HEAD", self.wire.url(f"blobs/{digest}"))

        answer = self.wire.patiently(f"look for {digest[:19]}", head)
        return answer.status == 200 and answer.headers.get("content-length") in (None, str(size))

    def push_blob(self, path: Path, digest: str, what: str) -> bool:
        """Upload a file; False where the registry has it. Raises `UserError`."""
        size = path.stat().st_size
        if self.has_blob(digest, size):
            return False
        with path.open("rb") as stream:
            Upload(self, stream, digest, size, what).run()
        return True

    def pull_blob(self, digest: str, size: int, sink: IO[bytes], what: str) -> None:
        """Write a blob into an empty file, from where it broke off where it does.

        Raises `UserError` where the bytes are not those of the digest.
        """
        def fetch() -> None:
            start = sink.tell()
            if start >= size > 0:
                return
            wanted = {"Range": f"bytes={start}-"} if start else {}
            self.wire.send("GET", self.wire.url(f"blobs/{digest}"),
                           lambda response: self._receive(response, sink, size, what),
                           headers=wanted)

        self.wire.patiently(f"pull {what}", fetch)
        sink.seek(0)
        found = hashlib.sha256()
        for block in iter(lambda: sink.read(1 << 20), b""):
            found.update(block)
        if f"sha256:{found.hexdigest()}" != digest:
            raise UserError(f"{self.where.registry} gives other bytes for {what}: they are "
                            f"sha256:{found.hexdigest()}, and not {digest}",
                            hint="the registry is damaged, or was tampered with; publish again "
                                 "once it is mended")

    def _receive(self, response: Body, sink: IO[bytes], size: int, what: str) -> None:
        if response.status not in (200, 206):
            raise UserError(f"{self.where.registry} does not give {what}: "
                            f"{response.explanation()}")
        if response.status == 200:
            sink.seek(0)
            sink.truncate()
        for block in iter(lambda: response.read(1 << 20), b""):
            sink.write(block)
            if sink.tell() > size:
                raise UserError(f"{self.where.registry} gives more than the {size} bytes of {what}")
        if sink.tell() < size:
            raise Transient("the answer ended early")

    # manifests

    def manifest(self, name: str) -> tuple[bytes, str] | None:
        """A manifest's bytes and digest, by tag or digest; None where there is none."""
        def get() -> Answer:
            return self.wire.ask("GET", self.wire.url(f"manifests/{name}"),
                                 headers={"Accept": ACCEPT})

        answer = self.wire.patiently(f"pull the manifest {name}", get)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise UserError(f"{self.where.registry} does not give the manifest {name}: "
                            f"{said(answer.body, answer.status)}")
        digest = f"sha256:{hashlib.sha256(answer.body).hexdigest()}"
        claimed = answer.headers.get("docker-content-digest", digest)
        wanted = name if name.startswith("sha256:") else claimed
        if digest != wanted:
            raise UserError(f"{self.where.registry} gives other bytes for the manifest {name}: "
                            f"they are {digest}, and not {wanted}")
        return answer.body, digest

    def push_manifest(self, data: bytes, name: str | None = None,
                      media_type: str = MANIFEST) -> tuple[str, bool]:
        """Upload a manifest under a tag, else its digest.

        Returns its digest, and whether the registry has listed it as a referrer by itself.
        """
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"

        def put() -> Answer:
            return self.wire.ask("PUT", self.wire.url(f"manifests/{name or digest}"), body=data,
                                 headers={"Content-Type": media_type}, push=True)

        answer = self.wire.patiently(f"push the manifest {name or digest[:19]}", put)
        if answer.status != 201:
            raise UserError(f"{self.where.registry} does not take the manifest "
                            f"{name or digest}: {said(answer.body, answer.status)}")
        _must_be(answer, digest, self.where.registry, "the manifest")
        return digest, "oci-subject" in answer.headers

    # referrers

    def referrers(self, digest: str) -> list[dict[str, Any]]:
        """The descriptors of what refers to a manifest, of all pages. Raises `UserError`."""
        url = self.wire.url(f"referrers/{digest}")
        answer = self._referrers(url)
        if answer.status != 200 or not answer.headers.get("content-type", "").startswith(INDEX):
            listed = self.manifest(_fallback(digest))  # it has no such interface
            return [] if listed is None else _descriptors(listed[0], self.where.registry)
        found = _descriptors(answer.body, self.where.registry)
        for _page in range(PAGES):
            following = _NEXT.search(answer.headers.get("link", ""))
            if following is None:
                return found
            answer = self._referrers(self.wire.joined(answer.url, following[1]))
            found += _descriptors(answer.body, self.where.registry)
        raise UserError(f"{self.where.registry} lists the referrers of {digest} on more than "
                        f"{PAGES} pages", hint="remove from the repository what is not yours")

    def _referrers(self, url: str) -> Answer:
        """A page of the referrers."""
        def get() -> Answer:
            return self.wire.ask("GET", url, headers={"Accept": INDEX})

        return self.wire.patiently("list the referrers", get)

    def attach(self, data: bytes, subject: str, artifact_type: str) -> str:
        """Upload a manifest that refers to another one; its digest."""
        digest, listed = self.push_manifest(data)
        if listed:
            return digest
        entry = descriptor(data, MANIFEST, artifactType=artifact_type)
        found = self.manifest(_fallback(subject))
        known = [] if found is None else _descriptors(found[0], self.where.registry)
        if all(one["digest"] != digest for one in known):
            index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [*known, entry]}
            self.push_manifest(json.dumps(index).encode(), _fallback(subject), INDEX)
        return digest


def _fallback(digest: str) -> str:
    return digest.replace(":", "-")


def _descriptors(data: bytes, registry: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(data)["manifests"]
        return [one for one in found if isinstance(one["digest"], str)]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{registry}: the list of referrers is damaged") from None


def _must_be(answer: Answer, digest: str, registry: str, what: str) -> None:
    claimed = answer.headers.get("docker-content-digest", digest)
    if claimed != digest:
        raise UserError(f"{registry} took {what} as {claimed}, and it is {digest}",
                        hint="the registry is damaged, or was tampered with")


class Upload:
    """One upload: chunks, and where it stands after each."""

    def __init__(self, registry: Registry, stream: IO[bytes], digest: str, size: int, what: str,
                 ) -> None:
        self.registry = registry
        self.wire = registry.wire
        self.stream = stream
        self.digest = digest
        self.size = size
        self.what = what
        self.offset = 0
        self.location: str | None = None

    def run(self) -> None:
        """Upload all of it. A failure that may pass counts anew once more got through than before.

        What is sent again is not more: an upload whose end always fails comes to an end.
        """
        pauses, furthest = iter(self.wire.pauses), 0
        while True:
            try:
                if self.step():
                    return
                if self.offset > furthest:
                    pauses, furthest = iter(self.wire.pauses), self.offset
            except Transient as failure:
                pause = next(pauses, None)
                if pause is None:
                    raise self.wire.gave_up(f"push {self.what}", failure) from None
                log.note(f"push {self.what}: {failure}; it goes on in {pause:.0f} s")
                time.sleep(pause)
                if self._there():
                    return

    def step(self) -> bool:
        """The next request; True once all is there."""
        if self.location is None:
            self._begin()
        elif self.offset < self.size:
            self._chunk()
        else:
            return self._finish()
        return False

    def _begin(self) -> None:
        answer = self.wire.ask("POST", self.wire.url("blobs/uploads/"), body=b"", push=True)
        if answer.status != 202:
            raise self._refused(answer)
        self.offset = 0
        self._goes_on(answer)
        least = answer.headers.get("oci-chunk-min-length", "")
        if least.isdigit():
            self.registry.chunk = max(self.registry.chunk, int(least))

    def _goes_on(self, answer: Answer) -> None:
        location = answer.headers.get("location")
        if not location:
            raise UserError(f"{self.registry.where.registry} does not say where an upload goes on")
        self.location = self.wire.joined(answer.url, location)

    def _chunk(self) -> None:
        assert self.location is not None
        self.stream.seek(self.offset)
        block = self.stream.read(self.registry.chunk)
        if not block:
            raise UserError(f"{self.what} was changed while it was pushed")
        end = self.offset + len(block) - 1
        answer = self.wire.ask("PATCH", self.location, body=block, push=True, headers={
            "Content-Type": OCTETS, "Content-Range": f"{self.offset}-{end}"})
        if answer.status in (404, 416):
            raise Transient("the registry lost the upload, or part of it")
        if answer.status not in (201, 202, 204):
            raise self._refused(answer)
        self._goes_on(answer)
        now = _received(answer, end + 1)
        if now <= self.offset:
            raise Transient("the registry took nothing of what was sent")
        self.offset = now

    def _finish(self) -> bool:
        assert self.location is not None
        gap = "&" if "?" in self.location else "?"
        answer = self.wire.ask(
            "PUT", f"{self.location}{gap}digest={urllib.parse.quote(self.digest, safe='')}",
            body=b"", push=True, headers={"Content-Type": OCTETS})
        if answer.status == 404:
            raise Transient("the registry lost the upload")
        if answer.status not in (201, 204):
            raise self._refused(answer)
        _must_be(answer, self.digest, self.registry.where.registry, self.what)
        return True

    def _there(self) -> bool:
        """After a failure: is the blob there after all? Else find out where to go on."""
        if self.location is None:
            return False
        try:
            if self.offset >= self.size and self.registry.has_blob(self.digest, self.size):
                return True
            answer = self.wire.ask("GET", self.location, push=True)
        except Transient:
            return False
        if answer.status in (200, 202, 204):
            self.offset = _received(answer, 0)
            if answer.headers.get("location"):
                self._goes_on(answer)
        else:
            self.location = None  # anew
        return False

    def _refused(self, answer: Answer) -> UserError:
        return UserError(f"{self.registry.where.registry} does not take {self.what}: "
                         f"{said(answer.body, answer.status)}")


def _received(answer: Answer, otherwise: int) -> int:
    """How many bytes of an upload the registry says that it has; its first is 0."""
    found = re.fullmatch(r"(?:bytes=)?0-(\d+)", answer.headers.get("range", ""))
    if found is None:
        return otherwise
    end = int(found[1])
    return end + 1 if end else otherwise  # registries say 0-0 of nothing at all


def titles(manifest: Any) -> Iterator[tuple[str, str, int]]:
    """Name, digest and size of the files of an artifact. Raises `UserError` for a damaged one."""
    try:
        for layer in manifest["layers"]:
            title = (layer.get("annotations") or {}).get("org.opencontainers.image.title")
            if title is not None:
                digest, size = layer["digest"], layer["size"]
                if not DIGEST.fullmatch(digest) or type(size) is not int or size < 0:
                    raise ValueError(f"{digest!r} of {size!r} bytes")
                yield title, digest, size
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError("the artifact's manifest is damaged") from None
