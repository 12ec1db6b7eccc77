"""The schema of a recipe: frozen structs, one per section.

The descriptions are the reference in docs/recipe.md (`recipe_docs` writes it).
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")
"""A package's name (Debian Policy 5.6.1)."""

DRIVER_VERSION = re.compile(r"\d{3}\.\d{1,3}(\.\d{1,2})?")
"""NVIDIA's driver versions: branch, release, and often a third part."""

# msgspec searches for a pattern, it does not anchor it.
PackageName = Annotated[str, Meta(
    pattern=rf"^{PACKAGE.pattern}\Z",
    description="a package's name: lower case letters, digits, plus, minus and full stop")]
DriverVersion = Annotated[str, Meta(pattern=rf"^{DRIVER_VERSION.pattern}\Z")]
KernelVersion = Annotated[str, Meta(
    pattern=r"^[0-9]+\.[0-9]+(\.[0-9]+)?([-+~.][0-9A-Za-z.+~-]*)?\Z")]
ModuleVersion = Annotated[str, Meta(pattern=r"^v[0-9]+\.[0-9]+\.[0-9]+(-[0-9a-z.]+)?\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Suite = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9.-]*\Z")]
Url = Annotated[str, Meta(pattern=r"^https?://\S+\Z")]
Mirror = Annotated[str, Meta(pattern=r"^(host|https?://\S+)\Z")]
AbsolutePath = Annotated[str, Meta(pattern="^/")]


class Arch(StrEnum):
    """Architectures, by the kernel's names."""

    X86_64 = "x86_64"


class DistributionId(StrEnum):
    """Guest distributions."""

    DEBIAN = "debian"


class KernelSource(StrEnum):
    """Where the kernel's source comes from."""

    DEBIAN = "debian"
    KERNEL_ORG = "kernel.org"


class Headers(StrEnum):
    """Package format of the kernel headers."""

    DEB = "deb"
    RPM = "rpm"


class DriverSource(StrEnum):
    """Where the NVIDIA driver comes from."""

    DEBIAN = "debian"
    NONE = "none"


class KernelModule(StrEnum):
    """NVIDIA's two kernel modules: open (GPUs since Turing) and closed."""

    OPEN = "open"
    CLOSED = "closed"


class Capability(StrEnum):
    """What containers may do with the GPU, by the names of NVIDIA_DRIVER_CAPABILITIES."""

    COMPUTE = "compute"
    UTILITY = "utility"
    VIDEO = "video"
    GRAPHICS = "graphics"
    DISPLAY = "display"


class ToolkitSource(StrEnum):
    """Where the NVIDIA Container Toolkit comes from."""

    GO = "go"
    DEBS = "debs"
    NONE = "none"


class ToolkitMode(StrEnum):
    """How a container gets the GPU inside the guest."""

    CDI = "cdi"
    HOOK = "hook"


class ImageFormat(StrEnum):
    """How the root file system is packed."""

    EROFS = "erofs"
    EXT4 = "ext4"
    INITRD = "initrd"


class ImageModel(StrEnum):
    """Where the driver is: in the image, or on a disk of its own beside it."""

    SINGLE = "single"
    EXTENSION = "extension"


class Compression(StrEnum):
    """Compressors of the packed root file system."""

    NONE = "none"
    LZ4HC = "lz4hc"
    ZSTD = "zstd"


LEVELS: dict[ImageFormat, dict[Compression, range]] = {
    ImageFormat.EROFS: {Compression.NONE: range(0), Compression.LZ4HC: range(1, 13),
                        Compression.ZSTD: range(1, 20)},
    ImageFormat.EXT4: {Compression.NONE: range(0)},
    ImageFormat.INITRD: {Compression.NONE: range(0), Compression.ZSTD: range(1, 20)},
}
"""Compressors of each format and their levels (mkfs.erofs(1) -z, zstd(1)); empty: has none."""


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the recipe's parts: immutable, and an unknown field is an error."""


class Distribution(Section, frozen=True, kw_only=True):
    """What the guest's root file system is made of."""

    id: Annotated[DistributionId, Meta(description="distribution of the guest")]
    suite: Annotated[Suite, Meta(description=(
        "code name of the release, for example `trixie`"))]
    components: Annotated[tuple[str, ...], Meta(min_length=1, description=(
        "parts of the archive; the NVIDIA driver is in `contrib` and `non-free`"))] = (
        "main", "contrib", "non-free", "non-free-firmware")
    mirror: Annotated[Mirror, Meta(description=(
        "address of a mirror, or `host`: the build host's own apt configuration where it is of "
        "the same distribution, else `fallback_mirror`"))] = "host"
    fallback_mirror: Annotated[Url, Meta(description=(
        "address of the mirror that is used when `mirror: host` has none to offer"))]
    security_mirror: Annotated[Url | None, Meta(description=(
        "address of the archive of `<suite>-security`, where the host's own apt has none to "
        "offer; null: none"))] = None
    keyring: Annotated[AbsolutePath, Meta(description=(
        "absolute path of the keyring with which the archive is verified"))]


