"""The layers of a guest, and what stages agree on about it."""

from __future__ import annotations

from pathlib import Path

from katagpu.schema import DriverSource, ModulesBy, Recipe, ToolkitSource
from katagpu.stages.api import Build, Ref

RUN = Ref(stage="driver_package", output="run")
"""The `.run` file of a recipe with `driver: {source: runfile}`."""


def chain(recipe: Recipe) -> dict[str, Ref]:
    """The layers of the guest, lowest first."""
    layers = {"base": Ref(stage="base", output="root")}
    if recipe.toolkit.source is not ToolkitSource.NONE:
        layers["toolkit"] = Ref(stage="toolkit", output="layer")
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


def toolkit_mode(recipe: Recipe) -> str:
    """`cdi`, `hook` or `none`."""
    return "none" if recipe.toolkit.source is ToolkitSource.NONE else str(recipe.toolkit.mode)


def stack(build: Build) -> tuple[Path, ...]:
    """The layers below as an overlay's lower directories, topmost first."""
    return tuple(build.tree(name) for name in reversed(build.options["layers"]))
