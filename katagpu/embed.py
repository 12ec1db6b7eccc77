"""The client token of a vGPU guest, put into copies of its images that exist in `out/` alone.

The stages make the image without it. Here the same layers are packed once more with the token on
top, in a directory beside the results that only its owner may enter. The store, its records, the
logs and the build record learn nothing of the token, not even its digest: whether another one has
been given is told by the file's size, inode and times.

A directory with such an image has a notice, `EMBEDS_CLIENT_TOKEN`, from before the first byte of
the token is there until the last is gone; `refuse` is for whoever wants to publish a directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from katagpu.store import Store, writing
from katagpu.tree import EPOCH
from katagpu.vgpu import TOKEN_DIRECTORY

NAME = "client_configuration_token.tok"
STATE = ".embedded.json"
SCRATCH = ".embedding"
LARGEST = 1 << 16  # bytes; the servers' tokens have some 3000
MARKER = "embeds_client_token"  # in the manifest: what has it must not be published
IMAGES = ("image", "initrd")
NOTICE = "EMBEDS_CLIENT_TOKEN"
INDENT = "  "  # of a file's name in the notice, and of nothing else there
TEXT = """\
DO NOT PUBLISH. The files that are named below have the client configuration token of an NVIDIA
licence server in them, since the recipe says `embed_token: true`. It is a secret: who has one of
these files can take licences. The next build task of this guest without `embed_token` removes them.

"""


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """A file as it was left: what it was made from, its mark, and that of the token.

    `image`: has it the token in it? The manifest only speaks of it.
    """

    identity: str = ""
    mark: receipt.Mark = None
    token: receipt.Mark = None
    image: bool = True


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What was made last, by name."""

    files: dict[str, Left] = {}


def takes(artifact: Artifact) -> bool:
    """Does an artifact change with the token: is it an image, or the manifest?"""
    return (artifact.stage in IMAGES and artifact.output == "image") or (
        artifact.stage == "manifest")


def settled(directory: Path) -> bool:
    """Does nothing here say that a token is, or may be, in a file of this directory?"""
    return not any(os.path.lexists(directory / name) for name in (STATE, NOTICE))


def refuse(directory: Path) -> None:
    """Raise `UserError` if a file of this directory has a token in it: it must not be published."""
    if os.path.lexists(directory / NOTICE):
        names = ", ".join(_noted(directory)) or "a file there"
        raise UserError(f"{directory} must not be published: a client token is in {names}",
                        hint="say `embed_token: false` in the recipe and build again: this removes "
                             "them")


def withdraw(store: Store, directory: Path, clean: Callable[[str], bool]) -> list[str]:
    """Remove what has a token in it, for a recipe that embeds none.

    Only what still is as it was left is removed; another mode makes no difference. Returns the
    names of changed files that may have a token in them yet: the notice stays for those.
    `clean`: is the file of this name known to have none?
    """
    if settled(directory):
        return []
    with _alone(store, directory):
        removed, kept = set(), {}
        for name, left in _listed(directory).items():
            if _same(directory / name, left):
                (directory / name).unlink()
                log.note(f"{name} is removed: it was of a build with the client token in it")
                removed.add(name)
            elif left.image and not clean(name):
                kept[name] = left
        for path in directory.iterdir():
            if path.is_symlink() and str(path.readlink()) in removed:
                path.unlink()
        _record(directory, kept)
        return sorted(kept)


def _noted(directory: Path) -> list[str]:
    """The names in the notice."""
    try:
        text = (directory / NOTICE).read_text(errors="replace")
    except OSError:
        return []
    return [line.removeprefix(INDENT) for line in text.splitlines() if line.startswith(INDENT)]


def _listed(directory: Path) -> dict[str, Left]:
    """What is there of all that was made, by name; without a mark where only the notice has it."""
    try:
        files = msgspec.json.decode((directory / STATE).read_bytes(), type=State).files
    except (OSError, msgspec.DecodeError):
        files = {}
    files = {**{name: Left() for name in _noted(directory)}, **files}
    return {name: left for name, left in files.items() if os.path.lexists(directory / name)}


def _same(path: Path, left: Left) -> bool:
    """Is it the file that was left? Its inode's time does not count: chmod changes no content."""
    found = receipt.mark(path)
    return found is not None and left.mark is not None and found[:3] == left.mark[:3]


