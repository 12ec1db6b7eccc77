"""The default guest with the closed kernel modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from katagpu.context import Context
from katagpu.lock import Lock
from katagpu.locks import Locks
from katagpu.schema import KernelModule, Recipe


@dataclass(frozen=True, kw_only=True)
class Closed:
    """The recipe, and its lock: the modules are another package, all others the default guest's."""

    recipe: Recipe
    lock: Lock


def closed(context: Context, place: Path) -> Closed:
    """Resolve it below `place`, on top of what is resolved for the default guest."""
    recipe = replace(context.recipe, driver=replace(
        context.recipe.driver, kernel_module=KernelModule.CLOSED))
    locks = Locks(recipe, context.root, place / "guest", [], context.locks.committed)
    locks.shared.parent.mkdir(parents=True, exist_ok=True)
    locks.shared.write_bytes(context.locks.shared.read_bytes())
    with context.resolving() as apt:
        locks.make(apt, anew=False)
    found, known = locks.find(), context.locked()
    assert found is not None and known is not None
    assert {name for name in found.groups if found.group(name) != known.group(name)} == {
        "driver_source"}
    return Closed(recipe=recipe, lock=found)
