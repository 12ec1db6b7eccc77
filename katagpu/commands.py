"""doit's command line over this repository's dodo.py, with our words for a task that is unknown."""

from __future__ import annotations

import signal
import sys
from typing import Any

from doit.cmd_base import ModuleTaskLoader
from doit.cmd_help import Help
from doit.cmd_list import List
from doit.cmd_run import Run
from doit.cmdparse import CmdParseError
from doit.doit_cmd import DoitMain
from doit.exceptions import InvalidCommand

from katagpu import log, tasks
from katagpu.current import values
from katagpu.errors import Status
from katagpu.reporter import Reporter
from katagpu.several import ALL

REFUSED = 3  # doit's own status for a command line that it does not understand


class RunTasks(Run):  # type: ignore[misc]  # doit has no type hints
    """`doit run`, which is also what runs without a command."""

    name = "run"

    def parse_execute(self, in_args: Any) -> int:
        """Run with these words of the command line."""
        if values().get("driver") == ALL:  # a guest that fails does not stop the others
            in_args = ["--continue", *in_args]
        try:
            status = int(super().parse_execute(in_args) or 0)
            return Reporter.worst or status  # doit's own counts what was not reached as an error
        except InvalidCommand as unknown:
            if unknown.not_found is None:
                raise
            return self._unknown(str(unknown.not_found))
        except CmdParseError as wrong:
            said = str(wrong).removeprefix("Error parsing Command: ").partition(" (parsing")[0]
            log.error(f"{said}\n  hint: ./doitw help run shows the options")
            return int(Status.USER)

    def _unknown(self, word: str) -> int:
        from difflib import get_close_matches

        names = [task.name for task in self.task_list if not task.name.startswith("_")]
        near = get_close_matches(word, names, n=1)
        said = f"did you mean {near[0]}? " if near else ""
        log.error(f"there is no task {word!r}\n  hint: {said}./doitw list shows all tasks")
        return int(Status.USER)


class Main(DoitMain):  # type: ignore[misc]
    """doit under the name by which it is called here.

    Its other commands are for targets, `file_dep` and a state on disk, of which there is none, and
    `info` for their status; `why` says what runs.
    """

    BIN_NAME = "./doitw"
    DOIT_CMDS = (RunTasks, Help, List)


def run(argv: list[str]) -> int:
    """Run doit's command line; its exit status (0, 1: the user can mend it, 2: a step failed)."""
    if argv and argv[0] in (List.get_name(), Help.get_name()):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `./doitw list | head`
    sys.path.insert(0, str(tasks.ROOT))
    import dodo

    status = int(Main(ModuleTaskLoader(dodo), config_filenames=()).run(argv) or 0)
    return int(Status.USER) if status == REFUSED else status
