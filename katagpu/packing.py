"""What is read from a merged root to pack it, in the namespace that owns its files."""

from __future__ import annotations

from pathlib import Path

from katagpu.tree import Capture

OF_DRIVER = ("libcuda.so", "libnvidia-", "libnvcuvid.so")


def write_tar(root: Path, target: str) -> str:
    """Write the tree as an uncompressed tar to `target`; its SHA-256."""
    with Path(target).open("wb") as sink:
        return Capture(root, overlay=False, drop=()).write(sink)


def sizes(root: Path) -> dict[str, int]:
    """Bytes by part of the guest, for the table of what takes the space."""
    parts: dict[str, int] = {}
    for path in root.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        parts_of = path.relative_to(root).parts
        name = _part("/".join(parts_of))
        parts[name] = parts.get(name, 0) + path.stat().st_size
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def _part(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    path = path if not path.startswith("lib/") else f"usr/{path}"  # on the driver's disk
    if path.startswith("var/lib/dpkg/"):
        return "dpkg's database"
    if path.startswith("usr/lib/modules/"):
        return "NVIDIA kernel modules" if "/drivers/video/" in path else "kernel modules"
    if path.startswith("usr/lib/firmware/"):
        return "GSP firmware"
    if name.startswith(OF_DRIVER) or (name.startswith("lib") and "/nvidia/" in path):
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
