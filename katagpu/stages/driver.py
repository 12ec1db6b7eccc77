"""The NVIDIA driver's kernel modules.

The modules are compiled against the headers package of our kernel and nothing else of it, so that
no change to the root file system compiles them again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from katagpu import nvconftest, patches, provenance
from katagpu.errors import StepError
from katagpu.lock import Lock
from katagpu.nvpreflight import require_modules
from katagpu.run import run
from katagpu.sandbox import Bind, Root
from katagpu.schema import Capability, KernelModule, Recipe
from katagpu.stages.api import Build, Ref, Stage, jobs
from katagpu.stages.kbuild import ARCH, environment, patch, patch_files
from katagpu.store import Kind, writing

MODULE = "stages.driver"
DRIVER = "/katagpu/driver"
TARGETS = {KernelModule.OPEN: patches.Target.DRIVER_OPEN,
           KernelModule.CLOSED: patches.Target.DRIVER_CLOSED}
# Modules by need: peermem wants InfiniBand's core, drm the kernel's DRM, and modeset serves drm.
DISPLAYS = {Capability.GRAPHICS, Capability.DISPLAY}
PLACE = "kernel/drivers/video"  # where NVIDIA's own installer puts them


def excluded(recipe: Recipe) -> list[str]:
    """The modules that this guest does not need."""
    displays = DISPLAYS & set(recipe.driver.capabilities)
    return ["nvidia-peermem"] if displays else ["nvidia-peermem", "nvidia-drm", "nvidia-modeset"]


def modules(recipe: Recipe, lock: Lock, root: Path) -> Stage:
    """The modules from the distribution's source package."""
    return dataclasses.replace(plain(recipe, root), module=MODULE, make=make_modules,
                               packages={"source": lock.group("driver_source")})


def plain(recipe: Recipe, root: Path) -> Stage:
    """What module builds have in common, wherever the source comes from."""
    driver = recipe.driver
    inputs = {"toolchain": Ref(stage="toolchain", output="root"),
              "headers": Ref(stage="kernel", output="headers"),
              "release": Ref(stage="kernel", output="release")}
    if recipe.rootfs.extra_packages:
        inputs["build_layer"] = Ref(stage="build_layer", output="layer")
    return Stage(name="driver_modules", title=f"NVIDIA kernel modules ({driver.kernel_module})",
                 module=MODULE, make=make_modules, outputs={"modules": Kind.TREE},
                 options={"flavour": str(driver.kernel_module), "version": driver.version,
                          "excluded": excluded(recipe)},
                 inputs=inputs, files=patch_files(root, TARGETS[driver.kernel_module]))


def make_modules(build: Build) -> None:
    """Unpack the one directory modules/<name> of the package's tarball, and compile it."""
    (deb,) = build.debs("source")
    content = build.directory("driver-deb")
    run(["dpkg-deb", "--extract", deb, content], log=build.log)
    tarballs = sorted((content / "usr/src").glob("*.tar.*"))
    if len(tarballs) != 1:
        raise StepError(f"{deb} does not contain one tarball below usr/src")
    source = build.directory("driver-source")
    run(["tar", "--extract", "--no-same-owner", "--strip-components=2", "--file", tarballs[0],
         "--directory", source], log=build.log)
    compile_modules(build, source)


def compile_modules(build: Build, source: Path) -> None:
    """Plain make against the headers, then strip (an open nvidia.ko is 224 MB with debug info).

    `source` is written to. The modules become the output `modules`.
    """
    release = build.blob("release").read_text()
    headers = build.directory("headers")
    run(["dpkg-deb", "--extract", build.blob("headers"), headers], log=build.log)
    place = f"/usr/src/linux-headers-{release}"
    layers = [build.tree("build_layer")] if "build_layer" in build.inputs else []
    require_modules([headers, *layers, build.tree("toolchain")], release, place, build.scratch)
    flavour = KernelModule(build.options["flavour"])
    patch(build, TARGETS[flavour], build.options["version"], headers / place.lstrip("/"), source)
    ccache, env = environment(build, "driver")
    # the driver's own files are in the key of `nvconftest`
    others = (output.identity for name, output in sorted(build.inputs.items()) if name != "run")
    results = build.store.root / "ccache/conftest" / nvconftest.key(source, *others)
    kept = build.facts["conftest_kept"] = build.ccache and nvconftest.restore(results, source)
    roots = [Root(lower=(*layers, build.tree("toolchain")), upper=build.directory("upper"))]
    binds = [Bind(source=headers / place.lstrip("/"), target=place),
             Bind(source=source, target=DRIVER, writable=True), *ccache]
    started = time.time()
    build.enter(["make", ARCH, f"-j{jobs()}", f"SYSSRC={place}", f"SYSOUT={place}", "CC=gcc",
                 f"NV_EXCLUDE_KERNEL_MODULES={' '.join(build.options['excluded'])}", "modules"],
                roots, binds=binds, env=env, cwd=DRIVER)
    probing = 0.0 if kept else nvconftest.seconds(source, started)
    build.facts["times"] = {"conftest": round(probing, 1),
                            "compile": round(time.time() - started - probing, 1)}
    if build.ccache:
        with writing(build.store.root):
            nvconftest.keep(source, results, build.scratch)
    built = sorted(source.glob("*.ko"))
    if not any(path.name == "nvidia.ko" for path in built):
        raise StepError(f"make succeeded, but there is no nvidia.ko; log: {build.log}")
    build.enter(["strip", "--strip-debug", "--", *(path.name for path in built)], roots,
                binds=binds, cwd=DRIVER)
    put(build, built, release, headers / place.lstrip("/"))


def put(build: Build, built: Sequence[Path], release: str, headers: Path) -> None:
    """Make stripped modules the output `modules`, with the record of the headers' directory."""
    out = build.directory("modules")
    directory = out / "usr/lib/modules" / release
    target = directory / PLACE
    target.mkdir(parents=True)
    (directory / provenance.RECORD).write_text(provenance.record(headers))
    for path in built:
        path.chmod(0o644)
        path.rename(target / path.name)
    build.facts["modules"] = {path.name: path.stat().st_size for path in target.iterdir()}
    build.put_tree("modules", out)
