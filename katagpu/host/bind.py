"""`host bind`, `host unbind`: give GPUs to vfio-pci with their whole IOMMU groups, and back.

GPUs of Grace superchips go to a driver of their own (`vfio.driver`).

driver_override, unbind and drivers_probe: the kernel's Documentation/ABI/testing/sysfs-bus-pci.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from katagpu import log
from katagpu.errors import UserError
from katagpu.host import command, groups, pci, users, vfio
from katagpu.host.changes import Change, Run, Write
from katagpu.host.command import Answer, Commands
from katagpu.host.machine import Machine
from katagpu.host.pci import DRIVERS, Function
from katagpu.host.vfio import GRACE

PROBE = "/sys/bus/pci/drivers_probe"
SETTLES = 5.0  # seconds that udev may take to make /dev/vfio/N


def add(commands: Commands) -> None:
    """Their command lines."""
    for name, run, text in (
            ("bind", bind, "give GPUs to vfio-pci, with all that is in their IOMMU groups"),
            ("unbind", unbind, "give GPUs back to the host's drivers")):
        made = command.new(commands, name, run, text)
        made.add_argument("bdf", nargs="+", metavar="BDF",
                          help="a GPU's PCI address: 0000:41:00.0, 41:00.0")
        made.add_argument("--force", action="store_true",
                          help="even where processes use it, or where its group has functions of "
                               "other vendors")


def bind(machine: Machine, given: argparse.Namespace) -> Answer:
    """Bind them. Raises `UserError`; then all is as before."""
    wanted = [groups.whole(pci.resolve(machine, text)) for text in given.bdf]
    found = groups.members(machine, wanted)
    todo = [member for member in found if member.driver != vfio.driver(member.ids)]
    drivers = sorted({vfio.driver(member.ids) for member in found})
    if not todo:
        return _answer(machine, found, {}, f"bound to {' and '.join(drivers)} already")
    groups.no_strangers(todo, force=given.force)
    _unused(machine, todo, force=given.force)
    for member in todo:
        if machine.text(f"{member.path}/boot_vga") == "1":
            log.warn(f"{member} is this host's console: the screen will stay as it is")
    machine.agree(f"give {_named(todo)} to {' and '.join(drivers)}")
    with machine.together():
        for driver in drivers:
            _load(machine, driver)
        for member in todo:
            _give(machine, member)
        if not machine.dry_run:
            _verify_bound(machine, found)
    return _answer(machine, found, {member.address: member.driver for member in todo},
                   "would be given" if machine.dry_run else "given")


def unbind(machine: Machine, given: argparse.Namespace) -> Answer:
    """Give them back. Raises `UserError`; then all is as before."""
    wanted = [pci.resolve(machine, text) for text in given.bdf]
    found = groups.members(machine, wanted)
    todo = [member for member in found
            if member.driver in vfio.DRIVERS or member.override in vfio.DRIVERS]
    if not todo:
        return _answer(machine, found, {}, "not bound to vfio-pci")
    _unused(machine, todo, force=given.force)
    machine.agree(f"take {_named(todo)} from vfio-pci")
    with machine.together():
        for member in todo:
            _take(machine, member)
        if not machine.dry_run:
            _verify_free(machine, todo)
    answer = _answer(machine, found, {member.address: member.driver for member in todo},
                     "would be taken" if machine.dry_run else "taken")
    if not machine.dry_run:
        for member in todo:
            if pci.read(machine, member.address).driver is None:
                log.note(f"{member.address} has no driver now: none that is loaded takes it "
                         f"(modprobe nvidia?)")
    return answer


def _load(machine: Machine, driver: str) -> None:
    if machine.exists(f"{DRIVERS}/{driver}"):
        return
    try:
        machine.run(["modprobe", driver], undo=[Run(("modprobe", "-r", driver))], atomic=True)
    except UserError as failure:
        if driver == GRACE and failure.hint is None:
            failure.hint = ("the GPU of a Grace superchip wants this driver, which Linux 6.9 has "
                            "(CONFIG_NVGRACE_GPU_VFIO_PCI)")
        raise


def _unused(machine: Machine, members: Sequence[Function], *, force: bool) -> None:
    found = users.users(machine, members)
    if not found:
        return
    said = ", ".join(str(user) for user in found)
    if force:
        log.warn(f"in use, and taken as was asked for: {said}")
        return
    hint = "end them first"
    if any(user.name.startswith("nvidia-persiste") for user in found):
        hint = "systemctl stop nvidia-persistenced"
    elif any("/vfio/" in user.node for user in found):
        hint = "a guest has it: stop its container first"
    raise UserError(f"in use: {said}", hint=f"{hint}; --force takes it all the same, and the "
                                            "kernel may then wait for them without end")


def _give(machine: Machine, member: Function) -> None:
    """One function to vfio-pci."""
    override = Write(f"{member.path}/driver_override", f"{member.override or ''}\n")
    wanted = vfio.driver(member.ids)
    machine.write(override.path, wanted, undo=[override])
    if member.driver:
        machine.write(f"{DRIVERS}/{member.driver}/unbind", member.address,
                      undo=[override, Write(f"{DRIVERS}/{member.driver}/bind", member.address)])
    _probe(machine, member, wanted)


def _take(machine: Machine, member: Function) -> None:
    """One function from vfio-pci."""
    override = Write(f"{member.path}/driver_override", f"{member.override or ''}\n")
    machine.write(override.path, "\n", undo=[override])
    if member.driver:
        machine.write(f"{DRIVERS}/{member.driver}/unbind", member.address,
                      undo=[override, Write(f"{DRIVERS}/{member.driver}/bind", member.address)])
    _probe(machine, member, None)


def _probe(machine: Machine, member: Function, wanted: str | None) -> None:
    """Let the kernel look for a driver; what it found is let go when a later step fails."""
    machine.write(PROBE, member.address)
    if machine.dry_run:
        return
    got = pci.read(machine, member.address).driver
    undo: list[Change] = [] if got is None else [Write(f"{DRIVERS}/{got}/unbind", member.address)]
    machine.also(undo)
    if wanted is not None and got != wanted:
        raise UserError(f"{member} was not taken by {wanted}"
                        + (f", but by {got}" if got else ""),
                        hint="dmesg | grep -i vfio says why; katagpu host check knows the usual "
                             "causes")


def _verify_bound(machine: Machine, members: Sequence[Function]) -> None:
    """Every function has its driver, and a device node: its group's, or its own."""
    for member in members:
        if pci.read(machine, member.address).driver != vfio.driver(member.ids):
            raise UserError(f"{member} lost {vfio.driver(member.ids)} again",
                            hint="what else binds drivers on this host?")
    end = time.monotonic() + SETTLES
    for member in members:
        while not machine.exists(node := vfio.node(machine, member) or ""):
            if time.monotonic() > end:
                raise UserError(f"{node} did not appear", hint="is udev running? katagpu host "
                                "check looks at the rest")
            time.sleep(0.1)


