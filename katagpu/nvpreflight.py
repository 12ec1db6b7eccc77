"""What can be known before NVIDIA's installer is started, so that it need not fail for it.

A module build that fails costs minutes, and a full disk ends the installer with SIGBUS and no word.
All that is asked here is the presence of files; nothing is run.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from katagpu import nvbranches
from katagpu.errors import UserError
from katagpu.log import size
from katagpu.nvcauses import PACKAGES, SPACE_CURE, build_package
from katagpu.run import PATH
from katagpu.schema import KernelModule

# Measured with 550.163.01: what is installed without and with OpenGL's and 32-bit files, and what
# the unpacked package and its build directory take beside that.
HEADLESS, EVERYTHING, BUILD = 400_000_000, 725_000_000, 1_500_000_000
# Where make alone builds: a copy of the source (70 MB), what it becomes (412 MB more), and the
# stripped modules.
MODULES = 600_000_000
ALWAYS = ("ldconfig", "grep", "dmesg", "tail", "modprobe", "rmmod", "lsmod", "depmod")
BUILDING = ("cc", "make", "ld", "tr", "sed")
MAKING = ("gcc", "make", "ld", "sed")
LINKS = 40  # as the kernel


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of the installer that is about to start.

    `layers` are the directories of the root, topmost first. `space` is a directory on the file
    system that will hold what is written. `headless`: neither OpenGL's nor 32-bit files are wanted.
    """

    version: str
    release: str
    flavour: KernelModule
    flavours: frozenset[str]
    layers: Sequence[Path]
    space: Path
    builds: bool = False
    headless: bool = True


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that would make the run fail, and how to mend it."""

    what: str
    cure: str


class Layers:
    """Directories that lie on top of each other as a root. Links are followed inside."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = directories

    def find(self, path: str) -> Path | None:
        """The file or directory that a path of the root leads to; None where it leads nowhere."""
        left = list(PurePosixPath(path).parts[1:])
        at = PurePosixPath("/")
        links = 0
        while left:
            part = left.pop(0)
            if part == "..":
                at = at.parent
                continue
            place = self._lookup(at / part)
            if place is None:
                return None
            if place.is_symlink():
                links += 1
                if links > LINKS:
                    return None
                target = PurePosixPath(place.readlink())
                if target.is_absolute():
                    at = PurePosixPath("/")
                left = [*(part for part in target.parts if part != "/"), *left]
                continue
            at = at / part
        return self._lookup(at)

    def program(self, name: str) -> Path | None:
        """A program, looked for where the installer looks."""
        return next((found for directory in PATH.split(":")
                     if (found := self.find(f"{directory}/{name}")) is not None), None)

    def _lookup(self, path: PurePosixPath) -> Path | None:
        inner = path.relative_to("/")
        for directory in self.directories:
            place = directory / inner
            if _whiteout(place):
                return None
            if place.is_symlink() or place.exists():
                return place
            if any(_whiteout(directory / parent) or _opaque(directory / parent)
                   for parent in inner.parents):
                return None
        return None


def _whiteout(place: Path) -> bool:
    """Does overlay hide what lies below it here (a character device 0:0)?"""
    try:
        found = place.lstat()
    except OSError:
        return False
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _opaque(place: Path) -> bool:
    try:
        return os.getxattr(place, "user.overlay.opaque", follow_symlinks=False) == b"y"
    except OSError:
        return False


def preflight(plan: Plan) -> list[Problem]:
    """All that would make the run fail and costs nothing to find out."""
    layers = Layers(plan.layers)
    needed = (HEADLESS if plan.headless else EVERYTHING) + (BUILD if plan.builds else 0)
    names = (*ALWAYS, *(BUILDING if plan.builds else ()))
    found = [*_fit(plan), *_programs(layers, names, "in which the driver is installed"),
             *_space(needed, plan.space)]
    if plan.builds:
        if layers.find("/usr/include/stdio.h") is None:
            found.append(Problem(what="the root in which the driver is built has no headers of the "
                                      "C library", cure=build_package("libc6-dev")))
        found += _headers(layers, plan.release, f"/lib/modules/{plan.release}/build")
    return found


def require_modules(layers: Sequence[Path], release: str, place: str, space: Path) -> None:
    """Raises `UserError` for what would make a build of the modules by make alone fail.

    `layers` are the directories of the root, topmost first; `place` is the path of the headers in
    it. `space` is as in `Plan`.
    """
    root = Layers(layers)
    require([*_programs(root, MAKING, "in which the modules are built"), *_space(MODULES, space),
             *_headers(root, release, place)])


def require(problems: Sequence[Problem]) -> None:
    """Raises one `UserError` that names all problems, if there are any."""
    if problems:
        raise UserError("\n".join(problem.what for problem in problems),
                        hint="; ".join(dict.fromkeys(problem.cure for problem in problems)))


def _fit(plan: Plan) -> Iterator[Problem]:
    try:
        nvbranches.check_flavour(plan.version, plan.flavour, plan.flavours)
    except UserError as refusal:
        yield Problem(what=refusal.what, cure=refusal.hint or "")


def _programs(layers: Layers, names: Sequence[str], which: str) -> Iterator[Problem]:
    for name in names:
        if layers.program(name) is None:
            yield Problem(what=f"the root {which} has no {name}",
                          cure=build_package(PACKAGES.get(name, name)))


def _space(needed: int, space: Path) -> Iterator[Problem]:
    free = shutil.disk_usage(space).free
    if free < needed:
        yield Problem(what=f"the driver needs {size(needed)} on the file system of {space}, "
                           f"{size(free)} are free", cure=SPACE_CURE)


def _headers(layers: Layers, release: str, place: str) -> Iterator[Problem]:
    cure = "build the kernel again, with its headers package (./doitw build_kernel)"
    if layers.find(place) is None:
        yield Problem(what=f"the headers of kernel {release} are not in the root: there is "
                           f"no {place}", cure=cure)
        return
    for name, why in (("include/linux/kernel.h", "the source's part of the headers"),
                      ("include/generated/autoconf.h", "the configured part of the headers"),
                      ("Module.symvers", "without it no symbol of the kernel is found"),
                      ("scripts/mod/modpost", "the kernel's own build programs")):
        if layers.find(f"{place}/{name}") is None:
            yield Problem(what=f"the headers of kernel {release} are incomplete: {place}/"
                               f"{name} is missing ({why})", cure=cure)
    found = _release(layers, place)
    if found != release:
        yield Problem(what=f"the headers in {place} are of kernel {found or 'unknown release'}, "
                           f"the guest's is {release}", cure=cure)


def _release(layers: Layers, place: str) -> str | None:
    """The release that a headers tree was configured for."""
    plain = layers.find(f"{place}/include/config/kernel.release")
    if plain is not None:
        return plain.read_text().strip()
    stamped = layers.find(f"{place}/include/generated/utsrelease.h")
    if stamped is not None:
        for line in stamped.read_text().splitlines():
            if line.startswith("#define UTS_RELEASE "):
                return line.split(maxsplit=2)[2].strip().strip('"')
    return None
