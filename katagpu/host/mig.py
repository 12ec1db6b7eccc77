"""`host mig`: multi-instance GPUs, through nvidia-smi."""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from katagpu.errors import UserError
from katagpu.host import command, pci, smi, vgputypes
from katagpu.host.changes import Change, Run
from katagpu.host.command import Answer, Commands
from katagpu.host.machine import Machine
from katagpu.host.programs import Missing
from katagpu.host.smi import PROGRAM, Compute, Gpu, Instance, Profile

SWITCHING = 120.0  # seconds: a GPU that is reset, or whose driver starts anew
HEAD = ("GPU", "BDF", "NAME", "MIG", "PENDING", "INSTANCES")
PROFILES = ("GPU", "PROFILE", "ID", "FREE", "TOTAL", "GIB")
INSTANCES = ("GPU", "INSTANCE", "PROFILE", "ID", "PLACEMENT", "COMPUTE")


def add(commands: Commands) -> None:
    """Its command line."""
    verbs = command.family(commands, "mig", "multi-instance GPUs (MIG), through nvidia-smi")
    made = command.new(verbs, "status", status, "show modes, profiles and instances")
    made.add_argument("gpu", nargs="*", metavar="BDF", help="only of these GPUs")
    for name, run, text in (("enable", enable, "turn MIG on"), ("disable", disable, "turn it off")):
        made = command.new(verbs, name, run, text)
        made.add_argument("gpu", metavar="BDF", help="the GPU")
        made.add_argument("--reset", action="store_true",
                          help="reset the GPU where the mode comes into force only then")
    made = command.new(verbs, "create", create, "make GPU instances")
    made.add_argument("gpu", metavar="BDF", help="the GPU")
    made.add_argument("profile", nargs="+", metavar="PROFILE", help="1g.10gb, or its ID; several "
                      "make several")
    made.add_argument("--no-compute", action="store_true",
                      help="without compute instances (a MIG-backed vGPU's guest makes its own)")
    made = command.new(verbs, "destroy", destroy, "destroy GPU instances")
    made.add_argument("gpu", metavar="BDF", help="the GPU")
    made.add_argument("instance", nargs="*", type=int, metavar="ID", help="only these instances")


def status(machine: Machine, given: argparse.Namespace) -> Answer:
    """`status`"""
    gpus = smi.gpus(machine)
    if given.gpu:
        wanted = [pci.resolve(machine, text).address for text in given.gpu]
        gpus = [_gpu(gpus, address) for address in wanted]
    if not gpus:
        return Answer(["NVIDIA's driver has no GPU here"], {"gpus": []})
    rows, tables, data = [], [], []
    for gpu in gpus:
        profiles = smi.profiles(machine, gpu) if gpu.current is not None else []
        instances = smi.instances(machine, gpu) if gpu.current else []
        computes = smi.computes(machine, gpu) if instances else []
        rows.append([str(gpu.index), gpu.address, gpu.name, _word(gpu.current),
                     _word(gpu.pending) if gpu.waits else "-", str(len(instances))])
        tables.append((profiles, instances, {
            instance.number: [one.number for one in computes if one.instance == instance.number]
            for instance in instances}))
        data.append(_data(gpu, *tables[-1]))
    lines = command.table(HEAD, rows)
    for gpu in gpus:
        lines += [f"  {gpu.address}: {line}" for line in _notes(gpu)]
    lines += _tables(tables)
    return Answer(lines, {"gpus": data})


def _tables(found: list[tuple[list[Profile], list[Instance], dict[int, list[int]]]]) -> list[str]:
    instances = [[str(one.gpu), str(one.number), one.name, str(one.profile),
                  f"{one.start}:{one.size}", ",".join(map(str, computes[one.number])) or "-"]
                 for _, several, computes in found for one in several]
    profiles = [[str(one.gpu), one.name, str(one.number), str(one.free), str(one.total),
                 f"{one.memory:g}"] for several, _, _ in found for one in several]
    lines = ["", *command.table(INSTANCES, instances)] if instances else []
    return [*lines, "", *command.table(PROFILES, profiles)] if profiles else lines


