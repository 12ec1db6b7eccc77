"""`host vgpu`: SR-IOV virtual functions, the types that they take, and vGPUs made of them."""

from __future__ import annotations

import argparse
import difflib
import uuid
from collections.abc import Sequence

from katagpu.errors import UserError
from katagpu.host import command, nvidia, pci, support, vgputypes
from katagpu.host.changes import Run, Write
from katagpu.host.command import Answer, Commands
from katagpu.host.machine import Machine
from katagpu.host.pci import DEVICES, Function
from katagpu.host.vfio import DRIVERS, MDEVS, Interface
from katagpu.host.vgputypes import CURRENT, SUPPORTED, Kind, Made

SRIOV_MANAGE = "/usr/lib/nvidia/sriov-manage"
ENABLING = 120.0  # seconds; a card with 32 functions takes many
HEAD = ("BDF", "INSTANCES", "NAME", "DIR", "BACKING")
MADE = ("VGPU", "BDF", "NAME", "DIR", "VFIO")


def add(commands: Commands) -> None:
    """Its command line."""
    verbs = command.family(commands, "vgpu", "virtual functions and vGPUs of NVIDIA's vGPU manager")
    made = command.new(verbs, "list", listed, "list the types that can be made, and what is made")
    made.add_argument("gpu", nargs="*", metavar="BDF", help="only of these GPUs")
    made.add_argument("--all", action="store_true", help="types too of which none is left")
    for name, run, text in (("enable", enable, "enable the virtual functions of a GPU"),
                            ("disable", disable, "disable them")):
        made = command.new(verbs, name, run, text)
        made.add_argument("gpu", metavar="BDF", help="the GPU")
    made = command.new(verbs, "create", create, "make a vGPU")
    made.add_argument("gpu", metavar="BDF", help="a virtual function; of a GPU, one that is free")
    made.add_argument("type", metavar="TYPE", help="the type's name or DIR: A100D-4C, nvidia-692")
    made.add_argument("--uuid", help="the UUID of the mdev (default: a new one)")
    made = command.new(verbs, "remove", remove, "remove vGPUs")
    made.add_argument("vgpu", nargs="+", metavar="VGPU", help="UUID, or the virtual function")


def listed(machine: Machine, given: argparse.Namespace) -> Answer:
    """`list`"""
    gpus = [_owner(machine, pci.resolve(machine, text)) for text in given.gpu] or \
        pci.gpus(machine)
    types = [kind for gpu in gpus for kind in vgputypes.kinds(machine, gpu)
             if kind.instances or given.all]
    made = [one for gpu in gpus for one in vgputypes.made(machine, gpu)]
    lines = command.table(HEAD, [[kind.function, str(kind.instances), kind.name, kind.directory,
                                  kind.backing] for kind in types]) if types else []
    if made:
        lines += ["", *command.table(MADE, [[one.name, one.function, one.kind or "?",
                                             one.directory, one.node or "-"] for one in made])]
    for gpu in gpus:
        if not any(kind.function in vgputypes.places(gpu) for kind in types):
            lines.append(f"{gpu.address}: {_why_none(machine, gpu)}")
    return Answer(lines or ["no NVIDIA GPU is here"], {
        "types": [{"bdf": kind.function, "instances": kind.instances, "name": kind.name,
                   "dir": kind.directory, "backing": kind.backing,
                   "interface": kind.interface.value} for kind in types],
        "vgpus": [{"vgpu": one.name, "bdf": one.function, "name": one.kind, "dir": one.directory,
                   "interface": one.interface.value, "vfio": one.node} for one in made]})


def enable(machine: Machine, given: argparse.Namespace) -> Answer:
    """`enable`"""
    gpu = _physical(machine, given.gpu)
    if gpu.vfs:
        return _functions(gpu, f"{gpu.address} has its virtual functions already")
    if gpu.driver != "nvidia":
        raise UserError(f"{gpu} is bound to {gpu.driver or 'no driver'}: virtual functions are "
                        "made by NVIDIA's vGPU manager",
                        hint=f"katagpu host unbind {gpu.address}, with the vGPU manager (NVIDIA's "
                             "-vgpu-kvm.run) installed")
    machine.agree(f"enable {gpu.total_vfs} virtual functions of {gpu.address}")
    with machine.together():
        if machine.exists(SRIOV_MANAGE):
            _manage(machine, gpu, "-e", "-d")
        else:
            machine.write(f"{gpu.path}/sriov_numvfs", f"{gpu.total_vfs}\n",
                          undo=[Write(f"{gpu.path}/sriov_numvfs", "0\n")])
        if machine.dry_run:
            return Answer()
        after = pci.read(machine, gpu.address)
        if len(after.vfs) < gpu.total_vfs:
            raise UserError(f"{gpu.address} has {len(after.vfs) or 'no'} virtual function"
                            f"{'' if len(after.vfs) < 2 else 's'} afterwards, and not "
                            f"{gpu.total_vfs}", hint="SR-IOV has to be on in the BIOS; dmesg | "
                                                     "grep -i nvrm says more")
    return _functions(after, f"{gpu.address}: {len(after.vfs)} virtual functions")


