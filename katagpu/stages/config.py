"""The guest's kernel configuration, and its audit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from katagpu import kconfig, kconfig_spans, log, patches
from katagpu.sandbox import Bind
from katagpu.schema import Recipe
from katagpu.stages.api import Build, Stage
from katagpu.stages.kbuild import ARCH, BUILD, SOURCE, TARBALL, TOOLCHAIN, patch_files, roots, tree
from katagpu.store import Kind

MODULE = "stages.config"


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
        build.enter(argv, roots(build), binds=binds, cwd=BUILD, env={"ARCH": "x86_64"})
    fragments = [build.file(name) for name in names]
    findings = kconfig_spans.forgive(
        kconfig.audit(kconfig.load_fragments(fragments), work / ".config", source_tree, "x86_64",
                      kconfig.load_allowances(build.file("allow"))),
        fragments, kconfig.kernel_version(source_tree), source_tree, "x86_64")
    for finding in findings:
        if not finding.fatal:
            log.note(f"kernel_config: {finding.message}")
    kconfig.require(findings, build.file("allow").parent)
    build.put_file("config", work / ".config")