def _verify_free(machine: Machine, members: Sequence[Function]) -> None:
    for member in members:
        now = pci.read(machine, member.address)
        if now.driver in vfio.DRIVERS or now.override in vfio.DRIVERS:
            raise UserError(f"{member} is with {now.driver or now.override} still",
                            hint=_why_kept(machine, now))


def _why_kept(machine: Machine, function: Function) -> str:
    """What gives a function to vfio-pci again, and the cure."""
    places = vfio.named_by_ids(machine, function.ids)
    if function.override in vfio.DRIVERS or not places:
        return "does a udev rule give it back? katagpu host persist --remove"
    vendor, _, device = function.ids.partition(":")
    return (f"vfio-pci takes {function.ids} by `ids=` of {' and '.join(places)}: take it out there "
            f"(and renew the initrd), and for now: echo {vendor} {device} > "
            f"{DRIVERS}/{function.driver}/remove_id")


def _named(members: Sequence[Function]) -> str:
    return ", ".join(f"{member} ({member.driver or 'no driver'})" for member in members)


def _answer(machine: Machine, members: Sequence[Function], was: dict[str, str | None],
            said: str) -> Answer:
    now = [pci.read(machine, member.address) for member in members]
    lines = []
    for function in now:
        arrow = f"{was[function.address] or 'no driver'} → " if function.address in was and \
            not machine.dry_run else ""
        lines.append(f"{function}  {arrow}{function.driver or 'no driver'}"
                     f"  {' '.join(vfio.nodes(machine, function))}".rstrip())
    if machine.dry_run and was:
        lines = []
    return Answer(lines if was else [*lines, said], {"said": said, "functions": [
        {"bdf": function.address, "id": function.ids, "driver": function.driver,
         "was": was.get(function.address, function.driver),
         "iommu_group": None if function.group is None else int(function.group),
         "vfio": vfio.nodes(machine, function)} for function in now]})
