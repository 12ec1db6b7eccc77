"""Build a guest twice, with all varied that must not matter, and compare every output.

Each build has a copy of the repository and an empty store of its own. What is downloaded is shared
by content: the first build has what this store has, and the second what the first has, so nothing
is fetched twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from katagpu import artifacts, differences, guest, log, parameters, sameness, sandbox, vary
from katagpu.context import Context
from katagpu.errors import StepError, UserError
from katagpu.files import clone_or_copy
from katagpu.plan import Plan, through_ccache
from katagpu.sameness import Compared
from katagpu.store import Action, Store, writing
from katagpu.vary import Side, Variation

TASKS = ("build_image", "build_initrd")
RESULT = "result.json"
LOGS = "logs"


@dataclass
class Outcome:
    """How it went: the plans over the two stores, what was compared, seconds of each build."""

    variation: Variation
    plans: tuple[Plan, Plan]
    found: list[Compared]
    walls: list[float]
    stamped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Are all outputs identical?"""
        return not sameness.differing(self.found)


def reproduce(context: Context, stages: Sequence[str]) -> Path:
    """Build these stages twice, compare, say what differs; the result's file.

    Raises `StepError` where something differs or a build fails. The guest has its lock.
    """
    given = context.values.get("diffoscope")
    program = differences.find(parameters.program(given) if given else None)
    place = context.root / "out/reproduce" / context.recipe.name
    elsewhere = context.values.get("place")
    store = Store(parameters.path(elsewhere)) if elsewhere else context.store
    store.prepare()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with context.store.lease(), store.staging("reproduce", sandbox.remove) as scratch:
        scratch.chmod(0o755)
        outcome = _build_twice(context, stages, scratch, place)
        stores = (outcome.plans[0].store, outcome.plans[1].store)
        with log.step("look for stamps of the day"):
            _stamps(outcome)
        _say(outcome)
        for one in sameness.differing(outcome.found):
            _show(one, stores, place, program)
        result = _write(context, outcome, place)
        with writing(context.store.root):
            adopt(context.store, outcome)
    if not outcome.same:
        raise StepError(f"{len(sameness.differing(outcome.found))} outputs are not the same in "
                        "both builds", hint=f"{os.path.relpath(place)} has both files of each")
    return result


def _build_twice(context: Context, stages: Sequence[str], scratch: Path, place: Path) -> Outcome:
    sign = context.recipe.sign
    named = [] if sign is None else [Path(sign.key), Path(sign.cert)]
    reads = [path for path in named if path.is_absolute()]
    variation = vary.variation(scratch, context.environment, reads)
    lock = context.locked()
    assert lock is not None, "it was made before"
    for side in variation.sides:  # both now: somebody may edit the repository meanwhile
        vary.lay(context.root, side, _locks(context))
    plans: list[Plan] = []
    walls: list[float] = []
    for side in variation.sides:
        store = Store(side.store)
        store.prepare()
        sources = [context.plan, *plans]
        plans.append(Plan(guest.stages(context.recipe, lock, side.tree), store, side.place / LOGS))
        seed(sources, store)
        if side.ccache:
            _lend(context.store.root / "ccache", side.store / "ccache")
        vary.give(side)
        started = time.monotonic()
        with log.step(f"reproduce: the {side.name} build, in {side.place}"):
            _build(context, side, stages, place)
        walls.append(round(time.monotonic() - started, 1))
    both = (plans[0], plans[1])
    kernel = plans[0].action("kernel")
    release = kernel.record["release"] if kernel is not None else "RELEASE"
    names = {(item.stage, item.output): item.name.format(release=release) for task in TASKS
             for item in artifacts.of(context.recipe, task)}
    return Outcome(variation, both, sameness.compare(both, stages, names), walls)


def _locks(context: Context) -> list[Path]:
    """The lock, and what it was made with; a committed one is among the recipes."""
    directory = context.directory.parent
    return [path for pattern in ("resolved*.json", "*/lock*.json")
            for path in sorted(directory.glob(pattern))]


def _build(context: Context, side: Side, stages: Sequence[str], place: Path) -> None:
    """Run one build, its lines on our stderr. Its logs stay where it fails."""
    words = [f"{name}={context.values[name]}" for name in ("recipe", "driver")
             if name in context.values]
    script = f'umask {side.umask:03o}; exec "$@"'
    argv = ["setpriv", "--pdeathsig", "TERM", "--", "sh", "-c", script,
            "sh", *side.argv(*words, *(f"_stage:{name}" for name in stages))]
    status = subprocess.run(argv, cwd=side.tree, env=dict(side.environment), check=False).returncode
    if status != 0:
        logs = side.tree / context.directory.relative_to(context.root) / LOGS
        with contextlib.suppress(OSError):
            shutil.copytree(logs, place / f"{LOGS}-{side.name}")
        raise (UserError if status == 1 else StepError)(
            f"the {side.name} build ended with status {status}",
            hint=f"its logs: {os.path.relpath(place / f'{LOGS}-{side.name}')}")


# sources


