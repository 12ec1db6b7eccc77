"""The schema of a recipe: frozen structs, one per section.

The descriptions are the reference in docs/recipe.md (`recipe_docs` writes it).
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Annotated

from msgspec import Meta

from katagpu.sections import BootCheck as BootCheck
from katagpu.sections import Section as Section
from katagpu.sections import Sign as Sign
from katagpu.words import (
    Component,
    DriverVersion,
    Fingerprint,
    KernelVersion,
    Minutes,
    Mirror,
    PackageName,
    Port,
    ServerAddress,
    Sha256,
    Suite,
    ToolkitVersion,
    Url,
)


class Arch(StrEnum):
    """Architectures, by the kernel's names."""

    X86_64 = "x86_64"


class DistributionId(StrEnum):
    """Guest distributions."""

    DEBIAN = "debian"
    UBUNTU = "ubuntu"


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
    RUNFILE = "runfile"
    NONE = "none"


class ModulesBy(StrEnum):
    """Who compiles the kernel modules of a `.run` file."""

    KATAGPU = "katagpu"
    INSTALLER = "installer"


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
    NGX = "ngx"
    COMPAT32 = "compat32"


class ToolkitSource(StrEnum):
    """Where the NVIDIA Container Toolkit comes from."""

    GO = "go"
    APT = "apt"
    DEBS = "debs"
    NONE = "none"


class ToolkitMode(StrEnum):
    """How a container gets the GPU inside the guest."""

    CDI = "cdi"
    HOOK = "hook"


class Service(StrEnum):
    """NVIDIA's daemons for data centres, which the guest can start."""

    FABRICMANAGER = "fabricmanager"
    DCGM = "dcgm"


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


class FeatureType(IntEnum):
    """What nvidia-gridd asks a licence for, by the numbers of its `FeatureType`."""

    UNLICENSED = 0
    VGPU = 1
    WORKSTATION = 2
    COMPUTE = 4


class Distribution(Section, frozen=True, kw_only=True):
    """What the guest's root file system is made of."""

    id: Annotated[DistributionId, Meta(description="distribution of the guest")]
    suite: Annotated[Suite, Meta(description=(
        "code name of the release, for example `trixie`"))]
    components: Annotated[tuple[Component, ...] | None, Meta(description=(
        "parts of the archive; null: all of them. Debian has the NVIDIA driver in `contrib` and "
        "`non-free`"))] = None
    mirror: Annotated[Mirror, Meta(description=(
        "address of a mirror, or `host`: the build host's own apt configuration where it is of "
        "the same distribution, else `fallback_mirror`"))] = "host"
    fallback_mirror: Annotated[Url, Meta(description=(
        "address of the mirror that is used when `mirror: host` has none to offer"))]
    security_mirror: Annotated[Url | None, Meta(description=(
        "address of the archive of `<suite>-security`, where the host's own apt has none to "
        "offer; null: none"))] = None
    keyring: Annotated[str, Meta(pattern=r"^\S+\Z", description=(
        "the keyring with which the archive is verified: an absolute path on the build host, or "
        "one from the repository's root (`keys/ubuntu/archive-2018.asc`)"))]


COMPONENTS: dict[DistributionId, tuple[str, ...]] = {
    DistributionId.DEBIAN: ("main", "contrib", "non-free", "non-free-firmware"),
    DistributionId.UBUNTU: ("main", "restricted", "universe", "multiverse"),
}
"""All parts of each distribution's archive."""

TOOLS = Distribution(
    id=DistributionId.DEBIAN, suite="trixie", fallback_mirror="http://deb.debian.org/debian",
    security_mirror="http://deb.debian.org/debian-security",
    keyring="/usr/share/keyrings/debian-archive-keyring.gpg")
"""Where the bootstrap and image tools come from, whatever the guest is."""


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
        "`debian`: the suite's packages; `runfile`: NVIDIA's own `.run` file, installed by its own "
        "nvidia-installer; `none`: a guest without a driver"))]
    version: Annotated[DriverVersion | None, Meta(description=(
        "NVIDIA's version, for example `\"550.163.01\"`; null: the one in the name of `file` or "
        "`url`; `./doitw driver=VERSION` takes another"))
    ] = None
    url: Annotated[Url | None, Meta(description=(
        "address of the `.run` file; `{version}` in it stands for the version (source: runfile); "
        "null, and no `file`: NVIDIA's public downloads by version"))] = None
    file: Annotated[str | None, Meta(description=(
        "path of the `.run` file from the repository's root, with `{version}` as in `url` "
        "(source: runfile)"))] = None
    sha256: Annotated[Sha256 | None, Meta(description=(
        "SHA-256 of the `.run` file; null: its own checksums alone are verified, and the lock "
        "keeps the digest of the first that came. A `url` with plain http needs it"))] = None
    modules_by: Annotated[ModulesBy, Meta(description=(
        "`katagpu` compiles the kernel modules, cached apart, and nvidia-installer installs the "
        "rest; `installer`: nvidia-installer compiles them, with the compiler that "
        "`rootfs.extra_packages` brings (source: runfile)"))] = ModulesBy.KATAGPU
    documentation: Annotated[bool, Meta(description=(
        "ship the driver's documentation too; its licence always is (source: runfile)"))] = False
    kernel_module: Annotated[KernelModule, Meta(description=(
        "`open` needs a GPU of Turing or later; `closed` is the proprietary module"))
    ] = KernelModule.OPEN
    capabilities: Annotated[tuple[Capability, ...], Meta(description=(
        "whose libraries go into the image; `graphics` and `display` need the kernel feature "
        "`drm`, `compat32` needs `ia32`; `ngx` and `compat32` need `source: runfile`"))
    ] = (Capability.COMPUTE, Capability.UTILITY)


