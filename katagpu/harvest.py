"""Takes the files that ship out of what an installer left in an overlay's upper directory.

Runs in the namespace that owns the files (`Build.inside`).
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from katagpu.guestfiles import resolve


def take(root: Path, upper: str, target: str, wanted: list[str]) -> dict[str, Any]:
    """Move `wanted` (paths in the guest) from `upper` to the same places below `target`.

    `root` is the merged guest: links to directories are followed there, so that /lib is usr/lib.
    The answer holds the `missing` ones, and the size in bytes of each file `taken`.
    """
    missing: list[str] = []
    taken: dict[str, int] = {}
    for path in wanted:
        place = resolve(root, path).relative_to(root)
        source = Path(upper) / place
        try:
            found = source.lstat()
        except OSError:
            missing.append(path)
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
            missing.append(path)
            continue
        to = Path(target) / place
        _parents(Path(target), to.parent)
        source.rename(to)
        if stat.S_ISREG(found.st_mode):
            # set-user-id programs make nodes and load modules; the guest's units do that
            to.chmod(stat.S_IMODE(found.st_mode) & 0o777)
            taken[path] = found.st_size
    return {"missing": missing, "taken": taken}


def find(root: Path, upper: str, names: list[str]) -> dict[str, list[str]]:
    """Where files of these names were put, as paths of the guest; names without one are not there.

    `root` is not looked at: what was there before is not in `upper`.
    """
    del root
    found: dict[str, list[str]] = {}
    for path in sorted(Path(upper).rglob("*")) if names else []:
        if path.name in names and (path.is_symlink() or path.is_file()):
            found.setdefault(path.name, []).append(f"/{path.relative_to(upper)}")
    return found


def read(root: Path, path: str) -> str:
    """A text file of the guest; empty where there is none."""
    try:
        return resolve(root, path, last=True).read_text(errors="replace")
    except OSError:
        return ""


def modules(root: Path, path: str) -> list[str]:
    """The kernel modules below a directory of the guest, as paths of the guest."""
    place = resolve(root, path, last=True)
    return sorted(f"{path}/{module.relative_to(place)}" for module in place.rglob("*.ko"))


def _parents(top: Path, directory: Path) -> None:
    for part in (*reversed(directory.relative_to(top).parents), directory.relative_to(top)):
        here = top / part
        if not here.exists():
            here.mkdir()
            here.chmod(0o755)
