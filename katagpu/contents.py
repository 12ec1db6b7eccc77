"""What is in a guest's root, read in the namespace that owns its files: for lists of its contents.

Packages are those of dpkg's own database, Go modules those that the programs name, and the driver's
files are told by their places and names.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from katagpu import debcopyright, gobuildinfo, packing
from katagpu.check.elf import Damaged
from katagpu.check.kmod import read_module
from katagpu.check.root import Root

STATUS = "/var/lib/dpkg/status"
DOCS = "/usr/share/doc"
RUN_LICENCE = f"{DOCS}/NVIDIA_GLX-1.0/LICENSE"  # where a `.run` file's manifest has it
DRIVER = ("NVIDIA user space", "NVIDIA kernel modules", "GSP firmware")
PROGRAMS = ("bin/", "usr/bin/", "usr/sbin/", "usr/libexec/", "usr/lib/nvidia/")


def survey(root: Path, disk: str | None) -> dict[str, Any]:
    """Everything at once; `disk` is where the driver's own disk is mounted in the root."""
    guest = Root(root)
    files = sorted(_files(root))
    inside = f"{disk.strip('/')}/" if disk else None
    licence = next((place for place in (f"{disk}{RUN_LICENCE}", RUN_LICENCE)
                    if (disk and guest.is_file(place)) or (place == RUN_LICENCE
                    and guest.is_file(place))), None)
    return {"debs": debs(root), "go": list(_go(root, files, inside)),
            "driver": list(_driver(root, files, inside)),
            "licence": guest.text(licence) if licence else None}


def debs(root: Path) -> list[dict[str, Any]]:
    """The packages that dpkg has installed, with what their copyright files say."""
    from debian.deb822 import Deb822

    guest = Root(root)
    if not guest.is_file(STATUS):
        return []
    found = []
    for each in Deb822.iter_paragraphs(io.StringIO(guest.text(STATUS)), use_apt_pkg=False):
        if "installed" not in each.get("Status", "").split():
            continue
        source, _blank, version = each.get("Source", "").partition(" ")
        copyright_file = f"{DOCS}/{each['Package']}/copyright"
        text = guest.text(copyright_file) if guest.is_file(copyright_file) else None
        said = None if text is None else debcopyright.read(text)
        found.append({
            "name": each["Package"], "version": each["Version"],
            "architecture": each["Architecture"], "source": source or each["Package"],
            "source_version": version.strip("()") or each["Version"],
            "maintainer": each.get("Maintainer", ""), "section": each.get("Section", ""),
            "homepage": each.get("Homepage", ""), "file": copyright_file,
            "names": None if said is None else list(said.names),
            "texts": {} if said is None else said.texts,
            "copyright": text is not None})
    return sorted(found, key=lambda deb: (deb["name"], deb["architecture"]))


def owners(root: Path, names: list[str]) -> list[dict[str, Any]]:
    """The packages of which one file, documentation apart, has one of these names."""
    wanted = set(names)
    guest = Root(root)
    found = []
    for deb in debs(root):
        for stem in (deb["name"], f"{deb['name']}:{deb['architecture']}"):
            lines = guest.text(f"/var/lib/dpkg/info/{stem}.list").splitlines()
            if any(line.rpartition("/")[2] in wanted for line in lines
                   if not line.startswith(f"{DOCS}/")):
                found.append(deb)
                break
    return found


def _files(root: Path) -> Iterator[str]:
    for directory, _names, files in os.walk(root):
        for name in files:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                yield os.path.relpath(path, root)


def _outer(path: str, disk: str | None) -> str:
    """The path as it would be in a root of its own, for one on the driver's disk."""
    return path.removeprefix(disk) if disk else path


def _go(root: Path, files: list[str], disk: str | None) -> Iterator[dict[str, Any]]:
    for path in files:
        if not _outer(path, disk).startswith(PROGRAMS):
            continue
        found = gobuildinfo.read(root / path) if (root / path).stat().st_size > 64 else None
        if found is not None:
            yield {"path": f"/{path}", "go": found.go,
                   "main": None if found.main is None else _module(found.main),
                   "modules": [_module(module) for module in found.modules]}


def _module(module: gobuildinfo.Module) -> list[str]:
    return [module.path, module.version, module.sum]


def _driver(root: Path, files: list[str], disk: str | None) -> Iterator[dict[str, Any]]:
    for path in files:
        part = packing.part(_outer(path, disk)).partition(":")[0]
        if part not in DRIVER:
            continue
        fact = {"licence": "", "version": ""}
        if part == "NVIDIA kernel modules":
            try:
                module = read_module(root / path, f"/{path}")
            except Damaged:
                continue
            if not module.name.startswith("nvidia"):
                continue  # the kernel's own, for displays
            fact = {"licence": module.fact("license"), "version": module.fact("version")}
        data = (root / path).read_bytes()
        yield {"path": f"/{path}", "part": part, "size": len(data), **fact,
               "sha256": hashlib.sha256(data).hexdigest(),
               "sha1": hashlib.sha1(data, usedforsecurity=False).hexdigest()}
