"""What is in the guest: SPDX and CycloneDX documents, and the list of licences.

Read from the packed layers themselves; the recipe and the lock only say where it came from.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

from katagpu import agent, contents, licencelist, sbom, sbom_cyclonedx, sbom_spdx
from katagpu.lock import Lock
from katagpu.sandbox import Root
from katagpu.schema import DriverSource, ImageFormat, KernelSource, Recipe, ToolkitSource
from katagpu.stages import final, layers
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind

MODULE = "stages.sbom"
GROUPS = ("base", "extension_tools", "toolkit", "driver_needs", "driver_user", "services")
DISK = Ref(stage="extension_root", output="tree")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING", "license.txt")


def contents_of(recipe: Recipe, lock: Lock) -> Stage:
    """The stage; it reads the image, so that its documents name the image's digest."""
    guest = {**layers.chain(recipe), "rootfs": Ref(stage="rootfs", output="layer")}
    inputs = {**guest, "image": Ref(stage="image", output="image"),
              "tarball": Ref(stage="kernel_source", output="tarball"),
              "config": Ref(stage="kernel_config", output="config"),
              "release": Ref(stage="kernel", output="release"),
              "vmlinuz": Ref(stage="kernel", output="vmlinuz")}
    split = layers.split(recipe)
    if split:
        inputs |= {**layers.driver_chain(recipe), "disk": DISK,
                   "extension": Ref(stage="extension", output="image")}
    if recipe.toolkit.source is ToolkitSource.GO:
        inputs["go_modules"] = Ref(stage="toolkit_source", output="modules")
    if recipe.agent is not None:
        inputs["agent"] = Ref(stage="agent", output="agent")
    return Stage(name="sbom", title="SBOM and licences", module=MODULE, make=make_sbom,
                 outputs={"spdx": Kind.FILE, "cyclonedx": Kind.FILE, "licences": Kind.FILE},
                 options={**_facts(recipe, lock), "layers": list(guest),
                          "chain": list(layers.driver_chain(recipe)) if split else []},
                 inputs=inputs)


def _facts(recipe: Recipe, lock: Lock) -> dict[str, Any]:
    kernel, driver = recipe.kernel, recipe.driver
    source = f"{kernel.package} {lock.version('kernel_source', kernel.package or '')}" \
        if kernel.source is KernelSource.DEBIAN else f"kernel.org {kernel.version}"
    ending = "initrd" if recipe.image.format is ImageFormat.INITRD else "image"
    names = {"image": f"{final.image_file(recipe)}.{ending}"}
    if layers.split(recipe):
        names["extension"] = final.extension_file(recipe)
    grid = recipe.vgpu is not None or "-grid" in f"{driver.file or ''}{driver.url or ''}"
    return {
        "name": f"{recipe.name}-nvidia-gpu", "version": driver.version or "no-driver",
        "images": names, "distribution": [str(recipe.distribution.id), recipe.distribution.suite],
        "kernel": source, "driver": driver.version, "grid": grid,
        "flavour": None if driver.source is DriverSource.NONE else str(driver.kernel_module),
        "services": [str(name) for name in recipe.services],
        "debs": {f"{deb.package}={deb.version}": deb.sha256
                 for group in GROUPS for deb in lock.group(group)}}


def make_sbom(build: Build) -> None:
    """Read the guest, with the driver's disk mounted where there is one, and write the three."""
    options = build.options
    roots = [Root(lower=layers.stack(build), special=False)]
    place = None
    if "disk" in build.inputs:
        place = layers.EXTENSION_ROOT
        # The mount point is made in a layer on top.
        roots = [dataclasses.replace(roots[0], upper=build.directory("guest"))]
        roots.append(Root(lower=(build.tree("disk"),), target=place, special=False))
    found = build.inside(contents.survey, roots, disk=place)
    if place is not None:
        found["debs"] = _with_disk(build, found["debs"])
    identities = {name: output.identity for name, output in build.inputs.items()}
    known = {
        **options,
        "images": {file: identities[name] for name, file in options["images"].items()},
        "kernel": {"release": build.blob("release").read_text(), "source": options["kernel"],
                   "tarball": identities["tarball"], "config": identities["config"],
                   "vmlinuz": identities["vmlinuz"]}}
    if "agent" in build.inputs:
        known["agent"] = {"version": agent.version(build.blob("agent")) or "",
                          "sha256": identities["agent"]}
    document = sbom.document(known, found, _go_licences(build))
    build.facts["components"] = len(document.components)
    build.put_bytes("spdx", sbom_spdx.render(document))
    build.put_bytes("cyclonedx", sbom_cyclonedx.render(document))
    build.put_bytes("licences", licencelist.render(document, options))


def _with_disk(build: Build, base: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The base's packages, and those of the driver's chain that have a file on its disk."""
    names = sorted({path.name for path in build.tree("disk").rglob("*") if not path.is_dir()})
    chain = Root(lower=layers.stack(build, "chain"), special=False)
    more = build.inside(contents.owners, [chain], names=names)
    known = {(deb["name"], deb["architecture"]) for deb in base}
    return [*base, *(deb for deb in more if (deb["name"], deb["architecture"]) not in known)]


def _go_licences(build: Build) -> dict[str, str]:
    """The licences' texts of the toolkit's modules, out of their archives (go help goproxy)."""
    if "go_modules" not in build.inputs:
        return {}
    found = {}
    tree = build.tree("go_modules")
    for path in sorted(tree.rglob("@v/*.zip")):
        module = unescaped(str(path.parent.parent.relative_to(tree)))
        text = _licence(path, f"{module}@{unescaped(path.stem)}")
        if text is not None:
            found[f"{module}@{unescaped(path.stem)}"] = text
    return found


def _licence(path: Path, prefix: str) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        return next((archive.read(f"{prefix}/{name}").decode(errors="replace")
                     for name in LICENCES if f"{prefix}/{name}" in names), None)


def unescaped(path: str) -> str:
    """A module's path: an exclamation mark stands before what was a capital letter."""
    head, *rest = path.split("!")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)
