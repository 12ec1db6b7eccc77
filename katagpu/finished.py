"""A finished build as data, read from what it left: its manifest, and what the manifest names.

The store is not asked: a build that came from elsewhere, a release, reads the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from katagpu import filelist, kconfig, parameters
from katagpu.errors import UserError
from katagpu.filelist import Entry
from katagpu.keys import file_digest
from katagpu.release import layout
from katagpu.stages.layers import EXTENSION_ROOT

MANIFEST = "manifest.json"
SIZES = "sizes.json"
FILES = "files.mtree"
DISK_SIZES = "sizes-extension.json"
DISK_FILES = "files-extension.mtree"
SCHEMA = 1


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a build; `size` in bytes."""

    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a comparison needs of every manifest; `packages` are versions by name."""

    schema: int
    recipe: str
    kernel_release: Annotated[str, msgspec.Meta(pattern=r"^[^/\s]+\Z")]
    packages: dict[str, str]
    parts: dict[str, Part]
    checks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A build. What it does not have is None, and `lacks` says why.

    `facts` is the whole manifest, `config` the kernel's symbols that are set (without `CONFIG_`),
    `sizes` bytes by part of the guest, `files` the guest's files by path. Where the driver has a
    disk of its own, both are of base and disk, its files at the paths where the guest mounts it.
    """

    name: str
    manifest: Manifest
    facts: Mapping[str, Any]
    config: Mapping[str, str] | None = None
    sizes: Mapping[str, int] | None = None
    files: Mapping[str, Entry] | None = None
    lacks: tuple[str, ...] = ()


def read(place: Path, name: str) -> Finished:
    """The build in a directory, or that of a manifest, called `name` in what is said of it.

    A directory, that of a release too, must have all that its manifest names; beside a manifest
    that is named itself, what is there is read. Raises `UserError`.
    """
    alone = not place.is_dir()
    names = {} if alone else _names(place)
    path = place if alone else place / names.get(MANIFEST, MANIFEST)
    manifest, facts = _manifest(path, name)
    lacks: list[str] = []

    def part(key: str, file: str, parse: Callable[[Path], Any]) -> Any:
        known, found = manifest.parts.get(key), path.parent / names.get(file, file)
        if not found.is_file():
            if known is not None and not alone:
                raise UserError(f"{name} lacks {file}, which its manifest names",
                                hint="./doitw build_image restores it, with the parameters of "
                                     "that build")
            lacks.append(f"{name} has no {file}" if known is not None
                         else f"{name} is of a version that wrote no {file}")
            return None
        if known is not None and file_digest(found) != known.sha256:
            raise UserError(f"{found} is not the file that the manifest of {name} names: it was "
                            "changed, or is of another build", hint="./doitw build_image restores "
                            "it, with the parameters of that build")
        try:
            return parse(found)
        except (ValueError, msgspec.MsgspecError) as bad:
            raise UserError(f"{found} is damaged: {bad}") from None

    config = part("kernel_config", f"config-{manifest.kernel_release}", kconfig.read_config)
    sizes, files = part("sizes", SIZES, _sizes), part("files", FILES, _files)
    if "extension" in manifest.parts:
        sizes = _added(sizes, part("extension_sizes", DISK_SIZES, _sizes))
        files = _mounted(files, part("extension_files", DISK_FILES, _files))
    return Finished(name=name, manifest=manifest, facts=facts, config=config, sizes=sizes,
                    files=files, lacks=tuple(lacks))


def _names(place: Path) -> dict[str, str]:
    """A release's own names of files, by those that they have below out/."""
    path = place / layout.RELEASE
    if not path.is_file():
        return {}
    return {file.source: file.name for file in layout.parse(path.read_bytes(), str(place)).files}


def _added(base: dict[str, int] | None, disk: dict[str, int] | None) -> dict[str, int] | None:
    """Bytes by part of base and driver's disk; a half of them would look like a change."""
    if base is None or disk is None:
        return None
    return {name: base.get(name, 0) + disk.get(name, 0) for name in {**base, **disk}}


def _mounted(base: dict[str, Entry] | None, disk: dict[str, Entry] | None,
             ) -> dict[str, Entry] | None:
    """The files of the guest with its driver's disk mounted."""
    if base is None or disk is None:
        return None
    place = EXTENSION_ROOT.lstrip("/")
    found = (replace(entry, path=f"{place}/{path}".rstrip("/")) for path, entry in disk.items())
    return {**base, **{entry.path: entry for entry in found}}


def _manifest(path: Path, name: str) -> tuple[Manifest, dict[str, Any]]:
    hint = "a build is a directory below out/, or a manifest.json"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{name} is no build: it has no {MANIFEST}", hint=hint) from None
    except OSError as refusal:
        raise UserError(f"{name} is no build: {refusal.strerror}", hint=hint) from None
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        facts: dict[str, Any] = json.loads(data)
    except (ValueError, msgspec.MsgspecError) as bad:
        raise UserError(f"{path} is not a manifest: {bad}", hint="./doitw build_image restores it, "
                        "with the parameters of that build") from None
    if manifest.schema != SCHEMA:
        raise UserError(f"{path} is a manifest of schema {manifest.schema}, and here is "
                        f"{SCHEMA}", hint="compare with the katagpu that made it")
    return manifest, facts


def _sizes(path: Path) -> dict[str, int]:
    return msgspec.json.decode(path.read_bytes(), type=dict[str, int])


def _files(path: Path) -> dict[str, Entry]:
    return {entry.path: entry for entry in filelist.parse(path.read_bytes())}


def find(word: str, root: Path, recipe: str) -> tuple[Path, str]:
    """The build that a word means, and its name: one below out/ or out/<recipe>/, or a path.

    Paths start where the command was typed, or at `root`. Raises `UserError`, which lists the
    builds that are there.
    """
    typed = parameters.path(word)
    ours = (root / word, root / "out" / word, root / "out" / recipe / word)
    for place in (typed, *ours) if word.startswith((".", "~")) else (*ours, typed):
        if place.exists():
            known, top = place.resolve(), (root / "out").resolve()
            return place, str(known.relative_to(top) if top in known.parents else word)
    there = builds(root)
    if not there:
        raise UserError(f"there is no build {word!r}, and none below out/",
                        hint="./doitw build_image makes one")
    raise UserError(f"there is no build {word!r}; paths start at {parameters.caller()}",
                    hint=f"below out/ are: {', '.join(there)}")


def builds(root: Path) -> list[str]:
    """The builds below out/, as `recipe/driver`."""
    return sorted(str(path.parent.relative_to(root / "out"))
                  for path in (root / "out").glob(f"*/*/{MANIFEST}"))
