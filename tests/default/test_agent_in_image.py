"""`agent:` in its forms, through the real stages: a file, and an image read without mounting."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from katagpu import guest
from katagpu.context import Context
from katagpu.plan import Plan
from katagpu.schema import Agent, Compression, ImageFormat
from katagpu.stages.api import Build


def plan_with(context: Context, agent: Agent, logs: Path, format_: ImageFormat) -> Plan:
    """The default guest with an agent, packed in this format."""
    packing = Compression.ZSTD if format_ is ImageFormat.EROFS else Compression.NONE
    recipe = replace(context.recipe, agent=agent, image=replace(
        context.recipe.image, format=format_, compression=packing, level=None))
    found = context.locked()
    assert found is not None
    return Plan(guest.stages(recipe, found, context.root), context.store, logs)


def test_agent_from_a_file_and_out_of_the_image_that_has_it(
        context: Context, guest_build: Build, tmp_path: Path) -> None:
    # Any program of the guest's own distribution: what is checked is the way that it takes.
    program = tmp_path / "kata-agent"
    program.write_bytes((guest_build.tree("base") / "usr/bin/true").read_bytes())
    given = None
    for format_ in (ImageFormat.EROFS, ImageFormat.EXT4):
        plan = plan_with(context, Agent(file=str(program)), tmp_path / "logs", format_)
        image = plan.ensure("image").outputs["image"]
        given = plan.ensure("agent").outputs["agent"]
        packed = tmp_path / f"{format_}.image"
        context.store.copy_out(image.blob, packed)
        again = plan_with(context, Agent(image=str(packed)), tmp_path / "logs", format_)
        assert again.ensure("agent").outputs["agent"] == given
        # The same agent by another way: nothing after it is made again.
        assert again.reason("image") == "hit"
    assert given is not None
    without = context.plan.action("rootfs")
    with_agent = plan.action("rootfs")
    assert without is not None and with_agent is not None
    assert without.outputs["layer"] != with_agent.outputs["layer"]
