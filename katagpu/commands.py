"""doit's command line over this repository's dodo.py, with our words for what it does not know."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from doit.cmd_base import ModuleTaskLoader
from doit.cmd_help import Help
from doit.cmd_list import List
from doit.cmd_run import Run
from doit.cmdparse import CmdParseError
from doit.doit_cmd import DoitMain
from doit.exceptions import InvalidCommand

from katagpu import helptext, log, parameters, tasks
from katagpu.current import values
from katagpu.errors import Status, UserError
from katagpu.reporter import Reporter
from katagpu.several import ALL

REFUSED = 3  # doit's own status for a command line that it does not understand
TAKES_THE_REST = ("why", "diff", "host")
"""Tasks for which all words after them are no tasks."""


def unknown(word: str, known: Iterable[str]) -> int:
    """Say that there is no such task, and the nearest name; the exit status."""
    near = get_close_matches(word, [name for name in known if not name.startswith("_")], n=1)
    said = f"did you mean {near[0]}? " if near else ""
    log.error(f"there is no task {word!r}\n  hint: {said}./doitw list shows all tasks")
    return int(Status.USER)


class Plain:
    """For doit's commands: an option that is none, or has a wrong value, in plain words."""

    name: str
    cmdparser: Any
    task_list: Sequence[Any] = ()

    def parse_execute(self, in_args: list[str]) -> int:
        """Run with these words of the command line."""
        try:
            return int(super().parse_execute(in_args) or 0)  # type: ignore[misc]  # doit's
        except CmdParseError as wrong:
            where, said = self.name, self._plain(str(wrong))
            if option := re.match(r"Error parsing Task: option (\S+)", str(wrong)):
                where = _task_of(option[1], in_args)
                said = f"{where}: {said}"
            log.error(f"{said}\n  hint: ./doitw help {where} shows the options")
            return int(Status.USER)
        except InvalidCommand as wrong:
            word = wrong.not_found or _match(r"'(.*)' is not a task", str(wrong))
            if word is None:
                raise
            return unknown(word, [*(task.name for task in self.task_list), *helptext.COMMANDS])

    def _plain(self, said: str) -> str:
        said = said.partition(" (parsing")[0]
        if of := re.match(r"Error parsing parameter '(\w+)'", said):
            option = re.split("[ ,=]", self.cmdparser[of[1]].help_param())[0]
            if number := re.search(r"invalid literal for int\(\).*?: (.*)", said):
                return f"option {option}: {number[1]} is not a number"
            if choice := re.search(r"Provided ('.*') but available choices are: (.*)\.", said):
                return f"option {option}: {choice[1]} is none of {choice[2]}"
        return re.sub(r"^Error parsing \w+: ", "", said).replace("requires argument",
                                                                "needs a value")


def _match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _task_of(option: str, words: Sequence[str]) -> str:
    """The task after which an option stands."""
    name = "run"
    for word in words:
        if word in parameters.TASKS:
            name = word
        if word.startswith(option):
            break
    return name


class RunTasks(Plain, Run):  # type: ignore[misc]  # doit has no type hints
    """`doit run`, which is also what runs without a command."""

    name = "run"

    def parse_execute(self, in_args: list[str]) -> int:
        """Run with these words of the command line."""
        if values().get("driver") == ALL:  # a guest that fails does not stop the others
            in_args = ["--continue", *in_args]
        status = super().parse_execute(in_args)
        return Reporter.worst or status  # doit's own counts what was not reached as an error

    def execute(self, params: Any, args: list[str]) -> int:
        """Run these tasks, where one of them reads each parameter that is given."""
        refused = _unread(args or [tasks.DEFAULT])
        if refused is not None:
            log.error(str(refused))
            return int(refused.status)
        return int(super().execute(params, args) or 0)


def _unread(words: Sequence[str]) -> UserError | None:
    asked = []
    for word in words:
        if word in parameters.TASKS:
            asked.append(word)
        elif "*" in word or word.startswith("_"):
            return None
        if word in TAKES_THE_REST:
            break
    return parameters.unread(values(), asked) if asked else None


class ListTasks(Plain, List):  # type: ignore[misc]
    """`doit list`."""

    name = "list"


class HelpTasks(Plain, Help):  # type: ignore[misc]
    """`help`: what a task or a command does, and what it takes."""

    name = "help"

    def execute(self, params: Any, args: list[str]) -> int:
        """Show help; status 1 where there is none of that name."""
        if not args:
            sys.stdout.write(helptext.overview())
            return 0
        if args[0] in self.cmds:
            sys.stdout.write(helptext.of_command(args[0]))
            return 0
        return int(super(Help, self).execute(params, args) or 0)

    def _execute(self, pos_args: list[str]) -> int:
        known = {task.name: task for task in self.task_list}
        if pos_args[0] not in known:
            return unknown(pos_args[0], [*known, *helptext.COMMANDS])
        sys.stdout.write(helptext.of_task(known[pos_args[0]]))
        return 0


class Main(DoitMain):  # type: ignore[misc]
    """doit under the name by which it is called here.

    Its other commands are for targets, `file_dep` and a state on disk, of which there is none, and
    `info` for their status; `why` says what runs.
    """

    BIN_NAME = "./doitw"
    DOIT_CMDS = (RunTasks, HelpTasks, ListTasks)


def run(argv: list[str]) -> int:
    """Run doit's command line; its exit status (0, 1: the user can mend it, 2: a step failed)."""
    if {"-h", "--help"} & set(argv):
        words = [word for word in argv if "=" not in word and word[:1] not in ("-", "")]
        argv = ["help", *[word for word in words if word != "help"][:1]]
    if argv and argv[0] in ("list", "help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `./doitw list | head`
    sys.path.insert(0, str(tasks.ROOT))
    import dodo

    status = int(Main(ModuleTaskLoader(dodo), config_filenames=()).run(argv) or 0)
    return int(Status.USER) if status == REFUSED else status
