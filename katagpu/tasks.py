"""From the plan to doit's tasks: every task is `ensure`, and the store answers what is up to date.

doit orders, selects and reports. It keeps no state of its own: `file_dep` and its database would
miss content whose times are clamped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from katagpu import log, parameters
from katagpu.errors import KatagpuError, Status, StepError, UserError
from katagpu.receipt import DEFAULT as DEFAULT
from katagpu.run import die_cleanly_on_signals

if TYPE_CHECKING:
    from katagpu.context import Context
    from katagpu.several import Guests

Task = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent

# Public tasks and the stages that they make.
STAGES: Mapping[str, tuple[str, ...]] = {
    "build_kernel": ("kernel",),
    "build_headers": ("kernel",),
    "build_rootfs": ("rootfs",),
    "install_driver": ("driver_modules", "driver_user"),
    "install_toolkit": ("toolkit",),
    "build_initrd": ("initrd", "initrd_config"),
    "build_image": ("image", "kata_config", "manifest"),
}


def config() -> dict[str, Any]:
    """doit's settings: no state on disk, stages side by side in threads, our reporter."""
    from katagpu.reporter import Reporter

    die_cleanly_on_signals()
    os.umask(0o022)  # stages write files in this process too, whose modes go into layers
    return {"dep_file": ":memory:", "backend": "sqlite3", "reporter": Reporter, "verbosity": 2,
            "default_tasks": [DEFAULT], "num_process": 3, "par_type": "thread",
            "subtasks": True}  # `doit list` shows cache:list and its like too


def _context() -> Context:
    from katagpu.current import context

    return context()


def _guests() -> Guests:
    from katagpu.current import guests

    return guests()


def work(function: Callable[..., None]) -> Callable[..., Any]:
    """An action: our errors become doit's, by exit status (1: the user can mend it, 2: a step)."""

    def action(**arguments: Any) -> Any:
        from doit.exceptions import TaskError, TaskFailed

        try:
            function(**arguments)
        except KatagpuError as error:
            kind = TaskFailed if error.status is Status.USER else TaskError
            failure = kind(str(error))
            failure.cause = error
            return failure
        return True

    return action


def answer(function: Callable[[], bool]) -> Callable[[], bool]:
    """An `uptodate` question: one that cannot be answered is a no, and the action says why."""

    def ask() -> bool:
        try:
            return function()
        except KatagpuError:
            return False

    return ask


def plain(function: Callable[..., None], doc: str, **more: Any) -> Task:
    """A task that always runs."""
    return {"actions": [work(function)], "doc": doc, "io": {"capture": False}, "uptodate": [False],
            **more}


def _hidden(name: str, action: Callable[..., None], ready: Callable[[], bool] | None,
            *needs: str, **more: Any) -> Task:
    """A hidden task `_stage:NAME`; `ready` says that there is nothing to do."""
    return {"basename": "_stage", "name": name, "actions": [work(action)],
            "io": {"capture": False}, "task_dep": list(needs),
            "uptodate": [answer(ready) if ready else False], **more}


def stage_tasks() -> Iterator[Task]:
    """The hidden tasks: the lock, one for each stage, and with driver=all each guest's results."""
    guests = _guests()
    yield {"basename": "_host", "actions": [work(_host)], "io": {"capture": False}}
    yield {"basename": "_lock", "actions": [work(partial(_lock, guests))], "task_dep": ["_host"],
           "io": {"capture": False}, "uptodate": [answer(guests.locked)]}
    for name, stage in guests.stages().items():
        lock = "_lock"
        if guests.all and len(stage.users) == 1:
            lock = f"_stage:{guests.label('lock', stage.users[0])}"
        yield _hidden(name, stage.ensure, stage.made, lock,
                      *(f"_stage:{need}" for need in stage.needs), doc=stage.title)
    for context in guests.contexts if guests.all else []:
        yield _hidden(guests.label("lock", context), partial(_refuse, context), None, "_lock")
        for name in STAGES:
            task = _guest(guests, context, name)
            yield _hidden(guests.label(name, context), *task["work"], *task["task_dep"])


