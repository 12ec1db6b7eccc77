"""The same guest packed otherwise: ext4, with a DAX header, and as an initrd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import disk, guest, verity
from katagpu.context import Context
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.schema import Compression, ImageFormat
from katagpu.stages import disks
from katagpu.stages.api import Build

Guest = tuple[Build, Root]


def packed(context: Context, stage: str = "image", output: str = "image", **image: Any) -> Path:
    """The blob of the image with these options, or of another output."""
    recipe = replace(context.recipe, image=replace(context.recipe.image, **image))
    found = context.locked()
    assert found is not None
    plan = Plan(guest.stages(recipe, found, context.root), context.store,
                context.directory / "logs")
    return context.store.blob(plan.ensure(stage).outputs[output].blob)


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


@pytest.mark.parametrize("options", [
    {}, {"dax_header": True},
    {"format": ImageFormat.EXT4, "compression": Compression.NONE, "level": None}],
    ids=["erofs", "erofs dax", "ext4"])
def test_a_hash_tree_is_verified_by_the_tool(context: Context, guest: Guest, tmp_path: Path,
                                             options: dict[str, Any]) -> None:
    image = packed(context, verity=True, **options)
    known = verity.read(packed(context, output="verity", verity=True, **options).read_text())
    data, hashes = disk.partitions(image)
    assert data.boot and known.data_blocks * verity.BLOCK == data.size
    places = []
    with image.open("rb") as source:
        for name, part in (("data", data), ("hashes", hashes)):
            source.seek(part.offset)
            (tmp_path / name).write_bytes(source.read(part.size))
            places.append(Bind(source=tmp_path / name, target=str(disks.OUT / name)))
    build, _root = guest
    tools = Root(lower=(build.tree("tools"),), upper=build.directory("verity"))
    argv = verity.check(disks.OUT / "data", disks.OUT / "hashes", known)
    assert build.enter(argv, [tools], binds=places, check=False).status == 0
    with (tmp_path / "data").open("r+b") as stream:
        stream.seek(-1, 2)  # the last byte of p1, which no file system has
        stream.write(b"x")
    assert build.enter(argv, [tools], binds=places, check=False).status != 0


def test_initrd_is_a_newc_archive_with_an_init(context: Context, guest: Guest) -> None:
    archive = packed(context, stage="initrd")
    said = tool(guest, archive, "sh", "-c",
                "zstd --decompress --stdout < /katagpu/image | cpio --list --verbose --quiet")
    lines = {line.split(None, 8)[8].split(" -> ")[0]: line for line in said.splitlines()}
    assert lines["init"].startswith("l")
    assert "usr/bin/nvidia-ctk" in lines
    assert lines["etc/resolv.conf"].startswith("-")
    assert any(name.endswith("/nvidia.ko") for name in lines)
