"""`host smoke`: the last steps of the guide on this host, a container that uses the GPU."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict

from katagpu.errors import UserError
from katagpu.host import (
    command,
    configure,
    containers,
    katafiles,
    pci,
    smokeparts,
    snippets,
    standalone,
    vfio,
    vgputypes,
)
from katagpu.host.command import Answer, Commands
from katagpu.host.containers import Job
from katagpu.host.katafiles import Target
from katagpu.host.kataguest import Guest
from katagpu.host.machine import Machine
from katagpu.host.programs import TooLong
from katagpu.host.smokeparts import Step
from katagpu.host.vfio import MDEVS

TIMEOUT = 300  # seconds: a guest with a large BAR starts in tens, the first pull takes its time


def add(commands: Commands) -> None:
    """Its command line."""
    made = command.new(commands, "smoke", run, "run a container that uses the GPU, and judge it")
    configure.options(made)
    made.add_argument("device", nargs="?", metavar="DEVICE",
                      help="a GPU's or virtual function's BDF, an mdev's UUID, or /dev/vfio/N "
                           "(default: the first that is ready)")
    made.add_argument("--with", dest="program", choices=containers.PROGRAMS,
                      help="what runs the container (default: the first that is here)")
    made.add_argument("--image", default=snippets.IMAGE,
                      help=f"the container's image (default: {snippets.IMAGE})")
    made.add_argument("--timeout", type=command.positive, default=TIMEOUT, metavar="S",
                      help=f"seconds until the container has ended (default: {TIMEOUT})")


def run(machine: Machine, given: argparse.Namespace) -> Answer:
    """Run it."""
    guest, goals, notes = configure.plan(machine, given)
    goal = goals[0]
    if len(goals) > 1:
        notes.append(f"with Kata's {goal.target.shim} runtime; --shim chooses")
    program = containers.choose(machine, given.program)
    notes += [containers.NOTES[program]] if program in containers.NOTES else []
    node, ids = _device(machine, given.device)
    what = snippets.devices(machine).get(node, "no GPU or vGPU that is known here")
    target = configure.in_use(machine, goal.target)
    copy, more = _without_kubelet(machine, program, target)
    notes += more
    job = Job(name=f"katagpu-smoke-{os.getpid()}", image=given.image, device=node,
              script=smokeparts.SCRIPT, shim=snippets.program(machine, goal.target.shim),
              config=target.config, handler=snippets.name_of(goal), copy=copy)
    machine.agree(f"run a container with {node} ({what}), by {program}")
    steps = _steps(machine, program, job, guest, ids, given.timeout)
    if machine.dry_run:
        return Answer([f"note: {note}" for note in notes], {"notes": notes})
    lines = [f"{node}: {what}", *(line for step in steps for line in step.lines)]
    fine = all(step.passed for step in steps)
    return Answer([*lines, *(f"note: {note}" for note in notes)],
                  {"device": node, "what": what, "program": program, "config": job.config,
                   "notes": notes, "steps": [asdict(step) for step in steps]}, fine)


def _without_kubelet(machine: Machine, program: str, target: Target) -> tuple[str, list[str]]:
    """A configuration for a container that is in no pod, where Kata's own is none; and why.

    Raises `UserError` where the program can give no GPU to a container.
    """
    if program == "nerdctl":
        standalone.by_default(machine, target)
        return "", []
    found = katafiles.effective(machine, target)
    if program == "crictl":
        standalone.in_a_pod(found, target.config)
        return "", []
    socket = standalone.socket(found)
    return (standalone.text(found), [standalone.NOTE.format(socket)]) if socket else ("", [])


def _steps(machine: Machine, program: str, job: Job, guest: Guest, ids: list[str],
           timeout: int) -> list[Step]:
    name = f"a container with {job.device}"
    try:
        said = containers.run(machine, program, job, timeout=timeout)
    except TooLong as failure:
        return [Step(name, False, failure.what,
                     "the guest started no container in that time: journalctl -t kata; "
                     "create_container_timeout (katagpu host configure --check)")]
    if machine.dry_run:
        return []
    if smokeparts.MARK not in said.out:
        text = said.err + said.out
        return [Step(name, False, f"`{program}` ended with status {said.status}: "
                     f"{said.said or 'it said nothing'}",
                     smokeparts.why(text) or "journalctl -t kata has Kata's and the guest's "
                                             "messages")]
    release = guest.manifest.get("kernel_release")
    return [Step(name, True, f"ran by {program}"),
            *smokeparts.judge(said.out, ids, str(release) if release else None)]


def _device(machine: Machine, text: str | None) -> tuple[str, list[str]]:
    """The node, and the ids of the GPUs behind it. Raises `UserError`."""
    ready = snippets.devices(machine)
    if text is None:
        node = next(iter(ready), None)
        if node is None:
            raise UserError("no GPU is bound to vfio-pci, and there is no vGPU",
                            hint="katagpu host bind BDF, or katagpu host vgpu create BDF TYPE")
    elif text.startswith("/dev/vfio/"):
        node = text
    elif machine.exists(f"{MDEVS}/{text}"):
        node = f"/dev/vfio/{machine.link(f'{MDEVS}/{text}/iommu_group')}"
    else:
        function = pci.resolve(machine, text)
        node = vfio.node(machine, function) or "/dev/vfio/"
        if node not in ready:
            raise UserError(f"{function} is bound to {function.driver or 'no driver'}",
                            hint=f"katagpu host bind {function.address}")
    if not machine.exists(node):
        raise UserError(f"there is no {node}", hint="katagpu host gpus shows what is there; "
                                                    "modprobe vfio-pci")
    return node, _ids(machine, node)


def _ids(machine: Machine, node: str) -> list[str]:
    """The ids of the GPUs that a guest sees through a node."""
    found = [one.ids for one in pci.functions(machine)
             if one.gpu and node in vfio.nodes(machine, one)]
    for gpu in [] if found else pci.gpus(machine):
        # A vGPU by mdev has its card's vendor and device.
        if any(one.node == node for one in vgputypes.made(machine, gpu)):
            found.append(gpu.ids)
    return sorted(set(found))
