"""How a function can be given away: its VFIO driver and device, and the vGPUs that it has.

VFIO: the kernel's Documentation/driver-api/vfio.rst. The driver of Grace superchips:
drivers/vfio/pci/nvgrace-gpu/main.c, whose ids are here. mdev: Documentation/ABI/testing/
sysfs-bus-vfio-mdev. NVIDIA's own interface, on kernels without mdev: NVIDIA's vGPU documentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from katagpu.host import bootline
from katagpu.host.machine import Machine
from katagpu.host.pci import DEVICES, Function

MDEVS = "/sys/bus/mdev/devices"
VFIO = "vfio-pci"
GRACE = "nvgrace_gpu_vfio_pci"
GRACE_IDS = frozenset(("10de:2342", "10de:2345", "10de:2348", "10de:2941", "10de:31c2"))
"""GH200, GB200, GB300: with vfio-pci a guest sees nothing of their memory."""
DRIVERS = (VFIO, GRACE)
MODPROBE_D = ("/etc/modprobe.d", "/run/modprobe.d", "/usr/local/lib/modprobe.d",
              "/usr/lib/modprobe.d", "/lib/modprobe.d")
_IDS = re.compile(r"vfio[-_]pci\.ids=", re.I)
_OPTIONS = re.compile(r"^[ \t]*options[ \t]+vfio[-_]pci[ \t](.*\bids=.*)$", re.M)


class Interface(Enum):
    """How a host makes vGPUs: mdev, or NVIDIA's own attributes of a virtual function."""

    MDEV = "mdev"
    VENDOR = "vendor"


@dataclass(frozen=True)
class Vgpu:
    """The vGPU state of a GPU: its interface, if any, and what was made (UUIDs, or VFs)."""

    interface: Interface | None
    made: tuple[str, ...]


def driver(ids: str) -> str:
    """The driver that gives a function to guests, by its ids."""
    return GRACE if ids in GRACE_IDS else VFIO


def named_by_ids(machine: Machine, ids: str) -> list[str]:
    """Where vfio-pci is told to take all functions of these ids: its parameter `ids`.

    On the kernel's command line, or in a file of modprobe.d(5).
    """
    found = ["/proc/cmdline"] if any(
        _IDS.match(word) and ids in word.lower() for word in bootline.options(machine)) else []
    for directory in MODPROBE_D:
        for name in machine.names(directory):
            text = machine.text(f"{directory}/{name}") or "" if name.endswith(".conf") else ""
            if any(ids in line.lower() for line in _OPTIONS.findall(text)):
                found.append(f"{directory}/{name}")
    return found


def group_node(group: str) -> str:
    """`/dev/vfio/192`."""
    return f"/dev/vfio/{group}"


def nodes(machine: Machine, function: Function) -> list[str]:
    """The VFIO devices through which a function is given away, those that are there.

    Its group's, and its own where the kernel has it (`vfio-dev`, since 6.1).
    """
    found = [group_node(function.group)] if function.group else []
    found += [f"/dev/vfio/devices/{name}" for name in machine.names(f"{function.path}/vfio-dev")]
    return [node for node in found if machine.exists(node)]


def node(machine: Machine, function: Function) -> str | None:
    """The device that a container is given: its group's, or its own (iommufd).

    Its own where the kernel has none for groups: it is without VFIO_GROUP, and so without
    /dev/vfio/vfio.
    """
    own = [name for name in nodes(machine, function) if "/devices/" in name]
    if own and not machine.exists("/dev/vfio/vfio"):
        return own[0]
    return function.group and group_node(function.group)


def vgpu(machine: Machine, gpu: Function) -> Vgpu:
    """The vGPUs of a GPU and of its virtual functions."""
    places = [gpu.address, *gpu.vfs]
    interface, made = None, []
    for address in places:
        path = f"{DEVICES}/{address}"
        if machine.exists(f"{path}/mdev_supported_types"):
            interface = interface or Interface.MDEV
        current = machine.text(f"{path}/nvidia/current_vgpu_type")
        if current is not None:
            interface = Interface.VENDOR
            if current not in ("", "0"):
                made.append(address)
    for name in machine.names(MDEVS):
        parent = machine.real(f"{MDEVS}/{name}").split("/")[-2]
        if parent in places:
            made.append(name)
    return Vgpu(interface=interface, made=tuple(made))
