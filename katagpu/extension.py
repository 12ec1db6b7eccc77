"""The root of the driver's disk, picked out of the layers in which the driver was installed.

The disk is mounted at /run/kata-extensions/gpu and is no root of its own: it has what the driver
brings, and what that needs and the base has not. Layout as Kata's (nvidia_rootfs.sh of
tools/osbuilder), so that nvidia-ctk with `--driver-root` finds it: bin, usr/lib/<triplet> without
directories in it, lib/modules, lib/firmware/nvidia, etc/ld.so.cache.

Of a layer that holds what the driver's own manifest has for this guest, and nothing else, all files
are taken. Packages of a distribution bring more than that: of theirs the names below.

Runs in the namespace that owns the layers' files.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from katagpu.check.elf import Binary
from katagpu.check.linker import Linker
from katagpu.check.modules import BUILD_ID_RECORD
from katagpu.check.root import Root
from katagpu.errors import StepError

TRIPLET = "x86_64-linux-gnu"
LIBRARIES = f"usr/lib/{TRIPLET}"
FIRMWARE = "lib/firmware/nvidia"
SOCKET = "var/run/nvidia-persistenced"
# NVIDIA's own, by name: most of them are only dlopened, so no program's needs lead to them.
DRIVER_LIBRARY = re.compile(
    r"lib(?:cuda|cudadebugger|nvcuvid|nvoptix|nvidia-(?!container)[\w-]+|(?:GLX|EGL|GLES\w*|vdpau)_nvidia)\.so")
# What nvidia-ctk gives to containers (NewDriverBinariesDiscoverer), and what runs in the guest.
PROGRAMS = ("nvidia-smi", "nvidia-debugdump", "nvidia-persistenced", "nvidia-cuda-mps-control",
            "nvidia-cuda-mps-server", "nvidia-imex", "nvidia-imex-ctl", "nvidia-ctk",
            "nvidia-cdi-hook")
PROGRAM_DIRECTORIES = ("usr/bin", "usr/sbin")
# Vendor files, which name libraries; the licences.
DATA = ("etc/OpenCL/vendors", "usr/share/glvnd/egl_vendor.d",
        "usr/share/egl/egl_external_platform.d", "usr/share/vulkan/icd.d",
        "usr/share/vulkan/implicit_layer.d", "usr/share/nvidia", "usr/share/doc")
# Of the kernel's module directory: what depmod and modprobe read, and what binds it to its kernel.
KERNEL_FILES = ("modules.builtin", "modules.builtin.modinfo", "modules.order", BUILD_ID_RECORD)


class Sources:
    """The merged root with the driver in it, and the layers (directories) that the base lacks.

    Of the layers that are `whole` all is taken.
    """

    def __init__(self, root: Path, layers: Sequence[Path], whole: Sequence[Path]) -> None:
        self.root = Root(root)
        self.layers = layers
        self.whole = whole
        self.linker = Linker(self.root)

    def brought(self, path: str) -> bool:
        """Whether one of the layers has something at this path, in which no directory is a link."""
        return any(os.path.lexists(layer / path.lstrip("/")) for layer in self.layers)


def harvest(root: Path, *, layers: list[str], whole: list[str], out: str,
            release: str) -> dict[str, int]:
    """Fill the directory `out`; how many files of each kind are in it.

    `root` is base, toolkit, driver and modules merged; `layers` are the directories of those that
    the base lacks, `whole` those of them of which every file is taken. Raises `StepError` where
    they have no driver.
    """
    sources = Sources(root, [Path(layer) for layer in layers], [Path(layer) for layer in whole])
    target = Path(out)
    chosen = {binary.path: binary for binary in _own(sources)}
    for binary in _needed(sources, chosen.values()):
        chosen.setdefault(binary.path, binary)
    if not any(path.rpartition("/")[2].startswith("libcuda.so") or path.endswith("/nvidia-smi")
               for path in chosen):
        raise StepError("the driver's layers have neither libcuda nor nvidia-smi",
                        hint="is the driver where this build expects it? look at the log of "
                             "driver_user")
    for path, binary in chosen.items():
        _copy(sources, path, target / _place(binary))
    counts = {"programs and libraries": len(chosen),
              "firmware": _tree(sources, f"/{FIRMWARE}", target / FIRMWARE),
              "modules": _modules(sources, target, release)}
    for directory in DATA:
        counts["data"] = counts.get("data", 0) + _tree(sources, f"/{directory}",
                                                       target / directory)
    counts["data"] += _rest(sources, chosen, target)
    # nvidia-ctk looks for the daemon's socket below the driver's root. Not a link of all of /run:
    # by that it would find the programs under a second path, and give it to containers.
    (target / SOCKET).parent.mkdir(parents=True)
    (target / SOCKET).symlink_to("/run/nvidia-persistenced")
    (target / "etc").mkdir(exist_ok=True)
    return counts


def _own(sources: Sources) -> Iterator[Binary]:
    """The driver's libraries and the programs, by their real paths."""
    for path, binary in sources.linker.binaries.items():
        named = DRIVER_LIBRARY.match(path.rpartition("/")[2]) and sources.brought(path)
        if (named or any((layer / path.lstrip("/")).is_file() for layer in sources.whole)) \
                and sources.linker.library(path) is not None:
            yield binary
    for name in PROGRAMS:
        for directory in PROGRAM_DIRECTORIES:
            real = sources.root.resolve(f"/{directory}/{name}")
            program = None if real is None else sources.linker.binaries.get(real)
            if program is not None and sources.brought(f"/{directory}/{name}"):
                yield program
                break