def _manage(machine: Machine, gpu: Function, flag: str, back: str) -> None:
    """Run sriov-manage. Where it fails, what it did half-way is undone, and nothing else."""
    undo = Run((SRIOV_MANAGE, back, gpu.address), ENABLING)
    try:
        machine.run([SRIOV_MANAGE, flag, gpu.address], timeout=ENABLING, undo=[undo], atomic=True)
    except UserError:
        now = pci.read(machine, gpu.address)
        if (list(now.vfs), now.driver) != (list(gpu.vfs), gpu.driver):
            machine.also([undo])
        raise


def _functions(gpu: Function, line: str) -> Answer:
    return Answer([line, *(f"  {vf}" for vf in gpu.vfs)],
                  {"bdf": gpu.address, "functions": list(gpu.vfs)})


def disable(machine: Machine, given: argparse.Namespace) -> Answer:
    """`disable`"""
    gpu = _physical(machine, given.gpu)
    made = [one.name for one in vgputypes.made(machine, gpu)]
    if made:
        raise UserError(f"{gpu.address} has vGPUs: {', '.join(made)}",
                        hint=f"katagpu host vgpu remove {' '.join(made)}")
    if not gpu.vfs:
        return _functions(gpu, f"{gpu.address} has no virtual functions")
    machine.agree(f"disable the virtual functions of {gpu.address}")
    with machine.together():
        if machine.exists(SRIOV_MANAGE):
            _manage(machine, gpu, "-d", "-e")
        else:
            machine.write(f"{gpu.path}/sriov_numvfs", "0\n",
                          undo=[Write(f"{gpu.path}/sriov_numvfs", f"{len(gpu.vfs)}\n")])
        if machine.dry_run:
            return Answer()
        after = pci.read(machine, gpu.address)
        if after.vfs:
            raise UserError(f"{gpu.address} still has {len(after.vfs)} virtual functions",
                            hint="something uses them: fuser -v /dev/vfio/*")
    return _functions(after, f"{gpu.address}: its virtual functions are gone")


def create(machine: Machine, given: argparse.Namespace) -> Answer:
    """`create`"""
    function = pci.resolve(machine, given.gpu)
    gpu = _owner(machine, function)
    kind = _chosen(machine, gpu, function, given.type)
    notes = _mode(machine, gpu, kind)
    name = _uuid(machine, given.uuid) if kind.interface is Interface.MDEV else kind.function
    machine.agree(f"make a vGPU of type {kind.name} on {kind.function}")
    path = f"{DEVICES}/{kind.function}"
    with machine.together():
        if kind.interface is Interface.MDEV:
            machine.write(f"{path}/{SUPPORTED}/{kind.directory}/create", f"{name}\n",
                          undo=[Write(f"{MDEVS}/{name}/remove", "1\n")])
        else:
            if given.uuid:
                raise UserError("a vGPU of this host is a virtual function and has no UUID",
                                hint="leave --uuid away")
            machine.write(f"{path}/{CURRENT}", f"{kind.directory}\n",
                          undo=[Write(f"{path}/{CURRENT}", "0\n")])
        if machine.dry_run:
            return Answer(notes, {"notes": notes})
        found = next((one for one in vgputypes.made(machine, gpu) if one.name == name), None)
        if found is None or found.node is None:
            raise UserError(f"the vGPU {name} is not there afterwards, or has no IOMMU group",
                            hint="journalctl -u nvidia-vgpu-mgr says why")
    return Answer([f"{name}: {kind.name} on {kind.function}, {found.node}", *notes,
                   "it is gone after a reboot; `katagpu host snippets ctr` has the line that uses "
                   "it"], {"vgpu": name, "bdf": kind.function, "name": kind.name,
                           "dir": kind.directory, "vfio": found.node, "notes": notes})


def remove(machine: Machine, given: argparse.Namespace) -> Answer:
    """`remove`"""
    everything = {one.name: one for gpu in pci.gpus(machine)
                  for one in vgputypes.made(machine, gpu)}
    chosen: list[Made] = []
    for text in given.vgpu:
        name = text.lower()
        if name not in everything and name.count(":") == 1:
            name = f"0000:{name}"
        if name not in everything:
            raise UserError(f"there is no vGPU {text}", hint="katagpu host vgpu list" + (
                f"; those here: {', '.join(everything)}" if everything else ""))
        chosen.append(everything[name])
    machine.agree(f"remove {', '.join(one.name for one in chosen)}")
    with machine.together():
        for one in chosen:
            path = f"{DEVICES}/{one.function}"
            if one.interface is Interface.MDEV:
                machine.write(f"{MDEVS}/{one.name}/remove", "1\n", undo=[
                    Write(f"{path}/{SUPPORTED}/{one.directory}/create", f"{one.name}\n")])
            else:
                machine.write(f"{path}/{CURRENT}", "0\n",
                              undo=[Write(f"{path}/{CURRENT}", f"{one.directory}\n")])
    if machine.dry_run:
        return Answer()
    return Answer([f"removed: {one.name}" for one in chosen],
                  {"removed": [one.name for one in chosen]})


