"""The one context of this process, from doit's command line."""

from __future__ import annotations

import functools
import sys

from katagpu import log
from katagpu.context import Context
from katagpu.errors import KatagpuError
from katagpu.keys import PACKAGE


@functools.cache
def context() -> Context:
    """The context. Ends the process with a plain error where the parameters are wrong."""
    from doit import doit_cmd

    values = {name: str(value) for name, value in (doit_cmd._CMDLINE_VARS or {}).items()}
    try:
        made = Context(PACKAGE.parent, values)
        made.sketch()
    except KatagpuError as error:
        log.error(str(error))
        sys.exit(int(error.status))
    return made
