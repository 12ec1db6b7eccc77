"""What is wrong with a recipe whose every field is valid by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from katagpu import chips, schema
from katagpu.schema import (
    Capability,
    Compression,
    DistributionId,
    Driver,
    DriverSource,
    ImageFormat,
    ImageModel,
    KernelSource,
    ModulesBy,
    Recipe,
    Repository,
    Toolkit,
    ToolkitMode,
    ToolkitSource,
    Vgpu,
)

Problem = tuple[tuple[str | int, ...], str, str | None]
"""Where in the recipe, what is wrong, and the cure."""

LOST = {Capability.GRAPHICS: "/etc/vulkan and no backend of GBM",
        Capability.DISPLAY: "backend of GBM and no modules of X",
        Capability.COMPAT32: "directory for 32-bit libraries"}
"""What a `.run` file brings for a capability and the driver's disk has no place for."""
LEVELS: dict[ImageFormat, dict[Compression, range]] = {
    ImageFormat.EROFS: {Compression.NONE: range(0), Compression.LZ4HC: range(1, 13),
                        Compression.ZSTD: range(1, 20)},
    ImageFormat.EXT4: {Compression.NONE: range(0)},
    ImageFormat.INITRD: {Compression.NONE: range(0), Compression.ZSTD: range(1, 20)},
}
"""Compressors of each format and their levels (mkfs.erofs(1) -z, zstd(1)); empty: has none."""
FEATURES = Path("kernel-configs/features")


def features(root: Path) -> list[str]:
    """Names of the optional kernel features."""
    return sorted(path.stem for path in (root / FEATURES).glob("*.conf"))


def problems(recipe: Recipe, name: str, root: Path) -> Iterator[Problem]:
    """What is wrong with a recipe whose every field is valid by itself."""
    if recipe.name != name:
        yield ("name",), f"{recipe.name!r} is not the file's name", f"write `name: {name}`"
    yield from _distribution(recipe, root)
    yield from _kernel(recipe, root)
    yield from _driver(recipe)
    yield from _other_drivers(recipe, root)
    yield from _toolkit(recipe, root)
    yield from _agent(recipe, root)
    yield from _image(recipe)
    yield from _beside_driver(recipe, root)
    yield from _sign(recipe, root)
    yield from _boot_check(recipe)


def _boot_check(recipe: Recipe) -> Iterator[Problem]:
    check = recipe.boot_check
    if int(check.device, 16) not in chips.KNOWN and None in (check.boot0, check.boot42):
        known = ", ".join(f"{device:04x}" for device in chips.KNOWN)
        yield (("boot_check", "device"), f"which chip {check.device} has is not known",
               f"give its `boot0` and `boot42`, or one of {known}")


def _sign(recipe: Recipe, root: Path) -> Iterator[Problem]:
    if recipe.sign is None:
        return
    key, home = Path(recipe.sign.key), root.resolve()
    if not key.is_absolute():
        yield (("sign", "key"), f"{key} is not an absolute path", "a private key lies outside of "
               "the repository, which is copied and published")
    elif key.resolve().is_relative_to(home):
        yield (("sign", "key"), f"{key} is in the repository, which is copied and published",
               "move the private key to another place")
    if not (root / recipe.sign.cert).is_file():
        yield (("sign", "cert"), f"there is no file {root / recipe.sign.cert}",
               "a relative path starts at the repository's root")


def _beside_driver(recipe: Recipe, root: Path) -> Iterator[Problem]:
    """What does not go with the driver that the recipe has."""
    if recipe.distribution.id is not DistributionId.DEBIAN \
            and recipe.driver.source is DriverSource.DEBIAN:
        yield (("driver", "source"), f"the packages of `source: debian` are not in "
               f"{recipe.distribution.id}", "use another source, or `none`")
    yield from _services(recipe, root)
    yield from _vgpu(recipe, root)
    yield from _extension(recipe)


