"""The guest's root file system: all layers merged, the guest's own files, indexes, and the checks.

The stage's output is the topmost layer of the chain (`stages.layers`). Nothing is
called built before the consistency checks have passed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from katagpu import agent, assembly, guestfiles, log, vgpu
from katagpu.check import elf
from katagpu.check import facts as facts_of
from katagpu.check.facts import Finding, Severity, raise_on
from katagpu.errors import UserError
from katagpu.sandbox import Bind, Root
from katagpu.schema import DriverSource, Recipe
from katagpu.stages.api import Build, Ref, Stage
from katagpu.stages.layers import chain, stack, toolkit_mode
from katagpu.store import Kind

MODULE = "stages.rootfs"
AGENT = "usr/bin/kata-agent"
KNOWN = {str(name) for name in facts_of.Capability}
# Debian has the libraries in a directory of their own, NVIDIA's installer among all others.
DRIVER_LAYOUTS = {DriverSource.DEBIAN: "debian", DriverSource.RUNFILE: "plain",
                  DriverSource.NONE: "plain"}


def rootfs(recipe: Recipe, root: Path) -> Stage:
    """The stage; its options are what the guest's files and the checks read of the recipe."""
    driver = recipe.driver
    files = {f"guest/{path.relative_to(root)}": path for path in guestfiles.digest_files(root)
             if path.is_file()}
    inputs = {**chain(recipe), "release": Ref(stage="kernel", output="release"),
              "config": Ref(stage="kernel_config", output="config"),
              "symvers": Ref(stage="kernel", output="symvers"),
              "vmlinux": Ref(stage="kernel", output="vmlinux")}
    if recipe.agent is not None:
        inputs["agent"] = Ref(stage="agent", output="agent")
    facts: dict[str, Any] = {"driver": None}
    if driver.source is not DriverSource.NONE:
        facts["driver"] = {"version": driver.version, "flavour": str(driver.kernel_module),
                           "capabilities": [str(name) for name in driver.capabilities
                                            if str(name) in KNOWN]}
    return Stage(name="rootfs", title="root file system and its checks", module=MODULE,
                 make=make_rootfs, outputs={"layer": Kind.TREE, "report": Kind.FILE},
                 options={**facts, "driver_layout": DRIVER_LAYOUTS[driver.source],
                          "layers": list(chain(recipe)), "toolkit": toolkit_mode(recipe),
                          "services": [str(name) for name in recipe.services],
                          "drm": "drm" in recipe.kernel.features,
                          "vgpu": vgpu.settings(recipe),
                          "format": str(recipe.image.format),
                          "compressor": compressor(recipe)},
                 inputs=inputs, files=files)


def compressor(recipe: Recipe) -> str | None:
    """The compressor of the packed image, as the kernel's config names it; None for none."""
    name = str(recipe.image.compression)
    return None if name == "none" else name


def make_rootfs(build: Build) -> None:
    """Lay the files, index modules and libraries, check, capture what was added."""
    upper = build.directory("upper")
    release = build.blob("release").read_text()
    merged = [Root(lower=stack(build), upper=upper)]
    plain = [Root(lower=stack(build), upper=upper, special=False)]
    build.inside(assembly.lay, plain, variables={
        "toolkit_mode": build.options["toolkit"], "drm": build.options["drm"],
        "services": build.options["services"],
        "hook_binary": "/usr/bin/nvidia-container-runtime-hook",
        "driver_layout": build.options["driver_layout"], "multiarch": "x86_64-linux-gnu",
        "driver_version": (build.options["driver"] or {}).get("version", ""),
        "vgpu": build.options["vgpu"]})
    binds = []
    if "agent" in build.inputs:
        binds.append(Bind(source=build.blob("agent"), target="/katagpu/kata-agent"))
        build.enter(["install", "-D", "-m", "755", "/katagpu/kata-agent", f"/{AGENT}"], merged,
                    binds=binds)
        build.enter(["rm", "-rf", "/katagpu"], merged)
    build.enter(["depmod", "--all", release], merged)
    build.enter(["ldconfig"], merged)
    findings = check(build, plain, release)
    build.put_bytes("report", _report(findings).encode())
    raise_on(findings)
    build.put_tree("layer", upper, overlay=True, final=True)


def check(build: Build, plain: list[Root], release: str) -> list[Finding]:
    """Run the checks in the namespace that owns the files."""
    found = build.inside(assembly.check, plain, facts={
        "kernel_release": release, "symvers": str(build.blob("symvers")),
        "kernel_config": str(build.blob("config")),
        "kernel_build_id": elf.read_build_id(build.blob("vmlinux")),
        "driver": build.options["driver"], "toolkit": build.options["toolkit"],
        "agent": "agent" in build.inputs, "vgpu": build.options["vgpu"] is not None,
        "root_format": build.options["format"],
        "compressor": build.options["compressor"]})
    findings = [Finding(check=item["check"], severity=Severity(item["severity"]),
                        what=item["what"], where=item["where"], cure=item["cure"])
                for item in found]
    for finding in findings:
        if finding.severity is Severity.WARNING:
            log.warn(f"rootfs: {finding}")
    return findings


def _report(findings: list[Finding]) -> str:
    lines = [f"{finding.severity}: {finding}" for finding in findings]
    return "\n".join(lines or ["every check passed"]) + "\n"


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
