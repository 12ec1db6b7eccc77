"""What kernel and driver builds share: one compiler, one unpacked source, patches and stamps.

The tree is never packed: the stored source is the tarball, and one disposable unpacked copy is
shared read-only by all builds, which put their objects elsewhere (`O=`).
"""

from __future__ import annotations

from pathlib import Path

from katagpu import kconfig, keys, log, patches
from katagpu.run import PATH, run
from katagpu.sandbox import Bind, Root
from katagpu.stages.api import Build, Ref
from katagpu.tree import EPOCH

MODULE = "stages.kbuild"
ARCH = "ARCH=x86_64"  # always said: without it an allnoconfig base gives a 32-bit kernel
SOURCE = "/usr/src/linux"
AREA = "/katagpu/kernel"
BUILD = f"{AREA}/build"  # packages are written to its parent
TOOLCHAIN = Ref(stage="toolchain", output="root")
TARBALL = Ref(stage="kernel_source", output="tarball")
# What kbuild would stamp into the image (Documentation/kbuild/reproducible-builds.rst). The date is
# EPOCH, and the C locale keeps its words English.
STAMPS = {"KBUILD_BUILD_USER": "katagpu", "KBUILD_BUILD_HOST": "katagpu",
          "KBUILD_BUILD_VERSION": "1", "KBUILD_BUILD_TIMESTAMP": f"@{EPOCH}"}


def patch_files(root: Path, target: patches.Target) -> dict[str, Path]:
    """A target's series with its patches, as files of a stage."""
    directory = root / "patches" / target
    return {f"patches/{path.name}": path for path in sorted(directory.iterdir())}


def patch(build: Build, target: patches.Target, version: str, headers: Path, tree: Path) -> int:
    """Apply what the stage's series has for this version and these headers; how many patches."""
    series = patches.load_series(build.file("patches/series.yaml"))
    found = patches.select(series, target, version, headers)
    for chosen in found:
        log.note(f"{build.stage.name}: {chosen.path.name}: {chosen.reason}")
        patches.apply([chosen], tree, build.log)
    return len(found)


def tree(build: Build) -> Path:
    """The unpacked, patched source (read-only)."""
    mine = {name: path for name, path in build.stage.files.items() if name.startswith("patches/")}
    tarball = build.inputs["tarball"].identity
    state = keys.digest([tarball, keys.code(MODULE),
                         sorted(path.read_text() for path in mine.values())])

    def unpack(target: Path) -> None:
        target.mkdir()
        run(["tar", "--extract", "--no-same-owner", "--strip-components=1", "--file",
             build.blob("tarball"), "--directory", target], log=build.log)
        patch(build, patches.Target.KERNEL, kconfig.kernel_version(target), target, target)

    return build.unpacked(f"source-{state}", unpack)


def roots(build: Build) -> list[Root]:
    """The build root, with a layer of its own to write to."""
    return [Root(lower=(build.tree("toolchain"),), upper=build.directory("upper"))]


def environment(build: Build, cache: str) -> tuple[list[Bind], dict[str, str]]:
    """ccache through PATH, so that CC is `gcc` in every recorded command; and the stamps."""
    binds, env = build.compiler_cache(cache, build.inputs["toolchain"].identity)
    return binds, {**env, **STAMPS, "PATH": f"/usr/lib/ccache:{PATH}"}
