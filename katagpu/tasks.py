"""From the plan to doit's tasks: every task is `ensure`, and the store answers what is up to date.

doit orders, selects and reports. It keeps no state of its own: `file_dep` and its database would
miss content whose times are clamped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from katagpu import log
from katagpu.errors import KatagpuError, Status

Task = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent

# Public tasks and the stages that they make.
STAGES: Mapping[str, tuple[str, ...]] = {
    "build_kernel": ("kernel",),
    "build_headers": ("kernel",),
    "build_rootfs": ("rootfs",),
    "install_driver": ("driver_modules", "driver_user"),
    "install_toolkit": ("toolkit",),
    "build_initrd": ("initrd",),
    "build_image": ("image", "kata_config", "manifest"),
}


def config() -> dict[str, Any]:
    """doit's settings: no state on disk, stages side by side in threads, our reporter."""
    from katagpu.reporter import Reporter

    return {"dep_file": ":memory:", "backend": "sqlite3", "reporter": Reporter, "verbosity": 2,
            "default_tasks": ["build_image"], "num_process": 3, "par_type": "thread"}


def _context() -> Any:
    from katagpu.current import context

    return context()


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


def plain(function: Callable[..., None], doc: str, **more: Any) -> Task:
    """A task that always runs."""
    return {"actions": [work(function)], "doc": doc, "io": {"capture": False}, "uptodate": [False],
            **more}


def stage_tasks() -> Iterator[Task]:
    """The hidden tasks, one for each stage, and the lock that all of them need."""
    context = _context()
    yield {"basename": "_lock", "actions": [work(context.make_lock)], "io": {"capture": False},
           "task_dep": ["_host"], "uptodate": [lambda: context.locked() is not None]}
    yield {"basename": "_host", "actions": [work(_host)], "io": {"capture": False}}
    for name, stage in context.sketch().items():
        needs = dict.fromkeys(f"_stage:{ref.stage}" for ref in stage.inputs.values())
        yield {"basename": "_stage", "name": name, "doc": stage.title,
               "actions": [work(lambda name=name: context.ensure(name))],
               "io": {"capture": False}, "task_dep": ["_lock", *needs],
               "uptodate": [lambda name=name: context.plan.action(name) is not None]}


def _host() -> None:
    from katagpu import hostsetup, sandbox

    hostsetup.ensure_host()
    context = _context()
    if context.locked() is None or not _everything_made(context):
        sandbox.probe()


def _everything_made(context: Any) -> bool:
    return context.plan.action("manifest") is not None


def build(name: str, doc: str) -> Task:
    """A public build task: makes its stages, and restores its artifacts into out/."""
    context = _context()
    known = context.sketch()
    wanted = [stage for stage in STAGES[name] if stage in known]

    def finish() -> None:
        from katagpu import artifacts

        context.restore(name)
        context.finish(name)
        context.outcome.announce(artifacts.of(context.recipe, name))
        if name == "build_image":
            context.usage()

    def ready() -> str:
        return f"{name}: up to date in {os.path.relpath(context.directory)}/"

    def up_to_date() -> bool:
        from katagpu import artifacts

        return bool(context.outcome.complete(artifacts.of(context.recipe, name)))

    return {"actions": [work(finish)], "doc": doc, "io": {"capture": False},
            "task_dep": ["_lock", *(f"_stage:{stage}" for stage in wanted)],
            "uptodate": [up_to_date], "meta": {"ready": ready}}


def setup() -> Task:
    """The host's packages."""
    from katagpu import hostsetup

    return plain(hostsetup.setup, "install the few packages that the build host needs")


def lock() -> Task:
    """Resolve anew."""
    return plain(_context().make_lock, "resolve the recipe's packages anew", task_dep=["_host"])


def why() -> Task:
    """Explain hits and misses."""

    def explain(names: list[str]) -> None:
        context = _context()
        for name in names or ["build_image"]:
            for line in context.explain(name, STAGES):
                sys.stdout.write(line + "\n")

    return plain(explain, "say for each stage of a task: hit, or miss and what differs",
                 pos_arg="names")


def cache() -> Iterator[Task]:
    """The store's own tasks."""
    from katagpu import storetasks

    yield {"basename": "cache", "name": None, "doc": "care of the store: list, verify, gc"}
    for name, function, doc in storetasks.TASKS:
        yield {**plain(lambda function=function: function(_context()), doc),
               "name": name}


def program(*argv: str, doc: str) -> Task:
    """A task that runs a program of the environment on the repository."""

    def run() -> None:
        import subprocess

        from katagpu.errors import StepError

        for line in argv:
            words = [str(Path(sys.executable).parent / line.split()[0]), *line.split()[1:]]
            if subprocess.run(words, cwd=ROOT, check=False).returncode != 0:
                raise StepError(f"{line} found something")

    return plain(run, doc)


def test() -> Iterator[Task]:
    """The fast suite, then the default build and its checks; with all=1 everything."""
    everything = _context().values.get("all", "0") != "0"

    def run() -> None:
        import subprocess

        from katagpu.errors import StepError

        log.say("> the test suite" + (" with the long tests" if everything else ""))
        argv = [sys.executable, "-m", "pytest", "-q", "tests"]
        if not everything:
            argv += ["-m", "not slow"]
        if subprocess.run(argv, cwd=ROOT, check=False).returncode != 0:
            raise StepError("the test suite failed")

    yield {**plain(run, "the test suite, then the default build and its checks (all=1: long ones)"),
           "basename": "test", "task_dep": ["build_image"]}
