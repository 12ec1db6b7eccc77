"""What `./doitw help` says: of the command line, and of each task with its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from doit.cmdparse import CmdOption

from katagpu import parameters

OVERVIEW = """\
./doitw [parameters] [tasks]      without a task: build_image

  ./doitw list                    every task in one line
  ./doitw help TASK               what a task does, and its parameters
  ./doitw help run                the options that go before tasks
  ./doitw why TASK                what would run, and why
  ./doitw host --help             the commands for GPU hosts
"""
COMMANDS = {
    "run": ("[options] [tasks]", "make tasks; the word `run` may be left out", (
        ("-a, --always-execute", "also what is up to date"),
        ("-c, --continue", "go on with other tasks after one that failed"),
        ("-n NUMBER", "tasks side by side (3)"),
        ("-s, --single", "these tasks without those that they need"))),
    "list": ("[options] [tasks]", "every task in one line", (
        ("-q, --quiet", "names alone"),
        ("-p, --private", "also the stages, which are hidden tasks"),
        ("--sort=definition", "in the order of dodo.py"))),
    "help": ("[TASK]", "what a task does, and its parameters", ()),
}
"""doit's commands: their words, purpose and options."""
WORDS = {"why": " [TASK or STAGE …]", "diff": " A B", "host": " COMMAND …"}
"""What comes after a task's name."""
VARIABLES = (
    ('EXTRA_PKGS="gcc make"', "more packages while the driver is built"),
    ("KATAGPU_STORE=DIRECTORY", "where the store of built things is"),
    ("KATAGPU_STORE_SIZE=BYTES", "what cache:gc brings it below"),
    ("KATAGPU_JOBS=NUMBER", "compilations side by side, instead of one for each processor"),
    ("KATAGPU_NO_INSTALL=1", "show what the host lacks, and install nothing"),
)
WIDTH = 30


def overview() -> str:
    """The help without a topic."""
    guest = [(f"{one.name}={one.value}", one.what) for one in parameters.GUEST]
    return "\n".join([OVERVIEW, "Parameters that choose the guest:", *_rows(guest), "",
                      "Variables of the environment, in front of ./doitw:",
                      *_rows(VARIABLES), ""])


def of_command(name: str) -> str:
    """The help of one of doit's commands."""
    words, purpose, options = COMMANDS[name]
    return "\n".join([f"{name}  {purpose}", "", f"./doitw {name} {words}", *_rows(options), ""])


def of_task(task: Any) -> str:
    """The help of a task of doit's."""
    if task.name == "host":
        from katagpu.host import cli

        return cli.parser("./doitw host").format_help()
    own = parameters.TASKS.get(task.name, ())
    options = [CmdOption(option) for option in task.params]
    return "\n".join([
        f"{task.name}  {task.doc}", "",
        f"./doitw {'[parameters] ' if own else ''}{task.name}{WORDS.get(task.name, '')}",
        *_rows((f"{one.name}={one.value}", one.what) for one in own),
        *_rows((option.help_param(), option.help) for option in options), ""])


def _rows(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Two columns; what is too wide for the first has a line of its own."""
    for name, what in rows:
        if len(name) > WIDTH:
            yield f"  {name}"
            name = ""
        yield f"  {name:<{WIDTH}}  {what}"