class Kernel(Section, frozen=True, kw_only=True):
    """The guest's kernel."""

    source: Annotated[KernelSource, Meta(description=(
        "`debian`: the suite's source package; `kernel.org`: a release, its signature verified"))]
    package: Annotated[PackageName | None, Meta(description=(
        "the binary package with the source, for example `linux-source-6.12` (source: debian)"))
    ] = None
    version: Annotated[KernelVersion | None, Meta(description=(
        "release of kernel.org, for example `\"6.12.30\"`; or the version of `package`, where "
        "not the newest"))] = None
    releases: Annotated[Url | None, Meta(description=(
        "address below which kernel.org's releases lie, for a mirror (source: kernel.org); null: "
        "kernel.org's own"))] = None
    features: Annotated[tuple[str, ...], Meta(description=(
        "optional parts of the kernel, by the files in kernel-configs/features"))] = ()
    fragments: Annotated[tuple[str, ...], Meta(description=(
        "config fragments of yours, paths from the repository's root; applied last, audited "
        "like the others"))] = ()
    headers: Annotated[Headers, Meta(description="package format of linux-headers")] = Headers.DEB


class Driver(Section, frozen=True, kw_only=True):
    """The NVIDIA driver."""

    source: Annotated[DriverSource, Meta(description=(
        "`debian`: the suite's packages; `none`: a guest without a driver"))]
    version: Annotated[DriverVersion | None, Meta(description=(
        "NVIDIA's version, for example `\"550.163.01\"`; `./doitw driver=VERSION` overrides it"))
    ] = None
    kernel_module: Annotated[KernelModule, Meta(description=(
        "`open` needs a GPU of Turing or later; `closed` is the proprietary module"))
    ] = KernelModule.OPEN
    capabilities: Annotated[tuple[Capability, ...], Meta(description=(
        "whose libraries go into the image; `graphics` and `display` need the kernel feature "
        "`drm`"))] = (Capability.COMPUTE, Capability.UTILITY)


class Toolkit(Section, frozen=True, kw_only=True):
    """The NVIDIA Container Toolkit."""

    source: Annotated[ToolkitSource, Meta(description=(
        "`go`: compiled from its Go module; `debs`: packages given as files; `none`"))]
    version: Annotated[ModuleVersion | None, Meta(description=(
        "version of the Go module, for example `v1.17.8` (source: go)"))] = None
    debs: Annotated[tuple[str, ...], Meta(description=(
        "packages, paths from the repository's root (source: debs)"))] = ()
    mode: Annotated[ToolkitMode, Meta(description=(
        "`cdi`: the guest writes a CDI specification; `hook`: the prestart hook of the older "
        "guide, which needs nvidia-container-cli and so `source: debs`"))] = ToolkitMode.CDI


class Agent(Section, frozen=True, kw_only=True):
    """Where kata-agent comes from: one of three forms."""

    file: Annotated[str | None, Meta(description="path of a kata-agent binary")] = None
    release: Annotated[Url | None, Meta(description=(
        "address of a kata-static release tarball; needs `sha256`"))] = None
    sha256: Annotated[Sha256 | None, Meta(description=(
        "SHA-256 of the release tarball, 64 hexadecimal digits"))] = None
    image: Annotated[str | None, Meta(description=(
        "path of an installed Kata guest image; it is read, not mounted"))] = None


class Rootfs(Section, frozen=True, kw_only=True):
    """What goes into the root file system beside the base, the driver and the toolkit."""

    packages: Annotated[tuple[PackageName, ...], Meta(description=(
        "packages that are shipped in the guest"))] = ()
    extra_packages: Annotated[tuple[PackageName, ...], Meta(
        description="packages that are there while the driver is built; `EXTRA_PKGS` in the "
                    "environment adds to them")] = ()
    keep_extra_pkgs: Annotated[bool, Meta(description=(
        "ship `extra_packages` in the guest too"))] = False


class Image(Section, frozen=True, kw_only=True):
    """How the guest's root file system is packed."""

    model: Annotated[ImageModel, Meta(description=(
        "`single`: everything in one image; `extension`: a base image without driver, and the "
        "driver on a disk of its own (docs/image.md)"))] = ImageModel.SINGLE
    format: Annotated[ImageFormat, Meta(description=(
        "`erofs` or `ext4`: a disk image in Kata's layout; `initrd`: a cpio archive"))
    ] = ImageFormat.EROFS
    compression: Annotated[Compression, Meta(description=(
        "erofs: any; initrd: `zstd` or `none`; ext4: `none`"))] = Compression.ZSTD
    level: Annotated[int | None, Meta(description=(
        "level of the compressor; null: its own default"))] = None
    dax_header: Annotated[bool, Meta(description=(
        "put Kata's 2 MiB DAX header in front of the disk image (for nvdimm)"))] = False


class Recipe(Section, frozen=True, kw_only=True):
    """A guest."""

    name: Annotated[str, Meta(description="the file's name, without `.yaml`")]
    arch: Annotated[Arch, Meta(description="architecture of the guest")] = Arch.X86_64
    distribution: Distribution
    kernel: Kernel
    driver: Driver
    toolkit: Toolkit
    agent: Annotated[Agent | None, Meta(description=(
        "without it the image boots, but Kata cannot use it"))] = None
    rootfs: Rootfs = Rootfs()
    image: Image = Image()


EXPLANATIONS: dict[tuple[str | int, ...], str] = {
    ("toolkit", "mode"): (
        "`cdi` or `hook`, not both: kata-agent drops guest hooks without a word when the "
        "container's specification has hooks already, and CDI devices bring hooks"),
}
"""Fields where a value of the wrong type deserves the reason."""
