"""One run: the recipe, the lock, the store, the plan, and where results go."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from katagpu import (
    artifacts,
    embed,
    guest,
    lock,
    lockparts,
    log,
    parameters,
    receipt,
    recipe,
    request,
)
from katagpu.artifacts import Artifact, Outcome
from katagpu.booting import Booting
from katagpu.committed import Committed
from katagpu.errors import CorruptBlob, KatagpuError, UserError
from katagpu.locks import Locks
from katagpu.plan import Plan
from katagpu.schema import Recipe, ToolkitSource
from katagpu.stages import final, layers
from katagpu.stages.api import Stage
from katagpu.store import Store, default_root, writing

DEFAULT = "debian-trixie"


class Context:
    """What the tasks share. Nothing is loaded before it is asked for.

    `values` are the parameters of the command line (`recipe=NAME`), `environment` the process's.
    Raises `UserError` where they are none.
    """

    def __init__(self, root: Path, values: Mapping[str, str],
                 environment: Mapping[str, str] = os.environ) -> None:
        parameters.check(values)
        # Before anything is read, so that what changes meanwhile does not look like what was read.
        self._marks = receipt.look(receipt.inputs(root))
        self.root = root
        self.values = values
        self.environment = environment
        self.store = Store(default_root())
        self.refused: KatagpuError | None = None  # why there is no lock, where others go on

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The recipe of this run with its overrides."""
        return recipe.load(self.values.get("recipe", DEFAULT), self.root,
                           cache=self.store.root / "recipes", driver=self.values.get("driver"),
                           extra_packages=self._extra)

    @property
    def _extra(self) -> list[str]:
        return self.environment.get("EXTRA_PKGS", "").split()

    @functools.cached_property
    def plain(self) -> Recipe:
        """The recipe as it is in its file, which is what a committed lock answers."""
        if "driver" not in self.values and not self._extra:
            return self.recipe
        return recipe.load(self.values.get("recipe", DEFAULT), self.root,
                           cache=self.store.root / "recipes")

    @property
    def other(self) -> bool:
        """Is this another guest than the recipe's own: of another driver, or with EXTRA_PKGS?"""
        return self.recipe != self.plain

    @functools.cached_property
    def directory(self) -> Path:
        """Where this guest's results go."""
        return self.root / "out" / self.recipe.name / (self.recipe.driver.version or "no-driver")

    @functools.cached_property
    def locks(self) -> Locks:
        """Where the lock of this run is: under out/, never a silent edit of a committed one."""
        return Locks(self.recipe, self.root, self.directory,
                     self._extra, Committed(self.plain, self.root))

    @functools.cached_property
    def _locked(self) -> lock.Lock | None:
        self._marks.update(receipt.look(self.locks.files()))
        return self.locks.find()

    def locked(self) -> lock.Lock | None:
        """The lock, when it answers what the recipe asks for."""
        return self._locked

    @contextlib.contextmanager
    def resolving(self) -> Iterator[Path]:
        """Be the only one who resolves packages; yields the directory for apt's lists."""
        self.store.prepare()
        waiting = functools.partial(log.note, "lock: another run is resolving packages")
        with self.store.lock("resolve", waiting), writing(self.directory):
            self.forget()
            yield self.store.root / "apt"
            self.forget()

    def make_lock(self, *, anew: bool = True) -> None:
        """Resolve the recipe now, and write the lock; unless `anew`, another run's will do."""
        with self.resolving() as apt:
            if not anew and self.locked() is not None:
                return
            with log.step(f"lock: resolve {self.recipe.name}'s packages"):
                self.locks.make(apt, anew=anew)
        log.note(f"lock: {self.locks}; ./doitw lock draft=1 resolves anew, ./doitw lock makes "
                 f"{self.locks.committed}, to be committed")

    def forget(self) -> None:
        """Read the lock anew from here on."""
        for name in ("_locked", "plan", "booting", "outcome", "embedding"):
            self.__dict__.pop(name, None)

    @functools.cached_property
    def outline(self) -> dict[str, Stage]:
        """The stages by name as they are without a lock: packages stand for what is asked for."""
        return guest.stages(self.recipe, request.outline(self.recipe, self.root), self.root)

    def sketch(self) -> Mapping[str, Stage]:
        """The stages by name; before there is a lock that holds, without their packages.

        What is wrong with a lock is said by the task that needs it.
        """
        try:
            return self.outline if self.locked() is None else self.plan.stages
        except UserError:
            return self.outline

    @functools.cached_property
    def plan(self) -> Plan:
        """The plan. Raises `UserError` when the lock is not made."""
        found = self.locked()
        if found is None:
            raise self.refused or UserError("this recipe is not resolved yet", hint="./doitw lock")
        return self.planned(guest.stages(self.recipe, found, self.root))

    def planned(self, stages: Mapping[str, Stage], found: lock.Lock | None = None) -> Plan:
        """A plan of these stages; the files that they name count as read.

        `found` is the lock that names their packages, where it is not this run's.
        """
        for stage in stages.values():
            for path in stage.files.values():
                self._marks.setdefault(str(path), receipt.mark(path))
        return Plan(stages, self.store, self.directory / "logs",
                    ccache=parameters.flag(self.values, "ccache", default=True),
                    address=functools.partial(self.address, found or self.locked()))

    @functools.cached_property
    def _here(self) -> Mapping[str, str]:
        return lockparts.here(self.recipe, self.root)

    def address(self, found: lock.Lock | None, deb: lock.Deb) -> str:
        """Where this host has a package: a committed lock knows its public address only."""
        origin = None if found is None else found.pins.archives.get(deb.archive)
        if origin is None or not deb.url.startswith(f"{origin}/"):
            return deb.url
        return self._here.get(deb.archive, origin) + deb.url.removeprefix(origin)

    @functools.cached_property
    def booting(self) -> Booting:
        """What only boot tasks need."""
        return Booting(self)

    @functools.cached_property
    def outcome(self) -> Outcome:
        """The results' directory."""
        return Outcome(self.directory, self.booting.checked() or self.plan)

    @functools.cached_property
    def embedding(self) -> embed.Embedding | None:
        """What puts the recipe's client token into images; None where none is embedded."""
        vgpu = self.recipe.vgpu
        if vgpu is None or not vgpu.embed_token or vgpu.token_file is None:
            return None
        named = self.root / vgpu.token_file
        token = named.resolve()  # what a link leads to is marked too
        self._marks.update(receipt.look([named, token]))
        return embed.Embedding(self.directory, self.plan, token)

    def artifacts(self, task: str) -> tuple[Artifact, ...]:
        """A task's artifacts; the manifest with the boot check where that was done."""
        found = artifacts.of(self.recipe, task)
        checked = any(item.name == artifacts.CHECKED.name for item in found) \
            and self.booting.checked() is not None
        return tuple(artifacts.CHECKED if checked and item.name == artifacts.CHECKED.name else item
                     for item in found)

    def _artifacts(self, task: str) -> tuple[list[Artifact], list[Artifact]]:
        """A task's artifacts: those that the store has as they shall be, and the others."""
        wanted = self.artifacts(task)
        other = [item for item in wanted if self.embedding is not None and embed.takes(item)]
        return [item for item in wanted if item not in other], other

    def complete(self, task: str) -> bool:
        """Are all of a task's artifacts there, as they were left? Reads no content."""
        plain, other = self._artifacts(task)
        return self.outcome.complete(plain) and (
            embed.settled(self.directory) if self.embedding is None
            else self.embedding.complete(other))

    def made(self, stage: str) -> bool:
        """Is the stage in the store?"""
        return self.plan.action(stage) is not None

    def ensure(self, stage: str) -> None:
        """Make a stage, holding the store's lease."""
        self.store.prepare()
        self._look_at_key()
        with self.store.lease():
            self.plan.ensure(stage)

    @functools.cache  # noqa: B019  # one context lives as long as the process
    def _look_at_key(self) -> None:
        """Warn before anything is made that modules cannot be signed at the end."""
        if self.recipe.sign is not None:
            from katagpu.stages import signing

            why = signing.lacks_key([stage for name, stage in self.plan.stages.items()
                                     if self.plan.action(name) is None])
            if why is not None:
                log.warn(f"modules will not be signed: {why}")

    def restore(self, task: str) -> None:
        """Restore a task's artifacts; damaged blobs are made again. A read-only store will do."""
        plain, other = self._artifacts(task)
        writable = os.access(self.store.root / "locks", os.W_OK)
        with self.store.lease() if writable else contextlib.nullcontext():
            # Before too: afterwards a file that is as it was embedded can only be another run's.
            self._withdraw()
            for left in reversed(range(len(plain) + len(other) + 1)):
                try:
                    self.outcome.restore(plain)
                    if any(item.name == artifacts.CHECKED.name for item in plain):
                        self.booting.drop_old()
                    if self.embedding is not None:
                        self.embedding.write(other)
                    for name in self._withdraw():
                        log.warn(f"{name} was changed since the client token was put in, and may "
                                 "have it: remove it yourself, and do not publish it")
                    return
                except CorruptBlob as damaged:
                    if left == 0:
                        raise
                    log.warn(f"{damaged}; it is made again")
                    self.plan.forget()
                    for artifact in (*plain, *other):
                        self.plan.ensure(artifact.stage)

    def _withdraw(self) -> list[str]:
        """Remove what has a token that the recipe no longer embeds; what may still have one."""
        return [] if self.embedding is not None else embed.withdraw(
            self.store, self.directory, self.outcome.restored)

    def finish(self, task: str, stages: Sequence[str]) -> None:
        """Write the build record of this run: what `stages` and all below them took, hits too.

        Results that cannot be written to are left as they are.
        """
        mine = {name: self.plan.digest(name) for stage in stages
                for name in self.plan.closure(stage)}
        found = log.Record()
        found.entries = [entry for entry in list(log.record.entries) if "stage" not in entry
                         or entry.get("action") == mine.get(entry["stage"], "not of this guest")]
        run = {entry.get("stage") for entry in found.entries}
        found.entries += [{"stage": name, "hit": True} for name in mine if name not in run]
        with contextlib.suppress(OSError):
            found.write(self.directory / "build-record.json", task=task,
                        recipe=self.recipe.name, driver=self.recipe.driver.version)

    def marks(self, task: str) -> dict[str, receipt.Mark]:
        """The marks of all that a finished task has read and left; none where it leaves nothing.

        The store has all that such a task makes, and the store must be asked. With
        no token to embed, what speaks of one must not be there: the marks do not hold before.
        """
        wanted = self.artifacts(task)
        if not wanted:
            return {}
        notice = str(self.directory / embed.NOTICE)
        spoken = {notice: receipt.mark(notice)} if self.embedding is not None else {
            notice: None, str(self.directory / embed.STATE): None}
        return {**self._marks, **receipt.look(self.outcome.files(wanted)), **spoken}

    def sign(self, task: str, said: str) -> None:
        """Write the receipt of a finished task."""
        receipt.sign(receipt.place(self.root, task, self.values, self.environment), said,
                     self.marks(task))

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
            for line in self._explained(stage):
                if line not in said:
                    said.add(line)
                    yield line

    def _explained(self, stage: str) -> Iterator[str]:
        """Hit or miss of a stage and all below it; without a lock, of what takes no packages."""
        if self.locked() is not None:
            yield from self.plan.explain(stage)
            return
        yield "lock: miss: not made yet; it comes before all else"
        plan = self.planned(self.outline)
        for name in plan.closure(stage):
            yield (f"{name}: hit" if plan.action(name) is not None
                   else f"{name}: miss: there is no lock yet")

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
                     "recipe's `agent:` names one (README, \"A guest for production\")")
        if self.embedding is not None:
            log.warn("the client token is in this image: whoever can read it can take licences; "
                     "only you may read it here, and it must not be published")
        if self.recipe.toolkit.source is ToolkitSource.NONE:
            log.warn("toolkit: none: containers do not get the GPU by CDI in this guest")
