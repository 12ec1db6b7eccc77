"""NVIDIA's `.run` file: fetched, verified, read, and refused where it does not fit the guest.

Nothing of it is executed here. It is stored as it came; stages that need its content share one
disposable unpacked copy.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from katagpu import keys, log, nvbranches, nvoutcome, runfile, vgpu
from katagpu.download import Gone
from katagpu.errors import StepError, UserError
from katagpu.fetch import Job, fetch_all
from katagpu.nvcauses import Kind
from katagpu.run import run
from katagpu.schema import KernelModule, Recipe
from katagpu.stages import driver
from katagpu.stages.api import Build, Stage
from katagpu.stages.layers import RUN
from katagpu.store import Kind as Output
from katagpu.store import writing

MODULE = "stages.runfile"
# Where NVIDIA keeps drivers by version: for workstations, and for data centres.
DOWNLOADS = tuple(
    f"https://us.download.nvidia.com/{area}/{{version}}/NVIDIA-Linux-x86_64-{{version}}.run"
    for area in ("XFree86/Linux-x86_64", "tesla"))

# Where the source of each flavour of the modules lies in the package.
DIRECTORIES = {KernelModule.CLOSED: "kernel", KernelModule.OPEN: "kernel-open"}


def package(recipe: Recipe, root: Path) -> Stage:
    """The verified file, and what it says of itself."""
    given = recipe.driver
    version = given.version or ""
    options: dict[str, Any] = {"version": version, "sha256": given.sha256,
                               "vgpu": recipe.vgpu is not None}
    files: dict[str, Path] = {}
    downloads: Mapping[str, tuple[str, str | None]] = {}
    network = False
    if given.file is not None:
        files["run"] = root / given.file.format(version=version)
    elif given.url is not None and given.sha256 is not None:
        downloads = {"run": (given.url.format(version=version), given.sha256)}
    else:
        network = True
        patterns = DOWNLOADS if given.url is None else (given.url,)
        options["urls"] = [pattern.format(version=version) for pattern in patterns]
    return Stage(name="driver_package", title=f"NVIDIA driver {version} (.run)", module=MODULE,
                 make=make_package, outputs={"run": Output.FILE, "about": Output.FILE},
                 options=options, files=files, downloads=downloads, network=network)


def make_package(build: Build) -> None:
    """Get the file, verify it, and read its manifest."""
    path = build.directory("run") / "driver.run"
    with writing(build.store.root):
        if "run" in build.stage.files:
            shutil.copyfile(build.file("run"), path)
        elif "run" in build.stage.downloads:
            shutil.copyfile(build.download("run"), path)
        else:
            _fetch(build, path)
    digest = keys.file_digest(path)
    wanted = build.options["sha256"]
    if wanted is None:
        log.note(f"driver_package: no sha256 in the recipe; this file's is {digest}")
    elif digest != wanted:
        raise UserError(f"the driver's file has the SHA-256 {digest}, the recipe's is {wanted}",
                        hint="get the file again; if NVIDIA's page shows this digest, mend the "
                             "recipe")
    file = runfile.RunFile(path)
    file.verify()
    runfile.fits(file, version=build.options["version"])
    daemon = any(entry.name == vgpu.DAEMON for entry in file.manifest.entries)
    if build.options["vgpu"]:
        vgpu.require_grid(is_grid=daemon, package=file.header.targetdir)
    for line in file.manifest.notes:
        log.note(f"driver_package: {line}")
    about = {"version": file.manifest.version, "description": file.manifest.description,
             "modules": list(file.manifest.modules), "flavours": sorted(file.manifest.flavours),
             "label": file.header.label, "grid": daemon}
    build.facts.update({"sha256": digest, **about})
    build.put_bytes("about", json.dumps(about, indent=1, sort_keys=True).encode())
    build.put_file("run", path)


def _fetch(build: Build, path: Path) -> None:
    """Fetch from the first address that has the file."""
    urls = build.options["urls"]
    for number, url in enumerate(urls, 1):
        job = Job(url=url, what=f"NVIDIA driver {build.options['version']}")
        partial = build.store.root / "partial" / keys.digest(url)
        try:
            fetch_all([(job, partial)])
        except Gone:
            if number == len(urls):
                raise
            continue
        partial.replace(path)
        return


def unpacked(build: Build) -> Path:
    """The content of the input `run`, as a directory that must not be written to."""
    identity = build.inputs["run"].identity
    code = keys.digest(keys.code("runfile"))[:16]
    return build.unpacked(f"run-{code}-{identity}", lambda target: runfile.RunFile(
        build.blob("run")).extract(target))


def modules(recipe: Recipe, root: Path) -> Stage:
    """The kernel modules, compiled here and not by the installer."""
    plain = driver.plain(recipe, root)
    return dataclasses.replace(plain, module=MODULE, make=make_modules,
                               inputs={**plain.inputs, "run": RUN})


def make_modules(build: Build) -> None:
    """Compile the flavour's source. Raises `UserError` where the file has no such flavour."""
    flavour = KernelModule(build.options["flavour"])
    tree = unpacked(build)
    require_flavour(tree, flavour)
    source = tree / DIRECTORIES[flavour]
    copy = build.directory("area") / "driver-source"
    run(["cp", "--recursive", "--preserve=mode,timestamps", "--reflink=auto", source, copy],
        log=build.log)
    version = build.options["version"]
    try:
        driver.compile_modules(build, copy, lambda release: nvbranches.check_kernel(
            version, release, flavour))
    except StepError:
        verdict = nvoutcome.judge(nvoutcome.Outcome(
            status=1, log=build.log.read_text(errors="replace"), said="", version=version,
            release=build.blob("release").read_text(), flavour=flavour))
        if verdict.kind is Kind.UNKNOWN:
            raise
        known = verdict.error()
        known.what += f"\n  whole log: {build.log}"
        raise known from None


def require_flavour(tree: Path, flavour: KernelModule) -> None:
    """Raises `UserError` where the unpacked driver lacks the source of these modules."""
    there = [name for name, directory in DIRECTORIES.items()
             if (tree / directory / "Kbuild").exists()]
    if flavour not in there:
        raise UserError(f"this driver has no {flavour} kernel modules", hint=(
            f"use `kernel_module: {there[0]}`; open ones exist since branch 515" if there
            else "it has none at all: is it a driver for Linux?"))
