"""What goes with an image: the Kata configuration drop-in, and the manifest of the whole guest."""

from __future__ import annotations

import json
from typing import Any

from katagpu import kataconfig, vgpu
from katagpu.lock import Lock
from katagpu.schema import DriverSource, Headers, ImageFormat, Recipe
from katagpu.stages.api import Build, Ref, Stage
from katagpu.stages.layers import RUN, toolkit_mode
from katagpu.store import Kind

MODULE = "stages.final"
PLACE = "/opt/kata/share/kata-containers"  # kata-deploy's; the names are links there
KERNEL = "vmlinuz-nvidia-gpu.container"
IMAGE = "kata-containers-nvidia-gpu.img"
INITRD = "kata-containers-nvidia-gpu-initrd.img"

PARTS = {"image": Ref(stage="image", output="image"),
         "vmlinuz": Ref(stage="kernel", output="vmlinuz"),
         "vmlinux": Ref(stage="kernel", output="vmlinux"),
         "headers": Ref(stage="kernel", output="headers"),
         "kernel_config": Ref(stage="kernel_config", output="config"),
         "kata_config": Ref(stage="kata_config", output="config"),
         "sizes": Ref(stage="image", output="sizes"),
         "files": Ref(stage="image", output="files")}


def kata_config(recipe: Recipe) -> Stage:
    """The drop-in for the Go shim."""
    return Stage(name="kata_config", title="Kata configuration drop-in", module=MODULE,
                 make=make_kata_config, outputs={"config": Kind.FILE},
                 options={"format": str(recipe.image.format), "dax": recipe.image.dax_header,
                          "toolkit": toolkit_mode(recipe)})


def make_kata_config(build: Build) -> None:
    """Render it."""
    options = build.options
    initrd = options["format"] == ImageFormat.INITRD
    settings = kataconfig.KataSettings(
        kernel=f"{PLACE}/{KERNEL}", image=None if initrd else f"{PLACE}/{IMAGE}",
        initrd=f"{PLACE}/{INITRD}" if initrd else None, dax_header=options["dax"],
        rootfs_type="ext4" if initrd else options["format"],
        toolkit_mode=kataconfig.ToolkitMode(options["toolkit"]))
    build.put_bytes("config", kataconfig.render_drop_in(settings).encode())


def manifest(recipe: Recipe, lock: Lock) -> Stage:
    """What is inside: versions, digests and sizes."""
    driver, kernel = recipe.driver, recipe.kernel
    packages = {deb.package: deb.version
                for group in ("base", "toolkit", "driver_user", "services")
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
                        "toolkit", "nvidia-container-toolkit") or recipe.toolkit.version,
                    "mode": toolkit_mode(recipe)},
        "vgpu": vgpu.settings(recipe),
        "image": {"format": str(recipe.image.format),
                  "compression": str(recipe.image.compression),
                  "dax_header": recipe.image.dax_header},
        "packages": packages,
    }
    headers = "headers_rpm" if kernel.headers is Headers.RPM else "headers"
    inputs = {**PARTS, "headers": Ref(stage="kernel", output=headers),
              "release": Ref(stage="kernel", output="release"),
              "report": Ref(stage="rootfs", output="report")}
    if driver.source is DriverSource.RUNFILE:
        inputs["run"] = RUN
    if recipe.agent is not None:
        inputs["agent"] = Ref(stage="agent", output="agent")
    return Stage(name="manifest", title="manifest", module=MODULE, make=make_manifest,
                 outputs={"manifest": Kind.FILE}, options=facts, inputs=inputs)


def make_manifest(build: Build) -> None:
    """Facts of the recipe and the lock, and the digest and size of every part."""
    parts = {name: {"sha256": output.identity, "size": output.size}
             for name, output in build.inputs.items()}
    content = {"schema": 1, "kernel_release": build.blob("release").read_text(), **build.options,
               "kata_agent": parts.get("agent"), "driver_package": parts.get("run"),
               "parts": {name: parts[name] for name in PARTS},
               "checks": build.blob("report").read_text().splitlines()}
    build.put_bytes("manifest", (json.dumps(content, indent=2) + "\n").encode())
