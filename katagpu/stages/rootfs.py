"""The guest's root file system: all layers merged, the guest's own files, indexes, and the checks.

The stage's output is the topmost layer of the chain (`stages.layers`). Nothing is
called built before the consistency checks have passed. Where the driver has a disk of its own, this
root is made and checked without it, and `stages.extension` checks both together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from katagpu import agent, assembly, guestfiles, vgpu
from katagpu.check.facts import raise_on
from katagpu.errors import UserError
from katagpu.sandbox import Bind, Root
from katagpu.schema import DriverSource, Recipe
from katagpu.stages import consistency, layers
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind

MODULE = "stages.rootfs"
AGENT = "usr/bin/kata-agent"
# Debian has the libraries in a directory of their own, NVIDIA's installer among all others.
DRIVER_LAYOUTS = {DriverSource.DEBIAN: "debian", DriverSource.RUNFILE: "plain",
                  DriverSource.NONE: "plain"}


def rootfs(recipe: Recipe, root: Path) -> Stage:
    """The stage; its options are what the guest's files and the checks read of the recipe."""
    files = {f"guest/{path.relative_to(root)}": path for path in guestfiles.digest_files(root)
             if path.is_file()}
    inputs = {**layers.chain(recipe), **consistency.INPUTS}
    if recipe.agent is not None:
        inputs["agent"] = Ref(stage="agent", output="agent")
    split = layers.split(recipe)
    return Stage(name="rootfs", title="root file system and its checks", module=MODULE,
                 make=make_rootfs, outputs={"layer": Kind.TREE, "report": Kind.FILE},
                 options={"driver": None if split else layers.driver_facts(recipe),
                          "extension": layers.EXTENSION_ROOT if split else None,
                          "layers": list(layers.chain(recipe)),
                          "toolkit": layers.toolkit_mode(recipe),
                          "driver_layout": "plain" if split
                          else DRIVER_LAYOUTS[recipe.driver.source],
                          "services": [str(name) for name in recipe.services],
                          "drm": "drm" in recipe.kernel.features,
                          "vgpu": vgpu.settings(recipe),
                          "format": str(recipe.image.format),
                          "compressor": layers.compressor(recipe),
                          **layers.verity(recipe)},
                 inputs=inputs, files=files)


def make_rootfs(build: Build) -> None:
    """Lay the files, index modules and libraries, check, capture what was added."""
    upper = build.directory("upper")
    merged = [Root(lower=layers.stack(build), upper=upper)]
    plain = [Root(lower=layers.stack(build), upper=upper, special=False)]
    build.inside(assembly.lay, plain, variables=_variables(build))
    binds = []
    if "agent" in build.inputs:
        binds.append(Bind(source=build.blob("agent"), target="/katagpu/kata-agent"))
        build.enter(["install", "-D", "-m", "755", "/katagpu/kata-agent", f"/{AGENT}"], merged,
                    binds=binds)
        build.enter(["rm", "-rf", "/katagpu"], merged)
    build.enter(["depmod", "--all", build.blob("release").read_text()], merged)
    build.enter(["ldconfig"], merged)
    options = build.options
    findings = consistency.check(
        build, plain, driver=options["driver"], toolkit=options["toolkit"],
        agent="agent" in build.inputs, root_format=options["format"],
        compressor=options["compressor"], extension=options["extension"],
        verity=options.get("verity", False), vgpu=options["vgpu"] is not None)
    build.put_bytes("report", consistency.report(findings))
    raise_on(findings)
    build.put_tree("layer", upper, overlay=True, final=True)


def _variables(build: Build) -> dict[str, Any]:
    """What the guest's files are rendered with."""
    extension = build.options["extension"]
    return {"toolkit_mode": build.options["toolkit"], "drm": build.options["drm"],
            "hook_binary": "/usr/bin/nvidia-container-runtime-hook",
            "driver_root": extension or "",
            "driver_layout": build.options["driver_layout"],
            "services": build.options["services"], "vgpu": build.options["vgpu"],
            "multiarch": "x86_64-linux-gnu",
            "driver_version": (build.options["driver"] or {}).get("version", "")}


def agent_stage(recipe: Recipe, root: Path) -> Stage:
    """kata-agent, taken out of what the recipe names."""
    given = recipe.agent
    assert given is not None
    files: dict[str, Path] = {}
    downloads: dict[str, tuple[str, str | None]] = {}
    if given.release is not None:
        downloads["source"] = (given.release, given.sha256)
    else:
        files["source"] = root / (given.file or given.image or "")
    return Stage(name="agent", title="kata-agent", module=MODULE, make=make_agent,
                 outputs={"agent": Kind.FILE},
                 inputs={"tools": Ref(stage="imagetools", output="root")},
                 files=files, downloads=downloads)


def make_agent(build: Build) -> None:
    """Read the agent out of a file, a release tarball or a guest image, without mounting it."""
    source = build.file("source") if "source" in build.stage.files else build.download("source")

    def tool(argv: Any, *, source: Path, scratch: Path) -> bytes:
        return build.enter(argv, [Root(lower=(build.tree("tools"),),
                                       upper=build.directory("upper"))], capture=True,
                           binds=[Bind(source=source, target=str(source)),
                                  Bind(source=scratch, target=str(scratch), writable=True)]).stdout

    target = build.scratch / "kata-agent"
    found = agent.provide(source, target, scratch=build.directory("agent"), tool=tool)
    if found.interpreter is not None and "linux-x86-64" not in found.interpreter:
        raise UserError(f"kata-agent wants the loader {found.interpreter}, which no guest has",
                        hint="take the agent of a Kata release for x86_64")
    build.facts.update({"version": found.version, "origin": found.origin,
                        "needed": list(found.needed)})
    build.put_file("agent", target)