def _data(gpu: Gpu, profiles: list[Profile], instances: list[Instance],
          computes: dict[int, list[int]]) -> dict[str, Any]:
    return {"index": gpu.index, "bdf": gpu.address, "name": gpu.name, "driver": gpu.driver,
            "mig": gpu.current, "pending": gpu.pending, "waits": gpu.waits,
            "profiles": [{"name": one.name, "id": one.number, "free": one.free,
                          "total": one.total, "gib": one.memory} for one in profiles],
            "instances": [{"id": one.number, "name": one.name, "profile": one.profile,
                           "start": one.start, "size": one.size,
                           "compute": computes[one.number]} for one in instances]}


def _word(mode: bool | None) -> str:
    return {True: "on", False: "off", None: "not supported"}[mode]


def _notes(gpu: Gpu) -> Iterator[str]:
    if gpu.waits:
        yield _after(gpu, bool(gpu.pending))


def _after(gpu: Gpu, on: bool) -> str:
    """What is to be done until a mode is in force."""
    verb = "enable" if on else "disable"
    if gpu.virtualization.lower().startswith("pass"):
        return f"MIG is {'on' if on else 'off'} once this virtual machine's GPU is reset: stop " \
               "and start the machine"
    return f"MIG is {'on' if on else 'off'} after a reset of the GPU (katagpu host mig {verb} " \
           f"{gpu.address} --reset) or a reboot of this host"


def enable(machine: Machine, given: argparse.Namespace) -> Answer:
    """`enable`"""
    return _switch(machine, given, on=True)


def disable(machine: Machine, given: argparse.Namespace) -> Answer:
    """`disable`"""
    return _switch(machine, given, on=False)


def _switch(machine: Machine, given: argparse.Namespace, *, on: bool) -> Answer:
    gpu = _named(machine, given.gpu)
    word = _word(on)
    if gpu.current is on and not gpu.waits:
        return Answer([f"{gpu.address}: MIG is {word} already"], _data(gpu, [], [], {}))
    _may_switch(machine, gpu, on=on)
    machine.agree(f"turn MIG {word} in {gpu.address}" + (" and reset it" if given.reset else ""))
    with machine.together():
        if gpu.pending is not on:
            back: list[Change] = [Run(_words(gpu, "-mig", "0" if on else "1"), SWITCHING)]
            _run(machine, _words(gpu, "-mig", "1" if on else "0"), back,
                 lambda: _named(machine, gpu.address).pending is not gpu.pending)
        after = gpu if machine.dry_run else _named(machine, gpu.address)
        if not machine.dry_run and after.pending is not on:
            raise UserError(f"nvidia-smi did not turn MIG {word} in {gpu.address}",
                            hint="dmesg | grep -i nvrm may say why")
    if given.reset and (after.waits or machine.dry_run):
        if after.processes:
            raise UserError(f"{gpu.address} cannot be reset: {', '.join(after.processes)} use it",
                            hint="stop them; the mode stays pending")
        _run(machine, (PROGRAM, "-i", gpu.address, "--gpu-reset"), [])
        after = gpu if machine.dry_run else _named(machine, gpu.address)
    if machine.dry_run:
        return Answer()
    done = after.current is on
    line = f"{gpu.address}: MIG is {word}" if done else f"{gpu.address}: {_after(after, on)}"
    return Answer([line], {**_data(after, [], [], {}), "reboot_or_reset": after.waits}, done)


