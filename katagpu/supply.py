"""Everything that builds take from outside, into the store: what comes after needs no network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from katagpu import apt, log
from katagpu.context import Context
from katagpu.errors import UserError
from katagpu.fetch import SUPERSEDED
from katagpu.plan import Plan
from katagpu.stages.api import RECIPE, bring, packages


def supply(contexts: Iterable[Context]) -> None:
    """Fetch what these guests and their boot checks need; all have their locks.

    Stages that have the network are made, with what they need. Raises `UserError` for what cannot
    be had.
    """
    for context in contexts:
        context.store.prepare()
        with context.store.lease():
            plan = _plan(context)
            _files(plan)
            for name, stage in plan.stages.items():
                if stage.network:
                    plan.ensure(name)
        log.say(f"fetch: {context.store.root} has all that is fetched for {context.recipe.name}, "
                f"driver {context.recipe.driver.version}: builds of it need no network")


def _plan(context: Context) -> Plan:
    """The guest's stages and, where QEMU can be had, those of boot checks."""
    try:
        context.booting.make_lock(anew=False)
    except UserError as refusal:
        log.warn(f"fetch: without QEMU for boot checks: {refusal}")
    return context.booting.plan


def _files(plan: Plan) -> None:
    """All packages at once, then the other files."""
    debs = {deb.sha256: deb for stage in plan.stages.values()
            for group in stage.packages.values() for deb in group}
    files = {digest: (url, digest, None, stage.title) for stage in plan.stages.values()
             for url, digest in stage.downloads.values() if digest is not None}
    with _timed(plan, [*debs, *files]):
        bring(plan.store, packages(debs.values(), plan.address), SUPERSEDED, apt.proxies)
        bring(plan.store, list(files.values()), RECIPE)


def _timed(plan: Plan, digests: Iterable[str]) -> contextlib.AbstractContextManager[object]:
    count = sum(not plan.store.has(digest) for digest in digests)
    return log.step(f"fetch: {count} files") if count else contextlib.nullcontext()
