"""What goes with an image: the Kata configuration drop-in, and the manifest of the whole guest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from katagpu import kataconfig, vgpu
from katagpu.keys import file_digest
from katagpu.lock import Lock
from katagpu.schema import DriverSource, Headers, ImageFormat, Recipe
from katagpu.stages import repository
from katagpu.stages.api import Build, Ref, Stage
from katagpu.stages.layers import EXTENSION, RUN, split, toolkit_mode, verity
from katagpu.store import Kind

MODULE = "stages.final"
PLACE = "/opt/kata/share/kata-containers"  # kata-deploy's; the names are links there
KERNEL = "vmlinuz-nvidia-gpu.container"
IMAGE = "kata-containers-nvidia-gpu.img"
INITRD = "kata-containers-nvidia-gpu-initrd.img"

TOOLKIT = "nvidia-container-toolkit"  # the package whose version is the toolkit's
BASE_IMAGE = "kata-containers-nvidia.img"  # Kata's names for the two disks
EXTENSION_IMAGE = "kata-containers-nvidia-gpu-extension.img"
DEB = "deb/"  # the files of `toolkit: {source: debs}`

PARTS = {"image": Ref(stage="image", output="image"),
         "vmlinuz": Ref(stage="kernel", output="vmlinuz"),
         "vmlinux": Ref(stage="kernel", output="vmlinux"),
         "headers": Ref(stage="kernel", output="headers"),
         "kernel_config": Ref(stage="kernel_config", output="config"),
         "kata_config": Ref(stage="kata_config", output="config"),
         "sizes": Ref(stage="image", output="sizes"),
         "files": Ref(stage="image", output="files"),
         "kata_config_rs": Ref(stage="kata_config", output="config_rs"),
         "sbom_spdx": Ref(stage="sbom", output="spdx"),
         "sbom_cyclonedx": Ref(stage="sbom", output="cyclonedx"),
         "licences": Ref(stage="sbom", output="licences")}
DISK = {"extension": Ref(stage="extension", output="image"),
        "extension_sizes": Ref(stage="extension", output="sizes"),
        "extension_files": Ref(stage="extension", output="files")}
VERITY = Ref(stage="extension", output="verity")
IMAGE_VERITY = Ref(stage="image", output="verity")


def image_file(recipe: Recipe) -> str:
    """The image's file name without its ending; a base without driver serves all drivers."""
    variant = "base" if split(recipe) else recipe.driver.version or "no-driver"
    return f"kata-{recipe.name}-nvidia-gpu-{variant}"


def extension_file(recipe: Recipe) -> str:
    """The file name of the driver's disk."""
    return f"kata-{recipe.name}-nvidia-gpu-extension-{recipe.driver.version}.image"


def kata_config(recipe: Recipe) -> Stage:
    """The drop-ins for both of Kata's runtimes."""
    image = BASE_IMAGE if split(recipe) else IMAGE
    if recipe.image.format is ImageFormat.INITRD:
        image = INITRD
    # Under its own name and not the link's, so that one node can have several drivers.
    extension = {"extension": extension_file(recipe)} if split(recipe) else {}
    return Stage(name="kata_config", title="Kata configuration drop-ins", module=MODULE,
                 make=make_kata_config, outputs={"config": Kind.FILE, "config_rs": Kind.FILE},
                 options={"format": str(recipe.image.format), "dax": recipe.image.dax_header,
                          "image": image, "toolkit": toolkit_mode(recipe), **extension},
                 inputs=_hash_trees(recipe))


def _hash_trees(recipe: Recipe) -> dict[str, Ref]:
    """The lines of verity parameters: of the driver's disk, and of the image."""
    return {**({"verity": VERITY} if split(recipe) else {}),
            **({"image_verity": IMAGE_VERITY} if recipe.image.verity else {})}


def initrd_config(recipe: Recipe) -> Stage:
    """The drop-ins for the initrd of the same guest, whatever the recipe's own format is."""
    return Stage(name="initrd_config", title="Kata configuration drop-ins for the initrd",
                 module=MODULE, make=make_kata_config,
                 outputs={"config": Kind.FILE, "config_rs": Kind.FILE},
                 options={"format": str(ImageFormat.INITRD), "dax": False, "image": INITRD,
                          "toolkit": toolkit_mode(recipe)})


