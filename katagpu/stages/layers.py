"""The layers of a guest, and what stages agree on about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from katagpu.check.facts import Capability
from katagpu.schema import (
    DriverSource,
    ImageFormat,
    ImageModel,
    ModulesBy,
    Recipe,
    ToolkitSource,
)
from katagpu.stages.api import Build, Ref

# The capabilities that the checks have rows for.
CHECKED = {str(name) for name in Capability}
RUN = Ref(stage="driver_package", output="run")
"""The `.run` file of a recipe with `driver: {source: runfile}`."""

# Where Kata's runtime and agent expect the extension named gpu (src/agent, main.rs; NVIDIA's NVRC).
EXTENSION = "gpu"
EXTENSION_ROOT = f"/run/kata-extensions/{EXTENSION}"


def split(recipe: Recipe) -> bool:
    """Whether the driver is on a disk of its own."""
    return recipe.image.model is ImageModel.EXTENSION


def chain(recipe: Recipe) -> dict[str, Ref]:
    """The layers of the guest's root, lowest first; without driver where that has its own disk."""
    if split(recipe):
        return {"base": Ref(stage="base", output="root"),
                "extension_tools": Ref(stage="extension_tools", output="layer"),
                "kernel_modules": Ref(stage="kernel", output="modules")}
    return driver_chain(recipe)


def driver_chain(recipe: Recipe) -> dict[str, Ref]:
    """The layers in which the driver is installed, lowest first."""
    layers = {"base": Ref(stage="base", output="root")}
    if recipe.toolkit.source is not ToolkitSource.NONE:
        layers["toolkit"] = Ref(stage="toolkit", output="layer")
    if needs_packages(recipe):
        layers["driver_needs"] = Ref(stage="driver_needs", output="layer")
    if recipe.driver.source is not DriverSource.NONE:
        layers["driver_user"] = Ref(stage="driver_user", output="layer")
    if recipe.services:
        layers["services"] = Ref(stage="services", output="layer")
    layers["kernel_modules"] = Ref(stage="kernel", output="modules")
    if recipe.driver.source is not DriverSource.NONE:
        layers["driver_modules"] = driver_modules(recipe)
    return layers


def driver_modules(recipe: Recipe) -> Ref:
    """The driver's kernel modules: of a stage of their own, or of the installer that built them."""
    installer = recipe.driver.modules_by is ModulesBy.INSTALLER
    return Ref(stage="driver_user" if installer else "driver_modules", output="modules")


def needs_packages(recipe: Recipe) -> bool:
    """Whether libraries of a `.run` file want packages of the distribution (`request`)."""
    screen = {"graphics", "display"} & {str(name) for name in recipe.driver.capabilities}
    return recipe.driver.source is DriverSource.RUNFILE and bool(screen)


def toolkit_mode(recipe: Recipe) -> str:
    """`cdi`, `hook` or `none`."""
    return "none" if recipe.toolkit.source is ToolkitSource.NONE else str(recipe.toolkit.mode)


def driver_facts(recipe: Recipe) -> dict[str, Any] | None:
    """What the checks compare the driver with; None for a guest without one."""
    driver = recipe.driver
    if driver.source is DriverSource.NONE:
        return None
    return {"version": driver.version, "flavour": str(driver.kernel_module),
            "capabilities": [str(name) for name in driver.capabilities
                             if str(name) in CHECKED]}


def compressor(recipe: Recipe) -> str | None:
    """The compressor of the packed image, as the kernel's config names it; None for none."""
    name = str(recipe.image.compression)
    return None if name == "none" else name


def verity(recipe: Recipe) -> dict[str, bool]:
    """The option of stages that a hash tree of the image changes; none where it has none."""
    return {"verity": True} if recipe.image.verity else {}


def extension_compression(recipe: Recipe) -> str:
    """The compressor of the driver's disk, which is erofs whatever the base image is."""
    return str(recipe.image.compression if recipe.image.format is ImageFormat.EROFS else "zstd")


def stack(build: Build, option: str = "layers") -> tuple[Path, ...]:
    """The layers below as an overlay's lower directories, topmost first."""
    return tuple(build.tree(name) for name in reversed(build.options[option]))
