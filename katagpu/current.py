"""The one set of guests of this process, from doit's command line."""

from __future__ import annotations

import functools
import sys

from katagpu import log
from katagpu.context import Context
from katagpu.errors import KatagpuError
from katagpu.keys import PACKAGE
from katagpu.several import Guests


def values() -> dict[str, str]:
    """The parameters of the command line."""
    from doit import doit_cmd

    return {name: str(value) for name, value in (doit_cmd._CMDLINE_VARS or {}).items()}


@functools.cache
def guests() -> Guests:
    """The guests. Ends the process with a plain error where the parameters are wrong."""
    try:
        made = Guests(PACKAGE.parent, values())
        for context in made.contexts:
            context.sketch()
    except KatagpuError as error:
        log.error(str(error))
        sys.exit(int(error.status))
    return made


def context() -> Context:
    """The first guest, which is the recipe's own."""
    return guests().contexts[0]