def _lock(guests: Guests) -> None:
    guests.lock(anew=False)  # a guest that has none says so in its own tasks


def _refuse(context: Context) -> None:
    if context.refused is not None:
        raise context.refused


def _raise(error: KatagpuError) -> None:
    raise error


def _host() -> None:
    """What a build needs of the host; a build with nothing to do opens no sandbox."""
    from katagpu import hostsetup, sandbox

    hostsetup.ensure_host()
    for context in _guests().contexts:
        if not answer(partial(_is_built, context))():
            context.store.prepare()
            sandbox.probe()
            return


def _is_built(context: Context) -> bool:
    return context.locked() is not None and context.made("manifest")


def _guest(guests: Guests, context: Context, name: str) -> dict[str, Any]:
    """What a public build task is for one guest: `work` is its action and its question.

    Whatever the recipe cannot have is refused when it is asked for, before anything is made.
    """
    from katagpu import artifacts

    refusal = artifacts.refusal(context.recipe, name)
    if refusal is not None:
        return {"work": (partial(_raise, refusal), lambda: False), "task_dep": []}
    labels = guests.labels(context)
    wanted = [stage for stage in STAGES[name] if stage in labels]

    def ready() -> str:
        return f"{name}: up to date in {os.path.relpath(context.directory)}/"

    def finish() -> None:
        context.restore(name)
        context.finish(name, wanted)
        if not guests.all:
            context.outcome.announce(context.artifacts(name))
            if name == DEFAULT:
                context.usage()
        context.sign(name, ready())

    def up_to_date() -> bool:
        complete = context.complete(name)
        if complete:
            context.finish(name, wanted)
            context.sign(name, ready())
        return complete

    own = f"_stage:{guests.label('lock', context)}" if guests.all else "_lock"
    return {"work": (finish, up_to_date), "meta": {"ready": ready},
            "task_dep": [own, *(f"_stage:{labels[stage]}" for stage in wanted)]}


def build(name: str, doc: str) -> Task:
    """A public build task: makes its stages, and restores its artifacts into out/."""
    from katagpu.reporter import Ended

    guests = _guests()
    common = {"doc": doc, "io": {"capture": False}}
    if not guests.all:
        task = _guest(guests, guests.contexts[0], name)
        finish, up_to_date = task.pop("work")
        return {**common, **task, "actions": [work(finish)], "uptodate": [answer(up_to_date)]}
    hidden = {f"_stage:{guests.label(name, context)}": context for context in guests.contexts}

    def summary(results: Mapping[str, Ended]) -> None:
        ended = {id(context): results.get(task, Ended.FAILED) for task, context in hidden.items()}
        for line in guests.summary(name, lambda context: ended[id(context)]):
            log.say(line)
        built = [context for context in guests.contexts if ended[id(context)] is Ended.BUILT]
        if built and name == DEFAULT:
            built[0].usage()

    return {**common, "actions": [work(partial(guests.sign, name))], "uptodate": [False],
            "task_dep": list(hidden), "meta": {"summary": summary}}


def boot_check() -> Task:
    """Boot what was built, and check it."""

    def check() -> None:
        for context in _guests().contexts:
            for artifact in context.booting.check():
                path = context.directory / artifact.name
                if path.suffix == ".txt":
                    log.say(path.read_text().rstrip())
                    log.say(f"boot_check: passed; {os.path.relpath(path.with_suffix('.xml'))}")

    return plain(check, "boot the guest in a virtual machine with an emulated GPU, and check it",
                 task_dep=[DEFAULT])


def boot_shell() -> Task:
    """Boot what was built, for a person."""

    return of_one("boot_shell", lambda context: context.booting.shell(),
                  "boot the guest as boot_check does, with a shell on this terminal", DEFAULT)


