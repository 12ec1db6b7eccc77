"""What a build costs: ratios measured in turns against a yardstick, and times from the records."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from katagpu import artifacts, log, parameters, sandbox, vary
from katagpu.errors import StepError
from katagpu.receipt import DEFAULT as TASK
from katagpu.sandbox import Bind
from katagpu.schema import Driver, KernelModule, Recipe
from katagpu.stages import kbuild
from katagpu.stages.api import Build, jobs
from katagpu.store import writing

if TYPE_CHECKING:
    from katagpu.context import Context

TRIVIAL = """DOIT_CONFIG = {"default_tasks": ["nothing"]}


def task_nothing():
    return {"actions": ["true"], "uptodate": [True]}
"""
NO_OP, RESTORE, CHANGE = 1.7, 1.2, 1.15
KERNEL, WARM = 0.6, 0.1
"""Targets: the most that a ratio should be."""
IMAGE_SIZE = 300_000_000
COLD = 40 * 60
"""Seconds of wall that a whole build without any cache should take at most."""
COMPILES = ("kernel", "driver_modules")


def timed(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def in_turns(first: Callable[[], object], second: Callable[[], object], rounds: int,
             ) -> list[tuple[float, float]]:
    """Wall seconds of both, in turns, after one round that does not count."""
    first()
    second()
    return [(timed(first), timed(second)) for _ in range(rounds)]


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The median of the ratios of pairs: a machine that drifts in speed moves both of a pair."""
    return statistics.median(one / other for one, other in pairs)


def ratio_line(what: str, pairs: Sequence[tuple[float, float]], target: float) -> str:
    """One measured ratio with its medians, and whether it keeps its target."""
    one = statistics.median(pair[0] for pair in pairs)
    other = statistics.median(pair[1] for pair in pairs)
    return f"{what}: {_verdict(ratio(pairs), target)}; {one:.3f} s over {other:.3f} s"


def _verdict(found: float, target: float) -> str:
    return f"{found:.2f} ({'within' if found <= target else 'MISSES'} {target})"