def _needed(sources: Sources, start: Iterable[Binary]) -> Iterator[Binary]:
    """The libraries that these need, and that came with the driver: the base has the others."""
    waiting = [(binary,) for binary in start]
    seen: set[str] = set()
    for chain in waiting:
        for name in chain[0].needed:
            found = sources.linker.find(name, chain)
            if found is None or found.path in seen:
                continue
            seen.add(found.path)
            if sources.brought(found.path):
                yield found
                waiting.append((found,))


def _place(binary: Binary) -> str:
    directory, _, name = binary.path.rpartition("/")
    if ".so" not in name:
        return f"bin/{name}"
    # The one directory beside libcuda's in which nvidia-ctk looks.
    return f"{LIBRARIES}/vdpau/{name}" if directory.endswith("/vdpau") else f"{LIBRARIES}/{name}"


def _modules(sources: Sources, target: Path, release: str) -> int:
    """The modules of the layers with their record, and what depmod reads of the kernel's own.

    A GPU's driver depends on nothing but what is built into our kernels; the check of modules.dep
    fails where it does.
    """
    place = f"lib/modules/{release}"
    _tree(sources, f"/{place}", target / place)
    for name in KERNEL_FILES:
        if sources.root.is_file(f"/{place}/{name}"):
            _copy(sources, f"/{place}/{name}", target / place / name)
    return sum(1 for _ in (target / place).rglob("*.ko*"))


def _tree(sources: Sources, directory: str, target: Path) -> int:
    """Copy a directory's files that the layers bring, links resolved; how many."""
    count = 0
    real = sources.root.resolve(directory)
    for name in sources.root.names(directory):
        path = f"{real}/{name}"
        if sources.root.is_dir(path):
            count += _tree(sources, path, target / name)
        elif sources.root.is_file(path) and sources.brought(path):
            _copy(sources, path, target / name)
            count += 1
    return count


def _rest(sources: Sources, chosen: Collection[str], target: Path) -> int:
    """What else is in the layers of which all is taken, at its own path; how many files.

    Of links those beside libraries: the others lead to what is taken under another path.
    """
    count = 0
    for layer in sources.whole:
        for found in sorted(layer.rglob("*")):
            path = str(found.relative_to(layer))
            if f"/{path}" in chosen or path.startswith((*(f"{name}/" for name in DATA),
                                                        f"usr/{FIRMWARE}/")):
                continue
            place = target / (f"bin/{found.name}" if path.startswith("usr/bin/") else path)
            if found.is_symlink():
                if found.parent == layer / LIBRARIES and "/" not in str(found.readlink()):
                    place.symlink_to(found.readlink())
            elif found.is_file():
                _copy(sources, f"/{path}", place)
                count += 1
    return count


def _copy(sources: Sources, path: str, target: Path) -> None:
    real = sources.root.resolve(path)
    assert real is not None, path
    if target.exists():
        raise StepError(f"two files of the driver would be {target.name}, one of them {path}",
                        hint="its layers hold two drivers")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(sources.root.host(real), target)
    target.chmod(0o755 if target.stat().st_mode & 0o111 else 0o644)
