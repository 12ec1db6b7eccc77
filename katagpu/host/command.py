"""What a command of `katagpu host` is: its options, and what it answers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from katagpu.host.machine import Machine


@dataclass(frozen=True)
class Answer:
    """What a command found or did: lines for people, data for `--json`.

    Not `ok`: what was asked for is not so, and the exit status is 1.
    """

    lines: Sequence[str] = ()
    data: Any = field(default_factory=dict)
    ok: bool = True


Runs = Callable[[Machine, argparse.Namespace], Answer]
Commands = Any  # argparse has no public name for what add_subparsers() gives


def new(commands: Commands, name: str, run: Runs, text: str) -> argparse.ArgumentParser:
    """A command with the options that all have; the caller adds its own.

    `text` is its help: what it does, in one line.
    """
    made: argparse.ArgumentParser = commands.add_parser(name, help=text,
                                                        description=f"{text[0].upper()}{text[1:]}.")
    made.add_argument("--json", action="store_true", help="answer in JSON")
    made.add_argument("--dry-run", action="store_true",
                      help="print the writes and commands, and do none of them")
    made.add_argument("--yes", action="store_true", help="ask nothing")
    made.add_argument("--root", type=Path, default=Path("/"), metavar="PREFIX",
                      help="the root directory of the host (default: /)")
    made.set_defaults(run=run)
    return made


def family(commands: Commands, name: str, text: str) -> Commands:
    """A command whose own word comes next: `vgpu list`. What is given makes those (`new`)."""
    made = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.",
        epilog="Every one has --json, --dry-run, --yes and --root.")
    return made.add_subparsers(dest="verb", metavar="VERB", required=True)


def positive(text: str) -> int:
    """A number of things, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they have to be."""
    width = [max(map(len, column)) for column in zip(head, *rows)]  # noqa: B905 (Python 3.9)
    return ["  ".join(cell.ljust(size) for cell, size in zip(row, width)).rstrip()  # noqa: B905
            for row in (head, *rows)]
