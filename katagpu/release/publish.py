"""Publish a release: to a registry as an OCI artifact, or to a directory. Read back afterwards."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from katagpu import log
from katagpu.embed import MARKER, refuse
from katagpu.errors import UserError
from katagpu.files import clone_or_copy, sync
from katagpu.release import artifact, assemble, layout, notes
from katagpu.release.layout import Release
from katagpu.release.reference import Reference, reference
from katagpu.release.registry import MANIFEST, Registry, descriptor
from katagpu.release.source import Pulled
from katagpu.release.wire import PAUSES, TIMEOUT, is_loopback


def publish(place: Path, to: str, *, licensed: bool, timeout: float = TIMEOUT,
            pauses: Sequence[float] = PAUSES) -> None:
    """Publish the release in a directory. Raises `UserError`."""
    if not (place / layout.RELEASE).exists():
        raise UserError(f"there is no release {place}", hint="./doitw release version=X.Y.Z")
    release = notes.read(place)
    wrong = assemble.damaged(place)
    if wrong:
        raise UserError(f"{place} was changed since it was made: {', '.join(wrong)}",
                        hint="remove the directory, and release again")
    refuse(place)
    _no_token(place, release)
    if not to.startswith("oci:"):
        _to_directory(place, Path(to) / release.id)
        return
    where = reference(to)
    if where.digest is not None:
        raise UserError("a release is published under a tag, and not a digest")
    if where.tag not in (None, release.version) and layout.VERSION.fullmatch(str(where.tag)):
        raise UserError(f"{where.tag} is the version of another release than {release.id}",
                        hint=f"the tag {release.version}, or one that is no version")
    _may_go(release, where, licensed=licensed)
    _Push(place, release, where, timeout, pauses).run()


def _no_token(place: Path, release: Release) -> None:
    manifest = release.file(layout.MANIFEST)
    if manifest is None or json.loads((place / manifest.name).read_bytes()).get(MARKER):
        raise UserError(f"{place} must not be published: a client token is in its image")


def _may_go(release: Release, where: Reference, *, licensed: bool) -> None:
    """Any registry but one of this machine may be public: nothing tells from here."""
    if release.licensed and not licensed and not is_loopback(where.registry):
        raise UserError(f"{release.id} has parts of NVIDIA's vGPU software, which must not be "
                        f"given to others, and {where.registry} may be public",
                        hint="licensed=1 publishes it, to a registry that only licensees can read")


def _to_directory(place: Path, target: Path) -> None:
    """Copy a release below a directory, in one step."""
    if target.exists():
        if _sums(target) != _sums(place):
            raise UserError(f"{target} is published already, with other content",
                            hint="a version is published once: release the next one")
        if not assemble.damaged(target):
            log.say(f"publish: {target} is there already")
            return
        raise UserError(f"{target} was changed since it was published: "
                        f"{', '.join(assemble.damaged(target))}", hint="remove it")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        assemble.sweep(target.parent, target.name)
        part.mkdir(parents=True)
        for path in sorted(place.iterdir()):
            with (part / path.name).open("xb") as stream:
                clone_or_copy(path, stream.fileno())
            (part / path.name).chmod(path.stat().st_mode & 0o777)
            sync(part / path.name)
        wrong = assemble.damaged(part)
        if wrong:
            raise UserError(f"{target.parent} does not hold what is written: {', '.join(wrong)}")
        part.chmod(0o755)
        part.rename(target)
        sync(target.parent)
    except OSError as refusal:
        raise UserError(f"cannot publish to {target}: {refusal.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log.say(f"publish: {target}")


def _sums(place: Path) -> bytes | None:
    try:
        return (place / layout.SUMS).read_bytes()
    except OSError:
        return None


class _Push:
    """One publication: blobs, manifest, what refers to it, and the tag last."""

    def __init__(self, place: Path, release: Release, where: Reference, timeout: float,
                 pauses: Sequence[float]) -> None:
        self.place = place
        self.release = release
        self.where = where
        self.timeout = timeout
        self.pauses = pauses
        self.tag = where.tag or release.version
        self.registry = Registry(where, timeout=timeout, pauses=pauses)
        self.digests = layout.parse_sums((place / layout.SUMS).read_bytes(), str(place))
        for name in (layout.SUMS, layout.SIGNATURE):
            if (place / name).exists():
                self.digests[name] = layout.digest(place / name)
        self.sources = {file.name: file.source for file in release.files}

    def run(self) -> None:
        """Publish, and read all of it back."""
        layers = [self._layer(name) for name in self.digests if artifact.attached(name) is None]
        data = artifact.render(artifact.RELEASE, layers, {
            "org.opencontainers.image.title": self.release.recipe,
            "org.opencontainers.image.version": self.release.version})
        digest = self._must_be_free(data)
        self._blobs()
        self.registry.push_manifest(data)
        subject = descriptor(data, MANIFEST)
        for kind, names in self._attached().items():
            manifest = artifact.render(kind, [self._layer(name) for name in names], {}, subject)
            self.registry.attach(manifest, digest, kind)
        self.registry.push_manifest(data, self.tag)
        self._read_back(digest)
        log.say(f"publish: oci://{self.where.registry}/{self.where.repository}:{self.tag}")
        log.say(f"  oci://{self.where.registry}/{self.where.repository}@{digest}")

    def _layer(self, name: str) -> dict[str, Any]:
        return artifact.layer(name, self.sources.get(name, name), self.digests[name],
                              (self.place / name).stat().st_size)

    def _attached(self) -> dict[str, list[str]]:
        """The files that refer to the release, by the type of their artifact."""
        found: dict[str, list[str]] = {}
        for name in self.digests:
            kind = artifact.attached(name)
            if kind is not None:
                found.setdefault(kind, []).append(name)
        return found

    def _must_be_free(self, data: bytes) -> str:
        """The artifact's digest. A tag that is the version names one content for good."""
        digest = str(descriptor(data, MANIFEST)["digest"])
        known = self.registry.manifest(self.tag)
        if known is not None and known[1] != digest:
            if self.tag == self.release.version:
                raise UserError(f"{self.where.registry}/{self.where.repository}:{self.tag} is "
                                f"published already, with other content ({known[1]})",
                                hint="a version is published once: release the next one")
            log.note(f"the tag {self.tag} moves from {known[1]}")
        return digest

    def _blobs(self) -> None:
        with tempfile.NamedTemporaryFile() as nothing:
            nothing.write(artifact.NOTHING)
            nothing.flush()
            digest = descriptor(artifact.NOTHING, "")["digest"]
            self.registry.push_blob(Path(nothing.name), digest, "the empty configuration")
        for name in sorted(self.digests, key=lambda name: (self.place / name).stat().st_size):
            path = self.place / name
            with log.step(f"push {name} ({log.size(path.stat().st_size)})"):
                if not self.registry.push_blob(path, f"sha256:{self.digests[name]}", name):
                    log.note("it is there already")

    def _is_ours(self, name: str, found: tuple[str, int] | None) -> bool:
        return name in self.digests and found == (
            f"sha256:{self.digests[name]}", (self.place / name).stat().st_size)

    def _read_back(self, digest: str) -> None:
        """Pull all that was pushed, as an installer does. Raises `UserError` where it is other."""
        with log.step("read it back"):
            pulled = Pulled(f"oci://{self.where.registry}/{self.where.repository}:{self.tag}",
                            timeout=self.timeout, pauses=self.pauses)
            if pulled.digest != digest:
                raise UserError(f"{self.where.registry} gives {pulled.digest} for {self.tag}, and "
                                f"{digest} was pushed")
            files = pulled.layers
            for unit in pulled.attached(artifact.SIGNATURE, *artifact.ATTACHED):
                if all(self._is_ours(name, one) for name, one in unit.items()):
                    files = {**files, **unit}
            for name, sha256 in self.digests.items():
                size = (self.place / name).stat().st_size
                if not self._is_ours(name, files.get(name)):
                    raise UserError(f"{self.where.registry} does not list {name} as it was pushed")
                self._pull(name, sha256, size)

    def _pull(self, name: str, sha256: str, size: int) -> None:
        """Pull a file, to look at its bytes only."""
        place = self.place.parent
        try:
            with tempfile.TemporaryFile(dir=place) as sink:
                self.registry.pull_blob(f"sha256:{sha256}", size, sink, name)
        except OSError as refusal:
            raise UserError(f"{name} cannot be read back into {place}: "
                            f"{refusal.strerror or refusal}", hint="all is pushed; once that is "
                            "mended, the same command looks at it again") from None
