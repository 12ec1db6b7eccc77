"""The default guest with `toolkit: {mode: hook}`, from packages that are made here.

They hold the programs of the Go module, which are real, and an `nvidia-container-cli` of ours: that
one is not in the module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from katagpu import lock, request, resolve
from katagpu.context import Context
from katagpu.lock import Group, Lock
from katagpu.schema import Recipe, Repository, ToolkitMode, ToolkitSource
from katagpu.stages.api import Build
from tests.toyarchive import ToyArchive, served, signing_keys

RECORDING = b'#!/bin/sh\necho "$@" > /katagpu/record/call\n'
VERSION = "1.17.8-1"


def packages(build: Build, archive: ToyArchive, client: bytes) -> list[Path]:
    """NVIDIA's packages, with the Go module's programs and this client."""
    programs = {path.name: path.read_bytes()
                for path in (build.tree("toolkit") / "usr/bin").iterdir()}
    hook = programs.pop("nvidia-container-runtime-hook")
    return [
        archive.add_deb("libnvidia-container-tools", VERSION,
                        {"/usr/bin/nvidia-container-cli": client}),
        archive.add_deb("nvidia-container-toolkit-base", VERSION,
                        {f"/usr/bin/{name}": program for name, program in programs.items()}),
        archive.add_deb("nvidia-container-toolkit", VERSION,
                        {"/usr/bin/nvidia-container-runtime-hook": hook},
                        Depends=f"nvidia-container-toolkit-base (= {VERSION}), "
                                f"libnvidia-container-tools (>= {VERSION})")]


def hooked(recipe: Recipe, source: ToolkitSource, **fields: object) -> Recipe:
    """The recipe with another toolkit, in mode hook."""
    changes = {"source": source, "version": None, "mode": ToolkitMode.HOOK, **fields}
    return replace(recipe, toolkit=replace(recipe.toolkit, **changes))


def given(recipe: Recipe, debs: list[Path]) -> tuple[Recipe, tuple[lock.Deb, ...]]:
    """The packages as files; they need nothing, so their group of dependencies is empty."""
    return hooked(recipe, ToolkitSource.DEBS, debs=tuple(map(str, debs))), ()


def from_apt(recipe: Recipe, archive: ToyArchive, directory: Path,
             ) -> tuple[Recipe, tuple[lock.Deb, ...]]:
    """The packages from the repository, as the recipe's own request resolves them."""
    key = directory / "key.asc"
    key.write_text(archive.gpg("--armor", "--export", "test"))
    recipe = hooked(recipe, ToolkitSource.APT, version=VERSION, repository=Repository(
        uri=archive.base, signed_by=str(key), fingerprint=archive.fingerprint()))
    wanted = request.request(recipe, directory)
    only = replace(wanted, archives={lock.GUEST: ()}, groups={"base": Group(),
                                                "toolkit": wanted.groups["toolkit"]})
    found = resolve.resolve(only, directory / "apt").group("toolkit")
    assert {deb.package for deb in found} == {
        "nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container-tools"}
    return recipe, found


@contextlib.contextmanager
def toolkit(source: ToolkitSource, context: Context, build: Build, directory: Path, *,
            client: bytes = RECORDING) -> Iterator[tuple[Recipe, Lock]]:
    """A recipe with the toolkit from there, and its lock, as long as the repository is served."""
    known = context.locked()
    assert known is not None
    with signing_keys() as home:
        (directory / "archive").mkdir()
        archive = ToyArchive(directory / "archive", home, flat=True)
        debs = packages(build, archive, client)
        archive.publish()
        with served(archive):
            recipe, found = (given(context.recipe, debs) if source is ToolkitSource.DEBS
                             else from_apt(context.recipe, archive, directory))
            yield recipe, replace(known, groups={**known.groups, "toolkit": found})
