"""Run the installer, and die by SIGKILL just before its Nth change of a file system.

Python's audit events tell of each change; where there are fewer than N, it ends as usual.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from katagpu.release import installer

CHANGES = ("os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "os.chmod")


def run(number: int, *words: str) -> int:
    """The exit status of the installer with these words, -SIGKILL where it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            sys.addaudithook(_hook(number))
            status = installer.main(words)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _hook(left: int) -> Any:
    def hook(event: str, words: tuple[Any, ...]) -> None:
        nonlocal left
        written = event == "open" and isinstance(words[2], int) \
            and words[2] & (os.O_WRONLY | os.O_RDWR)
        if written or event in CHANGES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook
