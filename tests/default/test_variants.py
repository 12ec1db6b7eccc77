"""The same guest packed otherwise: ext4, with a DAX header, and as an initrd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import disk, guest
from katagpu.context import Context
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.schema import Compression, ImageFormat
from katagpu.stages.api import Build

Guest = tuple[Build, Root]


def packed(context: Context, stage: str = "image", **image: Any) -> Path:
    """The blob of the image with these options."""
    recipe = replace(context.recipe, image=replace(context.recipe.image, **image))
    found = context.locked()
    assert found is not None
    plan = Plan(guest.stages(recipe, found, context.root), context.store,
                context.directory / "logs")
    return context.store.blob(plan.ensure(stage).outputs["image"].blob)


def tool(guest: Guest, image: Path, *argv: str) -> str:
    build, _root = guest
    tools = Root(lower=(build.tree("tools"),), upper=build.directory("variants"))
    return build.enter(argv, [tools], binds=[Bind(source=image, target="/katagpu/image")],
                       capture=True).stdout.decode()


@pytest.mark.parametrize("dax", [False, True])
def test_ext4(context: Context, guest: Guest, dax: bool) -> None:
    image = packed(context, format=ImageFormat.EXT4, compression=Compression.NONE, level=None,
                   dax_header=dax)
    (partition,) = disk.partitions(image)
    assert partition.offset == (3 << 20 if dax else 1 << 20)
    assert disk.has_dax_header(image) is dax
    assert image.stat().st_size % (128 << 20) == 0
    place = f"/katagpu/image?offset={partition.offset}"
    tool(guest, image, "e2fsck", "-f", "-n", place)
    assert "Type: regular" in tool(guest, image, "debugfs", "-R", "stat /etc/resolv.conf", place)
    assert "Type: regular" in tool(guest, image, "debugfs", "-R", "stat /usr/bin/nvidia-ctk", place)


def test_erofs_with_a_dax_header(context: Context) -> None:
    image = packed(context, dax_header=True)
    (partition,) = disk.partitions(image)
    assert partition.offset == 3 << 20
    assert disk.fs_type(image, partition.offset) is disk.FsType.EROFS


def test_initrd_is_a_newc_archive_with_an_init(context: Context, guest: Guest) -> None:
    archive = packed(context, stage="initrd")
    said = tool(guest, archive, "sh", "-c",
                "zstd --decompress --stdout < /katagpu/image | cpio --list --verbose --quiet")
    lines = {line.split(None, 8)[8].split(" -> ")[0]: line for line in said.splitlines()}
    assert lines["init"].startswith("l")
    assert "usr/bin/nvidia-ctk" in lines
    assert lines["etc/resolv.conf"].startswith("-")
    assert any(name.endswith("/nvidia.ko") for name in lines)
