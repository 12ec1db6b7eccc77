"""The packed guest: a disk image in Kata's layout, or an initrd.

Made without root, loop devices or mounts on the host: the file system is made from the merged
layers inside the sandbox, and the partition table around it is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from katagpu import filesystem, log, newc, packing, verity
from katagpu.check import kernelconfig
from katagpu.check.facts import RootFormat
from katagpu.errors import StepError
from katagpu.keys import digest
from katagpu.sandbox import Root
from katagpu.schema import Compression, Image, ImageFormat, ImageModel, Recipe
from katagpu.stages import disks, layers
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, writing
from katagpu.tree import EPOCH

MODULE = "stages.image"
PACKED = (disks.FS, "disk.img", "tree.tar", "initrd")  # what `pack` writes without a hash tree


def image(recipe: Recipe) -> Stage:
    """The image of the recipe's format."""
    chosen = recipe.image
    kind = "initrd" if chosen.format is ImageFormat.INITRD else f"{chosen.format} disk image"
    if chosen.model is ImageModel.EXTENSION:
        kind += " of the base, without driver"
    return _stage(recipe, "image", kind, chosen)


def initrd(recipe: Recipe) -> Stage:
    """An initrd of the same guest, whatever the recipe's own format is.

    The checks of the root know that format alone, so this stage looks at the kernel itself.
    """
    chosen = Image(format=ImageFormat.INITRD, compression=Compression.ZSTD, level=None,
                   dax_header=False)
    return _stage(recipe, "initrd", "initrd", chosen,
                  {"config": Ref(stage="kernel_config", output="config")})


def _stage(recipe: Recipe, name: str, title: str, chosen: Image,
           more: Mapping[str, Ref] = MappingProxyType({})) -> Stage:
    lower = {**layers.chain(recipe), "rootfs": Ref(stage="rootfs", output="layer")}
    hashed: dict[str, bool] = {"verity": True} if chosen.verity else {}
    level = chosen.level if chosen.level is not None else disks.LEVELS[chosen.compression]
    return Stage(name=name, title=title, module=MODULE, make=make_image,
                 outputs={"image": Kind.FILE, "sizes": Kind.FILE, "files": Kind.FILE,
                          **dict.fromkeys(hashed, Kind.FILE)},
                 options={"format": str(chosen.format), "compression": str(chosen.compression),
                          "level": level, "dax_header": chosen.dax_header,
                          "layers": list(lower), **hashed},
                 inputs={**lower, **more, "tools": Ref(stage="imagetools", output="root")})


def make_image(build: Build) -> None:
    """Pack the merged layers; the identity of what is packed names UUID and disk signature."""
    if "config" in build.inputs:
        _must_be_readable(build)
    guest = Root(lower=layers.stack(build), special=False)
    with writing(build.store.root):
        packed = pack(build, guest, build.directory("packed"))
    files = build.scratch / "files"
    sizes = build.inside(packing.survey, [guest], target=str(files))
    build.put_file("files", files)
    build.put_bytes("sizes", json.dumps(sizes, indent=1).encode())
    if packed.verity is not None:
        build.put_bytes("verity", f"{packed.verity}\n".encode())
    build.put_file("image", packed.file)


def _must_be_readable(build: Build) -> None:
    """Raises `StepError` where the kernel cannot unpack what would be made."""
    compression = build.options["compression"]
    faults = list(kernelconfig.unreadable(
        kernelconfig.read(build.blob("config")), RootFormat(build.options["format"]),
        None if compression == Compression.NONE else compression))
    if faults:
        raise StepError("\n".join(f"{fault.where}: {fault.what}" for fault in faults),
                        hint=faults[0].cure)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """An image, and its hash tree where it has one."""

    file: Path
    verity: verity.Verity | None = None


def pack(build: Build, guest: Root, out: Path) -> Packed:
    """Pack a root in the image's format. Its content goes into `out` alone.

    The files there keep the mode that they have, should they be there before (`PACKED`).
    """
    identity = digest([build.inputs[name].identity for name in build.options["layers"]])
    packer = _initrd if build.options["format"] == ImageFormat.INITRD else _disk
    return packer(build, guest, identity, out)


def _disk(build: Build, guest: Root, identity: str, out: Path) -> Packed:
    dax, hashed = build.options["dax_header"], build.options.get("verity", False)
    make = {ImageFormat.EROFS: disks.erofs, ImageFormat.EXT4: disks.ext4}
    size = make[ImageFormat(build.options["format"])](build, guest, identity, out, dax=dax,
                                                      hashed=hashed)
    if not hashed:
        return Packed(file=disks.write(build, identity, size, out, dax=dax))
    target, known = disks.write_hashed(build, identity, size, out, dax=dax)
    return Packed(file=target, verity=known)


def _initrd(build: Build, guest: Root, identity: str, out: Path) -> Packed:
    """The merged tree as newc, compressed; `identity` has no place in the format."""
    del identity
    tar, archive = out / "tree.tar", out / "initrd"
    build.inside(packing.write_tar, [guest], target=str(tar))
    with archive.open("wb") as stream:
        lost = newc.write(lambda: tar.open("rb"), stream, time=EPOCH)
    for name in lost:
        log.warn(f"initrd: /{name} loses its capabilities, which newc cannot hold")
    if build.options["compression"] == "none":
        return Packed(file=archive)
    place = disks.OUT / "initrd"
    disks.tool(build, filesystem.pack(place, level=build.options["level"]), out)
    return Packed(file=out / filesystem.packed(place).name)
