"""What only the boot tasks of a run need: QEMU, the plan of the check, its results."""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from katagpu import artifacts, guest, log, sandbox
from katagpu.artifacts import Artifact, Outcome
from katagpu.emulator import EmulatorLock
from katagpu.errors import UserError
from katagpu.locks import Locks
from katagpu.plan import Plan
from katagpu.schema import Recipe
from katagpu.stages.api import Build, Stage, unpacked_tree
from katagpu.store import Store, writing

if TYPE_CHECKING:
    from katagpu.boot.qemu import Qemu


class Run(Protocol):
    """What they need of a run; `Context` has it."""

    root: Path
    store: Store

    @property
    def recipe(self) -> Recipe:
        """What is built."""

    @property
    def directory(self) -> Path:
        """Where the results are."""

    @property
    def locks(self) -> Locks:
        """Where the guest's lock is."""

    @property
    def plan(self) -> Plan:
        """The plan of the guest."""

    def planned(self, stages: Mapping[str, Stage]) -> Plan:
        """A plan of more stages."""


class Booting:
    """The boot tasks of a run. Nothing is looked for before it is asked for."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.store = run.store

    @functools.cached_property
    def lock(self) -> EmulatorLock:
        """The lock of QEMU of the pipeline's own: under out/, for all drivers of the recipe."""
        return EmulatorLock(self.run.recipe, self.run.root, self.run.directory.parent,
                            self.run.locks.committed.lock)

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan of boot tasks: the guest's stages and what boots them.

        Raises `UserError` when the guest's lock is not made. QEMU's is not needed for it.
        """
        return self._plan(lesser=False)

    def _plan(self, *, lesser: bool) -> Plan:
        return self.run.planned({**self.run.plan.stages, **guest.boot_stages(
            self.run.recipe, self.lock.find(), lambda: self.qemu, lesser=lesser)})

    @functools.cached_property
    def qemu(self) -> Qemu:
        """The QEMU that boots guests here: the host's, or the pipeline's own, which is then made.

        Raises `UserError` where there is none.
        """
        from katagpu.boot import qemu

        return qemu.find(self._emulator)

    def command(self) -> str:
        """How a shell starts that QEMU."""
        words = [f"{name}={value}" for name, value in self.qemu.env.items()]
        return shlex.join(["env", *words, *self.qemu.argv])

    @functools.cached_property
    def _checking(self) -> Plan:
        """The plan of a boot check that has no result yet, for the QEMU that is there."""
        return self.plan if self.qemu.vfio_user else self._plan(lesser=True)

    def make_lock(self, *, anew: bool) -> None:
        """Resolve QEMU of the pipeline's own; unless `anew`, only where that is not done yet.

        Raises `UserError` where the mirror does not have it.
        """
        self.store.prepare()
        waiting = functools.partial(log.note, "lock: another run is resolving packages")
        with self.store.lock("resolve", waiting), writing(self.lock.path.parent):
            if anew or self.lock.find() is None:
                with log.step("lock: resolve QEMU for boot checks"):
                    self.lock.make(self.store.root / "apt")
                self.__dict__.pop("plan", None)

    def renew_lock(self) -> None:
        """Resolve QEMU anew where it was resolved before; where that fails, say so and go on."""
        if self.lock.path.exists():
            try:
                self.make_lock(anew=True)
            except UserError as refusal:
                log.warn(f"{self.lock} stays as it was: {refusal}")

    def _emulator(self) -> Path:
        """The root with QEMU of the pipeline's own: resolved, fetched and made where it is not.

        The caller holds the store's lease as long as it runs from there. Raises `UserError` where
        it cannot be had.
        """
        self.make_lock(anew=False)
        action = self.plan.ensure("emulator")
        return unpacked_tree(self.store, action.outputs["root"])

    def checked(self) -> Plan | None:
        """The plan of a boot check that has a result, where the results say that there is one."""
        if not (self.run.directory / artifacts.BOOT_CHECK[0].name).exists():
            return None
        for plan in (self.plan, self._plan(lesser=True)):
            if plan.action(artifacts.CHECKED.stage) is not None:
                return plan
        return None

    def drop_old(self) -> None:
        """What a boot check left of another build does not stay beside this one."""
        if self.checked() is None:
            for item in artifacts.BOOT_CHECK:
                (self.run.directory / item.name).unlink(missing_ok=True)

    def check(self) -> Sequence[Artifact]:
        """Boot the guest and check it, unless that was done with these very bytes; the results.

        Raises `StepError` for a guest that does not pass, `UserError` for what the host lacks.
        """
        wanted = artifacts.of(self.run.recipe, "boot_check")
        self.store.prepare()
        with self.store.lease():
            plan = self.plan
            if plan.action("boot_check") is None:
                plan = self._checking
            plan.ensure(artifacts.CHECKED.stage)
            Outcome(self.run.directory, plan).restore(wanted)
        return artifacts.BOOT_CHECK

    def shell(self) -> None:
        """Boot the guest as the check does, with a shell on this terminal.

        Raises `UserError` where there is no terminal, and for what the host lacks.
        """
        from katagpu.boot import terminal
        from katagpu.stages import boot

        terminal.must_be_one()
        with self.inputs("boot_shell") as build:
            terminal.shell(boot.guest(build), boot.setting(build, self.qemu))

    @contextlib.contextmanager
    def inputs(self, name: str) -> Iterator[Build]:
        """A handle on what the check's stage gets, all made; `name` is that of its log."""
        self.store.prepare()
        with self.store.lease(), self.store.staging(name, sandbox.remove) as scratch:
            plan = self._checking
            for need in plan.needs("boot_check"):
                plan.ensure(need)
            yield Build(plan.stages["boot_check"], self.store, plan.inputs("boot_check"), scratch,
                        self.run.directory / f"logs/{name}.log")
