"""What can be changed on a host, each as a value that can be shown, done and undone."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_LINKS = 40  # as the kernel (path_resolution(7)); more are a circle


class Change(ABC):
    """A change of the host."""

    @abstractmethod
    def lines(self) -> list[str]:
        """What is printed in a dry run."""

    @abstractmethod
    def data(self) -> dict[str, Any]:
        """The same for `--json`."""


@dataclass(frozen=True)
class Write(Change):
    """Write text to an attribute of sysfs, in one write(2)."""

    path: str
    text: str

    def lines(self) -> list[str]:
        """As it can be pasted into a root shell."""
        words = shlex.quote(self.text.strip()) if self.text.strip() else ""
        return [f"echo {words} > {shlex.quote(self.path)}".replace("  ", " ")]

    def data(self) -> dict[str, Any]:
        """For `--json`."""
        return {"write": self.path, "text": self.text}


@dataclass(frozen=True)
class Place(Change):
    """Write a file, in one step; directories above it are made."""

    path: str
    text: str
    mode: int = 0o644

    def lines(self) -> list[str]:
        """Its name, and what will be in it."""
        return [f"write the file {self.path}:", *(f"    {line}".rstrip()
                                                   for line in self.text.splitlines())]

    def data(self) -> dict[str, Any]:
        """For `--json`."""
        return {"file": self.path, "text": self.text, "mode": f"{self.mode:04o}"}


@dataclass(frozen=True)
class Remove(Change):
    """Remove a file that may not be there."""

    path: str

    def lines(self) -> list[str]:
        """As it can be pasted into a root shell."""
        return [f"rm -f {shlex.quote(self.path)}"]

    def data(self) -> dict[str, Any]:
        """For `--json`."""
        return {"remove": self.path}


@dataclass(frozen=True)
class Run(Change):
    """Run a program; a status other than 0 is a failure. `timeout` is in seconds."""

    argv: tuple[str, ...]
    timeout: float = 60.0

    def lines(self) -> list[str]:
        """As it can be pasted into a root shell."""
        return [" ".join(shlex.quote(word) for word in self.argv)]

    def data(self) -> dict[str, Any]:
        """For `--json`."""
        return {"run": list(self.argv)}


def below(root: str, path: str, *, follow: bool = True) -> str:
    """Where `path` of the host is, below `root`; absolute links stay below it too.

    `follow`: the last name of the path, too, is followed where it is a link.
    """
    if root == "/":
        return path
    done, todo, links = "", [part for part in path.split("/") if part not in ("", ".")], 0
    while todo:
        part = todo.pop(0)
        if part == "..":
            done = done.rpartition("/")[0]
            continue
        here = f"{root}{done}/{part}"
        if (todo or follow) and Path(here).is_symlink() and links < MOST_LINKS:
            links += 1
            target = str(Path(here).readlink())
            if target.startswith("/"):
                done = ""
            todo = [word for word in target.split("/") if word not in ("", ".")] + todo
            continue
        done = f"{done}/{part}"
    return f"{root}{done}"