class Repository(Section, frozen=True, kw_only=True):
    """An apt repository beside the distribution's archive, in the words of sources.list(5)."""

    uri: Annotated[Url, Meta(description=(
        "address of the repository; `$(ARCH)` in it becomes Debian's name of the architecture"))]
    suite: Annotated[str, Meta(pattern=r"^[A-Za-z0-9./][A-Za-z0-9./_~+-]*\Z", description=(
        "name of the suite; one that ends in a slash is the directory of a flat repository"))
    ] = "/"
    components: Annotated[tuple[Component, ...], Meta(description=(
        "parts of the suite; a flat repository has none"))] = ()
    signed_by: Annotated[str, Meta(description=(
        "the public key that signs it, armored or binary: a path from the recipes' repository, or "
        "a URL, which needs `fingerprint`"))]
    fingerprint: Annotated[Fingerprint | None, Meta(description=(
        "fingerprint of that key, 40 hexadecimal digits without blanks: no other is trusted"))
    ] = None


LIBNVIDIA_CONTAINER = Repository(
    uri="https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH)",
    signed_by="https://nvidia.github.io/libnvidia-container/gpgkey",
    fingerprint="C95B321B61E88C1809C4F759DDCAE044F796ECB0")
"""NVIDIA's public repository of the toolkit (its installation guide)."""


class Toolkit(Section, frozen=True, kw_only=True):
    """The NVIDIA Container Toolkit."""

    source: Annotated[ToolkitSource, Meta(description=(
        "`go`: compiled from its Go module; `apt`: packages of an apt repository; `debs`: "
        "packages given as files; `none`"))]
    version: Annotated[ToolkitVersion | None, Meta(description=(
        "source: go: version of the module, for example `v1.17.8`; source: apt: version of the "
        "packages, for example `1.17.8-1`, null: the newest, kept by the lock"))] = None
    repository: Annotated[Repository, Meta(description=(
        "where the packages are (source: apt); by default NVIDIA's public repository"))
    ] = LIBNVIDIA_CONTAINER
    debs: Annotated[tuple[str, ...], Meta(description=(
        "packages, paths from the repository's root (source: debs)"))] = ()
    mode: Annotated[ToolkitMode, Meta(description=(
        "`cdi`: the guest writes a CDI specification; `hook`: the prestart hook of Kata's "
        "NVIDIA guide, which needs nvidia-container-cli and so `source: apt` or `debs`"))
    ] = ToolkitMode.CDI


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
    verity: Annotated[bool, Meta(description=(
        "a hash tree of the disk image, by which Kata verifies it (docs/image.md)"))] = False


class Vgpu(Section, frozen=True, kw_only=True):
    """An NVIDIA vGPU guest: its licence client, nvidia-gridd (see vgpu.md)."""

    feature_type: Annotated[FeatureType, Meta(description=(
        "what is licensed: `1` the vGPU, by its own type; `0` nothing, or vApps on a GPU that is "
        "passed through; `2` RTX Virtual Workstation; `4` Virtual Compute Server"))
    ] = FeatureType.VGPU
    server_address: Annotated[ServerAddress | None, Meta(description=(
        "a legacy licence server, for older vGPU software; null: the client configuration "
        "token says which server it is"))] = None
    server_port: Annotated[Port, Meta(description="its port (`server_address`)")] = 7070
    backup_server_address: Annotated[ServerAddress | None, Meta(description=(
        "the legacy server that takes over (`server_address`)"))] = None
    backup_server_port: Annotated[Port, Meta(description=(
        "its port (`backup_server_address`)"))] = 7070
    license_interval: Annotated[Minutes | None, Meta(description=(
        "for how many minutes a legacy licence is borrowed, 10 to 10080; null: a day "
        "(`server_address`)"))] = None
    embed_token: Annotated[bool, Meta(description=(
        "put the client configuration token into the image under out/, and nowhere else; without "
        "it the token is handed to the guest when it starts"))] = False
    token_file: Annotated[str | None, Meta(description=(
        "path of that token (`embed_token`)"))] = None


class Recipe(Section, frozen=True, kw_only=True):
    """A guest."""

    name: Annotated[str, Meta(description="the file's name, without `.yaml`")]
    arch: Annotated[Arch, Meta(description="architecture of the guest")] = Arch.X86_64
    distribution: Distribution
    tools: Annotated[Distribution | None, Meta(description=(
        "where mmdebstrap, Go and the image tools come from, with the fields of `distribution`; "
        "null: Debian trixie, from the guest's own archive where that is it"))] = None
    kernel: Kernel
    driver: Driver
    other_drivers: Annotated[tuple[Driver, ...], Meta(description=(
        "more sections like `driver`, each with a version of its own: `./doitw driver=VERSION` "
        "takes one of them, `driver=all` builds a guest with each"))] = ()
    toolkit: Toolkit
    services: Annotated[tuple[Service, ...], Meta(description=(
        "daemons of `nvidia_repository` that the guest starts: `fabricmanager` for NVSwitches, "
        "`dcgm` for monitoring"))] = ()
    nvidia_repository: Annotated[Repository | None, Meta(description=(
        "NVIDIA's repository for the guest's distribution, which has the `services`"))] = None
    agent: Annotated[Agent | None, Meta(description=(
        "without it the image boots, but Kata cannot use it"))] = None
    rootfs: Rootfs = Rootfs()
    image: Image = Image()
    vgpu: Annotated[Vgpu | None, Meta(description=(
        "the driver is a GRID guest driver for vGPUs; without it the guest has no licence client"))
    ] = None
    sign: Annotated[Sign | None, Meta(description=(
        "sign the kernel's and the driver's modules; without it they are not signed"))] = None
    boot_check: BootCheck = BootCheck()
