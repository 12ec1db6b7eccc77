"""What doit says: errors as a user reads them, and nothing about tasks that had nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, ClassVar

from doit.exceptions import UnmetDependency
from doit.reporter import ConsoleReporter

from katagpu import log
from katagpu.errors import KatagpuError, Status


class Ended(StrEnum):
    """How a task ended, by the words of a summary."""

    BUILT = "built"
    THERE = "up to date"
    FAILED = "failed"


class Reporter(ConsoleReporter):  # type: ignore[misc]  # doit has no type hints
    """Steps report themselves; this one shows failures, without tracebacks for known errors.

    A selected task may have a summary (`meta`), which gets at the end how each task ended. `worst`
    is the highest status of all failures.
    """

    desc = "katagpu's own"
    worst: ClassVar[int] = 0

    def __init__(self, outstream: Any, options: Any) -> None:
        super().__init__(outstream, options)
        self._said: set[str] = set()
        self._ended: dict[str, Ended] = {}
        self._summaries: list[Callable[[Mapping[str, Ended]], None]] = []

    def initialize(self, tasks: Any, selected_tasks: Any) -> None:
        """Remember who wants a summary."""
        wanted = (tasks[name] for name in selected_tasks)
        self._summaries = [task.meta["summary"] for task in wanted
                           if task.meta and "summary" in task.meta]

    def execute_task(self, task: Any) -> None:
        """Steps say when they start."""

    def add_success(self, task: Any) -> None:
        """For the summaries."""
        self._ended[task.name] = Ended.BUILT

    def skip_uptodate(self, task: Any) -> None:
        """One line for what was asked for and is there."""
        self._ended[task.name] = Ended.THERE
        if not task.name.startswith("_") and task.meta and "ready" in task.meta:
            log.say(task.meta["ready"]())

    def add_failure(self, task: Any, fail: Any) -> None:
        """The error's own words; a traceback only where it is a fault of ours."""
        self._ended[task.name] = Ended.FAILED
        if isinstance(fail, UnmetDependency):  # what it depends on was said
            return
        name = task.name.lstrip("_").removeprefix("stage:")
        cause = getattr(fail, "cause", None)
        status = cause.status if isinstance(cause, KatagpuError) else Status.STEP
        Reporter.worst = max(Reporter.worst, status)
        if isinstance(cause, KatagpuError):
            if str(cause) not in self._said:  # a full disk stops all that runs side by side
                log.error(f"{name}: {cause}")
            self._said.add(str(cause))
        elif fail.traceback:
            log.error(f"{name}: a fault in katagpu, please report it with these lines:\n"
                      + "".join(fail.traceback))
        elif fail.report:
            log.error(f"{name}: {fail.get_msg().strip()}")

    def complete_run(self) -> None:
        """The summaries; errors were shown as they came."""
        for message in self.runtime_errors:
            log.error(str(message))
        for summary in self._summaries:
            summary(self._ended)
