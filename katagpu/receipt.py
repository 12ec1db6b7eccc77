"""What a finished build read and left: so long as all of it is unchanged, there is nothing to do.

The full answer imports every stage, reads every input and computes every key. A receipt stands for
it with one lstat(2) per file, as git's index does; any doubt means the full answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

Mark = list[int] | None
"""Size, inode, and times of change of content and of inode (ns); None: there is no such file."""

INPUTS = ("dodo.py", "katagpu", "recipes", "kernel-configs", "patches", "rootfs", "hooks", "keys")
FORMAT = 1
DEFAULT = "build_image"
"""The task of a command line that names none."""


def mark(path: str | Path) -> Mark:
    """A file's mark; a link is marked itself."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def look(paths: Iterable[str | Path]) -> dict[str, Mark]:
    """The marks of files, by path."""
    return {str(path): mark(path) for path in paths}


def inputs(root: Path) -> Iterator[str]:
    """Every file and directory of the repository at `root` that may change a guest."""
    queue: list[str | Path] = [root / name for name in INPUTS]
    while queue:
        path = queue.pop()
        yield str(path)
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            queue.extend(entry.path for entry in entries if entry.name != "__pycache__")


def place(root: Path, task: str, values: Mapping[str, str],
          environment: Mapping[str, str]) -> Path:
    """Where the receipt of a task with these parameters is."""
    asked = json.dumps([FORMAT, task, sorted(values.items()),
                        environment.get("EXTRA_PKGS", "").split()])
    return root / "out" / ".receipts" / hashlib.sha256(asked.encode()).hexdigest()[:32]


def write(path: Path, said: str, marks: Mapping[str, Mark]) -> None:
    """Write a receipt: what to say when there is nothing to do, and the marks that must hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps({"said": said, "marks": marks}))
    part.replace(path)


def sign(path: Path, said: str, marks: Mapping[str, Mark]) -> None:
    """Write a receipt where there is something to mark. A run that cannot is only slower."""
    if marks:
        with contextlib.suppress(OSError):
            write(path, said, marks)


def holds(path: Path) -> str | None:
    """What to say, if every mark still holds."""
    try:
        found = json.loads(path.read_bytes())
        marks = found["marks"]
        return str(found["said"]) if all(mark(name) == marks[name] for name in marks) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def nothing_to_do(root: Path, argv: Sequence[str], default: str,
                  environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """What to say for a command line whose tasks all have a receipt that holds, else None."""
    if any(word.startswith("-") for word in argv):
        return None
    values = dict(word.split("=", 1) for word in argv if "=" in word)
    tasks = [word for word in argv if "=" not in word] or [default]
    said = [holds(place(root, task, values, environment)) for task in tasks]
    return [line for line in said if line is not None] if None not in said else None
