"""The parameters of the command line: their table, flags, and paths from where they were typed."""

from __future__ import annotations

import pytest

from katagpu import parameters
from katagpu.errors import UserError


def test_the_table_names_each_task_and_each_parameter_once() -> None:
    for task, own in parameters.TASKS.items():
        names = [one.name for one in parameters.taken(task)]
        assert len(set(names)) == len(names), task
        assert all(one.what and one.value for one in own)
    assert sorted(parameters.FLAGS) == ["all", "ccache", "draft", "json", "licensed", "no_agent",
                                        "unsigned", "unverified"]


def test_a_flag_is_0_or_1_and_nothing_else() -> None:
    assert parameters.flag({"all": "1"}, "all")
    assert not parameters.flag({"all": "0"}, "all", default=True)
    assert not parameters.flag({}, "all")
    assert parameters.flag({}, "ccache", default=True)
    for word in ("no", "yes", "", "00", "true"):
        with pytest.raises(UserError, match="neither 0 nor 1"):
            parameters.flag({"unverified": word}, "unverified")
        with pytest.raises(UserError, match="neither 0 nor 1"):
            parameters.check({"recipe": "any", "unverified": word})


def test_what_is_no_parameter() -> None:
    parameters.check({name: "1" for name in parameters.ALL})
    with pytest.raises(UserError, match="unknown parameter Recipe=") as near:
        parameters.check({"Recipe": "x"})
    assert near.value.hint == "did you mean 'recipe'?"
    with pytest.raises(UserError, match="EXTRA_PKGS is no parameter") as front:
        parameters.check({"EXTRA_PKGS": "gcc make"})
    assert front.value.hint == 'it goes in front: EXTRA_PKGS="gcc make" ./doitw …'


