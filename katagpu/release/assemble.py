"""Make a release's directory: the same build, version and key give the same bytes.

It is made beside its place, and gets its name last. A version that is there already is never
changed: the same content is that release again, other content is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from katagpu import log, statement
from katagpu.embed import MARKER
from katagpu.errors import UserError
from katagpu.files import clone_or_copy, sync
from katagpu.release import layout, notes, provenance, pyz
from katagpu.release.layout import File, Release
from katagpu.release.signing import Signer
from katagpu.statement import Built

_ENDING = re.compile(r"((\.spdx|\.cdx|\.cyclonedx)?\.json"
                     r"|\.image|\.initrd|\.deb|\.rpm|\.toml|\.txt|\.xml|\.mtree)$")
LICENCE_CLIENT = "/nvidia-gridd "  # in files.mtree: only GRID drivers have it


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file of the build: its name is that below out/, `part` that among the manifest's parts."""

    path: Path
    link: str | None = None
    part: str | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is released. `built` is its provenance; no signer: unsigned."""

    recipe: str
    version: str
    pieces: Sequence[Piece]
    signer: Signer | None
    built: Built
    licensed: bool = False


def versioned(name: str, version: str) -> str:
    """A file's name in a release: its own with the version, before the ending where it has one."""
    found = _ENDING.search(name)
    stem = name[:found.start()] if found else name
    return f"{stem}-{version}{name[len(stem):]}"


def make(order: Order, top: Path, confirm: Callable[[], None] | None = None) -> Path:
    """Make the release below `top`, or find it made; its directory. Raises `UserError`.

    `confirm` is asked before it gets its name, and raises where it must not.
    """
    layout.version(order.version)
    place = top / f"{order.recipe}-{order.version}"
    known = notes.read(place) if place.exists() else None
    with _staging(top, place.name) as part:
        release = _files(order, part, _previous(top, order, known))
        (part / layout.RELEASE).write_bytes(layout.render(release))
        _notes(part, release, top, place)
        pyz.write(part / layout.INSTALLER)
        pyz.write_host(part / layout.HOST)
        _provenance(order, part, place)
        sums = layout.render_sums(_digests(part))
        _sign(order, part, place, sums)
        (part / layout.SUMS).write_bytes(sums)
        if confirm is not None:
            confirm()
        if known is not None:
            _must_be_the_same(place, sums, signed=order.signer is not None)
            log.say(f"release: {place} is made already, with the same bytes")
            return place
        for path in part.iterdir():
            path.chmod(0o755 if path.suffix == ".pyz" else 0o644)
            sync(path)
        part.chmod(0o755)
        sync(part)
        part.rename(place)
        sync(top)
    return place


@contextlib.contextmanager
def _staging(top: Path, name: str) -> Iterator[Path]:
    """A directory beside the release, gone afterwards where it was not renamed."""
    top.mkdir(parents=True, exist_ok=True)
    sweep(top, name)
    part = top / f".{name}.{os.getpid()}.part"
    part.mkdir()
    try:
        yield part
    except OSError as refusal:
        raise UserError(f"cannot make a release below {top}: {refusal.strerror or refusal}",
                        hint="nothing of it is left there") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sweep(top: Path, name: str) -> None:
    """Remove what runs that were killed left half-made of a release."""
    for left in top.glob(f".{name}.*.part"):
        pid = left.name.rsplit(".", 2)[1]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left)


def _previous(top: Path, order: Order, known: Release | None) -> str | None:
    """The version before; the notes of a release that is made already speak of the same one."""
    if known is not None:
        return known.previous
    versions = [version for version in made(top, order.recipe)
                if layout.order(version) < layout.order(order.version)]
    return versions[-1] if versions else None


def made(top: Path, recipe: str) -> list[str]:
    """The versions of a recipe's releases below a directory, the latest last."""
    found = []
    for path in top.glob(f"{recipe}-*/{layout.RELEASE}"):
        version = path.parent.name.removeprefix(f"{recipe}-")
        if layout.VERSION.fullmatch(version):
            found.append(version)
    return sorted(found, key=layout.order)


