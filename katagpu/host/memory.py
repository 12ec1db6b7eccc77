"""What `host check` says of memory: VFIO pins all of a guest's, which has to be there and allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from katagpu.host.katafiles import Effective
from katagpu.host.machine import Machine
from katagpu.host.verdict import Verdict, failed, passed, warned
from katagpu.kataconfig import HYPERVISOR

RUNTIMES = ("containerd", "crio", "dockerd")
MIB = 1 << 20


def facts(machine: Machine) -> dict[str, int]:
    """/proc/meminfo, in its own units (kB, or a count)."""
    return {name: int(value) for name, value in
            re.findall(r"^(\w+):\s+(\d+)", machine.text("/proc/meminfo") or "", re.M)}


def check(machine: Machine, configured: Sequence[Effective]) -> Iterator[Verdict]:
    """Locked memory of the container runtime, and memory for the largest guest configured."""
    yield from _memlock(machine)
    found = facts(machine)
    tables = [effective.table(HYPERVISOR) for effective in configured]
    sizes = [table.get("default_memory") for table in tables]
    wanted = max((size for size in sizes if isinstance(size, int)), default=0)
    huge = any(table.get("enable_hugepages") is True for table in tables)
    if huge:
        free = found.get("HugePages_Free", 0) * found.get("Hugepagesize", 0) // 1024
        if free < max(wanted, 1):
            yield failed("hugepages", f"Kata takes its guests from huge pages, and {free} MiB are "
                         f"free of {wanted} MiB for one guest", "sysctl vm.nr_hugepages=N (in "
                         "/etc/sysctl.d), or enable_hugepages = false")
        else:
            yield passed("hugepages", f"{free} MiB free")
    elif found.get("HugePages_Total"):
        yield warned("hugepages", f"{found['HugePages_Total']} are reserved, and Kata is not told "
                     "to use them", "enable_hugepages = true in a drop-in, or reserve none")
    else:
        yield passed("hugepages", "none, and none are asked for; guests of tens of GiB start "
                                  "faster with them (enable_hugepages)")
    available = found.get("MemAvailable", 0) // 1024
    if wanted and available < wanted:
        yield warned("memory", f"a guest has {wanted} MiB, all of them pinned, and {available} MiB "
                     "are available", "give it less (default_memory), or free some")
    elif wanted:
        yield passed("memory", f"{available} MiB available, {wanted} MiB for one guest, all pinned")


def _memlock(machine: Machine) -> Iterator[Verdict]:
    """The limit that guests inherit from the container runtime; root is above it."""
    for pid in machine.names("/proc"):
        name = machine.text(f"/proc/{pid}/comm") if pid.isdigit() else None
        if name not in RUNTIMES:
            continue
        limits = machine.text(f"/proc/{pid}/limits") or ""
        found = re.search(r"^Max locked memory\s+(\S+)", limits, re.M)
        if found is None:
            continue
        if found[1] == "unlimited":
            yield passed("memlock", f"{name} may lock all memory")
        else:
            yield warned("memlock", f"{name} may lock {int(found[1]) // MIB} MiB: enough for "
                         "guests that run as root, which the limit does not hold; not for others",
                         f"LimitMEMLOCK=infinity in a drop-in of {name}.service")
        return
    yield warned("memlock", f"none of {', '.join(RUNTIMES)} runs here", "start it, and check again")