def stage_lines(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A table of the wall and CPU seconds of stages, with their sums."""
    yield f"{'stage':<16} {'wall s':>8} {'CPU s':>8}"
    for name, record in records.items():
        yield f"{name:<16} {record.get('wall', 0):8.1f} {record.get('cpu', 0):8.1f}"
    sums = [sum(record.get(field, 0) for record in records.values()) for field in ("wall", "cpu")]
    yield f"{'sum':<16} {sums[0]:8.1f} {sums[1]:8.1f}"


def warmth(name: str, record: Mapping[str, Any]) -> str | None:
    """Why a stage's times are not those of a cold run; None where they are."""
    if name not in COMPILES:
        return None
    if "ccache" not in record:
        return "nothing is known of ccache's part"
    hits, misses = record["ccache"]["hits"], record["ccache"]["misses"]
    if hits:
        return f"{hits} of {hits + misses} compilations came from ccache"
    return "the results of conftest were kept" if record.get("conftest_kept") else None


def cold_lines(records: Mapping[str, Mapping[str, Any]],
               needs: Callable[[str], Sequence[str]]) -> Iterator[str]:
    """What a whole cold build takes, where every stage was made cold; else why that is not known.

    `needs` are the stages that a stage waits for. Stages that do not wait for each other run side
    by side, so the truth is between the longest way and the sum.
    """
    warm = [f"{name} ({why})" for name, record in records.items()
            if (why := warmth(name, record)) is not None]
    if warm:
        yield f"whole cold build_image: not known: {'; '.join(warm)}"
        return
    ends: dict[str, float] = {}
    for name, record in records.items():  # inputs first
        ends[name] = record.get("wall", 0) + max((ends[need] for need in needs(name)), default=0.0)
    total = sum(record.get("wall", 0) for record in records.values())
    yield (f"whole cold build_image: {log.duration(max(ends.values()))} on the longest way, "
           f"{log.duration(total)} one stage after another; at most {log.duration(COLD)}: "
           f"{'within' if total <= COLD else 'MISSES, if nothing ran side by side'}")


def driver_line(record: Mapping[str, Any]) -> str:
    """Where the time of a module build went."""
    times = record.get("times")
    if times is None:
        return "driver modules: nothing is known of where their time went"
    probes = "kept from before" if record.get("conftest_kept") else f"{times['conftest']} s"
    return (f"driver modules, wall: conftest {probes}, compiling {times['compile']} s, all "
            f"{record['wall']} s")


def size_lines(image: int, parts: Mapping[str, int]) -> Iterator[str]:
    """The image's size, and what takes the space in it before it is packed."""
    yield f"image: {log.size(image)} (at most {log.size(IMAGE_SIZE)})"
    total = sum(parts.values()) or 1
    for name, size in sorted(parts.items(), key=lambda item: -item[1]):
        yield f"{log.size(size):>10} {size / total:5.1%}  {name}"
    yield f"{log.size(total):>10}         unpacked"


def change_line(what: str, wall: float, build: Mapping[str, Any], needed: Sequence[str]) -> str:
    """A rebuild's wall seconds over those of the stages that it needs alone, from its record."""
    steps = {step["stage"]: step for step in build["steps"] if "stage" in step}
    made = [name for name, step in steps.items() if not step.get("hit")]
    alone = sum(steps[name]["wall"] for name in needed if name in made)
    if not set(needed) <= set(made):
        there = ", ".join(sorted(set(needed) - set(made)))
        return f"{what}: not measured, the store has it already ({there})"
    return (f"{what}: {_verdict(wall / alone, CHANGE)}; {wall:.1f} s over {alone:.1f} s of "
            f"{', '.join(needed)}; made: {', '.join(made)}")


def cutoff_line(what: str, build: Mapping[str, Any], stage: str) -> str:
    """Whether a change of a stage that changes nothing of its output ran it again, and it alone."""
    made = [step["stage"] for step in build["steps"] if "stage" in step and not step.get("hit")]
    verdict = "and nothing after it" if made == [stage] else f"MISSES: it should be {stage} alone"
    return f"{what}: made {', '.join(made) or 'nothing'}; {verdict}"


def main(context: Context) -> None:
    """Measure, and print. Raises `StepError` when something that is measured fails."""
    print_lines([_no_op(context), _restore(context)])
    records = {name: action.record for stage in ("image", "kata_config", "manifest")
               for name in context.plan.closure(stage)
               if (action := context.plan.action(name)) is not None}
    print_lines(stage_lines(records))
    print_lines(cold_lines(records, context.plan.needs))
    if "driver_modules" in records:
        print_lines([driver_line(records["driver_modules"])])
    image = context.plan.action("image")
    assert image is not None, "build_image ran before"
    sizes = json.loads(context.store.blob(image.outputs["sizes"].blob).read_bytes())
    print_lines(size_lines(image.outputs["image"].size, sizes))
    if parameters.flag(context.values, "all"):
        _changes(context)
        _kernel(context)


def print_lines(lines: Sequence[str] | Iterator[str]) -> None:
    """To stdout, where a measurement can be kept."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _call(argv: Sequence[str | Path], cwd: Path) -> None:
    result = subprocess.run([str(word) for word in argv], cwd=cwd, capture_output=True, text=True)
    if result.returncode != 0:
        raise StepError(f"{argv[0]} ended with {result.returncode}:\n{result.stderr[-2000:]}")


def _asked(context: Context) -> list[str]:
    """The words for what is measured: the recipe and the driver, where one was named."""
    return [f"{name}={value}" for name, value in context.values.items()
            if name in ("recipe", "driver")]


def _no_op(context: Context, rounds: int = 9) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "dodo.py").write_text(TRIVIAL)
        pairs = in_turns(
            lambda: _call([context.root / "doitw", *_asked(context), TASK], context.root),
            lambda: _call([sys.executable, "-m", "doit"], Path(scratch)), rounds)
    return ratio_line("nothing to do, over a trivial doit file", pairs, NO_OP)


def _restore(context: Context, rounds: int = 5) -> str:
    wanted = artifacts.of(context.recipe, TASK)
    with tempfile.TemporaryDirectory(dir=context.root / "out", prefix=".bench-") as scratch:
        ours, copy = Path(scratch) / "ours", Path(scratch) / "copy"

        def restore() -> None:
            artifacts.Outcome(ours, context.plan).restore(wanted)

        def plain() -> None:
            _call(["cp", "-a", "--reflink=auto", ours, copy], Path(scratch))

        def empty() -> None:
            os.sync()
            for directory in (ours, copy):
                shutil.rmtree(directory, ignore_errors=True)

        pairs = []
        for _ in range(rounds + 1):
            empty()
            pairs.append((timed(restore), timed(plain)))
    return ratio_line("restore of all artifacts, over cp of the same files", pairs[1:], RESTORE)


def _changes(context: Context) -> None:
    """Changes of one thing, each in a copy of the repository on the same store."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "copy"
        vary.copy(context.root, root)
        place = root / context.directory.relative_to(context.root)
        place.mkdir(parents=True)
        shutil.copy(context.locks.path, place)
        build = [sys.executable, "-m", "katagpu", *_asked(context)]
        path = root / "recipes" / f"{context.recipe.name}.yaml"
        was = context.recipe.driver.kernel_module
        now = KernelModule.CLOSED if was is KernelModule.OPEN else KernelModule.OPEN
        with (root / "katagpu/stages/source.py").open("a") as stream:
            stream.write(f"\n# bench {time.time()}\n")
        _call([*build, TASK], root)
        print_lines([cutoff_line("a comment added to a stage's code", _record(place),
                                 "kernel_source")])
        unit = next(path for path in sorted((root / "rootfs").rglob("*.service*"))
                    if path.is_file())
        with unit.open("a") as stream:
            stream.write(f"\n# bench {time.time()}\n")
        wall = timed(lambda: _call([*build, TASK], root))
        print_lines([change_line("a file of rootfs/ changed", wall, _record(place),
                                 ["rootfs", "image"])])
        if "driver_modules" not in context.plan.stages:
            print_lines(["kernel_module: not measured, no stage of this guest makes the modules"])
            return
        path.write_text(other_module(context.plain, context.recipe.driver.version, now))
        resolving = timed(lambda: _call([*build, "build_kernel"], root))  # a hit, but for the lock
        wall = timed(lambda: _call([*build, TASK], root))
        print_lines([change_line(f"kernel_module {was} → {now}", wall, _record(place),
                                 ["driver_modules", "image"]),
                     f"  before that, resolving the driver's packages took {resolving:.1f} s"])


def other_module(plain: Recipe, version: str | None, now: KernelModule) -> str:
    """A recipe's text (JSON is YAML) in which the driver of this version has another module."""
    from msgspec import json, structs

    def changed(driver: Driver) -> Driver:
        return structs.replace(driver, kernel_module=now) if driver is chosen else driver

    sections = (plain.driver, *plain.other_drivers)
    chosen = next((driver for driver in sections if driver.version == version), plain.driver)
    first, *others = map(changed, sections)
    return json.encode(structs.replace(plain, driver=first, other_drivers=tuple(others))).decode()


def _record(place: Path) -> Mapping[str, Any]:
    record: dict[str, Any] = json.loads((place / "build-record.json").read_bytes())
    return record


def defconfig(build: Build) -> None:
    """Build the kernel stage's source as its own x86_64_defconfig, as the stage builds ours."""
    work = build.directory("area/build")
    ccache, env = kbuild.environment(build, "kernel")
    binds = [Bind(source=kbuild.tree(build), target=kbuild.SOURCE),
             Bind(source=work.parent, target=kbuild.AREA, writable=True), *ccache]
    for words in (["-C", kbuild.SOURCE, f"O={kbuild.BUILD}", "x86_64_defconfig"],
                  ["bzImage", "modules"]):
        build.enter(["make", kbuild.ARCH, f"-j{jobs()}", *words], kbuild.roots(build), binds=binds,
                    env=env, cwd=kbuild.BUILD)


def _kernel(context: Context) -> None:
    """CPU seconds of the kernel stage: beside the source's defconfig, and with ccache's help."""
    stage = context.plan.stages["kernel"]
    inputs = context.plan.inputs("kernel")

    def spent(name: str, make: Callable[[Build], None], *, ccache: bool) -> float:
        with (writing(context.store.root),
              context.store.staging(f"bench-{name}", sandbox.remove) as scratch):
            build = Build(stage, context.store, inputs, scratch, scratch / "log", ccache=ccache)
            make(build)
            return build.cpu

    cold = spent("cold", stage.make, ccache=False)
    print_lines([cpu_line("kernel, cold, over x86_64_defconfig of its source", cold,
                          spent("defconfig", defconfig, ccache=False), KERNEL)])
    spent("fill", stage.make, ccache=True)
    print_lines([cpu_line("kernel, ccache warm, over cold",
                          spent("warm", stage.make, ccache=True), cold, WARM)])


def cpu_line(what: str, one: float, other: float, target: float) -> str:
    """The ratio of CPU seconds of two builds, each run once, and whether it keeps its target."""
    return f"{what}: {_verdict(one / other, target)}; {one:.0f} over {other:.0f} CPU seconds"