def of_one(name: str, function: Callable[[Context], None], doc: str, *needs: str) -> Task:
    """A task of one guest. With driver=all it only refuses: nothing is built for that."""

    def refuse() -> None:
        first = f"recipe={_context().recipe.name} " if "recipe" in _context().values else ""
        raise UserError("this is done with one guest, and driver=all are several",
                        hint=f"./doitw {first}driver=VERSION {name}")

    if _guests().all:
        return plain(refuse, doc)
    return plain(lambda: function(_context()), doc, task_dep=list(needs))


def setup() -> Task:
    """The host's packages."""
    from katagpu import hostsetup

    return plain(hostsetup.setup, "install the few packages that the build host needs")


def host() -> Task:
    """A name in `list` and `help`: the command itself needs no tasks (`__main__`)."""

    def refuse(words: list[str]) -> None:
        raise UserError("its commands are no tasks, and take no parameters",
                        hint=f"./doitw host {' '.join(words) or '--help'}")

    return plain(refuse, "what makes a host's GPUs ready for Kata: ./doitw host --help",
                 pos_arg="words")


def why() -> Task:
    """Explain hits and misses."""

    def explain(names: list[str]) -> None:
        guests = _guests()
        said = set()
        for context in guests.contexts:
            labels = guests.labels(context)
            for name in names or [DEFAULT]:
                for line in context.explain(name, STAGES):
                    stage, colon, state = line.partition(":")
                    line = f"{labels.get(stage, stage)}{colon}{state}"
                    if line not in said or not guests.all:
                        sys.stdout.write(line + "\n")
                    said.add(line)

    return plain(explain, "say for each stage of a task: hit, or miss and what differs",
                 pos_arg="names")


def diff() -> Task:
    """Compare two builds."""

    def show(places: list[str]) -> None:
        from katagpu import compare, compare_text, finished

        if len(places) != 2:
            there = ", ".join(finished.builds(ROOT)) or "none; ./doitw build_image makes one"
            raise UserError(f"two builds are compared, and here are {len(places)}: "
                            "./doitw diff A B", hint=f"builds below out/: {there}")
        context = _context()
        builds = [finished.read(*finished.find(place, ROOT, context.recipe.name))
                  for place in places]
        found = compare.compare(*builds)
        if parameters.flag(context.values, "json"):
            import json

            sys.stdout.write(json.dumps(compare.as_json(found), indent=1) + "\n")
            return
        everything = parameters.flag(context.values, "all")
        for line in compare_text.text(found, everything=everything):
            sys.stdout.write(line + "\n")

    return plain(show, "say what differs between two builds: diff A B (all=1: all; json=1)",
                 pos_arg="places")


def cache() -> Iterator[Task]:
    """The store's own tasks."""
    from katagpu import storetasks

    for name, function, doc in storetasks.TASKS:
        yield {**plain(lambda function=function: function(_context()), doc),
               "basename": f"cache:{name}"}
    yield {"basename": "cache", "actions": None, "task_dep": ["cache:list"],
           "doc": "the same as cache:list; what changes the store has to be asked for"}


def bench() -> Task:
    """Measure."""

    def measure(context: Context) -> None:
        from katagpu import bench

        bench.main(context)

    return of_one("bench", measure,
                  "measure: no-op, restore, stages, image size (all=1: changes, kernel)", DEFAULT)


def program(*argv: str, doc: str) -> Task:
    """A task that runs programs of the environment on the repository."""

    def run() -> None:
        for line in argv:
            call(line.split(), f"{line} found something")

    return plain(run, doc)


def call(words: list[str], failed: str, **environment: str) -> None:
    """Run a program of the environment, its output on ours, with more of an environment."""
    import subprocess

    # The signal reaches it when this task's thread ends, however: nothing builds on alone.
    argv = ["setpriv", "--pdeathsig", "TERM", "--", str(Path(sys.executable).parent / words[0]),
            *words[1:]]
    status = subprocess.run(argv, cwd=ROOT, check=False,
                            env={**os.environ, **environment}).returncode
    if status != 0:
        raise (UserError if status == Status.USER else StepError)(failed)
