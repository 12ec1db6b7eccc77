"""`toolkit: {mode: hook}` from packages, and the guide's prestart hook.

Once its packages are given as files, once they are in a signed apt repository on the loopback, of
NVIDIA's form.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from katagpu import guest
from katagpu.context import Context
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.schema import ToolkitSource
from katagpu.stages.api import Build
from tests.hookguest import toolkit
from tests.toyarchive import missing

HOOK = "/usr/share/oci/hooks/prestart/nvidia-container-toolkit.sh"


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