def _distribution(recipe: Recipe, root: Path) -> Iterator[Problem]:
    for section, distribution in (("distribution", recipe.distribution), ("tools", recipe.tools)):
        if distribution is None:
            continue
        components = schema.COMPONENTS[distribution.id]
        for number, component in enumerate(distribution.components or ()):
            if component not in components:
                yield ((section, "components", number), f"{distribution.id} has no part "
                       f"{component!r}", f"it has {', '.join(components)}")
        if not (root / distribution.keyring).is_file() and distribution.keyring[0] != "/":
            yield ((section, "keyring"), f"there is no file {root / distribution.keyring}",
                   "paths start at the repository's root, or with /")
    if recipe.distribution.id is not DistributionId.DEBIAN:
        own = f"the packages of `source: debian` are not in {recipe.distribution.id}"
        if recipe.kernel.source is KernelSource.DEBIAN:
            yield ("kernel", "source"), own, "use `source: kernel.org`"


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
        more = "; `file` and `url` of a name with it in need none"
        yield (("driver",), f"`source: {driver.source}` needs `version`",
               'for example `version: "550.163.01"`'
               + (more if driver.source is DriverSource.RUNFILE else ""))
    yield from _runfile(recipe)
    yield from _lost(recipe)
    for number, capability in enumerate(driver.capabilities):
        field = ("driver", "capabilities", number)
        drm = capability in {Capability.GRAPHICS, Capability.DISPLAY}
        if drm and "drm" not in recipe.kernel.features:
            yield (field, f"{capability.value!r} needs DRM, which the kernel leaves out",
                   "add it: `kernel: {features: [drm]}`")
        if capability is Capability.COMPAT32 and "ia32" not in recipe.kernel.features:
            yield (field, "'compat32' needs 32-bit programs, which the kernel leaves out",
                   "add them: `kernel: {features: [ia32]}`")
        ours = capability in {Capability.NGX, Capability.COMPAT32}
        if ours and driver.source is not DriverSource.RUNFILE:
            yield (field, f"{capability.value!r} is not in the distribution's packages here",
                   "use `driver: {source: runfile}`, or leave it out")
    if Capability.UTILITY not in driver.capabilities:
        yield (("driver", "capabilities"), "every guest needs `utility`: its own units use "
               "nvidia-persistenced and libnvidia-ml", "add it; containers get what they ask for")


def _runfile(recipe: Recipe) -> Iterator[Problem]:
    driver, defaults = recipe.driver, Driver(source=DriverSource.RUNFILE)
    if driver.source is not DriverSource.RUNFILE:
        for name in ("url", "file", "sha256", "modules_by", "documentation"):
            if getattr(driver, name) != getattr(defaults, name):
                yield ("driver", name), "belongs to `source: runfile`", "remove it"
        return
    for name in ("url", "file"):
        if re.search(r"[{}]", (getattr(driver, name) or "").replace("{version}", "")):
            yield ("driver", name), "`{version}` is all that may be in braces", "write it so"
    if driver.url is not None and driver.file is not None:
        yield ("driver", "file"), "`url` is given too", "keep one of them"
    if (driver.url or "").startswith("http://") and driver.sha256 is None:
        yield (("driver", "url"), "over plain http anything may come, and there is no `sha256`",
               "give the file's `sha256`, or an https address")
    builder = driver.modules_by is ModulesBy.INSTALLER
    if builder and not {"gcc", "make"} <= set(recipe.rootfs.extra_packages):
        yield (("driver", "modules_by"), "nvidia-installer finds no compiler in this guest",
               "add gcc and make: `rootfs: {extra_packages: [gcc, make]}`, or EXTRA_PKGS")


def _lost(recipe: Recipe) -> Iterator[Problem]:
    """Capabilities whose files of a `.run` the driver's disk does not carry (`extension.harvest`).

    Debian's packages bring no such file for `graphics` and `display`: nvidia-vulkan-common has its
    JSON files below /usr/share, and GBM's backend and the X modules are in packages of their own,
    which these capabilities do not ask for (contents of 550.163.01-2).
    """
    if recipe.image.model is not ImageModel.EXTENSION \
            or recipe.driver.source is not DriverSource.RUNFILE:
        return
    for number, capability in enumerate(recipe.driver.capabilities):
        if capability in LOST:
            yield (("driver", "capabilities", number), f"{capability.value!r} of a `.run` file "
                   f"is not complete with `model: extension`, whose disk has no {LOST[capability]}",
                   "leave it out, or use `image: {model: single}`")


