"""Who uses a GPU: the processes that have a device node of it open, from /proc/*/fd (proc(5))."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from katagpu.host import nvidia, vfio
from katagpu.host.machine import Machine
from katagpu.host.pci import Function

NVIDIA_NODE = "/dev/nvidia"


@dataclass(frozen=True)
class User:
    """A process, and the device node that it has open."""

    pid: int
    name: str
    node: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}, {self.node})"


def nodes(machine: Machine, functions: Iterable[Function]) -> set[str]:
    """The device nodes of functions: NVIDIA's, DRM's, VFIO's.

    Where the driver does not say which number a GPU has, every `/dev/nvidiaN` may be its own.
    """
    found: set[str] = set()
    for function in functions:
        if function.driver == "nvidia":
            number = nvidia.minor(machine, function.address)
            found |= {f"{NVIDIA_NODE}{number}"} if number is not None else {
                f"/dev/{name}" for name in machine.names("/dev")
                if name[6:].isdigit() and name.startswith("nvidia")}
        found |= {f"/dev/dri/{name}" for name in machine.names(f"{function.path}/drm")}
        if function.group is not None:
            found.add(vfio.group_node(function.group))
        found |= {f"/dev/vfio/devices/{name}"
                  for name in machine.names(f"{function.path}/vfio-dev")}
    return found


def users(machine: Machine, functions: Iterable[Function]) -> list[User]:
    """The processes that use functions. Those of others are seen by root only."""
    wanted = nodes(machine, functions)
    return [user for pid in machine.names("/proc") if pid.isdigit() and int(pid) != os.getpid()
            for user in _of(machine, pid, wanted)]


def _of(machine: Machine, pid: str, wanted: set[str]) -> Iterator[User]:
    seen: set[str] = set()
    for name in machine.names(f"/proc/{pid}/fd"):
        node = ""
        with contextlib.suppress(OSError):
            # Not `machine.link`: the name of what is open, with its directory.
            node = str(machine.path(f"/proc/{pid}/fd/{name}", follow=False).readlink())
        if node in wanted and node not in seen:
            seen.add(node)
            yield User(int(pid), machine.text(f"/proc/{pid}/comm") or "?", node)
