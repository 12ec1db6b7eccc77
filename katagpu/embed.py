"""The client token of a vGPU guest, put into copies of its images that exist in `out/` alone.

The stages make the image without it. Here the same layers are packed once more with the token on
top, in a directory beside the results that only its owner may enter. The store, its records, the
logs and the build record learn nothing of the token, not even its digest: whether another one has
been given is told by the file's size, inode and times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from katagpu import keys, log, receipt, sandbox
from katagpu.artifacts import Artifact
from katagpu.errors import UserError
from katagpu.plan import Plan
from katagpu.sandbox import Root
from katagpu.stages import image
from katagpu.stages.api import Build
from katagpu.stages.layers import stack
from katagpu.store import writing
from katagpu.tree import EPOCH
from katagpu.vgpu import TOKEN_DIRECTORY

NAME = "client_configuration_token.tok"
STATE = ".embedded.json"
SCRATCH = ".embedding"
LARGEST = 1 << 16  # bytes; the servers' tokens have some 3000
MARKER = "embeds_client_token"  # in the manifest: what has it must not be published
IMAGES = ("image", "initrd")


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it was left: what it was made from, and its mark."""

    identity: str
    mark: receipt.Mark


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What was made last, by name, and the mark of the token in it."""

    token: receipt.Mark = None
    files: dict[str, Left] = {}


def takes(artifact: Artifact) -> bool:
    """Does an artifact change with the token: is it an image, or the manifest?"""
    return (artifact.stage in IMAGES and artifact.output == "image") or (
        artifact.stage == "manifest")


class Embedding:
    """The results of one guest that have the token in them, or speak of it."""

    def __init__(self, directory: Path, plan: Plan, token: Path) -> None:
        self.directory = directory
        self.plan = plan
        self.token = token

    def _state(self) -> State:
        try:
            return msgspec.json.decode((self.directory / STATE).read_bytes(), type=State)
        except (OSError, msgspec.DecodeError):
            return State()

    def _identity(self, artifact: Artifact) -> str | None:
        action = self.plan.action(artifact.stage)
        return None if action is None else action.outputs[artifact.output].identity

    def _intact(self, artifact: Artifact, state: State) -> bool:
        known = state.files.get(artifact.name)
        link = self.directory / (artifact.link or artifact.name)
        return (known is not None and known.identity == self._identity(artifact)
                and state.token is not None and state.token == receipt.mark(self.token)
                and known.mark == receipt.mark(self.directory / artifact.name)
                and (artifact.link is None or (
                    link.is_symlink() and str(link.readlink()) == artifact.name)))

    def complete(self, artifacts: Sequence[Artifact]) -> bool:
        """Are these there as they were left, with the token as it is now? Reads no content."""
        state = self._state()
        return all(self._intact(artifact, state) for artifact in artifacts)

    def write(self, artifacts: Sequence[Artifact]) -> None:
        """Make what is not there. The stages are made. Raises `UserError` for an unfit token."""
        lock = f"embed-{keys.digest(str(self.directory))[:32]}"
        with self.plan.store.lock(lock), writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for left in self.directory.glob(f"{SCRATCH}*"):  # of a killed run: we have the lock
                sandbox.remove(left)
            mark, state = receipt.mark(self.token), self._state()
            files = dict(state.files) if state.token == mark else {}
            images = [artifact for artifact in artifacts if artifact.stage in IMAGES]
            for artifact in images:
                if not self._intact(artifact, state):
                    with log.step(f"{artifact.name}: the client token is put in"):
                        self._image(artifact)
                    files[artifact.name] = self._left(artifact)
            for artifact in artifacts:
                if artifact not in images and not (
                        files == state.files and self._intact(artifact, state)):
                    self._manifest(artifact, images)
                    files[artifact.name] = self._left(artifact)
            self._replace(STATE, msgspec.json.encode(State(token=mark, files=files)))

    def _left(self, artifact: Artifact) -> Left:
        return Left(identity=self._identity(artifact) or "",
                    mark=receipt.mark(self.directory / artifact.name))

    def _replace(self, name: str, data: bytes) -> None:
        part = self.directory / f".{name}.{os.getpid()}.part"
        part.write_bytes(data)
        part.replace(self.directory / name)

    def _image(self, artifact: Artifact) -> None:
        stage = self.plan.stages[artifact.stage]
        inputs = {}
        for role, ref in stage.inputs.items():
            action = self.plan.action(ref.stage)
            assert action is not None, "the stages were made before"
            inputs[role] = action.outputs[ref.output]
        logfile = self.plan.logs / f"{artifact.stage}-token.log"
        logfile.parent.mkdir(parents=True, exist_ok=True)
        logfile.write_text("")
        with (self._private() as private,
              self.plan.store.staging("embed", sandbox.remove) as scratch):
            build = Build(stage, self.plan.store, inputs, scratch, logfile)
            guest = Root(lower=(token_layer(private / "layer", self.token), *stack(build)),
                         special=False)
            packed = image.pack(build, guest, _files(private / "packed", image.PACKED))
            packed.chmod(0o600)
            with packed.open("rb") as stream:
                os.fsync(stream.fileno())
            packed.replace(self.directory / artifact.name)
        if artifact.link is not None:
            part = self.directory / f".{artifact.link}.{os.getpid()}.part"
            part.unlink(missing_ok=True)
            part.symlink_to(artifact.name)
            part.replace(self.directory / artifact.link)

    @contextmanager
    def _private(self) -> Iterator[Path]:
        """A directory beside the results that only we may enter, gone afterwards."""
        path = self.directory / f"{SCRATCH}-{os.getpid()}"
        path.mkdir(mode=0o700)
        try:
            yield path
        finally:
            sandbox.remove(path)

    def _manifest(self, artifact: Artifact, images: Sequence[Artifact]) -> None:
        action = self.plan.action(artifact.stage)
        assert action is not None, "the stages were made before"
        blob = self.plan.store.sound(action.outputs[artifact.output].blob)
        content = json.loads(blob.read_bytes())
        content[MARKER] = True
        for made in images:
            path = self.directory / made.name
            content["parts"][made.stage] = {"sha256": keys.file_digest(path),
                                            "size": path.stat().st_size}
        self._replace(artifact.name, (json.dumps(content, indent=2) + "\n").encode())


def _files(directory: Path, names: Sequence[str]) -> Path:
    """A directory with empty files that nobody else may read: who writes to them keeps that."""
    directory.mkdir(mode=0o700)
    for name in names:
        (directory / name).touch(mode=0o600)
    return directory


def token_layer(layer: Path, token: Path) -> Path:
    """A layer with the token in its place, its directories as the guest has them.

    Raises `UserError` where there is no token in the file; says nothing of what is.
    """
    try:
        content = token.read_bytes()
    except OSError as refusal:
        raise UserError(f"cannot read the client token {token}: {refusal.strerror}") from None
    if not content.strip() or len(content) > LARGEST:
        raise UserError(f"{token} holds no client token: it has {len(content)} bytes",
                        hint="the licence server's client_configuration_token_….tok has some 3000")
    home = layer / TOKEN_DIRECTORY.lstrip("/")
    directories = [home, home.parent, home.parent.parent, layer]
    for directory in reversed(directories):
        directory.mkdir()
        directory.chmod(0o700 if directory == home else 0o755)
    place = home / NAME
    with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    for path in (place, *directories):
        os.utime(path, (EPOCH, EPOCH))
    return layer
