"""Where a release is taken from, a directory or a registry, and that it is what was signed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from katagpu import log
from katagpu.errors import UserError
from katagpu.release import artifact, layout, registry, signature
from katagpu.release.layout import File, Release
from katagpu.release.reference import reference
from katagpu.release.wire import PAUSES, TIMEOUT, Unreachable

AGAIN = "do not use it; take the release again"
Unit = dict[str, tuple[str, int]]
"""The files of one artifact: digest and size by name."""


class Source(ABC):
    """Files of a release by name. Their bytes are not to be trusted before they are hashed."""

    where: str
    asked: str | None = None
    """The version that is asked for, where that is known."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none. Raises `UserError`."""

    @abstractmethod
    def signed(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Each list of digests that there is, with its signature. Raises `UserError`."""

    @abstractmethod
    def copy(self, file: File, sink: IO[bytes]) -> None:
        """Write a file into an empty one. Raises `UserError`."""


class Directory(Source):
    """A release's directory."""

    def __init__(self, place: Path) -> None:
        if not place.is_dir():
            raise UserError(f"there is no release {place}", hint="a release is a directory below "
                            "out/release/, or oci://registry/repository:tag")
        self.place = place
        self.where = str(place)

    def read(self, name: str) -> bytes | None:
        """A small file."""
        try:
            with self._opened(name) as stream:
                data = self._block(stream, layout.LARGEST + 1)
        except FileNotFoundError:
            return None
        if len(data) > layout.LARGEST:
            raise UserError(f"{self.place / name} is too large to be what it should be")
        return data

    def _opened(self, name: str) -> BinaryIO:
        """A file to read: a real one, for root may be reading what anybody put there.

        Raises `FileNotFoundError`, `UserError`.
        """
        path = self.place / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as refusal:
            why = "it is a link" if refusal.errno == errno.ELOOP else refusal.strerror
            raise UserError(f"{path} cannot be read: {why}", hint=AGAIN) from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"{path} is no file", hint=AGAIN)
        return os.fdopen(handle, "rb")

    def _block(self, stream: BinaryIO, size: int) -> bytes:
        try:
            return stream.read(size)
        except OSError as refusal:
            raise UserError(f"a file in {self.place} cannot be read: {refusal.strerror}",
                            hint=AGAIN) from None

    def signed(self) -> Iterator[tuple[bytes, bytes | None]]:
        """The one list."""
        sums = self.read(layout.SUMS)
        if sums is not None:
            yield sums, self.read(layout.SIGNATURE)

    def copy(self, file: File, sink: IO[bytes]) -> None:
        """Copy a file."""
        path = self.place / file.name
        try:
            stream = self._opened(file.name)
        except FileNotFoundError:
            raise UserError(f"{path} cannot be read: it is not there", hint=AGAIN) from None
        with stream:
            left = os.fstat(stream.fileno()).st_size
            if left != file.size:
                raise UserError(f"{path} is not the file that was signed: it has {left} bytes, "
                                f"and not {file.size}", hint=AGAIN)
            while left > 0:
                block = self._block(stream, min(left, 1 << 20))
                if not block:
                    break
                sink.write(block)
                left -= len(block)


class Pulled(Source):
    """A release in a registry: the artifact, and what refers to it."""

    def __init__(self, text: str, *, timeout: float = TIMEOUT,
                 pauses: Sequence[float] = PAUSES) -> None:
        self.where = text
        self.reference = reference(text)
        self.registry = registry.Registry(self.reference, timeout=timeout, pauses=pauses)
        found = self.registry.manifest(self.reference.name)
        if found is None:
            raise UserError(f"there is no {text}", hint="is the tag right? Without one it is "
                            "`latest`")
        data, self.digest = found
        self.layers = self._listed(data, artifact.RELEASE)
        tag = self.reference.tag
        self.asked = tag if tag is not None and layout.VERSION.fullmatch(tag) else None

    def _listed(self, data: bytes, kind: str) -> Unit:
        """Digest and size of an artifact's files by name."""
        try:
            manifest = json.loads(data)
            found = manifest.get("artifactType")
        except (ValueError, AttributeError):
            raise UserError(f"{self.where}: its manifest is damaged") from None
        if found != kind != artifact.RELEASE:
            raise UserError(f"its type is {found}, and not {kind}")
        if found != kind:
            raise UserError(f"{self.where} is no release of katagpu: its type is {found}",
                            hint="./doitw publish makes one")
        return {layout.plain_name(name): (digest, size)
                for name, digest, size in registry.titles(manifest)}

    def attached(self, *kinds: str) -> Iterator[Unit]:
        """What refers to the release, of these types.

        Who may write to the repository can add to it: what cannot be read is skipped.
        """
        for entry in self.registry.referrers(self.digest):
            if entry.get("artifactType") in kinds:
                with self._skipping(f"what refers to it as {entry['digest'][:80]!r}"):
                    found = self.registry.manifest(entry["digest"])
                    if found is not None:
                        yield self._listed(found[0], entry["artifactType"])

    @contextlib.contextmanager
    def _skipping(self, what: str) -> Iterator[None]:
        """Say what cannot be used, and go on. Raises `Unreachable`: that says nothing of it."""
        try:
            yield
        except Unreachable:
            raise
        except UserError as bad:
            log.note(f"{self.where}: {what} is skipped: {bad.what}")

    def read(self, name: str) -> bytes | None:
        """A small file."""
        found = self.layers.get(name)
        return None if found is None else self._small(name, found)

    def signed(self) -> Iterator[tuple[bytes, bytes | None]]:
        """The lists that refer to the release."""
        for unit in self.attached(artifact.SIGNATURE):
            sums, signed = unit.get(layout.SUMS), unit.get(layout.SIGNATURE)
            if sums is not None:
                with self._skipping("a signature"):
                    yield (self._small(layout.SUMS, sums),
                           None if signed is None else self._small(layout.SIGNATURE, signed))

    def _small(self, name: str, found: tuple[str, int]) -> bytes:
        digest, size = found
        if size > layout.LARGEST:
            raise UserError(f"{self.where}: {name} is too large to be what it should be")
        sink = io.BytesIO()
        self.registry.pull_blob(digest, size, sink, name)
        return sink.getvalue()

    def copy(self, file: File, sink: IO[bytes]) -> None:
        """Pull a file."""
        if self.layers.get(file.name) != (f"sha256:{file.sha256}", file.size):
            raise UserError(f"{self.where} does not have the {file.name} that was signed",
                            hint="do not use it; publish the release again")
        self.registry.pull_blob(f"sha256:{file.sha256}", file.size, sink, file.name)


