"""The table of checks: names, titles, how many."""

from __future__ import annotations

import inspect
import re

import pytest

from katagpu.boot import agent, gpus, system, table, toolkit
from katagpu.boot.table import COLD, HOT, TABLE, Check

ALL = [(boot, check) for boot, checks in TABLE.items() for check in checks]


@pytest.mark.parametrize("boot", list(TABLE))
def test_ids_are_unique_in_a_machine(boot: str) -> None:
    names = [table.name(check) for check in TABLE[boot]]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[a-z][a-z-]*[a-z]", name) for name in names)


@pytest.mark.parametrize(("boot", "check"), ALL, ids=lambda value: getattr(
    value, "__name__", value))
def test_each_has_a_sentence_for_its_title(boot: str, check: Check) -> None:
    title = table.title(check)
    assert re.fullmatch(r"\S.+\.", title), f"{boot}: {title}"
    assert len(title) < 100 and list(inspect.signature(check).parameters) == ["session"]


def test_there_are_enough() -> None:
    assert len({check for _boot, check in ALL}) >= 25
    assert list(TABLE) == [COLD, HOT]


def test_what_stands_first_and_last() -> None:
    """Whether the guest comes up, and what the kernel says of all that was done to it."""
    for checks in TABLE.values():
        assert checks[0] is system.ready and checks[-1] is system.kernel_log
    order = TABLE[HOT]
    assert order.index(gpus.hot_plug) < order.index(toolkit.cdi_hot) < order.index(gpus.second) \
        < order.index(toolkit.cdi_again) < order.index(gpus.unplug)


def test_no_check_is_forgotten() -> None:
    """Each public function of the modules that takes a session alone is in the table."""
    helpers = {gpus.find, toolkit.mock_nvml}
    written = {value for module in (agent, gpus, system, toolkit)
               for name, value in vars(module).items()
               if inspect.isfunction(value) and value.__module__ == module.__name__
               and not name.startswith("_")} - helpers
    assert written == {check for _boot, check in ALL}
