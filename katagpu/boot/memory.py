"""Is there memory for a guest: the host's, and what a control group leaves of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from katagpu.errors import UserError

OVERHEAD = 384 << 20
"""Bytes that QEMU takes beside the guest's memory: 90 MB of its own, and translated code (TCG)."""
GROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def available(proc: Path = PROC, groups: Path = GROUPS) -> tuple[int, str]:
    """Bytes that may still be taken, and whose limit that is.

    The host's is MemAvailable (proc_meminfo(5)); a control group's is its limit less what it uses,
    not counting cached files, which it gives back. A limit holds for all groups below.
    """
    found = [(_host(proc), "the host")]
    for group, limit, usage, cache in _limits(proc, groups):
        found.append((max(0, limit - max(0, usage - cache)), f"the control group {group}"))
    return min(found)


def must_have(guest: int, proc: Path = PROC, groups: Path = GROUPS, *, machines: int = 1) -> None:
    """Raises `UserError` when there is no memory for guests of so many bytes, each in a QEMU."""
    free, whose = available(proc, groups)
    if free < machines * (guest + OVERHEAD):
        guests = "the guest: it has" if machines == 1 else f"{machines} guests: each has"
        raise UserError(
            f"there is not enough memory for {guests} {guest >> 20} MiB and QEMU takes "
            f"{OVERHEAD >> 20} MiB more, and {whose} has {free >> 20} MiB left",
            hint="end other programs, or raise the control group's limit")


def _host(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    raise UserError(f"{proc}/meminfo has no MemAvailable", hint="Linux 3.14 and newer have it")


def _limits(proc: Path, groups: Path) -> Iterator[tuple[str, int, int, int]]:
    """Of our control groups that have a limit: name, limit, usage, and cached files, in bytes.

    Version 2 is one hierarchy; in version 1 memory has its own. In a container the path that
    /proc names may not be there: its own group is the top then.
    """
    with contextlib.suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if number == "0":
                top, files = groups, ("memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                top = groups / "memory"
                files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            else:
                continue
            group = top / name.lstrip("/")
            for place in (group, *group.parents):
                yield from _limit(place, *files)
                if place == top:
                    break


def _limit(place: Path, limit: str, usage: str,
           prefix: str) -> Iterator[tuple[str, int, int, int]]:
    try:
        most = (place / limit).read_text().strip()
        if most == "max":
            return
        used = int((place / usage).read_text())
        stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        cache = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
        found = str(place), int(most), used, cache
    except (OSError, ValueError):
        return
    yield found
