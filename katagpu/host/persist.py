"""`host persist`."""

from __future__ import annotations

import argparse

from katagpu.host import command
from katagpu.host.command import Answer, Commands
from katagpu.host.machine import Machine


def add(commands: Commands) -> None:
    """Its command line."""
    command.new(commands, "persist", run, "not yet")


def run(machine: Machine, given: argparse.Namespace) -> Answer:
    """Run it."""
    return Answer([])
