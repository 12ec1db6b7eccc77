"""What `host check` says of one requirement."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Is it as it has to be?"""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Verdict:
    """A line of `host check`; `cure` is what is to be done where it is not as it has to be."""

    state: State
    name: str
    said: str
    cure: str | None = None
    gpu: str | None = None

    def lines(self) -> list[str]:
        """For people."""
        name = self.name if self.gpu is None else f"{self.name} {self.gpu}"
        return [f"{self.state.value}  {name}: {self.said}",
                *([f"      → {self.cure}"] if self.cure else [])]

    def data(self) -> dict[str, str | None]:
        """For `--json`."""
        return {"state": self.state.value, "name": self.name, "gpu": self.gpu, "said": self.said,
                "cure": self.cure}


def passed(name: str, said: str, gpu: str | None = None) -> Verdict:
    """It is as it has to be."""
    return Verdict(State.PASS, name, said, None, gpu)


def warned(name: str, said: str, cure: str | None, gpu: str | None = None) -> Verdict:
    """It may become a trouble, or cannot be told."""
    return Verdict(State.WARN, name, said, cure, gpu)


def failed(name: str, said: str, cure: str, gpu: str | None = None) -> Verdict:
    """It will not work so."""
    return Verdict(State.FAIL, name, said, cure, gpu)
