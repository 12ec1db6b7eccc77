"""What a recipe asks the archives for: the groups of packages, and where they may come from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from katagpu import log
from katagpu.apt import host_archive
from katagpu.aptview import Pin
from katagpu.errors import UserError
from katagpu.keys import digest, file_digest
from katagpu.lock import (
    FORMAT,
    GUEST,
    Archive,
    Deb,
    Group,
    LocalDeb,
    Lock,
    Repository,
    Request,
)
from katagpu.schema import (
    COMPONENTS,
    TOOLS,
    Capability,
    Distribution,
    DriverSource,
    Headers,
    ImageModel,
    KernelModule,
    KernelSource,
    ModulesBy,
    Recipe,
    Service,
    ToolkitMode,
    ToolkitSource,
)
from katagpu.schema import Repository as RecipeRepository

ESSENTIAL = "?essential"  # apt-patterns(7)

TOOLS_SET = "tools"  # the archives of what is not the guest's

STAGE0 = (ESSENTIAL, "apt", "mmdebstrap")
# Kernel and modules see one compiler: that of the guest's own suite.
TOOLCHAIN = (
    ESSENTIAL, "bc", "bison", "bzip2", "ccache", "cpio", "debhelper", "dpkg-dev", "flex", "gcc",
    "kmod", "libc6-dev", "libelf-dev", "libssl-dev", "make", "patch", "python3-minimal", "rsync",
    "xz-utils", "zstd",
)
IMAGE_TOOLS = (
    ESSENTIAL, "ca-certificates", "cpio", "cryptsetup-bin", "e2fsprogs", "erofs-utils", "gcc",
    "golang-go", "libarchive13t64", "libc6-dev", "zstd",
)
# systemd with udev (GPUs are hot-plugged), and what kata-agent calls (docs/guest.md).
BASE = (
    ESSENTIAL, "chrony", "dbus", "e2fsprogs", "iptables", "kmod", "systemd-sysv", "udev",
)
# What a released agent is linked to beside the C library (docs/guest.md); Kata's own images have
# libseccomp2 too. The names are those of every Debian and Ubuntu that is built here.
AGENT = ("libdevmapper1.02.1", "libseccomp2")
# What mounts the driver's disk: veritysetup. A layer on the base, so that the base is the same in
# both models.
EXTENSION_TOOLS = ("cryptsetup-bin",)
# Debian's driver packages by capability. nvidia-kernel-support is left out on purpose: it maps
# `modprobe nvidia` to nvidia-current, and our modules are named nvidia. libcuda1 only dlopens
# libnvidia-nvvm and does not depend on it.
DRIVER: dict[Capability, tuple[str, ...]] = {
    Capability.COMPUTE: ("libcuda1", "libnvidia-nvvm4", "libnvidia-ptxjitcompiler1",
                         "libnvidia-pkcs11-openssl3"),
    Capability.UTILITY: ("nvidia-smi", "libnvidia-ml1", "libnvidia-cfg1"),
    Capability.VIDEO: ("libnvcuvid1", "libnvidia-encode1"),
    Capability.GRAPHICS: ("libgl1-nvidia-glvnd-glx", "libegl-nvidia0", "libgles-nvidia2",
                          "libnvidia-glvkspirv", "nvidia-vulkan-icd"),
    Capability.DISPLAY: ("libnvidia-fbc1",),
}
# Not nvidia-modprobe, which is set-user-id root: the guest's units make the nodes.
DRIVER_ALWAYS = ("firmware-nvidia-gsp", "nvidia-persistenced")
DRIVER_SOURCE = {KernelModule.OPEN: "nvidia-open-kernel-source",
                 KernelModule.CLOSED: "nvidia-kernel-source"}
ARCHITECTURE = "amd64"  # Debian's name
# NVIDIA's packages of the toolkit, which release together. nvidia-container-toolkit asks for
# libnvidia-container-tools of its own version or newer, and gets the newest where nothing pins it.
TOOLKIT = ("nvidia-container-*", "libnvidia-container*")
# Since this branch NVIDIA's packages are not named after the branch any more (its own
# gpu-driver-container installs them by this rule).
UNBRANCHED = 580

# What nvidia-installer needs beside the compiler and make of EXTRA_PKGS: the C library's headers,
# libelf for the kernel's objtool, and ccache.
COMPILING = ("ccache", "libc6-dev", "libelf-dev")
# What the libraries of a `.run` file are linked to and only Debian's packages depend on.
NEEDS: dict[Capability, tuple[str, ...]] = {
    Capability.GRAPHICS: ("libx11-6", "libxext6", "libdrm2", "libgbm1", "libwayland-client0"),
    Capability.DISPLAY: ("libx11-6", "libxext6"),
}


def groups(recipe: Recipe, root: Path) -> dict[str, Group]:
    """The groups of packages of a recipe; `root` is the repository."""
    extra = recipe.rootfs.extra_packages
    shipped = (*recipe.rootfs.packages, *(extra if recipe.rootfs.keep_extra_pkgs else ()))
    agent = AGENT if recipe.agent is not None else ()
    tools = GUEST if tools_of(recipe) is recipe.distribution else TOOLS_SET
    found = {
        "stage0": Group(packages=STAGE0, archives=tools),
        "toolchain": Group(packages=TOOLCHAIN),
        "imagetools": Group(packages=IMAGE_TOOLS, archives=tools),
        "base": Group(packages=(*BASE, *agent, *shipped)),
    }
    if recipe.image.model is ImageModel.EXTENSION:
        found["extension_tools"] = Group(packages=EXTENSION_TOOLS, on="base")
    if recipe.kernel.headers is Headers.RPM:
        found["rpm_tools"] = Group(packages=("rpm",), on="toolchain")
    installs = recipe.driver.modules_by is ModulesBy.INSTALLER
    if extra and not installs:
        found["build_layer"] = Group(packages=tuple(extra), on="toolchain")
    if recipe.kernel.source is KernelSource.DEBIAN:
        assert recipe.kernel.package is not None
        version = f"={recipe.kernel.version}" if recipe.kernel.version else ""
        found["kernel_source"] = Group(packages=(recipe.kernel.package + version,), alone=True)
    if recipe.toolkit.source is ToolkitSource.DEBS:
        files = tuple(LocalDeb(path=str((root / deb).resolve()), sha256=file_digest(root / deb))
                      for deb in recipe.toolkit.debs)
        found["toolkit"] = Group(files=files, on="base")
    if recipe.toolkit.source is ToolkitSource.APT:
        found["toolkit"] = _toolkit(recipe)
    found |= _driver(recipe, "toolkit" if "toolkit" in found else "base")
    if installs:
        below = next(name for name in ("driver_needs", "toolkit", "base") if name in found)
        found["driver_build"] = Group(packages=(*dict.fromkeys((*extra, *COMPILING)),), on=below)
    if recipe.services:
        found["services"] = _services(recipe, next(
            name for name in ("driver_user", "driver_needs", "toolkit", "base") if name in found))
    return found


def _driver(recipe: Recipe, below: str) -> dict[str, Group]:
    """The distribution's driver, or what one from a `.run` is linked to, on the group `below`."""
    driver, found = recipe.driver, {}
    needs = driver_needs(recipe)
    if needs:
        found["driver_needs"] = Group(packages=needs, on=below)
    if driver.source is DriverSource.DEBIAN:
        wanted = [package for capability in Capability if capability in driver.capabilities
                  for package in DRIVER[capability]]
        version = f"={driver.version}*"
        names = tuple(package if package == "nvidia-persistenced" else package + version
                      for package in dict.fromkeys([*wanted, *DRIVER_ALWAYS]))
        found["driver_user"] = Group(packages=names, on=below)
        source = DRIVER_SOURCE[driver.kernel_module]
        found["driver_source"] = Group(packages=(source + version,), alone=True)
    return found


