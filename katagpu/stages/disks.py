"""File systems and disks as stages make them: in the image tools' root, around a merged tree.

A disk has one partition with the file system, or, `hashed`, a second one with its hash tree
(dm-verity); docs/image.md has the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from katagpu import disk, filesystem, verity
from katagpu.sandbox import Bind, Root
from katagpu.schema import Compression
from katagpu.stages.api import Build
from katagpu.tree import EPOCH

TREE = PurePosixPath("/katagpu/tree")
OUT = PurePosixPath("/katagpu/out")
FS, HASHES = "fs", "hashes"  # names in the directory of what is made
# docs/image.md has the measurements: higher levels cost much for little.
LEVELS = {Compression.ZSTD: 3, Compression.LZ4HC: 9, Compression.NONE: 0}


def tool(build: Build, argv: Sequence[str], out: Path, tree: Root | None = None) -> str:
    """Run a program of the image tools' root (input `tools`); what it says.

    It sees `out` at `OUT`, and the tree at `TREE`.
    """
    roots = [Root(lower=(build.tree("tools"),), upper=build.directory("tools"))]
    if tree is not None:
        roots.append(dataclasses.replace(tree, target=str(TREE)))
    result = build.enter(argv, roots, binds=[Bind(source=out, target=str(OUT), writable=True)],
                         capture=True)
    return result.stdout.decode()


def erofs(build: Build, tree: Root, identity: str, out: Path, *, dax: bool = False,
          hashed: bool = False) -> int:
    """Make the file system; the size of the disk that it needs, in bytes.

    Compressor and level are the stage's options.
    """
    compression = filesystem.Compression(
        compressor=filesystem.Compressor(build.options["compression"]),
        level=build.options["level"])
    tool(build, filesystem.erofs(TREE, OUT / FS, identity=filesystem.fs_uuid(identity), time=EPOCH,
                                 compression=compression, dax=dax), out, tree)
    return disk.erofs_size((out / FS).stat().st_size, dax=dax, hashed=hashed)


def ext4(build: Build, tree: Root, identity: str, out: Path, *, dax: bool = False,
         hashed: bool = False) -> int:
    """Make a file system that fills its partition; the size of its disk, in bytes."""
    need = filesystem.ext4_need(filesystem.TreeSize(**build.inside(filesystem.measure, [tree])))
    size = disk.ext4_size(need.size, dax=dax, hashed=hashed)
    room = disk.layout(size, dax=dax, hashed=hashed).partitions[0].size
    need = dataclasses.replace(need, size=room // filesystem.BLOCK * filesystem.BLOCK)
    tool(build, filesystem.ext4(TREE, OUT / FS, identity=filesystem.fs_uuid(identity), time=EPOCH,
                                size=need), out, tree)
    return size


def write(build: Build, identity: str, size: int, out: Path, *, dax: bool = False) -> Path:
    """The disk with the file system made before, in one partition."""
    target = out / "disk.img"
    disk.write(target, disk.layout(size, dax=dax), [out / FS],
               disk_signature=disk.signature(identity))
    return target


def write_hashed(build: Build, identity: str, size: int, out: Path, *,
                 dax: bool = False) -> tuple[Path, verity.Verity]:
    """The disk with the file system made before and its hash tree, which covers all of p1."""
    plan = disk.layout(size, dax=dax, hashed=True)
    data = plan.partitions[0].size
    with (out / FS).open("r+b") as stream:
        stream.truncate(data)
    (out / HASHES).touch()
    said = tool(build, verity.make(OUT / FS, OUT / HASHES, salt=verity.salt(identity),
                                   data_blocks=data // verity.BLOCK), out)
    target = out / "disk.img"
    disk.write(target, plan, [out / FS, out / HASHES], disk_signature=disk.signature(identity))
    return target, verity.parse(said)
