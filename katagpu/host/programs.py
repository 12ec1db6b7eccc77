"""Programs on a host: in English, in a process group of their own, and never longer than asked."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from katagpu.errors import UserError
from katagpu.host.changes import below

# Of the user's: proxies, and where containerd and what crictl talks to are.
PASSED = re.compile(r"\w+_(proxy|PROXY)|CONTAINERD_\w+|CONTAINER_RUNTIME_ENDPOINT|"
                    r"IMAGE_SERVICE_ENDPOINT|CRI_CONFIG_FILE")
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Missing(UserError):
    """A program that is not on this host."""


class TooLong(UserError):
    """A program that did not end in its time; it and its group were killed."""


@dataclass(frozen=True)
class Result:
    """How a program ended, and what it said."""

    argv: tuple[str, ...]
    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The last lines of what it said, errors first, for a message."""
        text = (self.err.strip() or self.out.strip()).splitlines()
        return "\n    ".join(text[-8:])


class Programs:
    """Starts programs of the host below `root`: by chroot(8) where that is another root.

    `search` replaces the host's PATH, and chroot with it: tests put programs of their own there.
    Of `environment` (default: the user's) they get what `PASSED` names.
    """

    def __init__(self, root: str = "/", search: str | None = None,
                 environment: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.search = search
        given = os.environ if environment is None else environment
        self.environment = {name: value for name, value in given.items()
                            if PASSED.fullmatch(name)}

    def find(self, name: str) -> str | None:
        """The program's path on the host."""
        if self.search is not None:
            return shutil.which(name, path=self.search)
        for directory in SEARCH.split(":"):
            if os.access(below(self.root, f"{directory}/{name}"), os.X_OK):
                return f"{directory}/{name}"
        return None

    def run(self, argv: Sequence[str], timeout: float, stdin: str = "") -> Result:
        """Run a program to its end, or to the end of its time (seconds).

        Raises `Missing` and `TooLong`; any status is a result.
        """
        path = self.find(argv[0]) if "/" not in argv[0] else (
            argv[0] if self.search is None else below(self.root, argv[0]))
        if path is None:
            raise Missing(f"there is no {argv[0]} on this host")
        words = [path, *argv[1:]]
        if self.root != "/" and self.search is None:
            words = ["chroot", self.root, *words]
        environment = {**self.environment, "PATH": self.search or SEARCH, "LC_ALL": "C",
                       "LANG": "C", "HOME": "/"}
        if self.search is not None:
            environment["PATH"] = f"{self.search}:{SEARCH}"
            environment["KATAGPU_HOST_ROOT"] = self.root
        try:
            child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, env=environment, cwd="/",
                                     start_new_session=True)
        except OSError as refusal:
            raise Missing(f"{argv[0]} cannot be started: {refusal.strerror or refusal}") from None
        try:
            out, err = child.communicate(stdin.encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill(child)
            raise TooLong(f"`{' '.join(argv)}` did not end within {timeout:.0f} s, and was killed",
                          hint="a GPU that does not answer makes it hang: dmesg | grep -i -e nvrm "
                               "-e vfio says why") from None
        except BaseException:
            _kill(child)
            raise
        return Result(tuple(argv), child.returncode, out.decode(errors="replace"),
                      err.decode(errors="replace"))


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a program with its group. One that sleeps in the kernel is left to it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(2)
