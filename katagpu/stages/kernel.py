"""The guest's kernel, its modules, and its headers package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from katagpu import patches
from katagpu.check import elf
from katagpu.errors import StepError
from katagpu.lock import Lock
from katagpu.sandbox import Bind, Root
from katagpu.schema import Headers, Recipe
from katagpu.stages.api import Build, Ref, Stage, jobs
from katagpu.stages.kbuild import (
    ARCH,
    AREA,
    BUILD,
    SOURCE,
    STAMPS,
    TARBALL,
    TOOLCHAIN,
    environment,
    patch_files,
    roots,
    tree,
)
from katagpu.store import Kind
from katagpu.tree import EPOCH

MODULE = "stages.kernel"
OUT = "/katagpu/out"


def kernel(recipe: Recipe, lock: Lock, root: Path) -> Stage:
    """The kernel, its modules and its headers package."""
    version = lock.version("kernel_source", recipe.kernel.package or "")
    outputs = {name: Kind.FILE for name in ("vmlinuz", "vmlinux", "system_map", "symvers",
                                            "release", "headers")}
    inputs = {"toolchain": TOOLCHAIN, "tarball": TARBALL,
              "config": Ref(stage="kernel_config", output="config")}
    if recipe.kernel.headers is Headers.RPM:
        outputs["headers_rpm"] = Kind.FILE
        inputs["rpm_tools"] = Ref(stage="rpm_tools", output="layer")
    return Stage(name="kernel", title="kernel and headers", module=MODULE, make=make_kernel,
                 outputs={**outputs, "modules": Kind.TREE},
                 options={"stamps": STAMPS,
                          "package_version": version or f"{recipe.kernel.version}-1"},
                 inputs=inputs, files=patch_files(root, patches.Target.KERNEL))


def make_kernel(build: Build) -> None:
    """Build in a directory of fixed name, install the modules, and package the headers."""
    work, out = build.directory("area/build"), build.directory("out")
    (work / ".config").write_bytes(build.blob("config").read_bytes())
    ccache, env = environment(build, "kernel")
    binds = [Bind(source=tree(build), target=SOURCE),
             Bind(source=work.parent, target=AREA, writable=True),
             Bind(source=out, target=OUT, writable=True), *ccache]

    def make(*words: str, capture: bool = False) -> str:
        result = build.enter(["make", ARCH, f"-j{jobs()}", *words], roots(build), binds=binds,
                             env=env, cwd=BUILD, capture=capture)
        return result.stdout.decode()

    make("-C", SOURCE, f"O={BUILD}", "olddefconfig")
    before = build.blob("config").read_bytes()
    if (work / ".config").read_bytes() != before:
        raise StepError("the audited configuration changed when it was built",
                        hint="the kernel_config stage and the kernel do not see one compiler")
    make("bzImage", "modules")
    release = make("-s", "kernelrelease", capture=True).strip().splitlines()[-1]
    make("modules_install", f"INSTALL_MOD_PATH={OUT}/modules/usr", "INSTALL_MOD_STRIP=1",
         "DEPMOD=true")
    headers(build, work, binds, env, release)
    installed = out / "modules/usr/lib/modules" / release
    for link in ("build", "source"):
        (installed / link).unlink(missing_ok=True)
    # What binds these modules to this kernel where it has no MODVERSIONS; `check` compares it.
    (installed / "kernel-build-id").write_text(f"{elf.read_build_id(work / 'vmlinux')}\n")
    build.put_bytes("release", release.encode())
    for name, place in (("vmlinuz", "arch/x86/boot/bzImage"), ("vmlinux", "vmlinux"),
                        ("system_map", "System.map"), ("symvers", "Module.symvers")):
        build.put_file(name, work / place)
    build.put_tree("modules", out / "modules")
    build.facts["release"] = release


def headers(build: Build, work: Path, binds: Sequence[Bind], env: Mapping[str, str],
            release: str) -> None:
    """Package linux-headers with the kernel's own packaging.

    mkdebian and mkspec stamp their changelogs with date(1) (scripts/package): they get one of ours.
    """
    date = work.parent / "bin/date"
    date.parent.mkdir()
    date.write_text(f'#!/bin/sh\nexec /usr/bin/date --utc --date=@{EPOCH} "$@"\n')
    date.chmod(0o755)
    fixed = {**env, "PATH": f"{AREA}/bin:{env['PATH']}"}
    debian = {"KDEB_PKGVERSION": str(build.options["package_version"]), "KDEB_COMPRESS": "xz",
              "KDEB_CHANGELOG_DIST": "stable", "DEBFULLNAME": "katagpu",
              "DEBEMAIL": "katagpu@localhost", **fixed}
    # build-arch is what was built above; binary-headers alone makes the one package. Older kernels
    # (5.15, 6.1) have neither target: their bindeb-pkg makes every package.
    steps = [["make", ARCH, "run-command",
              "KBUILD_RUN_COMMAND=$(srctree)/scripts/package/mkdebian"],
             ["make", "-f", "debian/rules", "-o", "build-arch", "binary-headers"]]
    if "\nrun-command:" not in (tree(build) / "Makefile").read_text():
        steps = [["make", ARCH, f"-j{jobs()}", "bindeb-pkg"]]
    for argv in steps:
        build.enter(argv, roots(build), binds=binds, env=debian, cwd=BUILD)
    (deb,) = sorted(work.parent.glob(f"linux-headers-{release}_*.deb"))
    build.put_file("headers", deb)
    if "rpm_tools" in build.inputs:
        _headers_rpm(build, work, binds, fixed)


def _headers_rpm(build: Build, work: Path, binds: Sequence[Bind], env: Mapping[str, str]) -> None:
    """The kernel's binrpm-pkg: of its packages, `kernel-devel` is the one for module builds."""
    defines = {"_buildhost": "katagpu", "use_source_date_epoch_as_buildtime": "1",
               "clamp_mtime_to_source_date_epoch": "1", "source_date_epoch_from_changelog": "0"}
    options = " ".join(f"--define='{name} {value}'" for name, value in defines.items())
    tools = [Root(lower=(build.tree("rpm_tools"), build.tree("toolchain")),
                  upper=build.directory("rpm"))]
    build.enter(["make", ARCH, "binrpm-pkg", f"RPMOPTS={options}"], tools, binds=binds, env=env,
                cwd=BUILD)
    (rpm,) = sorted((work / "rpmbuild/RPMS").rglob("kernel-devel-*.rpm"))
    build.put_file("headers_rpm", rpm)
