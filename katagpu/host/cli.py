"""The command line of `katagpu host` and of `katagpu-host.pyz`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from katagpu import log
from katagpu.errors import KatagpuError, Status
from katagpu.host import bind, check, configure, gpus, mig, persist, smoke, snippets, vgpu
from katagpu.host.command import Answer
from katagpu.host.machine import Machine, data

COMMANDS = (gpus, check, bind, persist, configure, snippets, vgpu, mig, smoke)
"""Modules with an `add(commands)` each, which makes one command or more (`command.new`)."""

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


def main(argv: Sequence[str] | None = None, *, prog: str = "katagpu host",
         make: Callable[..., Machine] = Machine) -> int:
    """Run a command line; its exit status (0, 1: the user can mend it, or a check failed)."""
    try:
        given = parser(prog).parse_args(argv)
    except SystemExit as ended:  # of argparse, which has 2 for what a user can mend
        return int(Status.USER if ended.code else Status.OK)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if not given.root.is_dir():
            from katagpu.errors import UserError

            raise UserError(f"--root {given.root}: there is no such directory")
        machine = make(given.root.resolve(), dry_run=given.dry_run, yes=given.yes,
                       quiet=given.json)
        return _show(given.run(machine, given), machine, as_json=given.json)
    except KatagpuError as error:
        return _failed(error.what, error.hint, as_json=given.json)
    except OSError as refusal:
        said = f"{refusal.filename or ''}: {refusal.strerror or refusal}".lstrip(": ")
        return _failed(said, None, as_json=given.json)
    except KeyboardInterrupt:
        _failed("interrupted", "run the same command again", as_json=given.json)
        return 128 + signal.SIGINT


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _show(answer: Answer, machine: Machine, *, as_json: bool) -> int:
    if as_json:
        found = dict(answer.data) if isinstance(answer.data, dict) else {"found": answer.data}
        if machine.dry_run:
            found["dry_run"] = data(machine.changes)
        elif machine.changes:
            found["changes"] = data(machine.changes)
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        for line in answer.lines:
            sys.stdout.write(line + "\n")
    return int(Status.OK if answer.ok else Status.USER)


def _failed(what: str, hint: str | None, *, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps({"error": what, "hint": hint}, indent=1) + "\n")
    log.error(what if hint is None else f"{what}\n  hint: {hint}")
    return int(Status.USER)
