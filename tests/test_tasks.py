"""The tasks as doit gets them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from doit.exceptions import TaskError, TaskFailed

from katagpu import guest, hostsetup, recipe, tasks, testtasks
from katagpu.errors import CorruptBlob, KatagpuError, StepError, UserError
from katagpu.lock import Lock


@pytest.mark.parametrize(("error", "kind"), [
    (UserError("mend it"), TaskFailed), (StepError("broken"), TaskError),
    (CorruptBlob("0" * 64, "1" * 64), TaskError),
])
def test_errors_become_doit_s_by_status(error: KatagpuError, kind: type) -> None:
    def fails() -> None:
        raise error

    failure = tasks.work(fails)()
    assert type(failure) is kind
    assert vars(failure)["cause"] is error


def test_an_action_without_error_succeeds_and_a_fault_is_not_hidden() -> None:
    assert tasks.work(lambda: None)() is True

    def fault() -> None:
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        tasks.work(fault)()


def test_a_question_that_cannot_be_answered_is_a_no() -> None:
    def cannot() -> bool:
        raise UserError("no lock")

    assert tasks.answer(lambda: True)() is True
    assert tasks.answer(cannot)() is False


def test_every_stage_of_a_public_task_exists(repository: Path) -> None:
    default = recipe.load("debian-trixie", repository)
    known = guest.stages(default, Lock(recipe="", request="", groups={}), repository)
    assert {stage for stages in tasks.STAGES.values() for stage in stages} <= set(known)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The programs that a task starts, which are not started."""
    found: list[list[str]] = []

    def call(words: list[str], _failed: str, **environment: str) -> None:
        found.append([*(f"{name}={value}" for name, value in environment.items()), *words])

    monkeypatch.setattr(tasks, "call", call)
    monkeypatch.setattr(hostsetup, "ensure_tests", lambda: None)
    monkeypatch.setattr(tasks, "ROOT", tmp_path)
    return found


def action(task: tasks.Task) -> Callable[[], object]:
    """What a task does."""
    (found,) = task["actions"]
    assert callable(found)
    return found  # type: ignore[no-any-return]


def given(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Let these be the parameters of the command line."""
    class Given:
        def __init__(self) -> None:
            self.values = values

    monkeypatch.setattr("katagpu.current.context", Given)


BUILD = ["python", "-m", "katagpu", "build_image"]
SUITE = ["pytest", "-q", "-n", "2", "--dist", "loadfile", "-m"]
ON_A_BUILD = ["QEMU=qemu -x", "pytest", "-q", "-m"]


def test_the_test_task_is_the_suite_then_the_build_then_its_checks(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    given(monkeypatch)
    monkeypatch.setattr(testtasks, "_machines", lambda: contextlib.nullcontext({"QEMU": "qemu -x"}))
    monkeypatch.setenv("KATAGPU_JOBS", "2")
    places = ["tests/default", "tests/boot", "tests/host"]
    assert action(testtasks.test())() is True
    assert calls == [[*SUITE, "not built and not qemu and not slow", "tests"], BUILD,
                     [*ON_A_BUILD, "(built or qemu) and not slow", *places]]
    calls.clear()
    given(monkeypatch, all="1")
    action(testtasks.test())()
    assert calls == [[*SUITE, "not built and not qemu", "tests"], BUILD,
                     [*ON_A_BUILD, "(built or qemu)", *places]]


def test_one_processor_runs_one_test_at_a_time(
    calls: list[list[str]], monkeypatch: pytest.MonkeyPatch,
) -> None:
    given(monkeypatch)
    monkeypatch.setattr(testtasks, "_machines", lambda: contextlib.nullcontext({}))
    monkeypatch.setenv("KATAGPU_JOBS", "1")
    action(testtasks.test())()
    assert calls[0] == ["pytest", "-q", "-m", "not built and not qemu and not slow", "tests"]


def test_lint_runs_all_of_its_programs(calls: list[list[str]]) -> None:
    action(tasks.program("ruff check", "mypy", doc=""))()
    assert calls == [["ruff", "check"], ["mypy"]]


def test_a_program_that_fails_is_a_failed_step() -> None:
    failure = action(tasks.program("python -c raise(SystemExit(3))", doc=""))()
    assert isinstance(failure, TaskError)
    assert "found something" in failure.get_msg()


def test_doit_keeps_no_state_on_disk() -> None:
    config = tasks.config()
    assert config["dep_file"] == ":memory:"
    assert (config["num_process"], config["par_type"]) == (3, "thread")
    assert config["default_tasks"] == ["build_image"]