def _may_switch(machine: Machine, gpu: Gpu, *, on: bool) -> None:
    """Refuse what would take something away from somebody. Raises `UserError`."""
    if gpu.current is None:
        raise UserError(f"{gpu.address} ({gpu.name}) has no MIG")
    if gpu.processes:
        raise UserError(f"{gpu.address} is in use: {', '.join(gpu.processes)}",
                        hint="stop them first")
    made = list(vgputypes.made(machine, pci.read(machine, gpu.address)))
    wrong = [one.name for one in made]
    if wrong:
        raise UserError(f"{gpu.address} has vGPUs ({', '.join(wrong)}): MIG cannot be turned "
                        f"{_word(on)}", hint=f"katagpu host vgpu remove {' '.join(wrong)}")
    if not on and gpu.current:
        there = smi.instances(machine, gpu)
        if there:
            raise UserError(f"{gpu.address} has GPU instances: "
                            f"{', '.join(str(one.number) for one in there)}",
                            hint=f"katagpu host mig destroy {gpu.address}")


def create(machine: Machine, given: argparse.Namespace) -> Answer:
    """`create`"""
    gpu = _on(machine, given.gpu)
    offered = smi.profiles(machine, gpu)
    chosen = [_profile(offered, text) for word in given.profile for text in word.split(",")]
    for profile in set(chosen):
        if chosen.count(profile) > profile.free:
            raise UserError(f"{gpu.address} has room for {profile.free} of {profile.name}, and not "
                            f"for {chosen.count(profile)}", hint="katagpu host mig status")
    names = ", ".join(profile.name for profile in chosen)
    machine.agree(f"make GPU instances in {gpu.address}: {names}")
    before = {one.number for one in smi.instances(machine, gpu)}
    made: list[Instance] = []
    with machine.together():
        for profile in chosen:
            for one in _instance(machine, gpu, profile, before):
                made.append(one)
                before.add(one.number)
                if not given.no_compute:
                    _compute(machine, gpu, str(one.number))
            if machine.dry_run and not given.no_compute:
                _compute(machine, gpu, "INSTANCE")
    if machine.dry_run:
        return Answer()
    return Answer([f"{gpu.address}: instance {one.number}, {one.name}, at {one.start}:{one.size}"
                   for one in made], {"bdf": gpu.address, "instances": [
                       {"id": one.number, "name": one.name, "profile": one.profile,
                        "start": one.start, "size": one.size} for one in made]})


def _instance(machine: Machine, gpu: Gpu, profile: Profile, before: set[int]) -> list[Instance]:
    """Make a GPU instance; those that are new. One that a failure left is undone as well."""
    def new() -> list[Instance]:
        found = [one for one in smi.instances(machine, gpu) if one.number not in before]
        machine.also([Run(_words(gpu, "mig", "-dgi", "-gi", str(one.number))) for one in found])
        return found

    _run(machine, _words(gpu, "mig", "-cgi", str(profile.number)), [], lambda: bool(new()))
    if machine.dry_run:
        return []
    found = new()
    if not found:
        raise UserError(f"there is no new GPU instance in {gpu.address} afterwards",
                        hint="katagpu host mig status; dmesg | grep -i nvrm")
    return found


def _compute(machine: Machine, gpu: Gpu, instance: str) -> None:
    """Make the compute instance of a GPU instance."""
    _run(machine, _words(gpu, "mig", "-cci", "-gi", instance),
         [Run(_words(gpu, "mig", "-dci", "-gi", instance))],
         lambda: any(str(one.instance) == instance for one in smi.computes(machine, gpu)))


