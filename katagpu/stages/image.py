"""The packed guest: a disk image in Kata's layout, or an initrd.

Made without root, loop devices or mounts on the host: the file system is made from the merged
layers inside the sandbox, and the partition table around it is written here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path, PurePosixPath

from katagpu import disk, filesystem, log, newc, packing
from katagpu.keys import digest
from katagpu.sandbox import Bind, Root
from katagpu.schema import Compression, Image, ImageFormat, Recipe
from katagpu.stages.api import Build, Ref, Stage
from katagpu.stages.layers import chain, stack
from katagpu.store import Kind, writing
from katagpu.tree import EPOCH

MODULE = "stages.image"
TREE = PurePosixPath("/katagpu/tree")
OUT = PurePosixPath("/katagpu/out")
PACKED = ("fs", "disk.img", "tree.tar", "initrd")  # all files that `pack` writes itself
# docs/image.md has the measurements: higher levels cost much for little.
LEVELS = {Compression.ZSTD: 3, Compression.LZ4HC: 9, Compression.NONE: 0}


def image(recipe: Recipe) -> Stage:
    """The image of the recipe's format."""
    chosen = recipe.image
    kind = "initrd" if chosen.format is ImageFormat.INITRD else f"{chosen.format} disk image"
    return _stage(recipe, "image", kind, chosen)


def initrd(recipe: Recipe) -> Stage:
    """An initrd of the same guest, whatever the recipe's own format is."""
    return _stage(recipe, "initrd", "initrd", Image(
        format=ImageFormat.INITRD, compression=Compression.ZSTD, level=None, dax_header=False))


def _stage(recipe: Recipe, name: str, title: str, chosen: Image) -> Stage:
    layers = {**chain(recipe), "rootfs": Ref(stage="rootfs", output="layer")}
    level = chosen.level if chosen.level is not None else LEVELS[chosen.compression]
    return Stage(name=name, title=title, module=MODULE, make=make_image,
                 outputs={"image": Kind.FILE, "sizes": Kind.FILE, "files": Kind.FILE},
                 options={"format": str(chosen.format), "compression": str(chosen.compression),
                          "level": level, "dax_header": chosen.dax_header,
                          "layers": list(layers)},
                 inputs={**layers, "tools": Ref(stage="imagetools", output="root")})


def make_image(build: Build) -> None:
    """Pack the merged layers; the identity of what is packed names UUID and disk signature."""
    guest = Root(lower=stack(build), special=False)
    with writing(build.store.root):
        target = pack(build, guest, build.directory("packed"))
    files = build.scratch / "files"
    sizes = build.inside(packing.survey, [guest], target=str(files))
    build.put_file("files", files)
    build.put_bytes("sizes", json.dumps(sizes, indent=1).encode())
    build.put_file("image", target)


def pack(build: Build, guest: Root, out: Path) -> Path:
    """Pack a root in the image's format; where the result is. Its content goes into `out` alone.

    The files there keep the mode that they have, should they be there before (`PACKED`).
    """
    identity = digest([build.inputs[name].identity for name in build.options["layers"]])
    packers = {ImageFormat.EROFS: _erofs, ImageFormat.EXT4: _ext4, ImageFormat.INITRD: _initrd}
    return packers[ImageFormat(build.options["format"])](build, guest, identity, out)


def _tools(build: Build, guest: Root, out: Path) -> tuple[list[Root], list[Bind]]:
    roots = [Root(lower=(build.tree("tools"),), upper=build.directory("tools")),
             dataclasses.replace(guest, target=str(TREE))]
    return roots, [Bind(source=out, target=str(OUT), writable=True)]


def _erofs(build: Build, guest: Root, identity: str, out: Path) -> Path:
    roots, binds = _tools(build, guest, out)
    dax = build.options["dax_header"]
    compression = filesystem.Compression(
        compressor=filesystem.Compressor(build.options["compression"]),
        level=build.options["level"])
    build.enter(filesystem.erofs(TREE, OUT / "fs", identity=filesystem.fs_uuid(identity),
                                 time=EPOCH, compression=compression, dax=dax),
                roots, binds=binds)
    size = disk.erofs_size((out / "fs").stat().st_size, dax=dax)
    return _disk(build, identity, size, out)


def _ext4(build: Build, guest: Root, identity: str, out: Path) -> Path:
    roots, binds = _tools(build, guest, out)
    dax = build.options["dax_header"]
    need = filesystem.ext4_need(filesystem.TreeSize(**build.inside(filesystem.measure, [guest])))
    size = disk.ext4_size(need.size, dax=dax)
    room = disk.layout(size, dax=dax).partitions[0].size
    need = dataclasses.replace(need, size=room // filesystem.BLOCK * filesystem.BLOCK)
    build.enter(filesystem.ext4(TREE, OUT / "fs", identity=filesystem.fs_uuid(identity), time=EPOCH,
                                size=need), roots, binds=binds)
    return _disk(build, identity, size, out)


def _disk(build: Build, identity: str, size: int, out: Path) -> Path:
    plan = disk.layout(size, dax=build.options["dax_header"])
    target = out / "disk.img"
    disk.write(target, plan, [out / "fs"], disk_signature=disk.signature(identity))
    return target


def _initrd(build: Build, guest: Root, identity: str, out: Path) -> Path:
    """The merged tree as newc, compressed; `identity` has no place in the format."""
    del identity
    tar, archive = out / "tree.tar", out / "initrd"
    build.inside(packing.write_tar, [guest], target=str(tar))
    with archive.open("wb") as stream:
        lost = newc.write(lambda: tar.open("rb"), stream, time=EPOCH)
    for name in lost:
        log.warn(f"initrd: /{name} loses its capabilities, which newc cannot hold")
    if build.options["compression"] == "none":
        return archive
    place = OUT / "initrd"
    build.enter(filesystem.pack(place, level=build.options["level"]),
                [Root(lower=(build.tree("tools"),), upper=build.directory("tools"))],
                binds=[Bind(source=out, target=str(OUT), writable=True)])
    return out / filesystem.packed(place).name