# what is meant


def _owner(machine: Machine, function: Function) -> Function:
    """The GPU of a virtual function, or the GPU itself."""
    return pci.read(machine, function.parent) if function.parent else function


def _physical(machine: Machine, text: str) -> Function:
    gpu = _owner(machine, pci.resolve(machine, text))
    if gpu.total_vfs and not _by_functions(gpu):
        raise UserError(f"{gpu} is {support.generation(gpu.device)}: its vGPU types are on the "
                        "card itself, and not on virtual functions",
                        hint="katagpu host vgpu list has them, where NVIDIA's vGPU manager runs")
    if not gpu.total_vfs:
        raise UserError(f"{gpu} has no SR-IOV (sriov_totalvfs is not there, or 0)",
                        hint="cards before Ampere have none, and their vGPU types on themselves; "
                             "else it is off in the BIOS")
    return gpu


def _by_functions(gpu: Function) -> bool:
    """Are its vGPUs made on virtual functions? Turing can have those too, and has no use for them.
    """
    return support.generation(gpu.device) not in ("Turing", *support.CLOSED_ONLY)


def _chosen(machine: Machine, gpu: Function, function: Function, text: str) -> Kind:
    """The type that is meant, on a function where one more can be made. Raises `UserError`."""
    everything = list(vgputypes.kinds(machine, gpu))
    if function.parent:
        everything = [kind for kind in everything if kind.function == function.address]
    if not everything:
        raise UserError(f"{function.address} takes no vGPU: {_why_none(machine, gpu)}")
    named = [kind for kind in everything if kind.answers_to(text)]
    free = [kind for kind in named if kind.instances]
    if free:
        return free[0]
    names = sorted({kind.name for kind in everything if kind.instances})
    if named:
        raise UserError(f"no more {named[0].name} can be made on {function.address}",
                        hint=f"what can be: {', '.join(names) or 'nothing'}. A card takes vGPUs of "
                             "one size, until all are removed")
    near = difflib.get_close_matches(text, [name.rpartition(" ")[2] for name in names], n=1)
    raise UserError(f"{function.address} has no vGPU type {text!r}",
                    hint=f"did you mean {near[0]}?" if near else
                    f"what can be made: {', '.join(names) or 'nothing'}")


def _mode(machine: Machine, gpu: Function, kind: Kind) -> list[str]:
    """Refuse a type that MIG's mode forbids; what to say where the mode is not known."""
    mode = nvidia.mig(machine, [gpu]).get(gpu.address)
    if mode == "enabled" and not kind.mig_backed:
        raise UserError(f"{kind.name} is time-sliced, and MIG is on in {gpu.address}",
                        hint=f"katagpu host mig disable {gpu.address}, or take a MIG-backed type")
    if mode == "disabled" and kind.mig_backed:
        raise UserError(f"{kind.name} is MIG-backed, and MIG is off in {gpu.address}",
                        hint=f"katagpu host mig enable {gpu.address}, then mig create; or take a "
                             "time-sliced type")
    return [] if mode else [f"whether MIG is on in {gpu.address} is not known: nvidia-smi does not "
                            "say"]


def _uuid(machine: Machine, text: str | None) -> str:
    if text is None:
        return str(uuid.uuid4())
    try:
        name = str(uuid.UUID(text))
    except ValueError:
        raise UserError(f"{text!r} is no UUID", hint="uuidgen makes one; without --uuid it is "
                                                     "made here") from None
    if machine.exists(f"{MDEVS}/{name}"):
        raise UserError(f"there is an mdev {name} already")
    return name


def _why_none(machine: Machine, gpu: Function) -> str:
    """Why no vGPU can be made of a GPU."""
    everything: Sequence[Kind] = list(vgputypes.kinds(machine, gpu))
    if everything or any(machine.exists(f"{DEVICES}/{place}/{CURRENT}")
                         for place in vgputypes.places(gpu)):
        return "no type has an instance left (--all lists them); with MIG on, make GPU instances " \
               "first: katagpu host mig create"
    if gpu.driver in DRIVERS:
        return f"it is bound to {gpu.driver}, for a guest of its own: katagpu host unbind " \
               f"{gpu.address}"
    if gpu.total_vfs and not gpu.vfs and _by_functions(gpu):
        return f"its virtual functions are off: katagpu host vgpu enable {gpu.address}"
    return "its driver offers no vGPU types: that takes NVIDIA's vGPU manager (-vgpu-kvm.run), " \
           "and a card that it supports"