def _other_drivers(recipe: Recipe, root: Path) -> Iterator[Problem]:
    """Each is checked as if it were the recipe's own."""
    if recipe.other_drivers and recipe.driver.source is DriverSource.NONE:
        yield (("other_drivers",), "the recipe has no driver of its own",
               "write the first of them as `driver:`")
    seen = {recipe.driver.version}
    for number, driver in enumerate(recipe.other_drivers):
        where: tuple[str | int, ...] = ("other_drivers", number)
        if driver.source is DriverSource.NONE:
            yield where, "a guest without a driver is a recipe of its own", "remove it"
        alone = replace(recipe, driver=driver, other_drivers=())
        for steps, what, hint in (*_driver(alone), *_beside_driver(alone, root)):
            yield (*where, *steps[1:]) if steps[0] == "driver" else where, what, hint
        if driver.version in seen:
            yield ((*where, "version"), f"{driver.version} is listed already",
                   "results are kept by the driver's version: one section for each")
        seen.add(driver.version)


def _toolkit(recipe: Recipe, root: Path) -> Iterator[Problem]:
    toolkit = recipe.toolkit
    yield from _toolkit_version(toolkit)
    if toolkit.source is ToolkitSource.APT:
        yield from _repository(toolkit.repository, ("toolkit", "repository"), root)
    elif toolkit.repository != schema.LIBNVIDIA_CONTAINER:
        yield ("toolkit", "repository"), "belongs to `source: apt`", "remove it"
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
    if toolkit.mode is ToolkitMode.HOOK and toolkit.source in {ToolkitSource.GO,
                                                               ToolkitSource.NONE}:
        why = ("the toolkit's Go module does not contain"
               if toolkit.source is ToolkitSource.GO else "`source: none` does not bring")
        yield (("toolkit", "mode"), f"`hook` needs nvidia-container-cli, which {why}",
               "use `mode: cdi`, or the packages that have it: `source: apt` or `source: debs`")


def _toolkit_version(toolkit: Toolkit) -> Iterator[Problem]:
    where, version = ("toolkit", "version"), toolkit.version
    if toolkit.source is ToolkitSource.GO:
        if version is None:
            yield ("toolkit",), "`source: go` needs `version`", "for example `version: v1.17.8`"
        elif not version.startswith("v"):
            yield where, f"{version!r} is not a version of the Go module", "for example `v1.17.8`"
    elif version is not None and toolkit.source is not ToolkitSource.APT:
        yield where, "belongs to `source: go` and `source: apt`", "remove it"
    elif version is not None and version.startswith("v"):
        yield where, f"{version!r} is not the version of a package", 'for example `"1.17.8-1"`'


def _repository(repository: Repository, where: tuple[str | int, ...], root: Path,
                ) -> Iterator[Problem]:
    flat = repository.suite.endswith("/")
    if flat and repository.components:
        yield (*where, "components"), "a flat repository has none", "remove them"
    if not flat and not repository.components:
        yield (where, f"the suite {repository.suite!r} needs `components`",
               "or is it flat? then its name ends in a slash")
    if repository.signed_by.startswith(("http://", "https://")):
        if repository.fingerprint is None:
            yield ((*where, "signed_by"), "a key from a URL needs `fingerprint`",
                   "who signs the repository publishes it: the key itself is no witness")
    elif not (root / repository.signed_by).is_file():
        yield ((*where, "signed_by"), f"there is no file {root / repository.signed_by}",
               "paths start at the repository's root")