def _record(directory: Path, files: Mapping[str, Left]) -> None:
    """Write down what there is. The notice comes first, and goes last."""
    names = sorted(name for name, left in files.items() if left.image)
    if names:
        lines = "".join(f"{INDENT}{name}\n" for name in names)
        _replace(directory, NOTICE, (TEXT + lines).encode(), mode=0o644)
    if files:
        _replace(directory, STATE, msgspec.json.encode(State(files=dict(files))))
    else:
        (directory / STATE).unlink(missing_ok=True)
    if not names:
        (directory / NOTICE).unlink(missing_ok=True)


def _replace(directory: Path, name: str, data: bytes, *, mode: int | None = None) -> None:
    """Write a file at once; one that says the same stays, with its times."""
    path = directory / name
    if not path.is_symlink() and path.is_file() and path.read_bytes() == data and (
            mode is None or path.stat().st_mode & 0o777 == mode):
        return
    part = directory / f".{name}.{os.getpid()}.part"
    part.write_bytes(data)
    if mode is not None:
        part.chmod(mode)
    part.replace(path)


@contextmanager
def _alone(store: Store, directory: Path) -> Iterator[None]:
    """Be the only one who puts tokens into this directory or takes them away."""
    lock = f"embed-{keys.digest(str(directory))[:32]}"
    with store.lock(lock), writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{SCRATCH}*"):  # of a killed run: we have the lock
            sandbox.remove(left)
        yield


class Embedding:
    """The results of one guest that have the token in them, or speak of it."""

    def __init__(self, directory: Path, plan: Plan, token: Path) -> None:
        self.directory = directory
        self.plan = plan
        self.token = token

    def _identity(self, artifact: Artifact) -> str | None:
        action = self.plan.action(artifact.stage)
        return None if action is None else action.outputs[artifact.output].identity

    def _intact(self, artifact: Artifact, files: Mapping[str, Left]) -> bool:
        known = files.get(artifact.name)
        link = self.directory / (artifact.link or artifact.name)
        return (known is not None and known.identity == self._identity(artifact)
                and known.token is not None and known.token == receipt.mark(self.token)
                and known.mark == receipt.mark(self.directory / artifact.name)
                and (artifact.link is None or (
                    link.is_symlink() and str(link.readlink()) == artifact.name)))

    def complete(self, artifacts: Sequence[Artifact]) -> bool:
        """Are these there as they were left, with the token as it is now? Reads no image."""
        files = _listed(self.directory)
        named = sorted(name for name, left in files.items() if left.image)
        return named == _noted(self.directory) and all(
            self._intact(artifact, files) for artifact in artifacts)

    def write(self, artifacts: Sequence[Artifact]) -> None:
        """Make what is not there. The stages are made. Raises `UserError` for an unfit token."""
        with _alone(self.plan.store, self.directory):
            files, token = _listed(self.directory), receipt.mark(self.token)
            images = [artifact for artifact in artifacts if artifact.stage in IMAGES]
            try:
                for artifact in images:
                    if not self._intact(artifact, files):
                        with log.step(f"{artifact.name}: the client token is put in"):
                            self._image(artifact, files)
                        files[artifact.name] = self._left(artifact, token)
                for artifact in artifacts:
                    if artifact not in images and not self._intact(artifact, files):
                        self._manifest(artifact, images)
                        files[artifact.name] = self._left(artifact, token)
            finally:
                _record(self.directory, files)

    def _left(self, artifact: Artifact, token: receipt.Mark) -> Left:
        return Left(identity=self._identity(artifact) or "", token=token,
                    mark=receipt.mark(self.directory / artifact.name),
                    image=artifact.stage in IMAGES)

    def _image(self, artifact: Artifact, files: dict[str, Left]) -> None:
        """Pack an image with the token; `files` has it, without an identity, before it is there."""
        _record(self.directory, {artifact.name: Left(), **files})
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
            packed = image.pack(build, guest, _files(private / "packed", image.PACKED)).file
            packed.chmod(0o600)
            with packed.open("rb") as stream:
                os.fsync(stream.fileno())
            for name, left in files.items():
                if not left.image:  # the manifest is not true any more
                    files[name] = msgspec.structs.replace(left, identity="")
            files[artifact.name] = Left(mark=receipt.mark(packed))
            _record(self.directory, files)
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
        _replace(self.directory, artifact.name,
                 (json.dumps(content, indent=2) + "\n").encode())


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
