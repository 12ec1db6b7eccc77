"""The command line of `katagpu host` and of `katagpu-host.pyz`."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

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


def parser(prog: str) -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
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
    try:
        given = parser(prog).parse_args(argv)
    except SystemExit as ended:  # of argparse, which has 2 for what a user can mend
        return int(Status.USER if ended.code else Status.OK)
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