def seed(sources: Sequence[Plan], target: Store) -> None:
    """Copy what was fetched into an empty store: files by digest, and what network stages made."""
    stages = sources[0].stages.values()
    digests = {deb.sha256 for stage in stages for group in stage.packages.values()
               for deb in group} | {digest for stage in stages
                                    for _url, digest in stage.downloads.values()
                                    if digest is not None}
    fetched = dict(_fetched(sources))
    for plan in sources:
        for digest in sorted(digests):
            if plan.store.has(digest) and not target.has(digest):
                _bring(plan.store, digest, target)
        for action in fetched.values():
            for output in action.outputs.values():
                if plan.store.has(output.blob) and not target.has(output.blob):
                    _bring(plan.store, output.blob, target)
    for digest, action in fetched.items():
        target.commit(digest, action)


def _fetched(sources: Sequence[Plan]) -> Iterator[tuple[str, Action]]:
    """The actions of stages that have the network, whether or not the store has their inputs."""
    for plan in sources:
        stages = {name: stage for name, stage in plan.stages.items() if stage.network}
        for digest, _used, action in plan.store.actions():
            stage = stages.get(action.stage)
            if stage is not None and plan.store.action(digest) is not None \
                    and stage.key(action.key["inputs"]) == action.key:
                yield digest, action


def _bring(source: Store, digest: str, target: Store) -> None:
    """Copy a verified blob to another store."""
    part = target.root / "staging" / f"{digest}.part"
    with writing(target.root), part.open("wb") as sink:
        clone_or_copy(source.sound(digest), sink.fileno())
    target.put(part, digest)


def _lend(source: Path, target: Path) -> None:
    """Copy the compilers' caches; what others change meanwhile may be missing."""
    if source.is_dir():
        with log.step("copy the compilers' caches"), contextlib.suppress(shutil.Error):
            shutil.copytree(source, target, symlinks=True)


def adopt(store: Store, outcome: Outcome) -> None:
    """Keep what the first build made, without ccache, where the second made the same.

    Where the store has it from a build with ccache, the record says from now on that it was not
    needed: a release asks for that.
    """
    plan = outcome.plans[0]
    good = {stage: all(one.same for one in outcome.found if one.stage == stage)
            for stage in {one.stage for one in outcome.found}}
    for stage in (name for name, same in good.items() if same):
        digest, action = plan.digest(stage), plan.action(stage)
        assert digest is not None and action is not None, "it was compared"
        known = store.action(digest)
        if known is not None and not through_ccache(known):
            continue
        for output in action.outputs.values():
            if not store.has(output.blob, output.size):
                _bring(plan.store, output.blob, store)
        store.commit(digest, action)


# what is said


def _stamps(outcome: Outcome) -> None:
    """Look for the days of the builds: two builds of one day cannot tell a stamp of the day."""
    now = time.time()
    words = differences.days(now - sum(outcome.walls), now)
    store = outcome.plans[0].store
    for one in sameness.counted(outcome.found):
        if one.same and one.first is not None:
            found = differences.stamps(store, one.first, words)
            if found:
                outcome.stamped[f"{one.stage} {one.output}"] = sorted(found)


def _say(outcome: Outcome) -> None:
    log.say("what was varied:")
    for name, (first, second) in outcome.variation.varied.items():
        log.say(f"  {name:<12} {first} | {second}")
    for name, why in outcome.variation.same.items():
        log.warn(f"{name}: the same in both: {why}")
    for line in sameness.table(outcome.found):
        log.say(line)
    for where, words in outcome.stamped.items():
        log.warn(f"{where}: has the day of this build in it: {', '.join(words)}")


def _show(one: Compared, stores: tuple[Store, Store], place: Path, program: str | None) -> None:
    """Keep both files of a difference; say what it is where it began, elsewhere that it follows."""
    log.say("")
    log.error(f"{one.stage} {one.output} differs" + (
        "" if one.cause else "; what it is made from differs already"))
    if one.first is None or one.second is None:
        return
    kept = differences.keep(one, stores, place)
    for line in differences.glance(*kept):
        log.say(f"  {line}")
    if not one.cause:
        return
    if program is None:
        log.warn("diffoscope is not installed, which would show this difference: `pip install "
                 "diffoscope` in any environment and diffoscope=PATH, or apt-get install "
                 f"diffoscope; then: diffoscope {' '.join(map(os.path.relpath, kept))}")
        return
    with log.step(f"diffoscope: {one.stage} {one.output}"):
        lines = differences.report(program, *kept, place / f"{one.stage}.{one.output}.diff.txt")
    for line in lines:
        log.say(f"  {line}")


def _write(context: Context, outcome: Outcome, place: Path) -> Path:
    found = outcome.found
    records = [{stage: action.record for stage in plan.stages
                if (action := plan.action(stage)) is not None
                and "compiler_cache" in action.record} for plan in outcome.plans]
    result: dict[str, Any] = {
        "schema": 1, "recipe": context.recipe.name, "driver": context.recipe.driver.version,
        "varied": {name: list(values) for name, values in outcome.variation.varied.items()},
        "not_varied": outcome.variation.same,
        "wall": dict(zip(vary.NAMES, outcome.walls, strict=True)),
        "ccache": {name: {stage: record.get("ccache") for stage, record in each.items()}
                   for name, each in zip(vary.NAMES, records, strict=True)},
        "compared": len(sameness.counted(found)),
        "identical": sum(one.same for one in sameness.counted(found)),
        "share": round(sameness.share(found), 6), "stamped": outcome.stamped,
        "outputs": sameness.as_json(found)}
    path = place / RESULT
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