def _files(order: Order, part: Path, previous: str | None) -> Release:
    """Copy the build's files under their versioned names. They have to be of one build."""
    found: list[File] = []
    for piece in order.pieces:
        source = layout.plain_name(piece.path.name)
        target = part / layout.plain_name(versioned(source, order.version))
        with target.open("xb") as stream:
            clone_or_copy(piece.path, stream.fileno())
        found.append(File(name=target.name, source=source, sha256=layout.digest(target),
                          size=target.stat().st_size, media_type=layout.media_type(source),
                          link=piece.link, part=piece.part))
    release = Release(recipe=order.recipe, version=order.version, files=tuple(found),
                      previous=previous, licensed=order.licensed or _has_grid(part, found))
    _must_be_of_one_build(part, release)
    return release


def _has_grid(part: Path, files: Sequence[File]) -> bool:
    return any(LICENCE_CLIENT.encode() in (part / file.name).read_bytes()
               for file in files if file.source.endswith(".mtree"))


def _must_be_of_one_build(part: Path, release: Release) -> None:
    manifest = release.file(layout.MANIFEST)
    if manifest is None:
        raise UserError("the build has no manifest", hint="./doitw build_image")
    facts = json.loads((part / manifest.name).read_bytes())
    if facts.get(MARKER):
        raise UserError("this guest has a client token in it, which is a secret: it is never "
                        "released", hint="say `embed_token: false` in the recipe, build again, and "
                        "hand the token to the guest when it starts (docs/vgpu.md)")
    for file in release.files:
        if file.part is not None and facts["parts"][file.part]["sha256"] != file.sha256:
            raise UserError(f"{file.source} is not the file that the manifest names",
                            hint="./doitw build_image restores it")


def _notes(part: Path, release: Release, top: Path, place: Path) -> None:
    before = top / f"{release.recipe}-{release.previous}" if release.previous else None
    target = part / layout.NOTES
    if before is not None and not before.exists() and (place / layout.NOTES).exists():
        log.warn(f"{before} is gone: the notes stay as they were")
        shutil.copyfile(place / layout.NOTES, target)
    else:
        target.write_text(notes.text(part, release, before))


def _provenance(order: Order, part: Path, place: Path) -> None:
    content = statement.statement(_digests(part), order.built)
    payload = (json.dumps(content, indent=1) + "\n").encode()
    if order.signer is None:
        (part / f"provenance-{order.version}.json").write_bytes(payload)
        return
    name = f"provenance-{order.version}.intoto.jsonl"
    (part / name).write_bytes(provenance.envelope(payload, order.signer, _old(place / name)))


def _sign(order: Order, part: Path, place: Path, sums: bytes) -> None:
    if order.signer is None:
        return
    old = _old(place / layout.SIGNATURE)
    if old is None or _old(place / layout.SUMS) != sums or not order.signer.accepts(sums, old):
        old = order.signer.sign(sums)
    (part / layout.SIGNATURE).write_bytes(old)


def _old(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _digests(directory: Path) -> dict[str, str]:
    return {path.name: layout.digest(path) for path in sorted(directory.iterdir())}


def _sums(place: Path) -> dict[str, str]:
    try:
        return layout.parse_sums((place / layout.SUMS).read_bytes(), str(place))
    except OSError as refusal:
        raise UserError(f"{place / layout.SUMS} cannot be read: {refusal.strerror}",
                        hint=notes.AGAIN) from None


def damaged(place: Path) -> list[str]:
    """The files of a release that are not what its sums say, or are not in them.

    Raises `UserError` where it has no sums.
    """
    sums = _sums(place)
    found = {path.name: layout.digest(path) if path.is_file() else "no file"
             for path in sorted(place.iterdir())}
    for name in (layout.SUMS, layout.SIGNATURE):
        found.pop(name, None)
    return sorted(name for name in {**sums, **found} if sums.get(name) != found.get(name))


def _must_be_the_same(place: Path, sums: bytes, *, signed: bool) -> None:
    """Raise `UserError` where a version that is there has other content."""
    was = _sums(place)
    now = layout.parse_sums(sums, "this build")
    other = sorted(name for name in {**was, **now} if was.get(name) != now.get(name))
    if other or signed != (place / layout.SIGNATURE).exists():
        what = f"other are: {', '.join(other)}" if other else "one is signed, one is not"
        raise UserError(f"{place} is released already, with other content; {what}",
                        hint="a version is released once: take the next one")
    wrong = damaged(place)
    if wrong:
        raise UserError(f"{place} was changed since it was made: {', '.join(wrong)}",
                        hint="remove the directory, and release again: it becomes what it was")
