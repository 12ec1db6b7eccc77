"""The errors that reach a user. Every message says what went wrong, where, and what to do next."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    USER = 1
    STEP = 2


class KatagpuError(Exception):
    """Base of all errors that are shown without a traceback.

    `hint` is the cure, one sentence or a line that can be pasted.
    """

    status = Status.STEP

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\n  hint: {self.hint}"


class UserError(KatagpuError):
    """The user can mend it: a recipe, a missing tool, no network, no space."""

    status = Status.USER


class StepError(KatagpuError):
    """A build step failed: a compiler error, a check that did not pass."""

    status = Status.STEP


class TookTooLong(StepError):
    """A program did not end in the time that it had; it and its group were killed."""


class CorruptBlob(StepError):
    """A stored blob's bytes do not have the digest under which they were stored."""

    def __init__(self, digest: str, found: str) -> None:
        super().__init__(f"stored blob sha256:{digest} is damaged (its bytes are sha256:{found})")
        self.digest = digest