def make_kata_config(build: Build) -> None:
    """Render them."""
    options = build.options
    initrd = options["format"] == ImageFormat.INITRD
    image = f"{PLACE}/{options['image']}"
    extensions: tuple[kataconfig.Extension, ...] = ()
    if "extension" in options:
        extensions = (kataconfig.Extension(
            name=EXTENSION, path=f"{PLACE}/{options['extension']}",
            verity_params=_line(build, "verity")),)
    for output, shim in (("config", kataconfig.Shim.GO), ("config_rs", kataconfig.Shim.RUST)):
        settings = kataconfig.KataSettings(
            shim=shim, kernel=f"{PLACE}/{KERNEL}", image=None if initrd else image,
            initrd=image if initrd else None, dax_header=options["dax"],
            rootfs_type="ext4" if initrd else options["format"],
            kernel_verity_params=_line(build, "image_verity"),
            toolkit_mode=kataconfig.ToolkitMode(options["toolkit"]), extensions=extensions)
        build.put_bytes(output, kataconfig.render_drop_in(settings).encode())


def _line(build: Build, name: str) -> str:
    return build.blob(name).read_text().strip() if name in build.inputs else ""


def manifest(recipe: Recipe, lock: Lock, root: Path) -> Stage:
    """What is inside: versions, digests and sizes; `root` is the repository."""
    driver, kernel = recipe.driver, recipe.kernel
    packages = {deb.package: deb.version
                for group in ("base", "extension_tools", "toolkit", "driver_needs", "driver_user",
                              "services")
                for deb in lock.group(group)}
    facts: dict[str, Any] = {
        "recipe": recipe.name, "architecture": str(recipe.arch),
        "distribution": f"{recipe.distribution.id} {recipe.distribution.suite}",
        "kernel_source": lock.version("kernel_source", kernel.package or "") or kernel.version,
        "driver": None if driver.version is None else {
            "source": str(driver.source), "version": driver.version,
            "kernel_module": str(driver.kernel_module),
            "capabilities": [str(name) for name in driver.capabilities]},
        "toolkit": {"source": str(recipe.toolkit.source), "version": lock.version(
                        "toolkit", TOOLKIT) or recipe.toolkit.version,
                    "mode": toolkit_mode(recipe)},
        "vgpu": vgpu.settings(recipe),
        "image": {"model": str(recipe.image.model), "format": str(recipe.image.format),
                  "compression": str(recipe.image.compression),
                  "dax_header": recipe.image.dax_header, **verity(recipe)},
        "packages": packages,
    }
    headers = "headers_rpm" if kernel.headers is Headers.RPM else "headers"
    inputs = {**PARTS, "headers": Ref(stage="kernel", output=headers),
              "release": Ref(stage="kernel", output="release"),
              "report": Ref(stage="rootfs", output="report")}
    if driver.source is DriverSource.RUNFILE:
        inputs |= {"run": RUN, "supported": Ref(stage="driver_user", output="supported")}
    if split(recipe):
        inputs |= {**DISK, "extension_report": Ref(stage="extension_root", output="report")}
    inputs |= _hash_trees(recipe)
    if recipe.agent is not None:
        inputs["agent"] = Ref(stage="agent", output="agent")
    return Stage(name="manifest", title="manifest", module=MODULE, make=make_manifest,
                 outputs={"manifest": Kind.FILE}, options=facts, inputs=inputs,
                 files={f"{DEB}{Path(deb).name}": root / deb for deb in recipe.toolkit.debs})


def make_manifest(build: Build) -> None:
    """Facts of the recipe and the lock, and the digest and size of every part."""
    parts = {name: {"sha256": output.identity, "size": output.size}
             for name, output in build.inputs.items()}
    listed = [*PARTS, *(name for name in DISK if name in parts)]
    reports = [name for name in ("report", "extension_report") if name in build.inputs]
    content = {"schema": 1, "kernel_release": build.blob("release").read_text(), **build.options,
               "kata_agent": parts.get("agent"), "driver_package": parts.get("run"),
               **_given(build), "parts": {name: parts[name] for name in listed},
               "checks": [line for name in reports
                          for line in build.blob(name).read_text().splitlines()]}
    if "supported" in build.inputs and (ids := json.loads(build.blob("supported").read_text())):
        content["driver"] = {**content["driver"], "supported_ids": ids}
    for name, field in (("verity", "verity_params"), ("image_verity", "kernel_verity_params")):
        if name in build.inputs:
            content[field] = _line(build, name)
    build.put_bytes("manifest", (json.dumps(content, indent=2) + "\n").encode())


def _given(build: Build) -> dict[str, Any]:
    """Fields of the manifest that packages given as files change.

    The lock has only what they depend on: their names and versions are in the files.
    """
    found, files = {}, {}
    for name, path in build.stage.files.items():
        control = repository.control_of(path)
        found[control["Package"]] = control["Version"]
        files[name.removeprefix(DEB)] = {"sha256": file_digest(path), "size": path.stat().st_size}
    if not files:
        return {}
    toolkit = {**build.options["toolkit"], "files": files}
    toolkit["version"] = found.get(TOOLKIT, toolkit["version"])
    return {"toolkit": toolkit, "packages": {**build.options["packages"], **found}}
