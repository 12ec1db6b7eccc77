"""The default guest as `./doitw build_image` left it. Run by `./doitw test` after that build."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from katagpu import sandbox
from katagpu.context import Context
from katagpu.sandbox import Root
from katagpu.stages import layers
from katagpu.stages.api import Build
from tests import closedguest, splitguest
from tests.closedguest import Closed
from tests.splitguest import Split

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this directory is of the default build, and may build or boot for minutes."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.built)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(1200))


@pytest.fixture(scope="session")
def context() -> Context:
    """The context of the default recipe, without any override of this environment."""
    return Context(ROOT, {}, environment={})


@pytest.fixture(scope="session")
def guest(context: Context) -> Iterator[tuple[Build, Root]]:
    """A build handle on the image stage's inputs, and the guest's root (read-only)."""
    plan = context.plan
    stage = plan.stages["image"]
    inputs = {}
    for role, ref in stage.inputs.items():
        action = plan.action(ref.stage)
        assert action is not None, f"{ref.stage} is not built: ./doitw build_image"
        inputs[role] = action.outputs[ref.output]
    with context.store.staging("tests", sandbox.remove) as scratch:
        build = Build(stage, context.store, inputs, scratch, scratch / "log")
        yield build, Root(lower=layers.stack(build), upper=build.directory("guest"))


@pytest.fixture(scope="session")
def guest_build(guest: tuple[Build, Root]) -> Build:
    """The build handle alone."""
    return guest[0]


@pytest.fixture(scope="session")
def split(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    """The default guest with the driver on a disk of its own."""
    with splitguest.split(context, tmp_path_factory.mktemp("repository")) as found:
        yield found


@pytest.fixture(scope="session")
def closed(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Closed:
    """The default guest with the closed kernel modules."""
    return closedguest.closed(context, tmp_path_factory.mktemp("closed"))
