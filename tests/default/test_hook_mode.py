"""`toolkit: {mode: hook}` from packages, and the guide's prestart hook.

The packages are made here: the programs of the Go module, which are real, and an
`nvidia-container-cli` that records its call, since that one is not in the module. Once they are
given as files, once they are in a signed apt repository on the loopback, of NVIDIA's form.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import guest, lock, request, resolve
from katagpu.context import Context
from katagpu.lock import Group, Lock
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.schema import Recipe, Repository, ToolkitMode, ToolkitSource
from katagpu.stages.api import Build
from tests.toyarchive import ToyArchive, missing, served, signing_keys

HOOK = "/usr/share/oci/hooks/prestart/nvidia-container-toolkit.sh"
CLI = b'#!/bin/sh\necho "$@" > /katagpu/record/call\n'
VERSION = "1.17.8-1"


def packages(build: Build, archive: ToyArchive) -> list[Path]:
    """NVIDIA's packages, with the Go module's programs and the recording client."""
    programs = {path.name: path.read_bytes()
                for path in (build.tree("toolkit") / "usr/bin").iterdir()}
    hook = programs.pop("nvidia-container-runtime-hook")
    return [
        archive.add_deb("libnvidia-container-tools", VERSION,
                        {"/usr/bin/nvidia-container-cli": CLI}),
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
def toolkit(source: ToolkitSource, context: Context, build: Build, directory: Path,
            ) -> Iterator[tuple[Recipe, Lock]]:
    """A recipe with the toolkit from there, and its lock, as long as the repository is served."""
    known = context.locked()
    assert known is not None
    with signing_keys() as home:
        (directory / "archive").mkdir()
        archive = ToyArchive(directory / "archive", home, flat=True)
        debs = packages(build, archive)
        archive.publish()
        with served(archive):
            recipe, found = (given(context.recipe, debs) if source is ToolkitSource.DEBS
                             else from_apt(context.recipe, archive, directory))
            yield recipe, replace(known, groups={**known.groups, "toolkit": found})


def bundle(directory: Path) -> None:
    """An OCI bundle of a container that asks for all GPUs."""
    (directory / "rootfs").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({
        "ociVersion": "1.0.2", "root": {"path": "/katagpu/bundle/rootfs"},
        "process": {"args": ["true"], "cwd": "/",
                    "env": ["NVIDIA_VISIBLE_DEVICES=all",
                            "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]}}))


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")
@pytest.mark.parametrize("source", [ToolkitSource.DEBS, ToolkitSource.APT])
def test_hook_calls_the_client_with_katas_empty_environment(
        context: Context, guest_build: Build, tmp_path: Path, source: ToolkitSource) -> None:
    with toolkit(source, context, guest_build, tmp_path) as (recipe, locked):
        plan = Plan(guest.stages(recipe, locked, context.root), context.store, tmp_path / "logs")
        plan.ensure("rootfs")
    stage = plan.stages["image"]
    inputs = {}
    for role, ref in stage.inputs.items():
        action = plan.action(ref.stage)
        assert action is not None
        inputs[role] = action.outputs[ref.output]
    build = Build(stage, context.store, inputs, guest_build.scratch / f"hook-{source}",
                  tmp_path / "log")
    build.scratch.mkdir()
    root = Root(lower=tuple(build.tree(name) for name in reversed(build.options["layers"])),
                upper=build.directory("guest"))
    record, oci = build.directory("record"), build.directory("bundle")
    bundle(oci)
    binds = [Bind(source=record, target="/katagpu/record", writable=True),
             Bind(source=oci, target="/katagpu/bundle")]
    listed = build.enter(["stat", "--format=%F %a", HOOK], [root], binds=binds, capture=True)
    assert listed.stdout.decode().strip() == "regular file 755"
    state = json.dumps({"ociVersion": "1.0.2", "id": "c1", "status": "created", "pid": 1,
                        "bundle": "/katagpu/bundle", "annotations": {}})
    script = f"env -i {HOOK} prestart < /katagpu/bundle/state.json"
    (oci / "state.json").write_text(state)
    build.enter(["bash", "-c", script], [root], binds=binds)
    call = (record / "call").read_text()
    assert "configure" in call and "--device=all" in call and "--compute" in call
    assert "/katagpu/bundle/rootfs" in call
