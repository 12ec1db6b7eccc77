"""Loading a recipe: the file, the overrides of one run, and what no schema can say.

The YAML is parsed once per content; later runs read it from a cache as JSON, which keeps the YAML
parser out of a run with nothing to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from katagpu import log, schema, words
from katagpu.errors import UserError
from katagpu.recipe_problems import features, problems
from katagpu.schema import (
    Agent,
    Arch,
    Capability,
    Compression,
    Distribution,
    DistributionId,
    Driver,
    DriverSource,
    Headers,
    Image,
    ImageFormat,
    ImageModel,
    Kernel,
    KernelModule,
    KernelSource,
    ModulesBy,
    Recipe,
    Repository,
    Rootfs,
    Service,
    Toolkit,
    ToolkitMode,
    ToolkitSource,
    Vgpu,
)

__all__ = [
    "Agent", "Arch", "Capability", "Compression", "Distribution", "DistributionId", "Driver",
    "DriverSource", "Headers", "Image", "ImageFormat", "ImageModel", "Kernel", "KernelModule",
    "KernelSource", "ModulesBy", "Recipe", "Repository", "Rootfs", "Service", "Toolkit",
    "ToolkitMode", "ToolkitSource", "Vgpu", "features", "known", "load", "problems", "versions",
    "with_driver",
]
EXPLANATIONS: dict[tuple[str | int, ...], str] = {
    ("toolkit", "mode"): (
        "`cdi` or `hook`, not both: kata-agent drops guest hooks without a word when the "
        "container's specification has hooks already, and CDI devices bring hooks"),
}
"""Fields where a value of the wrong type deserves the reason."""


def known(root: Path) -> list[str]:
    """Names of the recipes in the repository at `root`."""
    return sorted(path.stem for path in (root / "recipes").glob("*.yaml"))


def load(
    name: str, root: Path, *, cache: Path | None = None, driver: str | None = None,
    extra_packages: Sequence[str] = (),
) -> Recipe:
    """The recipe `name` of the repository at `root`.

    `driver` and `extra_packages` are the overrides of this run. `cache` is a directory for parsed
    recipes. Raises `UserError` with file, line and field.
    """
    path = root / "recipes" / f"{name}.yaml"
    try:
        content = path.read_bytes() if "/" not in name else None
    except FileNotFoundError:
        content = None
    except OSError as failure:
        raise UserError(f"cannot read {path}: {failure.strerror}",
                        hint="a recipe is a file that you may read") from None
    if content is None:
        from difflib import get_close_matches
        close = get_close_matches(name, known(root), n=1)
        raise UserError(f"there is no recipe {name!r}; known: {', '.join(known(root)) or 'none'}",
                        hint=f"did you mean {close[0]!r}?" if close else (
                            f"a recipe is a file NAME.yaml in {root / 'recipes'}"))
    recipe = _with_versions(_with_packages(_parsed(path, content, cache), extra_packages))
    for steps, what, hint in problems(recipe, name, root):
        from katagpu.yamlfile import YamlFile
        raise YamlFile(path, content.decode()).error(steps, what, hint)
    return recipe if driver is None else with_driver(recipe, driver)


def _parsed(path: Path, content: bytes, cache: Path | None) -> Recipe:
    cached = None
    if cache is not None:
        digest = hashlib.sha256(content)
        digest.update(Path(schema.__file__).read_bytes())
        cached = cache / f"recipe-{digest.hexdigest()}.json"
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(cached.read_bytes(), type=Recipe)
    from katagpu.yamlfile import YamlFile
    try:
        text = content.decode()
    except UnicodeDecodeError as bad:
        line = content.count(b"\n", 0, bad.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {bad.start})",
                        hint="save it as UTF-8") from None
    recipe = YamlFile(path, text).convert(Recipe, EXPLANATIONS)
    if cached is not None:
        # Only time is lost where the cache cannot be written; who needs the store says so itself.
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            part = cached.with_name(f"{cached.name}.{os.getpid()}.part")
            part.write_bytes(msgspec.json.encode(recipe))
            part.replace(cached)
    return recipe


def versions(recipe: Recipe) -> list[str]:
    """The versions of the drivers that a recipe lists, the default's first."""
    return [driver.version for driver in (recipe.driver, *recipe.other_drivers) if driver.version]


def with_driver(recipe: Recipe, version: str) -> Recipe:
    """The recipe with the driver of this version, which is the only place where one is chosen.

    A section that has the version is taken whole; else it is the default's section, with the other
    version. The sections that are not taken are the `other_drivers` then. Raises `UserError`.
    """
    if recipe.driver.source is DriverSource.NONE:
        raise UserError(f"driver={version}: the recipe {recipe.name!r} has no driver",
                        hint="choose a recipe with `driver: {source: debian, …}`")
    listed = (recipe.driver, *recipe.other_drivers)
    for driver in listed:
        if driver.version == version:
            return replace(recipe, driver=driver, other_drivers=tuple(
                other for other in listed if other is not driver))
    if not words.DRIVER_VERSION.fullmatch(version):
        raise UserError(f"driver={version}: this is not a version of the NVIDIA driver",
                        hint=f"the recipe lists {', '.join(versions(recipe))}; driver=all builds "
                             "a guest with each of them")
    default = recipe.driver
    for name, place in (("url", default.url), ("file", default.file)):
        if place is not None and "{version}" not in place:
            raise UserError(f"driver={version}: the recipe's driver.{name} is the file of "
                            f"{default.version}: {place}", hint=(
                                "write {version} where the version stands in it, or list the "
                                "driver in `other_drivers`"))
    if (default.url or "").startswith("http://"):
        raise UserError(f"driver={version}: driver.url is plain http, and there is no digest of "
                        f"{version}", hint="list the driver in `other_drivers` with its `sha256`")
    if default.sha256 is not None:
        log.note(f"driver={version}: the recipe's sha256 is that of {default.version}, and not "
                 "asked for; list the driver in `other_drivers` with its own")
    return replace(recipe, driver=replace(default, version=version, sha256=None),
                   other_drivers=listed)


def _with_versions(recipe: Recipe) -> Recipe:
    """The recipe in which the version of a `.run` file is the one in its name, where none is given.

    The file is not read for it; whether it is of that version is found out when it is.
    """
    def named(driver: Driver) -> Driver:
        if driver.source is not DriverSource.RUNFILE or driver.version is not None:
            return driver
        name = (driver.file or driver.url or "").rpartition("/")[2]
        found = re.search(rf"(?<!\d){words.DRIVER_VERSION.pattern}(?!\d)", name)
        return driver if found is None else replace(driver, version=found[0])

    return replace(recipe, driver=named(recipe.driver),
                   other_drivers=tuple(map(named, recipe.other_drivers)))


def _with_packages(recipe: Recipe, extra_packages: Sequence[str]) -> Recipe:
    """The recipe with the packages of EXTRA_PKGS."""
    for package in extra_packages:
        if not words.PACKAGE.fullmatch(package):
            raise UserError(f"EXTRA_PKGS: {package!r} cannot be the name of a package",
                            hint='names with spaces between them: EXTRA_PKGS="gcc make"')
    if extra_packages:
        both = dict.fromkeys([*recipe.rootfs.extra_packages, *extra_packages])
        recipe = replace(recipe, rootfs=replace(recipe.rootfs, extra_packages=tuple(both)))
    return recipe
