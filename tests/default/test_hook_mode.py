"""`toolkit: {source: debs, mode: hook}`: packages given as files, and the guide's prestart hook.

The packages are made here: the programs of the Go module, which are real, and an
`nvidia-container-cli` that records its call, since that one is not in the module.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import guest
from katagpu.context import Context
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.schema import ToolkitMode, ToolkitSource
from katagpu.stages.api import Build

HOOK = "/usr/share/oci/hooks/prestart/nvidia-container-toolkit.sh"
CLI = '#!/bin/sh\necho "$@" > /katagpu/record/call\n'


def make_deb(build: Build, directory: Path) -> Path:
    """A package with the toolkit's programs and the recording client."""
    tree = directory / "deb"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: toy-container-toolkit\nVersion: 1.0-1\nArchitecture: amd64\n"
        "Maintainer: nobody <nobody@localhost>\nDescription: programs for a test\n")
    (tree / "usr").mkdir()
    shutil.copytree(build.tree("toolkit") / "usr/bin", tree / "usr/bin")
    client = tree / "usr/bin/nvidia-container-cli"
    client.write_text(CLI)
    client.chmod(0o755)
    deb = directory / "toy-container-toolkit.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(tree), str(deb)], check=True,
                   stdout=subprocess.DEVNULL)
    return deb


def bundle(directory: Path) -> None:
    """An OCI bundle of a container that asks for all GPUs."""
    (directory / "rootfs").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({
        "ociVersion": "1.0.2", "root": {"path": "/katagpu/bundle/rootfs"},
        "process": {"args": ["true"], "cwd": "/",
                    "env": ["NVIDIA_VISIBLE_DEVICES=all",
                            "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]}}))


@pytest.mark.slow
def test_hook_calls_the_client_with_katas_empty_environment(
        context: Context, guest_build: Build, tmp_path: Path) -> None:
    deb = make_deb(guest_build, tmp_path)
    recipe = replace(context.recipe, toolkit=replace(
        context.recipe.toolkit, source=ToolkitSource.DEBS, version=None, debs=(str(deb),),
        mode=ToolkitMode.HOOK))
    known = context.locked()
    assert known is not None
    # The package depends on nothing, so its group of locked dependencies is empty.
    plan = Plan(guest.stages(recipe, replace(known, groups={**known.groups, "toolkit": ()}),
                             context.root), context.store, tmp_path / "logs")
    plan.ensure("rootfs")
    stage = plan.stages["image"]
    inputs = {}
    for role, ref in stage.inputs.items():
        action = plan.action(ref.stage)
        assert action is not None
        inputs[role] = action.outputs[ref.output]
    build = Build(stage, context.store, inputs, guest_build.scratch / "hook", tmp_path / "log")
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