def _toolkit(recipe: Recipe) -> Group:
    hook = recipe.toolkit.mode is ToolkitMode.HOOK
    leader = "nvidia-container-toolkit"
    return Group(packages=(leader, *(("libnvidia-container-tools",) if hook else ())), on="base",
                 repository="toolkit", pins=(
                     Pin(leader=leader, packages=TOOLKIT, version=recipe.toolkit.version),))


def _services(recipe: Recipe, below: str) -> Group:
    """The daemons of NVIDIA's repository, on the group `below`.

    The fabric manager ends at once when the driver has another version than its own.
    """
    version = recipe.driver.version or ""
    branch = version.split(".")[0]
    suffix = "" if int(branch) >= UNBRANCHED else f"-{branch}"
    packages: list[str] = []
    pins = []
    if Service.FABRICMANAGER in recipe.services:
        leader = f"nvidia-fabricmanager{suffix}"
        switches = f"libnvidia-nscq{suffix}"  # DCGM reads the switches through it
        packages += [leader, *([switches] if Service.DCGM in recipe.services else [])]
        pins.append(Pin(leader=leader, packages=(leader, switches), version=f"{version}-*"))
    if Service.DCGM in recipe.services:
        packages.append("datacenter-gpu-manager-4-core")
        pins.append(Pin(leader=packages[-1], packages=("datacenter-gpu-manager-4-*",)))
    return Group(packages=tuple(packages), on=below, repository="nvidia", pins=tuple(pins))


def repositories(recipe: Recipe, root: Path) -> dict[str, Repository]:
    """The repositories that the groups name."""
    wanted: dict[str, RecipeRepository | None] = {
        "toolkit": recipe.toolkit.repository if recipe.toolkit.source is ToolkitSource.APT
        else None,
        "nvidia": recipe.nvidia_repository if recipe.services else None}
    return {name: _repository(found, root) for name, found in wanted.items() if found is not None}


def _repository(found: RecipeRepository, root: Path) -> Repository:
    key = found.signed_by
    return Repository(fingerprint=found.fingerprint, archive=Archive(
        uri=found.uri.replace("$(ARCH)", ARCHITECTURE), suites=(found.suite,),
        components=found.components,
        keyring=key if key.startswith(("http://", "https://")) else str(root / key)))


