"""The guests of one run: one, or with `driver=all` one for each driver that the recipe lists.

Guests of one recipe differ in few stages. What is the same in several is one task, made once; what
fails in one guest does not keep the others from being built.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from katagpu import log, receipt, recipe
from katagpu.context import Context
from katagpu.errors import KatagpuError, UserError
from katagpu.lock import Deb
from katagpu.reporter import Ended
from katagpu.schema import DriverSource
from katagpu.stages.api import Stage

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A stage of one or more guests: those whose outcome it is, and the stages below it."""

    stage: str
    title: str
    users: tuple[Context, ...]
    needs: tuple[str, ...]

    def _user(self) -> Context:
        """One that has a lock: the packages of what is shared are the same in all of them."""
        return next((user for user in self.users if user.locked() is not None), self.users[0])

    def made(self) -> bool:
        """Is it in the store?"""
        return self._user().made(self.stage)

    def ensure(self) -> None:
        """Make it. Raises `KatagpuError`."""
        self._user().ensure(self.stage)


class Guests:
    """The guests of a command line; `values` are its parameters (`driver=all`)."""

    def __init__(self, root: Path, values: Mapping[str, str],
                 environment: Mapping[str, str] = os.environ) -> None:
        self.root = root
        self.values = values
        self.environment = environment
        self.all = values.get("driver") == ALL
        if not self.all:
            self.contexts = [Context(root, values, environment)]
            return
        one = {name: value for name, value in values.items() if name != "driver"}
        wanted = Context(root, one, environment).recipe
        if wanted.driver.source is DriverSource.NONE:
            raise UserError(f"driver=all: the recipe {wanted.name!r} has no driver",
                            hint=f"./doitw recipe={wanted.name} builds its one guest")
        self.contexts = [Context(root, {**one, "driver": version}, environment)
                         for version in recipe.versions(wanted)]

    def label(self, name: str, context: Context) -> str:
        """The name of what is one guest's own, among those of several."""
        return f"{name}@{context.recipe.driver.version}" if self.all else name

    # stages

    def _shape(self, context: Context) -> Mapping[str, Stage]:
        """The stages of a guest. Only outlines compare, of a guest with a lock and one without."""
        return context.outline if self.all else context.sketch()

    @functools.cached_property
    def _owners(self) -> list[dict[str, int]]:
        """For each guest: the first guest that has the very same stage, by the stage's name."""
        found: list[dict[str, int]] = []
        shapes = [self._shape(context) for context in self.contexts]
        for number, stages in enumerate(shapes):
            mine: dict[str, int] = {}
            for name, stage in stages.items():  # inputs come first
                needs = {ref.stage for ref in stage.inputs.values()}
                mine[name] = next((
                    other for other in range(number) if shapes[other].get(name) == stage
                    and all(found[other][need] == mine[need] for need in needs)), number)
            found.append(mine)
        return found

    def labels(self, context: Context) -> dict[str, str]:
        """The stages of a guest, each with the name of its task."""
        mine = self._owners[self.contexts.index(context)]
        alone = {name for name in mine
                 if len({owners[name] for owners in self._owners if name in owners}) == 1}
        return {name: name if name in alone else self.label(name, self.contexts[owner])
                for name, owner in mine.items()}

    def stages(self) -> dict[str, Shared]:
        """All stages of all guests by the names of their tasks."""
        users: dict[str, list[Context]] = {}
        found: dict[str, Shared] = {}
        for context in self.contexts:
            labels = self.labels(context)
            for name, label in labels.items():
                users.setdefault(label, []).append(context)
                stage = self._shape(context)[name]
                needs = dict.fromkeys(labels[ref.stage] for ref in stage.inputs.values())
                found[label] = Shared(stage=name, title=stage.title, users=tuple(users[label]),
                                      needs=tuple(needs))
        return found

    # locks

    def locked(self) -> bool:
        """Do all guests have their locks, and these the same packages where they ask alike?"""
        known: dict[str, tuple[Deb, ...]] = {}
        for context in self.contexts:
            found = context.locked()
            if found is None:
                return False
            for name, asked in context.locks.asked().items() if self.all else ():
                if known.setdefault(asked, found.group(name)) != found.group(name):
                    return False
        return True

    def lock(self, *, anew: bool) -> list[KatagpuError]:
        """Resolve what all guests share once, then the rest of each; what kept some from it.

        Unless `anew`, only what is not known yet. Raises `UserError` when what is shared cannot be
        resolved.
        """
        first = self.contexts[0]
        if anew:
            first.booting.renew_lock()
        if not self.all:
            first.make_lock(anew=anew)
            return []
        with first.resolving() as apt:
            if not anew and self.locked():
                return []
            shared = set.intersection(*(set(context.locks.asked().values())
                                        for context in self.contexts))
            with log.step(f"lock: resolve what all guests of {first.recipe.name} share"):
                first.locks.make_shared(apt, shared, anew=anew)
        refused = []
        for context in self.contexts:
            try:
                with context.resolving() as apt:
                    if anew or context.locked() is None:
                        with log.step(f"lock: resolve driver {context.recipe.driver.version}"):
                            context.locks.make(apt, anew=anew, shared=True)
            except KatagpuError as refusal:
                context.refused = refusal
                refused.append(refusal)
        for context in self.contexts:
            context.forget()
        return refused

    # results

    def summary(self, task: str, ended: Callable[[Context], Ended]) -> Iterator[str]:
        """One line for each guest: how its task ended, the image's size, and where it is."""
        yield f"{task} with each driver of {self.contexts[0].recipe.name}:"
        rows = [(context, ended(context)) for context in self.contexts]
        widths = [max(len(context.recipe.driver.version or "") for context, _how in rows),
                  max(len(how) for _context, how in rows)]
        for context, how in rows:
            where = "" if how is Ended.FAILED else f"  {os.path.relpath(context.directory)}/"
            yield (f"  {context.recipe.driver.version:<{widths[0]}}  {how:<{widths[1]}}"
                   f"{self._size(task, context) if where else ''}{where}").rstrip()

    def _size(self, task: str, context: Context) -> str:
        action = context.plan.action("image") if task == receipt.DEFAULT else None
        return f"  {log.size(action.outputs['image'].size):>9}" if action is not None else ""

    def sign(self, task: str) -> None:
        """Write the receipt of a task that ended well for all guests."""
        marks: dict[str, receipt.Mark] = {}
        for context in self.contexts:
            marks |= context.marks(task)
        said = "\n".join(self.summary(task, lambda _context: Ended.THERE))
        receipt.sign(receipt.place(self.root, task, self.values, self.environment), said, marks)


def worst(refused: Sequence[KatagpuError]) -> KatagpuError:
    """Of several errors the one with the highest status."""
    return max(refused, key=lambda error: error.status)
