"""The NVIDIA driver as Debian packages it, fetched with the product's own apt code and unpacked.

Debian splits NVIDIA's `.run` into packages; `collect` lays their files out as NVIDIA's archive has
them: libraries at the top by the names that NVIDIA gives them, `32/`, `firmware/`, `kernel/` and
`kernel-open/`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from katagpu.fetch import Job, fetch_all
from katagpu.lock import Archive, Deb, Group, Request, host_archive, resolve

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
MIRROR = "http://deb.debian.org/debian"
KERNEL = ("nvidia-kernel-source", "nvidia-open-kernel-source")
COMPUTE = (
    "libcuda1", "libcudadebugger1", "libnvidia-allocator1", "libnvidia-cfg1", "libnvidia-ml1",
    "libnvidia-nvvm4", "libnvidia-opticalflow1", "libnvidia-pkcs11-openssl3",
    "libnvidia-ptxjitcompiler1", "libnvcuvid1", "libnvidia-encode1", "nvidia-cuda-mps",
    "nvidia-opencl-common", "nvidia-opencl-icd", "nvidia-persistenced", "nvidia-smi",
    "firmware-nvidia-gsp",
)
GRAPHICS = (
    "libegl-nvidia0", "libgles-nvidia1", "libgles-nvidia2", "libglx-nvidia0", "libnvidia-api1",
    "libnvidia-eglcore", "libnvidia-fbc1", "libnvidia-glcore", "libnvidia-glvkspirv",
    "libnvidia-ngx1", "libnvidia-rtcore", "nvidia-driver-bin", "nvidia-egl-common",
    "nvidia-suspend-common", "nvidia-vdpau-driver", "nvidia-vulkan-common",
    "xserver-xorg-video-nvidia",
)
COMPAT32 = ("libcuda1", "libnvidia-ml1", "libnvidia-nvvm4", "libnvidia-ptxjitcompiler1")
SINCE_545 = ("libnvidia-gpucomp",)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A Debian release and the branch of NVIDIA's driver that it has."""

    name: str
    branch: int

    def packages(self, *, graphics: bool) -> tuple[str, ...]:
        """The packages for x86_64, without their dependencies."""
        found = KERNEL + COMPUTE + (GRAPHICS if graphics else ())
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
        archive = Archive(uri=uri, suites=(suite.name,), components=("contrib", "non-free",
                          "non-free-firmware"), keyring=KEYRING)
        lock = resolve(Request(recipe=suite.name, identity="", architecture=architecture,
                               archives=(archive,), groups={"driver": Group(packages=names,
                                                                            alone=True)}),
                       cache / f"apt-{suite.name}-{architecture}")
        debs = [(deb, cache / "debs" / f"{deb.sha256}.deb") for deb in lock.group("driver")]
        fetch_all([(Job(url=deb.url, sha256=deb.sha256, size=deb.size, what=deb.package), path)
                   for deb, path in debs])
        found[architecture] = debs
    return found
