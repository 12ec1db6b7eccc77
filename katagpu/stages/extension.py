"""The driver's disk: its root picked out of the driver's layers, checked with the base, packed.

Two stages: a change of how the disk is packed does not check again, and neither is read by a stage
of the base, so that a new driver makes nothing but this.
"""

from __future__ import annotations

import json

from katagpu import extension, packing
from katagpu.check.facts import raise_on
from katagpu.sandbox import Bind, Root
from katagpu.schema import Compression, DriverSource, Recipe
from katagpu.stages import consistency, disks, layers
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, writing

MODULE = "stages.extension"
PLACE = "/katagpu/extension"
BASE = ("base", "kernel_modules")  # what the driver's chain shares with the base image's


def root(recipe: Recipe) -> Stage:
    """The disk's root; its inputs are all that a guest with the disk has in it."""
    driver, base = layers.driver_chain(recipe), layers.chain(recipe)
    guest = {**base, "rootfs": Ref(stage="rootfs", output="layer")}
    compressor = layers.extension_compression(recipe)
    return Stage(name="extension_root", title="root of the driver's disk, and the checks with it",
                 module=MODULE, make=make_root,
                 outputs={"tree": Kind.TREE, "report": Kind.FILE},
                 options={"layers": list(driver), "guest": list(guest),
                          "place": layers.EXTENSION_ROOT, "whole": _whole(recipe),
                          "driver": layers.driver_facts(recipe),
                          "toolkit": layers.toolkit_mode(recipe), "agent": recipe.agent is not None,
                          "compressor": None if compressor == "none" else compressor},
                 inputs={**driver, **guest, **consistency.INPUTS})


def _whole(recipe: Recipe) -> list[str]:
    """The layers of which every file is on the disk: what a `.run` file's manifest chose."""
    return ["driver_user"] if recipe.driver.source is DriverSource.RUNFILE else []


def make_root(build: Build) -> None:
    """Harvest, index libraries and modules, and check the guest with the disk mounted."""
    release = build.blob("release").read_text()
    out = build.directory("extension")
    merged = Root(lower=layers.stack(build), special=False)
    with writing(build.store.root):
        build.facts["harvested"] = build.inside(
            extension.harvest, [merged], out=str(out), release=release,
            layers=[str(build.tree(name)) for name in build.options["layers"] if name not in BASE],
            whole=[str(build.tree(name)) for name in build.options["whole"]])
    tools = [Root(lower=layers.stack(build, "guest"), upper=build.directory("tools"))]
    binds = [Bind(source=out, target=PLACE, writable=True)]
    # The links that programs ask for, then the cache; -n makes no cache, and -r sees no other root.
    build.enter(["ldconfig", "-n", f"{PLACE}/{extension.LIBRARIES}"], tools, binds=binds)
    build.enter(["ldconfig", "-r", PLACE], tools, binds=binds)
    build.enter(["rm", "-rf", f"{PLACE}/var/cache"], tools, binds=binds)  # ldconfig's own
    build.enter(["depmod", "--basedir", PLACE, release], tools, binds=binds)
    guest = Root(lower=layers.stack(build, "guest"), upper=build.directory("guest"), special=False)
    disk = Root(lower=(out,), target=build.options["place"], special=False)
    options = build.options
    findings = consistency.check(
        build, [guest, disk], driver=options["driver"], toolkit=options["toolkit"],
        agent=options["agent"], vgpu=False, root_format="erofs",
        compressor=options["compressor"], extension=options["place"])
    build.put_bytes("report", consistency.report(findings))
    raise_on(findings)
    build.put_tree("tree", out)


def disk(recipe: Recipe) -> Stage:
    """The disk: erofs with its hash tree, and the parameters by which the guest verifies it."""
    compression = Compression(layers.extension_compression(recipe))
    same = compression is recipe.image.compression
    level = recipe.image.level if same and recipe.image.level is not None \
        else disks.LEVELS[compression]
    return Stage(name="extension", title="disk with the driver", module=MODULE, make=make_disk,
                 outputs={"image": Kind.FILE, "verity": Kind.FILE, "sizes": Kind.FILE,
                          "files": Kind.FILE},
                 options={"compression": str(compression), "level": level},
                 inputs={"tree": Ref(stage="extension_root", output="tree"),
                         "tools": Ref(stage="imagetools", output="root")})


def make_disk(build: Build) -> None:
    """Pack the tree; its identity names UUID, salt and disk signature."""
    tree = Root(lower=(build.tree("tree"),), special=False)
    identity = build.inputs["tree"].identity
    out = build.directory("packed")
    with writing(build.store.root):
        size = disks.erofs(build, tree, identity, out, hashed=True)
        target, known = disks.write_hashed(build, identity, size, out)
    files = build.scratch / "files"
    sizes = build.inside(packing.survey, [tree], target=str(files))
    build.put_file("files", files)
    build.put_bytes("sizes", json.dumps(sizes, indent=1).encode())
    build.put_bytes("verity", f"{known}\n".encode())
    build.put_file("image", target)
