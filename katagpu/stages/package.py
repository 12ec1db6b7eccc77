"""NVIDIA's `.run` file: fetched, verified, read, and refused where it does not fit the guest.

Nothing of it is executed here. It is stored as it came.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from katagpu import driverfile, keys, log, nvbranches, patches, runfile, vgpu
from katagpu.errors import UserError
from katagpu.lock import Lock
from katagpu.schema import KernelModule, Recipe
from katagpu.stages.api import RECIPE, Build, Stage
from katagpu.stages.driver import TARGETS
from katagpu.store import Kind, writing

MODULE = "stages.package"


def package(recipe: Recipe, lock: Lock, root: Path) -> Stage:
    """The verified file, and what it says of itself.

    Raises `UserError` for a driver that does not build for the kernel, before anything is fetched.
    """
    given = recipe.driver
    version = given.version or ""
    target = TARGETS[given.kernel_module]
    series = patches.load_series(root / "patches" / target / "series.yaml")
    kernel = lock.version("kernel_source", recipe.kernel.package or "") or recipe.kernel.version
    if kernel is not None:
        nvbranches.check_kernel(version, kernel, given.kernel_module,
                                patches.lifted(series, target, version))
    options: dict[str, Any] = {"version": version, "sha256": given.sha256,
                               "vgpu": recipe.vgpu is not None,
                               "flavour": str(given.kernel_module),
                               "capabilities": sorted(str(name) for name in given.capabilities)}
    files: dict[str, Path] = {}
    downloads: Mapping[str, tuple[str, str | None]] = {}
    if given.file is not None:
        files["run"] = root / given.file.replace("{version}", version)
    elif given.url is not None and given.sha256 is not None:
        downloads = {"run": (given.url.replace("{version}", version), given.sha256)}
    else:  # before there is a lock, the first address stands for the file
        pinned = driverfile.pinned(recipe, lock.downloads)
        url = next(iter(pinned), driverfile.addresses(recipe)[0])
        downloads = {"run": (url, pinned.get(url))}
    return Stage(name="driver_package", title=f"NVIDIA driver {version} (.run)", module=MODULE,
                 make=make_package, outputs={"run": Kind.FILE, "about": Kind.FILE},
                 options=options, files=files, downloads=downloads)


def make_package(build: Build) -> None:
    """Get the file, verify it, and read its manifest."""
    path = build.directory("run") / "driver.run"
    with writing(build.store.root):
        given, wanted = "run" in build.stage.files, build.options["sha256"]
        cure = RECIPE if wanted else "`./doitw lock` takes the file that is there now"
        shutil.copyfile(build.file("run") if given else build.download("run", cure), path)
    digest = keys.file_digest(path)
    if wanted is None and given:
        log.note(f"driver_package: no sha256 in the recipe; this file's is {digest}")
    elif wanted not in {None, digest}:
        raise UserError(f"the driver's file has the SHA-256 {digest}, the recipe's is {wanted}",
                        hint="get the file again; if NVIDIA's page shows this digest, mend the "
                             "recipe")
    file = runfile.RunFile(path)
    file.verify()
    runfile.fits(file, version=build.options["version"],
                 flavour=KernelModule(build.options["flavour"]),
                 capabilities=build.options["capabilities"])
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
