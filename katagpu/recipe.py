"""Loading a recipe: the file, the overrides of one run, and what no schema can say.

The YAML is parsed once per content; later runs read it from a cache as JSON, which keeps the YAML
parser out of a run with nothing to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from katagpu import schema
from katagpu.errors import UserError
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
    Recipe,
    Rootfs,
    Toolkit,
    ToolkitMode,
    ToolkitSource,
)

__all__ = [
    "Agent", "Arch", "Capability", "Compression", "Distribution", "DistributionId", "Driver",
    "DriverSource", "Headers", "Image", "ImageFormat", "ImageModel", "Kernel", "KernelModule",
    "KernelSource", "Recipe", "Rootfs", "Toolkit", "ToolkitMode", "ToolkitSource", "features",
    "known", "load", "problems",
]

Problem = tuple[tuple[str | int, ...], str, str | None]
"""Where in the recipe, what is wrong, and the cure."""

FEATURES = Path("kernel-configs/features")


def known(root: Path) -> list[str]:
    """Names of the recipes in the repository at `root`."""
    return sorted(path.stem for path in (root / "recipes").glob("*.yaml"))


def features(root: Path) -> list[str]:
    """Names of the optional kernel features."""
    return sorted(path.stem for path in (root / FEATURES).glob("*.conf"))


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
        raise UserError(f"cannot read {path}: {failure.strerror}") from None
    if content is None:
        from katagpu.yamlfile import nearest
        raise UserError(f"there is no recipe {name!r}; known: {', '.join(known(root)) or 'none'}",
                        hint=nearest(name, known(root)))
    recipe = _parsed(path, content, cache)
    for steps, what, hint in problems(recipe, name, root):
        from katagpu.yamlfile import YamlFile
        raise YamlFile(path, content.decode()).error(steps, what, hint)
    return _overridden(recipe, driver, extra_packages)


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
        raise UserError(f"{path}: not UTF-8 (byte {bad.start})") from None
    recipe = YamlFile(path, text).convert(Recipe, schema.EXPLANATIONS)
    if cached is not None:
        # Only time is lost where the cache cannot be written; who needs the store says so itself.
        with contextlib.suppress(OSError):
            cached.parent.mkdir(parents=True, exist_ok=True)
            part = cached.with_name(f"{cached.name}.{os.getpid()}.part")
            part.write_bytes(msgspec.json.encode(recipe))
            part.replace(cached)
    return recipe


def _overridden(recipe: Recipe, driver: str | None, extra_packages: Sequence[str]) -> Recipe:
    if driver is not None:
        if recipe.driver.source is DriverSource.NONE:
            raise UserError(f"driver={driver}: the recipe {recipe.name!r} has no driver",
                            hint="choose a recipe with `driver: {source: debian, …}`")
        if not schema.DRIVER_VERSION.fullmatch(driver):
            raise UserError(f"driver={driver}: this is not a version of the NVIDIA driver",
                            hint=f"the recipe asks for {recipe.driver.version}")
        recipe = replace(recipe, driver=replace(recipe.driver, version=driver))
    for package in extra_packages:
        if not schema.PACKAGE.fullmatch(package):
            raise UserError(f"EXTRA_PKGS: {package!r} cannot be the name of a package",
                            hint='names with spaces between them: EXTRA_PKGS="gcc make"')
    if extra_packages:
        both = dict.fromkeys([*recipe.rootfs.extra_packages, *extra_packages])
        recipe = replace(recipe, rootfs=replace(recipe.rootfs, extra_packages=tuple(both)))
    return recipe


def problems(recipe: Recipe, name: str, root: Path) -> Iterator[Problem]:
    """What is wrong with a recipe whose every field is valid by itself."""
    if recipe.name != name:
        yield ("name",), f"{recipe.name!r} is not the file's name", f"write `name: {name}`"
    yield from _kernel(recipe, root)
    yield from _driver(recipe)
    yield from _toolkit(recipe, root)
    yield from _agent(recipe)
    yield from _image(recipe)
    yield from _extension(recipe)


def _kernel(recipe: Recipe, root: Path) -> Iterator[Problem]:
    kernel = recipe.kernel
    if kernel.source is KernelSource.DEBIAN and kernel.package is None:
        yield (("kernel",), "`source: debian` needs `package`",
               "for example `package: linux-source-6.12`")
    if kernel.source is KernelSource.KERNEL_ORG:
        if kernel.version is None:
            yield (("kernel",), "`source: kernel.org` needs `version`",
                   'for example `version: "6.12.30"`')
        if kernel.package is not None:
            yield ("kernel", "package"), "belongs to `source: debian`", "remove it"
    for number, feature in enumerate(kernel.features):
        if not (root / FEATURES / f"{feature}.conf").is_file():
            from katagpu.yamlfile import nearest
            yield (("kernel", "features", number), f"there is no kernel feature {feature!r}",
                   nearest(feature, features(root)))
    for number, fragment in enumerate(kernel.fragments):
        if not (root / fragment).is_file():
            yield (("kernel", "fragments", number), f"there is no file {root / fragment}",
                   "paths start at the repository's root")


def _driver(recipe: Recipe) -> Iterator[Problem]:
    driver = recipe.driver
    if driver.source is DriverSource.NONE:
        if driver.version is not None:
            yield ("driver", "version"), "`source: none` has no version", "remove it"
        return
    if driver.version is None:
        yield (("driver",), f"`source: {driver.source}` needs `version`",
               'for example `version: "550.163.01"`')
    for number, capability in enumerate(driver.capabilities):
        drm = capability in {Capability.GRAPHICS, Capability.DISPLAY}
        if drm and "drm" not in recipe.kernel.features:
            yield (("driver", "capabilities", number),
                   f"{capability.value!r} needs DRM, which the kernel leaves out",
                   "add it: `kernel: {features: [drm]}`")


def _toolkit(recipe: Recipe, root: Path) -> Iterator[Problem]:
    toolkit = recipe.toolkit
    if toolkit.source is ToolkitSource.GO and toolkit.version is None:
        yield (("toolkit",), "`source: go` needs `version`", "for example `version: v1.17.8`")
    if toolkit.source is not ToolkitSource.GO and toolkit.version is not None:
        yield ("toolkit", "version"), "belongs to `source: go`", "remove it"
    if toolkit.source is ToolkitSource.DEBS and not toolkit.debs:
        yield ("toolkit",), "`source: debs` needs `debs`, a list of files", None
    if len({Path(deb).name for deb in toolkit.debs}) != len(toolkit.debs):
        yield ("toolkit", "debs"), "two files have one name", "rename one of them"
    if toolkit.source is not ToolkitSource.DEBS and toolkit.debs:
        yield ("toolkit", "debs"), "belongs to `source: debs`", "remove it"
    for number, deb in enumerate(toolkit.debs):
        if not (root / deb).is_file():
            yield (("toolkit", "debs", number), f"there is no file {root / deb}",
                   "paths start at the repository's root")
    if toolkit.mode is ToolkitMode.HOOK and toolkit.source is not ToolkitSource.DEBS:
        why = ("the toolkit's Go module does not contain"
               if toolkit.source is ToolkitSource.GO else "`source: none` does not bring")
        yield (("toolkit", "mode"), f"`hook` needs nvidia-container-cli, which {why}",
               "use `mode: cdi`, or `source: debs` with the packages that have it")


def _agent(recipe: Recipe) -> Iterator[Problem]:
    agent = recipe.agent
    if agent is None:
        return
    forms = [form for form in ("file", "release", "image") if getattr(agent, form) is not None]
    if len(forms) != 1:
        yield (("agent",), f"give one of file, release and image, not {' and '.join(forms)}"
               if forms else "give one of file, release and image", None)
    if (agent.release is None) != (agent.sha256 is None):
        yield (("agent",), "`release` and `sha256` belong together",
               "sha256 is the digest of the release tarball")


def _image(recipe: Recipe) -> Iterator[Problem]:
    image = recipe.image
    levels = schema.LEVELS[image.format].get(image.compression)
    if levels is None:
        valid = " or ".join(f"`{word}`" for word in schema.LEVELS[image.format])
        yield (("image", "compression"),
               f"{image.format} cannot be compressed with {image.compression}", f"use {valid}")
    elif image.level is not None and image.level not in levels:
        what = f"{levels.start} to {levels.stop - 1}" if levels else "none"
        yield (("image", "level"), f"{image.level} is not a level of {image.compression}",
               f"levels: {what}")
    if image.dax_header and image.format is ImageFormat.INITRD:
        yield ("image", "dax_header"), "an initrd has no DAX header", "use a disk image"


def _extension(recipe: Recipe) -> Iterator[Problem]:
    if recipe.image.model is not ImageModel.EXTENSION:
        return
    if recipe.image.format is ImageFormat.INITRD:
        yield (("image", "format"), "the base of `model: extension` is a disk image",
               "use `erofs` or `ext4`, or `model: single`")
    if recipe.driver.source is DriverSource.NONE:
        yield (("image", "model"), "`extension` is a disk with the driver, and there is none",
               "name a driver, or use `model: single`")
    if recipe.toolkit.mode is ToolkitMode.HOOK:
        yield (("toolkit", "mode"), "`hook` needs the driver in the guest's own root, and `model: "
               "extension` has it elsewhere", "use `mode: cdi`, or `image: {model: single}`")
