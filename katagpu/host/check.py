"""`host check`: is all there that Kata needs to give this host's GPUs to guests?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from katagpu.errors import UserError
from katagpu.host import (
    command,
    gpucheck,
    hostkernel,
    katafiles,
    katalines,
    memory,
    pci,
    persist,
    support,
    vfio,
)
from katagpu.host.command import Answer, Commands
from katagpu.host.machine import Machine
from katagpu.host.verdict import State, Verdict, failed, warned


def add(commands: Commands) -> None:
    """Its command line."""
    made = command.new(commands, "check", run,
                       "say what this host lacks to give GPUs to Kata's guests")
    made.add_argument("bdf", nargs="*", metavar="BDF",
                      help="GPUs that are meant for guests (default: all, and none in particular)")
    made.add_argument("--manifest", metavar="FILE",
                      help="the manifest.json of the guest (default: the installed one's)")


def run(machine: Machine, given: argparse.Namespace) -> Answer:
    """Check it; not ok where something failed."""
    found = list(verdicts(machine, given))
    count = {state: sum(verdict.state is state for verdict in found) for state in State}
    summary = ", ".join(f"{count[state]} {state.value}" for state in State)
    return Answer([*(line for verdict in found for line in verdict.lines()), summary],
                  {"checks": [verdict.data() for verdict in found],
                   "counts": {state.value: count[state] for state in State}},
                  ok=not count[State.FAIL])


def verdicts(machine: Machine, given: argparse.Namespace) -> Iterator[Verdict]:
    """Everything about the host, then about each GPU. Raises `UserError` for a bad argument."""
    gpus = [pci.resolve(machine, text) for text in given.bdf] or pci.gpus(machine)
    facts = None
    try:
        facts = support.manifest(machine, given.manifest)
    except UserError as failure:
        if given.manifest:
            raise
        yield failed("guest", failure.what, failure.hint or "install the release again")
    yield from hostkernel.kernel(machine, grace=any(gpu.ids in vfio.GRACE_IDS for gpu in gpus))
    yield from hostkernel.iommu(machine)
    yield from hostkernel.devices(machine)
    yield from _kata(machine, gpus)
    if not gpus:
        yield failed("gpus", "there is no NVIDIA GPU here", "lspci -nn -d 10de: shows them; is it "
                     "in its slot, powered, and given to this machine?")
    kept: set[str] = set()
    try:
        kept = set(persist.kept(machine))
    except UserError as foreign:
        yield warned("persist", foreign.what, foreign.hint)
    for gpu in gpus:
        yield from gpucheck.check(machine, gpu, named=bool(given.bdf), kept=gpu.address in kept)
        yield support.check(gpu, facts[1] if facts else None)


def _kata(machine: Machine, gpus: Sequence[pci.Function]) -> Iterator[Verdict]:
    """Kata, and the memory that its guests are given."""
    said = list(katalines.versions(machine, large=any(gpu.large for gpu in gpus)))
    yield from said
    seen: list[katafiles.Effective] = []
    if all(verdict.state is State.PASS for verdict in said):
        seen, files = katalines.read(machine)
        yield from files
        if seen and gpus:
            yield from katalines.fits(machine)
    yield from memory.check(machine, seen)
