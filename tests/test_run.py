"""Programs: their environment, log and errors, and that none of them outlives us."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katagpu import run as runner
from katagpu.errors import StepError, UserError
from katagpu.run import CLEAN, kill_all, run, tail

SECONDS = 20.0  # how long a process may take to come or go


def processes(marker: str) -> list[int]:
    """Processes that have this word in their command line, other than this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if marker.encode() in words:
            found.append(int(entry.name))
    return found


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; does it come true?"""
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def marker() -> Iterator[str]:
    """A number of seconds that no other program sleeps; what still sleeps it is ended."""
    word = f"60.{os.getpid()}{time.monotonic_ns() % 1_000_000_000}"
    yield word
    for pid in processes(word):
        os.kill(pid, signal.SIGKILL)


def test_the_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("PATH", "/nowhere:" + os.environ["PATH"])
    said = run(["env"], env={"EXTRA": "2"}, capture=True).stdout.decode()
    found = dict(line.split("=", 1) for line in said.splitlines())
    assert found == {**CLEAN, "EXTRA": "2"}


def test_it_has_a_session_and_no_input_or_foreign_file_of_ours(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as ours:
        os.set_inheritable(ours.fileno(), True)
        code = "import os, json, sys; print(json.dumps([os.getsid(0) == os.getpid(), " \
               "os.getpgrp() == os.getpid(), sys.stdin.read(), os.listdir('/proc/self/fd')]))"
        said = json.loads(run([sys.executable, "-I", "-c", code], capture=True).stdout)
        assert said[:3] == [True, True, ""]
        assert len(said[3]) == 4, "0, 1, 2 and the directory itself"


def test_the_parent_death_signal_is_set() -> None:
    code = "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n)); " \
           "print(n.value)"
    said = run([sys.executable, "-I", "-c", code], capture=True).stdout
    assert int(said) == signal.SIGKILL


def test_a_child_whose_parent_is_gone_does_not_start_the_program() -> None:
    said = subprocess.run(["sh", "-c", runner._GUARD, "1", "echo", "started"],
                          capture_output=True)
    assert (said.returncode, said.stdout) == (137, b"")


def test_words_arrive_as_they_are() -> None:
    words = ["a b", "$HOME", "*", "", "'\"", "new\nline", "-c"]
    said = run(["printf", "%s|", *words], capture=True).stdout.decode()
    assert said == "".join(f"{word}|" for word in words)


def test_capture_takes_stdout_and_leaves_stderr_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "new" / "log"
    result = run(["sh", "-c", "echo out; echo err >&2"], capture=True, log=log)
    assert result.stdout == b"out\n"
    assert log.read_text() == "$ sh -c 'echo out; echo err >&2'\nerr\n"


def test_without_capture_the_log_gets_all_and_is_appended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    result = run(["sh", "-c", "echo out; echo err >&2"], log=log)
    assert result.stdout == b""
    assert log.read_text().splitlines()[0] == "before"
    assert log.read_text().splitlines()[2:] == ["out", "err"]


def test_stdin_is_given(tmp_path: Path) -> None:
    big = os.urandom(1 << 20)
    assert run(["cat"], stdin=big, capture=True).stdout == big


def test_a_failure_shows_the_last_lines_the_log_and_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(StepError) as failed:
        run(["sh", "-c", "seq 100; echo 'the reason' >&2; exit 3"], log=log)
    text = str(failed.value)
    assert "sh ended with status 3" in text
    assert "the reason" in text
    assert "\n100\n" in text
    assert "\n50\n" not in text
    assert f"whole log: {log}" in text
    assert str(failed.value.hint).startswith("run it again: sh -c 'seq 100; echo ")
    assert failed.value.status == 2


def test_a_failure_without_log_shows_stderr_and_another_command() -> None:
    with pytest.raises(StepError) as failed:
        run(["sh", "-c", "echo why >&2; kill -TERM $$"], again=["make", "it so"])
    assert "sh ended with signal SIGTERM:\nwhy" in str(failed.value)
    assert failed.value.hint == "run it again: make 'it so'"


def test_check_off_returns_the_status_and_stderr() -> None:
    result = run(["sh", "-c", "echo why >&2; exit 7"], check=False)
    assert (result.status, result.stderr) == (7, b"why\n")


@pytest.mark.parametrize("program", ["katagpu-no-such-program", "/no/such/program", "/etc/passwd"])
def test_a_missing_program_can_be_mended_by_the_user(program: str) -> None:
    with pytest.raises(UserError, match="is not installed") as missing:
        run([program])
    assert program in str(missing.value)
    assert "setup" in str(missing.value.hint)


def test_a_path_of_ones_own_needs_no_shell_in_it(tmp_path: Path) -> None:
    setpriv = shutil.which("setpriv", path=runner.PATH)
    assert setpriv is not None
    (tmp_path / "setpriv").symlink_to(setpriv)
    (tmp_path / "tool").write_text("#!/bin/sh\necho it ran\n")
    (tmp_path / "tool").chmod(0o755)
    assert run(["tool"], env={"PATH": str(tmp_path)}, capture=True).stdout == b"it ran\n"


def test_a_missing_directory_is_not_taken_for_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="no such directory"):
        run(["true"], cwd=tmp_path / "nowhere")


def test_the_tail_of_a_log_is_short_and_survives_odd_bytes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * 100_000 + b"\nlast \xff\n")
    assert tail(log, 1) == "last \N{REPLACEMENT CHARACTER}"
    assert len(tail(log)) < 17_000


def test_a_timeout_ends_the_whole_group(marker: str) -> None:
    started = time.monotonic()
    with pytest.raises(StepError, match="did not end within 1 s"):
        run(["sh", "-c", f"sleep {marker} & sleep {marker}"], timeout=1, capture=True, stdin=b"x")
    assert time.monotonic() - started < 15
    assert until(lambda: not processes(marker))


def test_an_interruption_in_python_ends_the_program(
    marker: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_words: object, **_more: object) -> None:
        assert until(lambda: bool(processes(marker)))
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(["sleep", marker])
    assert until(lambda: not processes(marker))
    assert not runner._live


def test_a_program_outlives_the_thread_that_asked_for_it(marker: str) -> None:
    processes_of: list[subprocess.Popen[bytes]] = []

    def ask() -> None:
        processes_of.append(runner._spawn(lambda: subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", "sleep", marker])))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    with processes_of[0] as process:
        assert until(lambda: bool(processes(marker)))
        time.sleep(0.3)
        assert process.poll() is None, "the signal of the thread's death must not reach it"
        process.kill()
    runner._live.discard(process.pid)


def test_kill_all_waits_for_no_lock(marker: str) -> None:
    thread = threading.Thread(target=lambda: run(["sleep", marker], check=False))
    thread.start()
    assert until(lambda: bool(processes(marker)))
    with runner._live_lock:  # as when a signal interrupts the code that holds it
        kill_all()
    thread.join(SECONDS)
    assert not thread.is_alive()


def script(repository: Path, body: str) -> subprocess.Popen[str]:
    """Start a Python that runs `body` with `run` at hand."""
    head = "import sys, threading\nfrom katagpu.run import run, die_cleanly_on_signals\n"
    return subprocess.Popen([sys.executable, "-c", head + body], cwd=repository, text=True,
                            stderr=subprocess.PIPE)


def test_killing_python_ends_the_program(marker: str, repository: Path) -> None:
    with script(repository, f"run(['sleep', '{marker}'])") as python:
        assert until(lambda: bool(processes(marker)))
        python.kill()
    assert until(lambda: not processes(marker))


def test_killing_python_ends_programs_of_ended_threads(marker: str, repository: Path) -> None:
    body = f"""