def destroy(machine: Machine, given: argparse.Namespace) -> Answer:
    """`destroy`"""
    gpu = _on(machine, given.gpu)
    there = smi.instances(machine, gpu)
    unknown = set(given.instance) - {one.number for one in there}
    if unknown:
        raise UserError(f"{gpu.address} has no GPU instance {', '.join(map(str, sorted(unknown)))}",
                        hint=f"it has {', '.join(str(one.number) for one in there) or 'none'}")
    chosen = [one for one in there if not given.instance or one.number in given.instance]
    if not chosen:
        return Answer([f"{gpu.address} has no GPU instances"], {"destroyed": []})
    made = list(vgputypes.made(machine, pci.read(machine, gpu.address)))
    if made:
        raise UserError(f"{gpu.address} has vGPUs: {', '.join(one.name for one in made)}",
                        hint=f"katagpu host vgpu remove {' '.join(one.name for one in made)}")
    computes = smi.computes(machine, gpu)
    machine.agree(f"destroy GPU instances of {gpu.address}: "
                  f"{', '.join(str(one.number) for one in chosen)}")
    with machine.together():
        for one in chosen:
            back: list[Change] = []
            inner = [each for each in computes if each.instance == one.number]
            for compute in inner:
                # The instance gets its number by its place, so that this is the same one.
                again = Run(_words(gpu, "mig", "-cci", str(compute.profile), "-gi",
                                   str(one.number)))
                _run(machine, _words(gpu, "mig", "-dci", "-ci", str(compute.number), "-gi",
                                     str(one.number)), [again],
                     functools.partial(_no_compute, machine, gpu, compute))
            back.append(Run(_words(gpu, "mig", "-cgi", f"{one.profile}:{one.start}")))
            _run(machine, _words(gpu, "mig", "-dgi", "-gi", str(one.number)), back,
                 functools.partial(_no_instance, machine, gpu, one))
    if machine.dry_run:
        return Answer()
    return Answer([f"{gpu.address}: instance {one.number} ({one.name}) is gone"
                   for one in chosen], {"destroyed": [one.number for one in chosen]})


def _no_compute(machine: Machine, gpu: Gpu, compute: Compute) -> bool:
    return compute not in smi.computes(machine, gpu)


def _no_instance(machine: Machine, gpu: Gpu, instance: Instance) -> bool:
    return instance not in smi.instances(machine, gpu)


# what is meant


def _words(gpu: Gpu, *words: str) -> tuple[str, ...]:
    """A command line about a GPU: `-i` goes first, but behind `mig`."""
    head = words[:1] if words[0] == "mig" else ()
    return (PROGRAM, *head, "-i", gpu.address, *words[len(head):])


def _run(machine: Machine, words: tuple[str, ...], undo: list[Change],
         done: Callable[[], bool] = lambda: False) -> None:
    """Run it, and say what a failure means. One that is `done` all the same is undone."""
    try:
        machine.run(words, timeout=SWITCHING, undo=undo, atomic=True)
    except UserError as failure:
        if not isinstance(failure, Missing) and _may_be(done):
            machine.also(undo)
        cure = smi.cure(failure.what)
        raise (UserError(failure.what, hint=cure) if cure and failure.hint is None
               else failure) from None


def _may_be(done: Callable[[], bool]) -> bool:
    """Is it done? It may be where nvidia-smi no longer answers."""
    try:
        return done()
    except UserError:
        return True


def _named(machine: Machine, text: str) -> Gpu:
    return _gpu(smi.gpus(machine), pci.resolve(machine, text).address)


def _gpu(gpus: list[Gpu], address: str) -> Gpu:
    found = next((gpu for gpu in gpus if gpu.address == address), None)
    if found is None:
        raise UserError(f"nvidia-smi does not show {address}",
                        hint=f"NVIDIA's driver has to have it: katagpu host unbind {address}")
    return found


def _on(machine: Machine, text: str) -> Gpu:
    gpu = _named(machine, text)
    if not gpu.current:
        raise UserError(f"MIG is {_word(gpu.current)} in {gpu.address}" + (
            f", until it is reset: {_after(gpu, True)}" if gpu.pending else ""),
            hint=None if gpu.current is None else f"katagpu host mig enable {gpu.address}")
    return gpu


def _profile(offered: list[Profile], text: str) -> Profile:
    found = next((profile for profile in offered if profile.answers_to(text)), None)
    if found is None:
        names = [profile.name for profile in offered]
        near = difflib.get_close_matches(text, names, n=1)
        raise UserError(f"there is no GPU instance profile {text!r}",
                        hint=f"did you mean {near[0]}?" if near else
                        f"profiles: {', '.join(names) or 'none'}")
    return found
