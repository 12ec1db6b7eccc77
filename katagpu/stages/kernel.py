"""The guest's kernel: configuration with its audit, and the build with its headers.

The tree is never packed: the stored source is the tarball, and one disposable unpacked copy is
shared read-only by all builds, which put their objects elsewhere (`O=`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from katagpu import kconfig, log, patches
from katagpu.check import elf
from katagpu.errors import StepError
from katagpu.keys import digest
from katagpu.lock import Lock
from katagpu.run import PATH, run
from katagpu.sandbox import Bind, Root
from katagpu.schema import Headers, Recipe
from katagpu.stages.api import Build, Ref, Stage, jobs
from katagpu.store import Kind
from katagpu.tree import EPOCH

MODULE = "stages.kernel"
ARCH = "ARCH=x86_64"  # always said: without it an allnoconfig base gives a 32-bit kernel
SOURCE = "/usr/src/linux"
AREA = "/katagpu/kernel"
BUILD = f"{AREA}/build"  # packages are written to its parent
OUT = "/katagpu/out"
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


def patch(build: Build, target: patches.Target, version: str, headers: Path, tree: Path) -> None:
    """Apply what the stage's series has for this version and these headers."""
    series = patches.load_series(build.file("patches/series.yaml"))
    for chosen in patches.select(series, target, version, headers):
        log.note(f"{build.stage.name}: {chosen.path.name}: {chosen.reason}")
        patches.apply([chosen], tree, build.log)


def config(recipe: Recipe, root: Path) -> Stage:
    """Merge the fragments, and compare what was asked with what came out."""
    base = sorted((root / "kernel-configs/base").glob("*.conf"))
    features = [root / f"kernel-configs/features/{name}.conf" for name in recipe.kernel.features]
    own = [root / name for name in recipe.kernel.fragments]
    files = {str(path.relative_to(root)): path for path in (*base, *features, *own)}
    allow = root / "kernel-configs/allow.yaml"
    return Stage(name="kernel_config", title="kernel configuration and its audit", module=MODULE,
                 make=make_config, outputs={"config": Kind.FILE},
                 options={"fragments": list(files)},
                 inputs={"toolchain": TOOLCHAIN, "tarball": TARBALL},
                 files={**files, "allow": allow, **patch_files(root, patches.Target.KERNEL)})


def tree(build: Build) -> Path:
    """The unpacked, patched source (read-only)."""
    mine = {name: path for name, path in build.stage.files.items() if name.startswith("patches/")}
    tarball = build.inputs["tarball"].identity
    state = digest([tarball, sorted(path.read_text() for path in mine.values())])

    def unpack(target: Path) -> None:
        target.mkdir()
        run(["tar", "--extract", "--no-same-owner", "--strip-components=1", "--file",
             build.blob("tarball"), "--directory", target], log=build.log)
        patch(build, patches.Target.KERNEL, kconfig.kernel_version(target), target, target)

    return build.unpacked(f"source-{state}", unpack)


def _root(build: Build) -> list[Root]:
    return [Root(lower=(build.tree("toolchain"),), upper=build.directory("upper"))]


def make_config(build: Build) -> None:
    """allnoconfig with the fragments, then the audit. Raises when a request was dropped."""
    source_tree = tree(build)
    work = build.directory("build")
    names: Sequence[str] = build.options["fragments"]
    binds = [Bind(source=source_tree, target=SOURCE),
             Bind(source=work, target=BUILD, writable=True)]
    places = []
    for index, name in enumerate(names):
        place = f"/katagpu/fragments/{index:02d}-{Path(name).name}"
        binds.append(Bind(source=build.file(name), target=place))
        places.append(place)
    # -n: fragments are applied to allnoconfig while it is made. On a finished configuration each
    # symbol that a fragment makes visible would take its default, and hundreds are on by default.
    steps: list[list[str]] = [
        ["make", "-C", SOURCE, f"O={BUILD}", ARCH, "outputmakefile"],
        [f"{SOURCE}/scripts/kconfig/merge_config.sh", "-n", "-O", BUILD, *places],
        ["make", "-C", SOURCE, f"O={BUILD}", ARCH, "olddefconfig"],
    ]
    for argv in steps:
        build.enter(argv, _root(build), binds=binds, cwd=BUILD, env={"ARCH": "x86_64"})
    findings = kconfig.audit(
        kconfig.load_fragments(build.file(name) for name in names), work / ".config", source_tree,
        "x86_64", kconfig.load_allowances(build.file("allow")))
    for finding in findings:
        if not finding.fatal:
            log.note(f"kernel_config: {finding.message}")
    kconfig.require(findings, build.file("allow").parent)
    build.put_file("config", work / ".config")


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


def environment(build: Build, cache: str) -> tuple[list[Bind], dict[str, str]]:
    """ccache through PATH, so that CC is `gcc` in every recorded command; and the stamps."""
    binds, env = build.compiler_cache(cache, build.inputs["toolchain"].identity)
    return binds, {**env, **STAMPS, "PATH": f"/usr/lib/ccache:{PATH}"}


def make_kernel(build: Build) -> None:
    """Build in a directory of fixed name, install the modules, and package the headers."""
    work, out = build.directory("area/build"), build.directory("out")
    (work / ".config").write_bytes(build.blob("config").read_bytes())
    ccache, env = environment(build, "kernel")
    binds = [Bind(source=tree(build), target=SOURCE),
             Bind(source=work.parent, target=AREA, writable=True),
             Bind(source=out, target=OUT, writable=True), *ccache]

    def make(*words: str, capture: bool = False) -> str:
        result = build.enter(["make", ARCH, f"-j{jobs()}", *words], _root(build), binds=binds,
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
    build.enter(["make", ARCH, "run-command",
                 "KBUILD_RUN_COMMAND=$(srctree)/scripts/package/mkdebian"], _root(build),
                binds=binds, env=debian, cwd=BUILD)
    # build-arch is what was built above; binary-headers alone makes the one package.
    build.enter(["make", "-f", "debian/rules", "-o", "build-arch", "binary-headers"], _root(build),
                binds=binds, env=debian, cwd=BUILD)
    (deb,) = sorted(work.parent.glob(f"linux-headers-{release}_*.deb"))
    build.put_file("headers", deb)
    if "rpm_tools" in build.inputs:
        _headers_rpm(build, work, binds, fixed)


def _headers_rpm(build: Build, work: Path, binds: Sequence[Bind], env: Mapping[str, str]) -> None:
    """The kernel's binrpm-pkg: of its packages, `kernel-devel` is the one for module builds."""
    defines = {"_buildhost": "katagpu", "use_source_date_epoch_as_buildtime": "1",
               "clamp_mtime_to_source_date_epoch": "1", "source_date_epoch_from_changelog": "0"}
    options = " ".join(f"--define='{name} {value}'" for name, value in defines.items())
    roots = [Root(lower=(build.tree("rpm_tools"), build.tree("toolchain")),
                  upper=build.directory("rpm"))]
    build.enter(["make", ARCH, "binrpm-pkg", f"RPMOPTS={options}"], roots, binds=binds, env=env,
                cwd=BUILD)
    (rpm,) = sorted((work / "rpmbuild/RPMS").rglob("kernel-devel-*.rpm"))
    build.put_file("headers_rpm", rpm)
