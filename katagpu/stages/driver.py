"""The NVIDIA driver from the distribution's packages: kernel modules, then user space.

The modules are compiled against the headers package of our kernel and nothing else of it, so that
no change to the root file system compiles them again.
"""

from __future__ import annotations

from pathlib import Path

from katagpu import nvconftest, patches
from katagpu.errors import StepError
from katagpu.lock import Lock
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


def modules(recipe: Recipe, lock: Lock, root: Path) -> Stage:
    """The kernel modules, stripped, at their place below usr/lib/modules."""
    driver = recipe.driver
    excluded = ["nvidia-peermem"]
    if not DISPLAYS & set(driver.capabilities):
        excluded += ["nvidia-drm", "nvidia-modeset"]
    inputs = {"toolchain": Ref(stage="toolchain", output="root"),
              "headers": Ref(stage="kernel", output="headers"),
              "release": Ref(stage="kernel", output="release")}
    if recipe.rootfs.extra_packages:
        inputs["build_layer"] = Ref(stage="build_layer", output="layer")
    return Stage(name="driver_modules", title=f"NVIDIA kernel modules ({driver.kernel_module})",
                 module=MODULE, make=make_modules, outputs={"modules": Kind.TREE},
                 options={"flavour": str(driver.kernel_module), "version": driver.version,
                          "excluded": excluded},
                 inputs=inputs, files=patch_files(root, TARGETS[driver.kernel_module]),
                 packages={"source": lock.group("driver_source")})


def _source(build: Build) -> Path:
    """The driver's source, unpacked: the one directory modules/<name> of the package's tarball."""
    (deb,) = build.debs("source")
    content = build.directory("driver-deb")
    run(["dpkg-deb", "--extract", deb, content], log=build.log)
    tarballs = sorted((content / "usr/src").glob("*.tar.*"))
    if len(tarballs) != 1:
        raise StepError(f"{deb} does not contain one tarball below usr/src")
    source = build.directory("driver-source")
    run(["tar", "--extract", "--no-same-owner", "--strip-components=2", "--file", tarballs[0],
         "--directory", source], log=build.log)
    return source


def make_modules(build: Build) -> None:
    """Plain make against the headers, then strip (an open nvidia.ko is 224 MB with debug info)."""
    release = build.blob("release").read_text()
    headers = build.directory("headers")
    run(["dpkg-deb", "--extract", build.blob("headers"), headers], log=build.log)
    place = f"/usr/src/linux-headers-{release}"
    source = _source(build)
    flavour = KernelModule(build.options["flavour"])
    patch(build, TARGETS[flavour], build.options["version"], headers / place.lstrip("/"), source)
    ccache, env = environment(build, "driver")
    layers = [build.tree("build_layer")] if "build_layer" in build.inputs else []
    results = build.store.root / "ccache/conftest" / nvconftest.key(
        source, *(output.identity for name, output in sorted(build.inputs.items())))
    build.facts["conftest_kept"] = build.ccache and nvconftest.restore(results, source)
    roots = [Root(lower=(*layers, build.tree("toolchain")), upper=build.directory("upper"))]
    binds = [Bind(source=headers / place.lstrip("/"), target=place),
             Bind(source=source, target=DRIVER, writable=True), *ccache]
    build.enter(["make", ARCH, f"-j{jobs()}", f"SYSSRC={place}", f"SYSOUT={place}", "CC=gcc",
                 f"NV_EXCLUDE_KERNEL_MODULES={' '.join(build.options['excluded'])}", "modules"],
                roots, binds=binds, env=env, cwd=DRIVER)
    if build.ccache:
        with writing(build.store.root):
            nvconftest.keep(source, results, build.scratch)
    built = sorted(source.glob("*.ko"))
    if not any(path.name == "nvidia.ko" for path in built):
        raise StepError(f"make succeeded, but there is no nvidia.ko; log: {build.log}")
    build.enter(["strip", "--strip-debug", "--", *(path.name for path in built)], roots,
                binds=binds, cwd=DRIVER)
    out = build.directory("out")
    target = out / "usr/lib/modules" / release / PLACE
    target.mkdir(parents=True)
    for path in built:
        path.chmod(0o644)
        path.rename(target / path.name)
    build.facts["modules"] = {path.name: path.stat().st_size for path in target.iterdir()}
    build.put_tree("modules", out)