def open_source(text: str) -> Source:
    """The source that a word names. Raises `UserError`."""
    return Pulled(text) if text.startswith("oci:") else Directory(Path(text))


@dataclass(frozen=True)
class Verified:
    """A release whose list of files is to be trusted; `kept` are small files that belong to it."""

    release: Release
    kept: dict[str, bytes]
    signed: bool


def verified(source: Source, key: Path | None) -> Verified:
    """Verify what a release says of itself; without a key, only that it agrees with itself.

    The files are not read: each is hashed when it is copied. Raises `UserError`.
    """
    sums, signed = _trusted(source, key)
    digests = layout.parse_sums(sums, source.where)
    kept = {layout.SUMS: sums} if signed is None else {layout.SUMS: sums,
                                                      layout.SIGNATURE: signed}
    data = _listed(source, layout.RELEASE, digests)
    kept[layout.RELEASE] = data
    release = layout.parse(data, source.where)
    if source.asked not in (None, release.version):
        raise UserError(f"{source.where} is {release.id}, and {source.asked} was asked for",
                        hint="somebody let the tag name another release: do not use it")
    for file in release.files:
        if digests.get(file.name) != file.sha256:
            raise UserError(f"{source.where}: {layout.RELEASE} and {layout.SUMS} disagree on "
                            f"{file.name}", hint="do not use it; take the release again")
    manifest = release.file(layout.MANIFEST)
    if manifest is None:
        raise UserError(f"{source.where} has no {layout.MANIFEST}")
    kept[manifest.name] = _listed(source, manifest.name, digests)
    _parts(release, kept[manifest.name], source.where)
    return Verified(release=release, kept=kept, signed=key is not None)


def _trusted(source: Source, key: Path | None) -> tuple[bytes, bytes | None]:
    """The list of digests that the key's owner signed; without a key one that fits, else the first.
    """
    refusal = UserError(f"{source.where} has no {layout.SUMS}", hint="a release is made by "
                        "./doitw release")
    first = None
    for sums, signed in source.signed():
        first = first or (sums, signed)
        if key is None:
            if _fits(source, sums):
                return sums, signed
        elif signed is None:
            refusal = UserError(f"{source.where} is not signed", hint="take a signed release; or "
                                "say unverified instead of a key, for one that you made yourself")
        else:
            try:
                signature.verify(sums, signed, key, source.where)
            except UserError as bad:
                refusal = bad
            else:
                return sums, signed
    if key is None and first is not None:
        return first
    raise refusal


def _fits(source: Source, sums: bytes) -> bool:
    """Is a list of digests about the release that is there?"""
    data = source.read(layout.RELEASE)
    return data is not None and \
        f"{hashlib.sha256(data).hexdigest()}  {layout.RELEASE}".encode() in sums.splitlines()


def _listed(source: Source, name: str, digests: dict[str, str]) -> bytes:
    data = source.read(name)
    if data is None:
        raise UserError(f"{source.where} lacks {name}")
    if hashlib.sha256(data).hexdigest() != digests.get(name):
        raise UserError(f"{source.where}: {name} is not the file that {layout.SUMS} lists",
                        hint="do not use it; take the release again")
    return data


def _parts(release: Release, manifest: bytes, where: str) -> None:
    """Kernel, image and all else have to be those of one build, that of the manifest."""
    try:
        parts = json.loads(manifest)["parts"]
        for file in release.files:
            if file.part is not None and parts[file.part]["sha256"] != file.sha256:
                raise UserError(f"{where}: {file.name} is not the {file.part} of the guest's "
                                "manifest: these files are not of one build")
    except (ValueError, KeyError, TypeError) as bad:
        raise UserError(f"{where}: its manifest is damaged ({bad!r})") from None