def _services(recipe: Recipe, root: Path) -> Iterator[Problem]:
    repository = recipe.nvidia_repository
    if repository is not None:
        yield from _repository(repository, ("nvidia_repository",), root)
        if not recipe.services:
            yield ("nvidia_repository",), "no service is taken from it", "remove it"
    for number, service in enumerate(recipe.services):
        where = ("services", number)
        if recipe.driver.source is DriverSource.NONE:
            yield where, f"{service.value!r} needs the driver, and there is none", "remove it"
        elif repository is None:
            yield (where, f"{service.value!r} is in NVIDIA's own repository, and this recipe "
                          f"names none: the distribution's archive does not have it",
                   "add `nvidia_repository` (docs/recipe.md), or remove the service")
        if service in recipe.services[:number]:
            yield where, f"{service.value!r} is there twice", "remove one"


def _agent(recipe: Recipe, root: Path) -> Iterator[Problem]:
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
    for form, name in (("file", agent.file), ("image", agent.image)):
        if name is not None and not (root / name).is_file():
            yield (("agent", form), f"there is no file {root / name}",
                   "a relative path starts at the repository's root")


def _image(recipe: Recipe) -> Iterator[Problem]:
    image = recipe.image
    levels = LEVELS[image.format].get(image.compression)
    if levels is None:
        valid = " or ".join(f"`{word}`" for word in LEVELS[image.format])
        yield (("image", "compression"),
               f"{image.format} cannot be compressed with {image.compression}", f"use {valid}")
    elif image.level is not None and image.level not in levels:
        what = f"{levels.start} to {levels.stop - 1}" if levels else "none"
        yield (("image", "level"), f"{image.level} is not a level of {image.compression}",
               f"levels: {what}")
    if image.dax_header and image.format is ImageFormat.INITRD:
        yield ("image", "dax_header"), "an initrd has no DAX header", "use a disk image"
    if image.verity and image.format is ImageFormat.INITRD:
        yield ("image", "verity"), "an initrd has no hash tree", "use a disk image"


def _vgpu(recipe: Recipe, root: Path) -> Iterator[Problem]:
    vgpu = recipe.vgpu
    if vgpu is None:
        return
    if recipe.driver.source != "runfile":
        yield (("vgpu",), f"a vGPU guest needs NVIDIA's GRID guest driver, and `driver: {{source: "
               f"{recipe.driver.source}}}` has none", "`driver: {source: runfile, …}` with a "
               "package whose name ends in -grid.run (docs/vgpu.md)")
    if vgpu.server_address is None:
        for field in ("backup_server_address", "license_interval"):
            if getattr(vgpu, field) is not None:
                yield (("vgpu", field), "belongs to `server_address`",
                       "remove it: with a token, the licence server's own settings count")
    elif vgpu.embed_token:
        yield (("vgpu", "embed_token"), "a token and `server_address` are two licence servers",
               "remove one of them; the legacy server knows no token")
    if vgpu.embed_token and recipe.image.verity:
        yield (("vgpu", "embed_token"), "the image with the token would have another root hash "
               "than the one in Kata's configuration", "use `image: {verity: false}`, or hand the "
               "token to the guest when it starts (docs/vgpu.md)")
    yield from _token(vgpu, root)


def _token(vgpu: Vgpu, root: Path) -> Iterator[Problem]:
    if vgpu.embed_token and vgpu.token_file is None:
        yield (("vgpu", "embed_token"), "needs `token_file`",
               "the client_configuration_token_….tok that the licence server gave you")
    if vgpu.token_file is None:
        return
    if not vgpu.embed_token:
        yield (("vgpu", "token_file"), "would not be used: `embed_token` is false",
               "docs/vgpu.md shows how a token is handed to the guest when it starts")
    elif not (root / vgpu.token_file).is_file():
        yield (("vgpu", "token_file"), f"there is no file {root / vgpu.token_file}",
               "a relative path starts at the repository's root")


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
    for field, what in (("services", recipe.services), ("vgpu", recipe.vgpu)):
        if what:
            yield ((field,), "these daemons are installed beside the driver, and `model: "
                   "extension` has that elsewhere", "use `image: {model: single}`")
