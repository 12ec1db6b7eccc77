"""The guest with a shell on this terminal, for a person to look around."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import ExitStack

from katagpu import log
from katagpu.boot import runner, table, vm
from katagpu.boot.channel import ENVIRONMENT, Channel
from katagpu.errors import UserError
from katagpu.run import scratch


def must_be_one() -> None:
    """Raises `UserError` where stdin and stdout are no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError("stdin and stdout have to be a terminal",
                        hint="./doitw boot_check asks the guest without one")


def shell(guest: runner.Guest, setting: runner.Setting) -> None:
    """Boot the machine with a GPU in it; it ends with the shell.

    Raises `StepError` for a guest that does not come up.
    """
    with scratch() as place, ExitStack() as stack:
        log.say(f"boot_shell: {setting.accel.why}")
        found, running, _link, _server = stack.enter_context(runner.booted(
            guest, setting, table.COLD, place, terminal=True))
        channel = Channel(found.channel, running.check, slow=setting.slow)
        stack.callback(channel.close)
        channel.wait_ready(runner.START)
        size = os.get_terminal_size()
        log.say(f"boot_shell: `exit` ends the machine; its log: {found.log}")
        with _raw():
            channel.terminal(vm.TERMINAL, size.lines, size.columns, {
                **ENVIRONMENT, "HOME": "/root", "TERM": os.environ.get("TERM", "vt100")})


@contextlib.contextmanager
def _raw() -> Iterator[None]:
    """Every key goes to the guest, Ctrl-C too."""
    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setraw(number)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
