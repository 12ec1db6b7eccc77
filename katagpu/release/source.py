"""Where a release is taken from, a directory or a registry, and that it is what was signed."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from katagpu.errors import UserError
from katagpu.release import artifact, layout, registry, signature
from katagpu.release.layout import File, Release
from katagpu.release.reference import reference
from katagpu.release.wire import PAUSES, TIMEOUT

Unit = dict[str, tuple[str, int]]
"""The files of one artifact: digest and size by name."""


class Source(ABC):
    """Files of a release by name. Their bytes are not to be trusted before they are hashed."""

    where: str

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
            with (self.place / name).open("rb") as stream:
                data = stream.read(layout.LARGEST + 1)
        except FileNotFoundError:
            return None
        except OSError as refusal:
            raise UserError(f"{self.place / name} cannot be read: {refusal.strerror}") from None
        if len(data) > layout.LARGEST:
            raise UserError(f"{self.place / name} is too large to be what it should be")
        return data

    def signed(self) -> Iterator[tuple[bytes, bytes | None]]:
        """The one list."""
        sums = self.read(layout.SUMS)
        if sums is not None:
            yield sums, self.read(layout.SIGNATURE)

    def copy(self, file: File, sink: IO[bytes]) -> None:
        """Copy a file."""
        try:
            stream = (self.place / file.name).open("rb")
        except OSError as refusal:
            raise UserError(f"{self.place / file.name} cannot be read: {refusal.strerror}",
                            hint="take the release again") from None
        with stream:
            shutil.copyfileobj(stream, sink, 1 << 20)


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
        self._attached: list[Unit] | None = None

    def _listed(self, data: bytes, kind: str) -> Unit:
        """Digest and size of an artifact's files by name."""
        try:
            manifest = json.loads(data)
            found = manifest.get("artifactType")
        except (ValueError, AttributeError):
            raise UserError(f"{self.where}: its manifest is damaged") from None
        if found != kind:
            raise UserError(f"{self.where} is no release of katagpu: its type is {found}",
                            hint="./doitw publish makes one")
        return {layout.plain_name(name): (digest, size)
                for name, digest, size in registry.titles(manifest)}

    def attached(self) -> list[Unit]:
        """What refers to the release. Who may write to the repository can add to it."""
        if self._attached is None:
            self._attached = []
            for entry in self.registry.referrers(self.digest):
                kind = entry.get("artifactType")
                if kind == artifact.SIGNATURE or kind in artifact.ATTACHED:
                    found = self.registry.manifest(entry["digest"])
                    if found is not None:
                        self._attached.append(self._listed(found[0], str(kind)))
        return self._attached

    def read(self, name: str) -> bytes | None:
        """A small file."""
        found = self.layers.get(name)
        return None if found is None else self._small(name, found)

    def signed(self) -> Iterator[tuple[bytes, bytes | None]]:
        """The lists that refer to the release."""
        for unit in self.attached():
            sums, signed = unit.get(layout.SUMS), unit.get(layout.SIGNATURE)
            if sums is not None:
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
    """The list of digests that the key's owner signed, else the first one."""
    refusal = UserError(f"{source.where} has no {layout.SUMS}", hint="a release is made by "
                        "./doitw release")
    for sums, signed in source.signed():
        if key is None:
            return sums, signed
        if signed is None:
            refusal = UserError(f"{source.where} is not signed", hint="take a signed release; or "
                                "say unverified instead of a key, for one that you made yourself")
            continue
        try:
            signature.verify(sums, signed, key, source.where)
        except UserError as bad:
            refusal = bad
        else:
            return sums, signed
    raise refusal


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
