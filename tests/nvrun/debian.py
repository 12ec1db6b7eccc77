"""The NVIDIA driver as Debian packages it, fetched with the product's own apt code and unpacked.

Debian splits NVIDIA's `.run` into packages and keeps the names of the files in it; `unpack` finds
them by name again, and the two trees of kernel module sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from katagpu.apt import host_archive
from katagpu.fetch import Job, fetch_all
from katagpu.lock import GUEST, Archive, Deb, Group, Request
from katagpu.resolve import resolve

CACHE = Path(os.environ.get("NVRUN_CACHE") or Path(
    os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "katagpu-nvrun")
"""Where slow tests keep packages between runs (400 MB for each suite); NVRUN_CACHE is another."""
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR = "http://deb.debian.org/debian"
KERNEL = ("nvidia-kernel-source", "nvidia-open-kernel-source")
COMPUTE = (
    "libcuda1", "libcudadebugger1", "libnvidia-allocator1", "libnvidia-cfg1", "libnvidia-ml1",
    "libnvidia-nvvm4", "libnvidia-opticalflow1", "libnvidia-pkcs11-openssl3",
    "libnvidia-ptxjitcompiler1", "libnvcuvid1", "libnvidia-encode1", "nvidia-cuda-mps",
    "nvidia-driver-bin", "nvidia-modprobe", "nvidia-opencl-common", "nvidia-opencl-icd",
    "nvidia-persistenced", "nvidia-smi", "firmware-nvidia-gsp",
)
GRAPHICS = (
    "libegl-nvidia0", "libgles-nvidia1", "libgles-nvidia2", "libglx-nvidia0", "libnvidia-api1",
    "libnvidia-eglcore", "libnvidia-fbc1", "libnvidia-glcore", "libnvidia-glvkspirv",
    "libnvidia-ngx1", "libnvidia-rtcore", "nvidia-egl-common",
    "nvidia-suspend-common", "nvidia-vdpau-driver", "nvidia-vulkan-common",
    "xserver-xorg-video-nvidia",
)
# NVIDIA's package always brings libglvnd, Debian has it among the free packages.
GLVND = ("libegl1", "libgl1", "libgles1", "libgles2", "libglvnd0", "libglx0", "libopengl0")
COMPAT32 = ("libcuda1", "libnvidia-ml1", "libnvidia-nvvm4", "libnvidia-ptxjitcompiler1")
SINCE_545 = ("libnvidia-gpucomp",)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A Debian release and the branch of NVIDIA's driver that it has."""

    name: str
    branch: int

    def packages(self, *, graphics: bool) -> tuple[str, ...]:
        """The packages for x86_64, without their dependencies."""
        found = KERNEL + COMPUTE + GLVND + (GRAPHICS if graphics else ())
        return found + (SINCE_545 if self.branch >= 545 else ())


TRIXIE = Suite(name="trixie", branch=550)
BOOKWORM = Suite(name="bookworm", branch=535)


def packages(suite: Suite, cache: Path, *, graphics: bool = False,
             compat32: bool = False) -> dict[str, list[tuple[Deb, Path]]]:
    """The packages by architecture, fetched into `cache`. Raises `UserError`, as the product."""
    uri = host_archive("debian").get("") or MIRROR
    wanted = {"amd64": suite.packages(graphics=graphics)}
    if compat32:
        wanted["i386"] = COMPAT32
    found = {}
    for architecture, names in wanted.items():
        free = ("main",) if architecture == "amd64" else ()
        archive = Archive(uri=uri, suites=(suite.name,), keyring=KEYRING,
                          components=(*free, "contrib", "non-free", "non-free-firmware"))
        lock = resolve(Request(recipe=suite.name, identity="", architecture=architecture,
                               archives={GUEST: (archive,)}, groups={"driver": Group(packages=names,
                                                                            alone=True)}),
                       cache / f"apt-{suite.name}-{architecture}")
        debs = [(deb, cache / "debs" / f"{deb.sha256}.deb") for deb in lock.group("driver")]
        fetch_all([(Job(url=deb.url, sha256=deb.sha256, size=deb.size, what=deb.package), path)
                   for deb, path in debs])
        found[architecture] = debs
    return found


def version(debs: list[tuple[Deb, Path]]) -> str:
    """NVIDIA's version of a set of packages."""
    (found,) = {deb.version.partition("-")[0] for deb, _ in debs if deb.package == "libcuda1"}
    return found


# Debian's own additions; files of these names are in NVIDIA's package too.
FOREIGN = re.compile(r"/(?:usr/share/(?:bug|lintian|doc)|etc/init\.d)/")


@dataclass(frozen=True, kw_only=True)
class Content:
    """Unpacked packages: files by base name, and the two trees of kernel module sources."""

    files: dict[str, Path]
    sources: dict[str, Path]


def unpack(debs: list[tuple[Deb, Path]], place: Path) -> Content:
    """Unpack packages below `place`, once, and index their files."""
    files: dict[str, Path] = {}
    sources: dict[str, Path] = {}
    place.mkdir(parents=True, exist_ok=True)
    for deb, path in debs:
        root = place / deb.sha256
        if not root.exists():
            part = place / f"{deb.sha256}.part"
            shutil.rmtree(part, ignore_errors=True)
            subprocess.run(["dpkg-deb", "--extract", path, part], check=True)
            if deb.package in KERNEL:
                _unpack_source(part)
            part.rename(root)
        if deb.package in KERNEL:
            sources["kernel" if deb.package == KERNEL[0] else "kernel-open"] = root / "source"
            if deb.package == KERNEL[0]:
                files |= _documents(root)
        for name, found in _files(root):
            if not FOREIGN.search(f"/{found.relative_to(root)}") \
                    and not found.is_relative_to(root / "source"):
                files.setdefault(name.removesuffix(".0.0"), found)  # NVIDIA's libGLX.so.0
    return Content(files=files, sources=sources)


def _unpack_source(root: Path) -> None:
    """The tarball of a source package, without Debian's own packaging in it."""
    (tarball,) = (root / "usr/src").glob("*.tar.*")
    source = root / "source"
    source.mkdir()
    subprocess.run(["tar", "--extract", "--no-same-owner", "--strip-components=2", "--file",
                    tarball, "--directory", source], check=True)
    shutil.rmtree(source / "debian", ignore_errors=True)
    tarball.unlink()
    documents = root / "usr/share/doc/nvidia-kernel-source"
    for name in ("README.txt", "changelog"):
        if (documents / f"{name}.gz").exists():
            subprocess.run(["gzip", "--decompress", "--name", documents / f"{name}.gz"], check=True)


def _documents(root: Path) -> dict[str, Path]:
    documents = root / "usr/share/doc/nvidia-kernel-source"
    return {"LICENSE": documents / "copyright", "README.txt": documents / "README.txt",
            "NVIDIA_Changelog": documents / "changelog"}


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    for directory, directories, names in os.walk(root):
        directories.sort()
        for name in sorted(names):
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield name, path
