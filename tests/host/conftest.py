"""The command line on a host of `tests/hosttree.py`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from katagpu.host import cli
from katagpu.host.machine import Machine
from tests.hosttree import Kernel, Tree


@dataclass
class Said:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Of `--json`."""
        return json.loads(self.out)


@dataclass
class Host:
    """A host that commands run on."""

    tree: Tree
    kernel: Kernel
    search: str
    read: Callable[[], Any]

    def __call__(self, *words: str) -> Said:
        """Run a command."""
        make = functools.partial(Machine, attributes=self.kernel, search=self.search)
        status = cli.main([*words, "--root", str(self.tree.root)], make=make)
        said = self.read()
        assert "Traceback" not in said.err
        return Said(status, said.out, said.err)


Make = Callable[..., Host]


@pytest.fixture
def host(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Make:
    """Makes a host of a function of `tests/hosttree.py`; the words are programs on it."""
    def make(build: Callable[[Path], Tree], **programs: str) -> Host:
        tree = build(tmp_path / "root")
        return Host(tree, Kernel(tree), tree.programs(**programs), capfd.readouterr)

    return make
