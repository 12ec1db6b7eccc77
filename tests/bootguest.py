"""Guests for boot checks in tests: what the stage `boot_check` of any plan would boot."""

from __future__ import annotations

from pathlib import Path

from katagpu import guest
from katagpu.boot import runner
from katagpu.boot.facts import Verdict
from katagpu.boot.qemu import Qemu
from katagpu.boot.report import Report
from katagpu.context import Context
from katagpu.lock import Lock
from katagpu.plan import Plan
from katagpu.schema import Recipe
from katagpu.stages import boot
from katagpu.stages.api import Build


def of(context: Context, recipe: Recipe, lock: Lock, qemu: Qemu, scratch: Path) -> runner.Guest:
    """The guest of a recipe like the default one; its stages are made where they are not."""
    plan = Plan({**guest.stages(recipe, lock, context.root),
                 **guest.boot_stages(recipe, None, lambda: qemu, lesser=False)},
                context.store, scratch / "logs")
    for need in plan.needs("boot_check"):
        plan.ensure(need)
    return boot.guest(Build(plan.stages["boot_check"], context.store, plan.inputs("boot_check"),
                            scratch, scratch / "log"))


def failed(report: Report) -> dict[str, str]:
    """The checks that failed, with all that they say."""
    found = {}
    for each in report.outcomes:
        if each.verdict is Verdict.FAILED:
            assert each.what and each.cause and each.cure, each
            found[f"{each.boot}: {each.id}"] = "\n".join(
                (each.what, *each.lines, each.cause, each.cure))
    return found


def skipped(report: Report) -> set[str]:
    """The ids of the checks that had nothing to look at."""
    return {each.id for each in report.outcomes if each.verdict is Verdict.SKIPPED}
