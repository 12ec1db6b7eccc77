"""The layers of a guest, and what stages agree on about it."""

from __future__ import annotations

from pathlib import Path

from katagpu.schema import DriverSource, Recipe, ToolkitSource
from katagpu.stages.api import Build, Ref


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
        layers["driver_modules"] = Ref(stage="driver_modules", output="modules")
    return layers


def toolkit_mode(recipe: Recipe) -> str:
    """`cdi`, `hook` or `none`."""
    return "none" if recipe.toolkit.source is ToolkitSource.NONE else str(recipe.toolkit.mode)


def stack(build: Build) -> tuple[Path, ...]:
    """The layers below as an overlay's lower directories, topmost first."""
    return tuple(build.tree(name) for name in reversed(build.options["layers"]))
