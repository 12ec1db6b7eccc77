"""What a run says while it works: one line per unit of work on stderr, and the build record.

A `Record` collects the same units as data, for `build-record.json` and `doit bench`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_lock = threading.Lock()


def _stream() -> TextIO:
    """The process's own stderr: doit puts another object in its place while a task runs."""
    return sys.__stderr__ or sys.stderr


def _style(text: str, code: str) -> str:
    if _stream().isatty() and "NO_COLOR" not in os.environ:
        return f"\x1b[{code}m{text}\x1b[0m"
    return text


def say(line: str) -> None:
    """Write one whole line to stderr; lines of concurrent steps never mix."""
    with _lock:
        _stream().write(line + "\n")
        _stream().flush()


def note(line: str) -> None:
    """Something worth knowing that changes nothing."""
    say(f"  {line}")


def warn(line: str) -> None:
    """A fallback or a gap that the user should see."""
    say(_style("! ", "33") + line)


def error(line: str) -> None:
    """An error as the user reads it."""
    say(_style("error: ", "31;1") + line)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def size(count: int) -> str:
    """Bytes as people read them, in powers of 1000: `12.5 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


class Record:
    """The build record: what ran, hit or miss and why, and how long it took.

    Times are wall seconds; CPU seconds of a stage's sandboxes are in its action's record.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def add(self, **entry: Any) -> None:
        """Append one entry."""
        with self._lock:
            self.entries.append(entry)

    def write(self, path: Path, **head: Any) -> None:
        """Write the record as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with self._lock:
            part.write_text(json.dumps({**head, "steps": self.entries}, indent=1) + "\n")
        part.replace(path)


record = Record()


@contextlib.contextmanager
def step(name: str, **facts: Any) -> Iterator[None]:
    """Time one unit of work, say when it starts and ends, and put it into the build record."""
    say(_style("> ", "36") + name)
    started = time.monotonic()
    try:
        yield
    except BaseException:
        wall = time.monotonic() - started
        record.add(step=name, wall=round(wall, 3), failed=True, **facts)
        say(_style("x ", "31;1") + f"{name} failed after {duration(wall)}")
        raise
    wall = time.monotonic() - started
    record.add(step=name, wall=round(wall, 3), **facts)
    say(_style("+ ", "32") + f"{name} ({duration(wall)})")
