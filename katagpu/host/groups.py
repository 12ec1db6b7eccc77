"""What goes to a guest together: the functions of an IOMMU group.

The kernel lets a group be used once no function of it has a driver of the host's; bridges may keep
theirs (Documentation/driver-api/vfio.rst).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from katagpu import log
from katagpu.errors import UserError
from katagpu.host import pci
from katagpu.host.machine import Machine
from katagpu.host.pci import NVIDIA, Function

IOMMU_OFF = "the IOMMU is off: katagpu host check says how it is turned on"
HOST_BRIDGE = "0600"


def whole(function: Function) -> Function:
    """Raises `UserError` for what is not given away as a whole."""
    if function.parent is not None:
        raise UserError(f"{function} is a virtual function of {function.parent}",
                        hint="a vGPU is made on it, and that is given to the guest: katagpu "
                             "host vgpu create")
    if function.vfs:
        raise UserError(f"{function} has {len(function.vfs)} virtual functions, which would be "
                        "lost",
                        hint=f"katagpu host vgpu disable {function.address}")
    if function.bridge:
        raise UserError(f"{function} is a bridge", hint="bridges stay with the host")
    return function


def members(machine: Machine, wanted: Sequence[Function]) -> list[Function]:
    """All that has to go together: the functions of the groups, but for bridges."""
    found: dict[str, Function] = {}
    for function in wanted:
        if function.group is None:
            raise UserError(f"{function} is in no IOMMU group", hint=IOMMU_OFF)
        for member in pci.members(machine, function.group):
            if not stays(member):
                found[member.address] = member
    return [found[address] for address in sorted(found)]


def no_strangers(members: Iterable[Function], *, force: bool) -> None:
    """Raise `UserError` where the group would take something else from the host."""
    others = [member for member in members if member.vendor != NVIDIA and member.driver]
    if not others:
        return
    said = ", ".join(f"{member} (class {member.kind[:4]}, driver {member.driver})"
                     for member in others)
    if force:
        log.warn(f"taken from the host too, as was asked for: {said}")
        return
    raise UserError(f"IOMMU group {others[0].group} has more than NVIDIA's functions: {said}",
                    hint="a group goes to a guest as a whole. Put the card into another slot, or "
                         "turn ACS on in the firmware; --force takes these from the host too")


def stays(function: Function) -> bool:
    """Does it stay with the host, whatever becomes of its group?"""
    return function.bridge or function.kind[:4] == HOST_BRIDGE
