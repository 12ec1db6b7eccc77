"""One run: the recipe, the lock, the store, the plan, and where results go."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from katagpu import artifacts, guest, keys, lock, log, receipt, recipe, request
from katagpu.artifacts import Outcome
from katagpu.errors import CorruptBlob, UserError
from katagpu.plan import Plan
from katagpu.schema import Recipe, ToolkitSource
from katagpu.stages import final, layers
from katagpu.stages.api import Stage
from katagpu.store import Store, default_root, writing

DEFAULT = "debian-trixie"
PARAMETERS = ("recipe", "driver", "all", "ccache")


class Context:
    """What the tasks share. Nothing is loaded before it is asked for.

    `values` are the parameters of the command line (`recipe=NAME`), `environment` the process's.
    """

    def __init__(self, root: Path, values: Mapping[str, str],
                 environment: Mapping[str, str] = os.environ) -> None:
        unknown = sorted(set(values) - set(PARAMETERS))
        if unknown:
            raise UserError(f"unknown parameter {unknown[0]}=; known: "
                            f"{', '.join(f'{name}=' for name in PARAMETERS)}")
        # Before anything is read, so that what changes meanwhile does not look like what was read.
        self._marks = receipt.look(receipt.inputs(root))
        self.root = root
        self.values = values
        self.environment = environment
        self.store = Store(default_root())

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The recipe of this run with its overrides."""
        return recipe.load(self.values.get("recipe", DEFAULT), self.root,
                           cache=self.store.root / "recipes", driver=self.values.get("driver"),
                           extra_packages=self.environment.get("EXTRA_PKGS", "").split())

    @functools.cached_property
    def directory(self) -> Path:
        """Where this guest's results go."""
        return self.root / "out" / self.recipe.name / (self.recipe.driver.version or "no-driver")

    @property
    def lock_path(self) -> Path:
        """The lock of this run: under out/, never a silent edit of a committed one.

        Packages of this run alone (EXTRA_PKGS) have a lock of their own beside the recipe's.
        """
        extra = sorted(self.environment.get("EXTRA_PKGS", "").split())
        return self.directory / (f"lock-{keys.digest(extra)[:12]}.json" if extra else "lock.json")

    @functools.cached_property
    def _locked(self) -> lock.Lock | None:
        self._marks[str(self.lock_path)] = receipt.mark(self.lock_path)
        found = lock.read(self.lock_path)
        wanted = request.identity(self.recipe, self.root)
        return found if found and found.request == wanted else None

    def locked(self) -> lock.Lock | None:
        """The lock, when it answers what the recipe asks for."""
        return self._locked

    def make_lock(self, *, anew: bool = True) -> None:
        """Resolve the recipe now, and write the lock; unless `anew`, another run's will do."""
        self.store.prepare()
        waiting = functools.partial(log.note, "lock: another run is resolving packages")
        with self.store.lock("resolve", waiting), writing(self.directory):
            self._forget()
            if not anew and self.locked() is not None:
                return
            with log.step(f"lock: resolve {self.recipe.name}'s packages"):
                wanted = request.request(self.recipe, self.root)
                lock.write(lock.resolve(wanted, self.store.root / "apt"), self.lock_path)
            self._forget()
        log.note(f"lock: {os.path.relpath(self.lock_path)}; ./doitw lock resolves anew")

    def _forget(self) -> None:
        for name in ("_locked", "plan", "outcome"):
            self.__dict__.pop(name, None)

    @functools.cached_property
    def _unlocked(self) -> dict[str, Stage]:
        empty = lock.Lock(recipe=self.recipe.name, request="", groups={})
        return guest.stages(self.recipe, empty, self.root)

    def sketch(self) -> Mapping[str, Stage]:
        """The stages by name; before there is a lock, without their packages."""
        return self._unlocked if self.locked() is None else self.plan.stages

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan. Raises `UserError` when the lock is not made."""
        found = self.locked()
        if found is None:
            raise UserError("this recipe is not resolved yet", hint="./doitw lock")
        stages = guest.stages(self.recipe, found, self.root)
        for stage in stages.values():
            for path in stage.files.values():
                self._marks.setdefault(str(path), receipt.mark(path))
        return Plan(stages, self.store, self.directory / "logs",
                    ccache=self.values.get("ccache", "1") != "0")

    @functools.cached_property
    def outcome(self) -> Outcome:
        """The results' directory."""
        return Outcome(self.directory, self.plan)

    def made(self, stage: str) -> bool:
        """Is the stage in the store?"""
        return self.plan.action(stage) is not None

    def ensure(self, stage: str) -> None:
        """Make a stage, holding the store's lease."""
        self.store.prepare()
        with self.store.lease():
            self.plan.ensure(stage)

    def restore(self, task: str) -> None:
        """Restore a task's artifacts; damaged blobs are made again. A read-only store will do."""
        wanted = artifacts.of(self.recipe, task)
        writable = os.access(self.store.root / "locks", os.W_OK)
        with self.store.lease() if writable else contextlib.nullcontext():
            for left in reversed(range(len(wanted) + 1)):
                try:
                    return self.outcome.restore(wanted)
                except CorruptBlob as damaged:
                    if left == 0:
                        raise
                    log.warn(f"{damaged}; it is made again")
                    self.plan.forget()
                    for artifact in wanted:
                        self.plan.ensure(artifact.stage)

    def finish(self, task: str, stages: Sequence[str]) -> None:
        """Write the build record of this run: what `stages` and all below them took, hits too.

        Results that cannot be written to are left as they are.
        """
        run = {entry.get("stage") for entry in log.record.entries}
        for name in dict.fromkeys(each for stage in stages for each in self.plan.closure(stage)):
            if name not in run:
                log.record.add(stage=name, hit=True)
        with contextlib.suppress(OSError):
            log.record.write(self.directory / "build-record.json", task=task,
                             recipe=self.recipe.name, driver=self.recipe.driver.version)

    def sign(self, task: str, said: str) -> None:
        """Write the receipt of a finished task. A run that cannot write it is only slower."""
        wanted = artifacts.of(self.recipe, task)
        if not wanted:  # the store has all that such a task makes, and the store must be asked
            return
        marks = {**self._marks, **receipt.look(self.outcome.files(wanted))}
        with contextlib.suppress(OSError):
            receipt.write(receipt.place(self.root, task, self.values, self.environment), said,
                          marks)

    def explain(self, task: str, known: Mapping[str, Sequence[str]]) -> Iterator[str]:
        """Hit or miss of every stage of a task, or of a stage by its own name."""
        names = [*known, *self.sketch()]
        if task not in names:
            from difflib import get_close_matches

            near = get_close_matches(task, names, n=1)
            raise UserError(f"there is no task or stage {task!r}", hint=(
                f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"))
        said = set()
        for stage in known.get(task, (task,)):
            if stage not in self.sketch():
                yield f"{stage}: not in this recipe"
                continue
            for line in self.plan.explain(stage):
                if line not in said:
                    said.add(line)
                    yield line

    def usage(self) -> None:
        """How to use the guest with Kata, and what it lacks."""
        shown = os.path.relpath(self.directory)
        log.say("To use it with Kata Containers, on the host that runs them:")
        log.say(f"  sudo cp -a {shown}/vmlinuz-* {shown}/vmlinux-* {shown}/kata-* "
                f"{final.PLACE}/")
        log.say(f"  and put {shown}/50-katagpu.toml, or 50-katagpu-runtime-rs.toml for Kata's Rust "
                "runtime, where its first lines say")
        if layers.split(self.recipe):
            log.say("Another driver needs one more disk, kata-*-extension-*, and a drop-in for a "
                    "runtime of its own; kernel and base are the same.")
        if self.recipe.agent is None:
            log.warn("no kata-agent in this image: it boots, but Kata cannot use it until the "
                     "recipe's `agent:` names one (README, third step)")
        if self.recipe.toolkit.source is ToolkitSource.NONE:
            log.warn("toolkit: none: containers do not get the GPU by CDI in this guest")
