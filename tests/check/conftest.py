"""The toy guest, built once (this needs gcc) and copied for each test."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from .toys import Toy, make


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    return make(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def toy(original: Toy, tmp_path: Path) -> Toy:
    shutil.copytree(original.root.parent, tmp_path / "toy", symlinks=True)
    top = tmp_path / "toy"
    return Toy(root=top / "root", facts=replace(
        original.facts, symvers=top / "Module.symvers", kernel_config=top / "config"))
