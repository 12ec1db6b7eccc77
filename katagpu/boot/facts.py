"""What a boot check is told, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

SHOWN = 12  # lines of evidence that are kept


class Verdict(StrEnum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The guest as it was built; what it is compared with in the machine.

    `build_id` is vmlinux's. `extension` is where a disk with the driver is mounted, `hook` the
    guest's OCI hook; `capabilities` are the driver's. That disk (`verity`) and the image
    (`measured`) have hash trees.
    """

    release: str
    build_id: str | None
    config: Path
    root_format: str
    driver: str | None = None
    flavour: str | None = None
    capabilities: tuple[str, ...] = ()
    toolkit: str = "none"
    agent: bool = False
    extension: str | None = None
    verity: bool = False
    measured: bool = False
    hook: str | None = None


class Failed(Exception):
    """A check did not pass: what is wrong, the guest's lines, the probable cause, the cure."""

    def __init__(self, what: str, lines: Sequence[object] = (), *, cause: str, cure: str) -> None:
        super().__init__(what)
        self.what = what
        self.lines = [str(line) for line in lines]
        self.cause = cause
        self.cure = cure


class Skipped(Exception):
    """A check has nothing to look at in this guest; its words say why."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One check's result. `boot` is the machine that it ran in, `title` what it proves."""

    id: str
    boot: str
    title: str
    verdict: Verdict
    seconds: float
    lines: tuple[str, ...] = ()
    what: str = ""
    cause: str = ""
    cure: str = ""


def shortened(lines: Sequence[object]) -> tuple[str, ...]:
    """The first lines of evidence, and how many more there are."""
    words = [str(line) for line in lines]
    if len(words) <= SHOWN:
        return tuple(words)
    return (*words[:SHOWN], f"… and {len(words) - SHOWN} more lines")
