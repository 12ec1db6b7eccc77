"""A recipe's stages, in an order in which every input comes before its reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from katagpu import keys
from katagpu.lock import Lock
from katagpu.schema import DriverSource, Headers, ModulesBy, Recipe, ToolkitSource
from katagpu.stages import (
    config,
    driver,
    extension,
    final,
    image,
    installer,
    kernel,
    layers,
    locked,
    package,
    rootfs,
    roots,
    runfile,
    sbom,
    source,
    toolkit,
)
from katagpu.stages.api import Ref, Stage

if TYPE_CHECKING:
    from katagpu.boot.qemu import Qemu


def stages(recipe: Recipe, lock: Lock, root: Path) -> dict[str, Stage]:
    """All stages of a guest by name; `root` is the repository."""
    found = [roots.stage0(lock),
             roots.root(lock, "toolchain", "build root of the guest's suite"),
             source.source(recipe, lock, root), config.config(recipe, root),
             kernel.kernel(recipe, lock, root),
             roots.root(lock, "imagetools", "root with the image tools and Go"),
             roots.root(lock, "base", "guest base", slim=True)]
    chain = [Ref(stage="base", output="root")]
    if recipe.toolkit.source is ToolkitSource.GO:
        found += [toolkit.source(recipe), toolkit.toolkit(recipe)]
    if recipe.toolkit.source in {ToolkitSource.APT, ToolkitSource.DEBS}:
        found.append(roots.layer(lock, "toolkit", "container toolkit", chain, slim=True,
                                 files=[root / deb for deb in recipe.toolkit.debs]))
    if recipe.toolkit.source is not ToolkitSource.NONE:
        chain = [*chain, Ref(stage="toolkit", output="layer")]
    if recipe.kernel.headers is Headers.RPM:
        found.append(roots.layer(lock, "rpm_tools", "rpmbuild on the build root",
                                 [Ref(stage="toolchain", output="root")]))
    if recipe.rootfs.extra_packages and recipe.driver.modules_by is ModulesBy.KATAGPU:
        found.append(roots.layer(lock, "build_layer", "EXTRA_PKGS on the build root",
                                 [Ref(stage="toolchain", output="root")]))
    found += _driver(recipe, lock, root, chain)
    if recipe.agent is not None:
        found.append(rootfs.agent_stage(recipe, root))
    found += [*_images(recipe, lock, root), final.kata_config(recipe),
              sbom.contents_of(recipe, lock), final.manifest(recipe, lock, root)]
    found = locked.pinned(found, lock, root)
    if recipe.sign is not None:
        from katagpu.stages import signing

        found = signing.signed(found, recipe, root)
    for stage in found:
        keys.code(stage.module)  # now: a key names the code that is loaded, not a later edit
    return {stage.name: stage for stage in found}


def boot_stages(recipe: Recipe, emulator: Lock | None, qemu: Callable[[], Qemu], *,
                lesser: bool) -> dict[str, Stage]:
    """The stages that only boot tasks have, beside the guest's.

    `emulator` is the lock of the pipeline's own QEMU, None where it is not made. `qemu` finds the
    one that boots the guest; `lesser`: it has no vfio-user.
    """
    from katagpu.stages import boot

    found = [boot.parts(recipe), boot.check(recipe, qemu, lesser=lesser), boot.record()]
    if emulator is not None:
        found.append(roots.root(emulator, "emulator", "root with QEMU, for boot checks"))
    for stage in found:
        keys.code(stage.module)
    return {stage.name: stage for stage in found}


def _driver(recipe: Recipe, lock: Lock, root: Path, chain: list[Ref]) -> list[Stage]:
    """The driver's stages, and daemons on it; `chain` are the layers below it, lowest first."""
    found: list[Stage] = []
    if layers.needs_packages(recipe):
        found.append(roots.layer(lock, "driver_needs", "what the driver's libraries are linked to",
                                 chain, slim=True))
        chain = [*chain, Ref(stage="driver_needs", output="layer")]
    if recipe.driver.source is DriverSource.DEBIAN:
        found += [driver.modules(recipe, lock, root),
                  roots.layer(lock, "driver_user", "NVIDIA user space", chain, slim=True)]
    if recipe.driver.source is DriverSource.RUNFILE:
        found += _runfile(recipe, lock, root, chain)
    if recipe.services:
        found.append(roots.layer(lock, "services", "NVIDIA's daemons", [
            *chain, Ref(stage="driver_user", output="layer")], slim=True))
    return found


def _runfile(recipe: Recipe, lock: Lock, root: Path, chain: list[Ref]) -> list[Stage]:
    verified = package.package(recipe, lock, root)
    user = installer.user(recipe, root, {f"below{index}": ref for index, ref in enumerate(chain)})
    if recipe.driver.modules_by is ModulesBy.KATAGPU:
        return [verified, runfile.modules(recipe, root), user]
    return [verified, roots.layer(lock, "driver_build", "EXTRA_PKGS on the guest", chain), user]


def _images(recipe: Recipe, lock: Lock, root: Path) -> list[Stage]:
    """The root file system and how it is packed: in one image, or base and driver's disk."""
    packed = [rootfs.rootfs(recipe, root), image.image(recipe)]
    if not layers.split(recipe):
        return [*packed, image.initrd(recipe), final.initrd_config(recipe)]
    tools = roots.layer(lock, "extension_tools", "what mounts the driver's disk",
                        [Ref(stage="base", output="root")], slim=True)
    return [tools, *packed, extension.root(recipe), extension.disk(recipe)]
