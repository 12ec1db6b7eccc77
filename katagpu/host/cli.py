"""The command line of `katagpu host` and of `katagpu-host.pyz`."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from katagpu import log
from katagpu.errors import KatagpuError, Status, UserError
from katagpu.host import bind, check, configure, gpus, mig, persist, smoke, snippets, vgpu
from katagpu.host.command import Answer
from katagpu.host.machine import Machine, data

COMMANDS = (gpus, check, bind, persist, configure, snippets, vgpu, mig, smoke)
"""Modules with an `add(commands)` each, which makes one command or more (`command.new`)."""

PROG = "katagpu host"

EPILOG = """\
Every command has --json, --dry-run, --yes and --root; `COMMAND --help` has the rest.
A command that changes something asks first, on a terminal; elsewhere it wants --yes."""


class Parser(argparse.ArgumentParser):
    """A command line. What is wrong with one is an error like any other, with the nearest name."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`."""
        near = self._nearest(message)
        more = f"{self.prog} --help"
        raise UserError(message, hint=f"did you mean {near}? {more}" if near else more)

    def _nearest(self, message: str) -> str | None:
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (\S+)", message)
        if wrong is None:
            return None
        if wrong[1] is not None:
            names = re.findall(r"[\w-]+", message.partition("(choose from")[2])
        else:
            names = sorted(_options(self))
        found = difflib.get_close_matches(wrong[1] or (wrong[2] or "").partition("=")[0], names, 1)
        return found[0] if found else None


def _options(top: argparse.ArgumentParser) -> set[str]:
    """The names of options, those of all commands too: argparse does not say which one it was."""
    found: set[str] = set()
    for action in top._actions:
        found |= {name for name in action.option_strings if name.startswith("--")}
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= _options(inner)
    return found


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(
        prog=prog, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make this host ready to give NVIDIA GPUs to Kata Containers.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add(commands)
    return top


def main(argv: Sequence[str] | None = None, *, prog: str = PROG,
         make: Callable[..., Machine] = Machine) -> int:
    """Run a command line; its exit status (0, 1: the user can mend it, or a check failed).

    `prog` is how the program is called here; messages with commands to paste have it too.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        given = parser(prog).parse_args(words)
    except SystemExit:  # --help
        return int(Status.OK)
    except UserError as wrong:
        return _Speaker(prog, as_json="--json" in words).fail(wrong.what, wrong.hint)
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 has no arrows
    speaker = _Speaker(prog, as_json=given.json)
    try:
        if not given.root.is_dir():
            raise UserError(f"--root {given.root}: there is no such directory")
        machine = make(given.root.resolve(), dry_run=given.dry_run, yes=given.yes,
                       quiet=given.json)
        status = speaker.show(given.run(machine, given), machine)
        sys.stdout.flush()
        return status
    except KatagpuError as error:
        return speaker.fail(error.what, error.hint)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Status.USER)
    except OSError as refusal:
        said = f"{refusal.filename or ''}: {refusal.strerror or refusal}".lstrip(": ")
        return speaker.fail(said, None)
    except KeyboardInterrupt:
        speaker.fail("interrupted", "run the same command again")
        return 128 + signal.SIGINT


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


class _Speaker:
    """Says what a command answered, with the program's name as it is called here."""

    def __init__(self, prog: str, *, as_json: bool) -> None:
        self.prog = prog
        self.as_json = as_json

    def show(self, answer: Answer, machine: Machine) -> int:
        """An answer; the exit status."""
        if self.as_json:
            found = dict(self._named(answer.data))
            if machine.dry_run:
                found["dry_run"] = data(machine.changes)
            elif machine.changes:
                found["changes"] = data(machine.changes)
            sys.stdout.write(json.dumps(found, indent=1) + "\n")
        else:
            for line in answer.lines:
                sys.stdout.write(self._named(line) + "\n")
        return int(Status.OK if answer.ok else Status.USER)

    def fail(self, what: str, hint: str | None) -> int:
        """An error; the exit status."""
        what, hint = self._named(what), self._named(hint)
        if self.as_json:
            sys.stdout.write(json.dumps({"error": what, "hint": hint}, indent=1) + "\n")
        log.error(what if hint is None else f"{what}\n  hint: {hint}")
        return int(Status.USER)

    def _named(self, value: Any) -> Any:
        """A text, or JSON's values, with commands that can be pasted."""
        if isinstance(value, str):
            return value.replace(f"{PROG} ", f"{self.prog} ")
        if isinstance(value, dict):
            return {key: self._named(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._named(inner) for inner in value]
        return value
