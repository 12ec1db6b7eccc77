"""What is read from a merged root to pack it, in the namespace that owns its files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from katagpu import filelist
from katagpu.tree import Capture

# The driver's libraries, wherever a distribution or NVIDIA's installer puts them.
NVIDIA = re.compile(r"lib(?:nvidia-(?!container)|cuda|nvcuvid|nvoptix|\w+_nvidia)[\w-]*\.so")


def write_tar(root: Path, target: str) -> str:
    """Write the tree as an uncompressed tar to `target`; its SHA-256."""
    with Path(target).open("wb") as sink:
        return Capture(root, overlay=False, drop=()).write(sink)


def survey(root: Path, target: str) -> dict[str, int]:
    """Write the list of all files to `target`; bytes by part of the guest, largest first."""
    entries = filelist.scan(root)
    Path(target).write_bytes(filelist.render(entries))
    return _sizes(entries)


def _sizes(entries: Iterable[filelist.Entry]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for entry in entries:
        if entry.kind is filelist.Kind.FILE:
            name = part(entry.path)
            parts[name] = parts.get(name, 0) + entry.size
    return dict(sorted(parts.items(), key=lambda item: (-item[1], item[0])))


def part(path: str) -> str:
    """The part of the guest that a file belongs to."""
    name = path.rsplit("/", 1)[-1]
    path = path if not path.startswith("lib/") else f"usr/{path}"  # on the driver's disk
    if path.startswith("var/lib/dpkg/"):
        return "dpkg's database"
    if path.startswith("usr/lib/modules/"):
        return "NVIDIA kernel modules" if "/drivers/video/" in path else "kernel modules"
    if path.startswith("usr/lib/firmware/"):
        return "GSP firmware"
    if NVIDIA.match(name):
        return f"NVIDIA user space: {name.split('.so')[0]}"
    if name in ("nvidia-smi", "nvidia-persistenced"):
        return f"NVIDIA user space: {name}"
    if name in ("nvidia-ctk", "nvidia-cdi-hook", "nvidia-container-runtime-hook"):
        return "container toolkit"
    if name == "kata-agent":
        return "kata-agent"
    if path.startswith("usr/share/doc/"):
        return "licences"
    return "distribution"
