"""What doit says: errors as a user reads them, and nothing about tasks that had nothing to do."""

from __future__ import annotations

from typing import Any

from doit.reporter import ConsoleReporter

from katagpu import log
from katagpu.errors import KatagpuError


class Reporter(ConsoleReporter):  # type: ignore[misc]  # doit has no type hints
    """Steps report themselves; this one shows failures, without tracebacks for known errors."""

    desc = "katagpu's own"

    def __init__(self, outstream: Any, options: Any) -> None:
        super().__init__(outstream, options)
        self._said: set[str] = set()

    def execute_task(self, task: Any) -> None:
        """Steps say when they start."""

    def skip_uptodate(self, task: Any) -> None:
        """One line for what was asked for and is there."""
        if not task.name.startswith("_") and task.meta:
            log.say(task.meta["ready"]())

    def add_failure(self, task: Any, fail: Any) -> None:
        """The error's own words; a traceback only where it is a fault of ours."""
        name = task.name.lstrip("_").removeprefix("stage:")
        cause = getattr(fail, "cause", None)
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
        """Errors were shown as they came."""
        for message in self.runtime_errors:
            log.error(str(message))