for _ in range(2):
    threading.Thread(target=lambda: run(['sleep', '{marker}'])).start()
threading.Event().wait()
"""
    with script(repository, body) as python:
        assert until(lambda: len(processes(marker)) == 2)
        python.kill()
    assert until(lambda: not processes(marker))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_us_and_our_programs(
    marker: str, repository: Path, tmp_path: Path, number: signal.Signals,
) -> None:
    told = tmp_path / "scratch"
    body = f"""
from pathlib import Path
from katagpu.run import scratch
die_cleanly_on_signals()
threading.Thread(target=lambda: run(['sh', '-c', 'sleep {marker} & sleep {marker}'])).start()
with scratch() as place:
    (place / "file").touch()
    Path({str(told)!r}).write_text(str(place))
    run(['sleep', '{marker}'])
"""
    with script(repository, body) as python:
        assert until(lambda: len(processes(marker)) == 3)
        assert (Path(told.read_text()) / "file").exists()
        python.send_signal(number)
        _out, said = python.communicate(timeout=SECONDS)
    assert python.returncode == 128 + number
    assert f"interrupted by {number.name}; run the same command again" in said
    assert "Traceback" not in said
    assert not Path(told.read_text()).exists()
    assert until(lambda: not processes(marker))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(
    marker: str, repository: Path, number: signal.Signals,
) -> None:
    """As `nohup ./doitw … &` asks for."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        python = script(repository, f"die_cleanly_on_signals()\nrun(['sleep', '{marker}'])")
    finally:
        signal.signal(number, before)
    with python:
        assert until(lambda: bool(processes(marker)))
        python.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            python.wait(0.5)
        python.send_signal(signal.SIGTERM)
        assert python.wait(SECONDS) == 128 + signal.SIGTERM
    assert until(lambda: not processes(marker))