def driver_needs(recipe: Recipe) -> tuple[str, ...]:
    """The distribution's packages that a `.run` file's libraries are linked to."""
    if recipe.driver.source is not DriverSource.RUNFILE:
        return ()
    return tuple(dict.fromkeys(package for capability in recipe.driver.capabilities
                               for package in NEEDS.get(capability, ())))


def tools_of(recipe: Recipe) -> Distribution:
    """Where mmdebstrap and the image tools come from: one suite for all guests, or the recipe's."""
    own = recipe.distribution
    if recipe.tools is not None:
        return recipe.tools
    return own if (own.id, own.suite) == (TOOLS.id, TOOLS.suite) else TOOLS


def distributions(recipe: Recipe) -> dict[str, Distribution]:
    """The distributions that a recipe takes packages from, by the name of their archives."""
    tools = tools_of(recipe)
    return {GUEST: recipe.distribution,
            **({} if tools is recipe.distribution else {TOOLS_SET: tools})}


def archives(distribution: Distribution, root: Path) -> tuple[Archive, ...]:
    """Where its packages come from: a mirror given, the host's own, or the recipe's fallback."""
    suite = distribution.suite
    components = distribution.components or COMPONENTS[distribution.id]
    keyring = str((root / distribution.keyring).absolute())
    main, security = distribution.mirror, distribution.security_mirror
    if distribution.mirror == "host":
        host = host_archive(distribution.id)
        main = host.get("") or distribution.fallback_mirror
        security = host.get("-security") or security
        if "" not in host:
            log.warn(f"`mirror: host`: this host's apt has no {distribution.id} to offer; "
                     f"{suite} comes from `fallback_mirror`, {main}")
    found = [Archive(uri=main, suites=_suites(suite, security is not None),
                     components=components, keyring=keyring)]
    if security is not None:
        found.append(Archive(uri=security, suites=(f"{suite}-security",), components=components,
                             keyring=keyring))
    return tuple(found)


def _suites(suite: str, maintained: bool) -> tuple[str, ...]:
    return (suite, f"{suite}-updates") if maintained else (suite,)


def _asked(recipe: Recipe, root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a recipe asks for, without where this host has it: for all groups, and for each."""
    wanted = to_builtins(groups(recipe, root))
    given = {"toolkit": recipe.toolkit.repository, "nvidia": recipe.nvidia_repository}
    for group in wanted.values():
        group["files"] = [deb["sha256"] for deb in group["files"]]
        if group["repository"] is None:  # as before there were any, so that older locks hold
            del group["repository"], group["pins"]
        else:
            group["repository"] = to_builtins(given[group["repository"]])
        if group["archives"] == GUEST:
            del group["archives"]
        else:
            group["archives"] = to_builtins(distributions(recipe)[group["archives"]])
    return {"format": FORMAT, "distribution": to_builtins(recipe.distribution)}, wanted


def identity(recipe: Recipe, root: Path) -> str:
    """Digest of what a recipe asks for; where this host has it is not part of that."""
    head, wanted = _asked(recipe, root)
    return digest({**head, "groups": wanted})


def digests(recipe: Recipe, root: Path) -> dict[str, str]:
    """For each group the digest of what it and the groups below it ask for.

    Locks of one recipe share the groups for which these are equal.
    """
    head, wanted = _asked(recipe, root)
    chains: dict[str, list[Any]] = {}
    for name, group in wanted.items():
        chains[name] = [group, *chains.get(group["on"], [])]
    return {name: digest({**head, "chain": chain}) for name, chain in chains.items()}


def outline(recipe: Recipe, root: Path) -> Lock:
    """Stands for a lock that is not made yet: one package for each group, named by its digest."""
    return Lock(recipe=recipe.name, request="", groups={
        name: (Deb(package=name, version=asked, architecture="all", url="", size=0, sha256=asked),)
        for name, asked in digests(recipe, root).items()})


def request(recipe: Recipe, root: Path) -> Request:
    """The whole request of a recipe, with the addresses for this host.

    Raises `UserError` when the host does not have a keyring.
    """
    found = {name: archives(distribution, root)
             for name, distribution in distributions(recipe).items()}
    must_have_keyrings(archive for each in found.values() for archive in each)
    return Request(recipe=recipe.name, identity=identity(recipe, root), architecture=ARCHITECTURE,
                   archives=found, groups=groups(recipe, root),
                   repositories=repositories(recipe, root), digests=digests(recipe, root))


def must_have_keyrings(wanted: Iterable[Archive]) -> None:
    """Raises `UserError` when the host does not have the keyring of an archive."""
    for archive in wanted:
        if not Path(archive.keyring).is_file():
            raise UserError(f"the keyring {archive.keyring} of {archive.uri} is not there", hint=(
                "install the package that has it (debian-archive-keyring, ubuntu-keyring), or "
                "name another one in the recipe"))
