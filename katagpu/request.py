"""What a recipe asks the archives for: the groups of packages, and where they may come from."""

from __future__ import annotations

from pathlib import Path

from msgspec import to_builtins

from katagpu.keys import digest, file_digest
from katagpu.lock import FORMAT, Archive, Group, LocalDeb, Request, host_archive
from katagpu.schema import (
    Capability,
    DriverSource,
    Headers,
    ImageModel,
    KernelModule,
    KernelSource,
    Recipe,
    ToolkitSource,
)

ESSENTIAL = "?essential"  # apt-patterns(7)

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


def groups(recipe: Recipe, root: Path) -> dict[str, Group]:
    """The groups of packages of a recipe; `root` is the repository."""
    extra = recipe.rootfs.extra_packages
    shipped = (*recipe.rootfs.packages, *(extra if recipe.rootfs.keep_extra_pkgs else ()))
    found = {
        "stage0": Group(packages=STAGE0),
        "toolchain": Group(packages=TOOLCHAIN),
        "imagetools": Group(packages=IMAGE_TOOLS),
        "base": Group(packages=(*BASE, *shipped)),
    }
    if recipe.image.model is ImageModel.EXTENSION:
        found["extension_tools"] = Group(packages=EXTENSION_TOOLS, on="base")
    if recipe.kernel.headers is Headers.RPM:
        found["rpm_tools"] = Group(packages=("rpm",), on="toolchain")
    if extra:
        found["build_layer"] = Group(packages=tuple(extra), on="toolchain")
    if recipe.kernel.source is KernelSource.DEBIAN:
        assert recipe.kernel.package is not None
        version = f"={recipe.kernel.version}" if recipe.kernel.version else ""
        found["kernel_source"] = Group(packages=(recipe.kernel.package + version,), alone=True)
    if recipe.toolkit.source is ToolkitSource.DEBS:
        files = tuple(LocalDeb(path=str((root / deb).resolve()), sha256=file_digest(root / deb))
                      for deb in recipe.toolkit.debs)
        found["toolkit"] = Group(files=files, on="base")
    driver = recipe.driver
    if driver.source is DriverSource.DEBIAN:
        wanted = [package for capability in Capability if capability in driver.capabilities
                  for package in DRIVER[capability]]
        version = f"={driver.version}*"
        names = tuple(package if package == "nvidia-persistenced" else package + version
                      for package in dict.fromkeys([*wanted, *DRIVER_ALWAYS]))
        found["driver_user"] = Group(packages=names,
                                     on="toolkit" if "toolkit" in found else "base")
        source = DRIVER_SOURCE[driver.kernel_module]
        found["driver_source"] = Group(packages=(source + version,), alone=True)
    return found


def archives(recipe: Recipe) -> tuple[Archive, ...]:
    """Where the packages come from: a mirror given, the host's own, or the recipe's fallback."""
    distribution = recipe.distribution
    suite, components = distribution.suite, distribution.components
    host = host_archive(distribution.id) if distribution.mirror == "host" else {}
    main = (host.get("") or distribution.fallback_mirror if distribution.mirror == "host"
            else distribution.mirror)
    security = host.get("-security") or distribution.security_mirror
    found = [Archive(uri=main, suites=_suites(suite, security is not None),
                     components=components, keyring=distribution.keyring)]
    if security is not None:
        found.append(Archive(uri=security, suites=(f"{suite}-security",), components=components,
                             keyring=distribution.keyring))
    return tuple(found)


def _suites(suite: str, maintained: bool) -> tuple[str, ...]:
    return (suite, f"{suite}-updates") if maintained else (suite,)


def identity(recipe: Recipe, root: Path) -> str:
    """Digest of what a recipe asks for; where this host has it is not part of that."""
    wanted = to_builtins(groups(recipe, root))
    for group in wanted.values():
        group["files"] = [deb["sha256"] for deb in group["files"]]
    return digest({"format": FORMAT, "distribution": to_builtins(recipe.distribution),
                   "groups": wanted})


def request(recipe: Recipe, root: Path) -> Request:
    """The whole request of a recipe, with the addresses for this host."""
    return Request(recipe=recipe.name, identity=identity(recipe, root), architecture="amd64",
                   archives=archives(recipe), groups=groups(recipe, root))
