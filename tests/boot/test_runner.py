"""Machines side by side, their checks, and what comes of those where a guest does not come up.

Where QEMU would be is fakeqemu.py; the processes, sockets and threads are real.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from katagpu.boot import gpus, kata, runner, system, table
from katagpu.boot.accel import Accel, Kind
from katagpu.boot.channel import Gone
from katagpu.boot.facts import Facts, Failed, Outcome, Skipped, Verdict
from katagpu.boot.gpu import Gpu
from katagpu.boot.qemu import Qemu
from katagpu.boot.runner import Guest, Setting
from katagpu.boot.session import Session
from katagpu.boot.table import COLD, HOT, Check
from katagpu.boot.vm import HotPlug
from katagpu.errors import StepError, UserError
from katagpu.kataconfig import KataSettings, render_drop_in

from .scripted import RELEASE, Scripted

HERE = Path(__file__).parent
FEW: dict[str, tuple[Check, ...]] = {
    COLD: (system.ready, system.release, gpus.none_yet), HOT: (system.ready, system.units)}
NONE_LEFT = "QEMU's processes have ended"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of few checks."""
    monkeypatch.setattr(table, "TABLE", FEW)


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    """Files of a guest, none of which is looked into."""
    (tmp_path / "config").write_text("CONFIG_A=y\n")
    facts = Facts(release=RELEASE, build_id=None, config=tmp_path / "config", root_format="erofs",
                  driver="550.163.01")
    return Guest(
        recipe="toy", facts=facts, vmlinuz=Path("/vmlinuz"), vmlinux=Path("/vmlinux"),
        root=Path("/root.image"), probe=Path("/probe"), helpers={},
        configuration=kata.read(render_drop_in(KataSettings(kernel="/k", image="/i"))))


def setting(tmp_path: Path, what: str, **other: Any) -> Setting:
    """A QEMU that behaves so."""
    qemu = Qemu(argv=(sys.executable, str(HERE / "fakeqemu.py"), what), version="11.1.3",
                env={"PYTHONPATH": str(HERE.parent.parent), "PYTHONDONTWRITEBYTECODE": "1"},
                vfio_user=True, why="a test", identity="")
    words: dict[str, Any] = {"memory": 64, "patience": 0.3, "gpu": Gpu(), **other}
    return Setting(qemu=qemu, accel=Accel(kind=Kind.TCG, why="TCG: a test"),
                   logs=tmp_path / "logs", **words)


def verdicts(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str]]:
    return [(outcome.boot, outcome.id, str(outcome.verdict)) for outcome in outcomes]


def left() -> list[str]:
    """Command lines of fake QEMUs, and directories of machines."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    mine = f"{HERE}/fakeqemu.py".encode()
    return [*(line.decode() for line in lines if mine in line.split(b"\0")),
            *(str(path) for path in Path(tempfile.gettempdir()).glob("katagpu-*")
              if (path / "serial.log").exists() and path.stat().st_uid == os.getuid())]


NO_BOOT = [(COLD, "ready", "failed"), (COLD, "release", "skipped"), (COLD, "none-yet", "skipped"),
           (HOT, "ready", "failed"), (HOT, "units", "skipped")]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("what", "said", "cause"), [
    ("panics", "QEMU ended with status 0", "finds no root"),
    ("refuses", "a socket or port that it needs is in use", "before the kernel said a word"),
    ("hangs", "first process: no answer within 0 s", "waits for ever")])
def test_a_guest_that_does_not_come_up(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str,
    cause: str,
) -> None:
    """One check of each machine fails, and says all; the others have nothing to look at."""
    monkeypatch.setattr(runner, "START", 0.4)
    before = left()
    report = runner.check(guest, setting(tmp_path, what))
    assert verdicts(report.outcomes) == NO_BOOT and not report.passed
    first = report.outcomes[0]
    assert first.what.startswith("the guest does not come up: ") and said in first.what
    assert cause in first.cause and first.cure
    assert report.outcomes[1].what == "the guest did not come up"
    assert left() == before, NONE_LEFT
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert {"cold-plug-qemu.log", "hot-plug-qemu.log"} <= names
    if what != "refuses":
        assert any("Linux version" in line for line in first.lines)
        assert "Linux version" in (tmp_path / "logs/hot-plug-serial.log").read_text()
    else:
        assert "hint: end what holds it" in first.what


@pytest.mark.usefixtures("few")
def test_a_guest_that_answers(guest: Guest, tmp_path: Path) -> None:
    before = left()
    report = runner.check(guest, setting(tmp_path, "answers"))
    assert verdicts(report.outcomes) == [
        (boot, table.name(check), "passed") for boot, checks in FEW.items() for check in checks]
    assert report.passed and report.outcomes[1].lines == (RELEASE,)
    facts = dict(report.facts)
    assert facts.pop("seconds") < 30
    assert facts == {
        "qemu": "11.1.3: a test", "acceleration": "TCG: a test", "gpu": "20b7 over vfio-user",
        "patience": "1.0 times that of an idle host",
        **{f"{boot} {name}": value for boot in FEW for name, value in {
            "ready after": 5.0, "ended after": 12.5, "memory used": 1000, "kernel": "#1 SMP",
        }.items()}}
    assert left() == before, NONE_LEFT


def test_a_guest_that_ends_in_the_middle(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was proven is kept; one check says what became of it, and none after it is asked."""
    monkeypatch.setattr(table, "TABLE", {HOT: (
        system.ready, system.release, system.units, gpus.none_yet, system.kernel_log)})
    before = left()
    report = runner.check(guest, setting(tmp_path, "ends"))
    assert [str(outcome.verdict) for outcome in report.outcomes] == [
        "passed", "passed", "failed", "skipped", "skipped"]
    lost = report.outcomes[2]
    assert lost.what.startswith("QEMU ended with status 0") and lost.cause and lost.cure
    assert any("Linux version" in line for line in lost.lines)
    assert report.outcomes[3].what == "the guest did not answer any more"
    assert left() == before, NONE_LEFT


@pytest.mark.usefixtures("few")
def test_a_machine_that_runs_for_too_long_is_killed(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "LONGEST", 0.5)
    begun = time.monotonic()
    report = runner.check(guest, setting(tmp_path, "hangs"))
    assert time.monotonic() - begun < 20 and verdicts(report.outcomes) == NO_BOOT


def test_no_memory_for_it(guest: Guest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not enough memory"):
        runner.check(guest, setting(tmp_path, "answers", memory=1 << 30))
    assert not (tmp_path / "logs").exists()


def test_no_program_of_that_name(guest: Guest, tmp_path: Path) -> None:
    """An error of the host is no failure of the guest."""
    chosen = setting(tmp_path, "answers")
    nothing = Qemu(argv=("/no/such/qemu",), version="", vfio_user=True, why="", identity="")
    with pytest.raises(UserError, match="/no/such/qemu"):
        runner.check(guest, Setting(qemu=nothing, accel=chosen.accel, gpu=chosen.gpu,
                                    logs=chosen.logs, memory=64))


# one check


def run(monkeypatch: pytest.MonkeyPatch, found: Scripted, *checks: Check) -> list[Outcome]:
    """The outcomes of checks that are asked of a guest of words."""
    monkeypatch.setattr(table, "TABLE", {COLD: checks})
    found.machine.log.write_text("[    9.1] Out of memory: Killed process 1 (systemd)\n")
    return list(runner._checks(COLD, found.session))


def raises(error: Exception) -> Check:
    def check(_session: Session) -> list[str]:
        """It fails."""
        raise error

    return check


def passes(_session: Session) -> list[str]:
    """It is so."""
    return [f"line {number}" for number in range(20)]


def test_a_check_that_passes(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome, = run(monkeypatch, scripted(), passes)
    assert (outcome.verdict, outcome.id, outcome.title) == (
        Verdict.PASSED, "passes", "It is so.")
    assert len(outcome.lines) == 13 and outcome.lines[-1] == "… and 8 more lines"


@pytest.mark.parametrize(("error", "verdict", "what"), [
    (Failed("not so", ["line"], cause="why", cure="how"), Verdict.FAILED, "not so"),
    (Skipped("nothing there"), Verdict.SKIPPED, "nothing there"),
    (StepError("no answer", hint="x"), Verdict.FAILED, "it could not be asked: no answer"),
    (FileNotFoundError(2, "No such file", "/proc/x"), Verdict.FAILED, "it could not be asked: "),
    (ValueError("no number"), Verdict.FAILED, "it could not be asked: no number"),
    (KeyError("x"), Verdict.FAILED, "it could not be asked: "),
    (IndexError("out of range"), Verdict.FAILED, "it could not be asked: ")])
def test_a_check_that_does_not(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch, error: Exception,
    verdict: Verdict, what: str,
) -> None:
    """Whatever it is, the next check is asked."""
    found = scripted()
    found.says("the kernel's last words")
    outcome, other = run(monkeypatch, found, raises(error), passes)
    assert outcome.verdict is verdict and outcome.what.startswith(what)
    assert other.verdict is Verdict.PASSED
    if verdict is Verdict.FAILED:
        assert outcome.cause and outcome.cure and outcome.lines


def test_a_check_whose_guest_is_gone(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = run(monkeypatch, scripted(), passes, raises(Gone("no answer within 15 s")), passes)
    assert [outcome.verdict for outcome in outcomes] == [
        Verdict.PASSED, Verdict.FAILED, Verdict.SKIPPED]
    assert outcomes[1].what == "no answer within 15 s" and "too little memory" in outcomes[1].cause


# the machines


def test_the_machine_of_a_cold_gpu(guest: Guest, tmp_path: Path) -> None:
    """As the drop-in has it: the compressed kernel, and q35's own handler."""
    found = runner.machine(guest, setting(tmp_path, ""), COLD, tmp_path)
    assert (found.kernel, found.hot_plug, len(found.ports), found.phys_bits) == (
        guest.vmlinuz, HotPlug.ACPI, 1, 0)
    device, = found.devices
    assert json.loads(device) == {
        "driver": "vfio-user-pci", "id": "gpu0", "bus": "rp0",
        "socket": {"type": "unix", "path": str(tmp_path / "gpu0")}}


def test_the_machine_of_hot_plugged_gpus(guest: Guest, tmp_path: Path) -> None:
    found = runner.machine(guest, setting(tmp_path, ""), HOT, tmp_path)
    assert (found.kernel, found.hot_plug, len(found.ports), list(found.devices)) == (
        guest.vmlinux, HotPlug.NATIVE, 2, [])


def test_large_bars_need_a_wider_processor(guest: Guest, tmp_path: Path) -> None:
    """Under KVM it is the host's own, which is wide enough."""
    large = setting(tmp_path, "", gpu=Gpu(device=0x2335, bar1=256 << 30))
    assert runner.machine(guest, large, HOT, tmp_path).phys_bits == 46
    kvm = Setting(qemu=large.qemu, gpu=large.gpu, logs=large.logs,
                  accel=Accel(kind=Kind.KVM, why=""))
    assert runner.machine(guest, kvm, HOT, tmp_path).phys_bits == 0


def test_the_machine_of_the_lesser_check(guest: Guest, tmp_path: Path) -> None:
    known = setting(tmp_path, "")
    qemu = Qemu(argv=known.qemu.argv, version="7.2", vfio_user=False, why="", identity="")
    lesser = Setting(qemu=qemu, accel=known.accel, gpu=known.gpu, logs=known.logs)
    device, = runner.machine(guest, lesser, COLD, tmp_path).devices
    assert json.loads(device) == {
        "driver": "pci-testdev", "membar": 32 << 30, "id": "gpu0", "bus": "rp0"}
    assert lesser.offer.function is None


@pytest.mark.parametrize(("load", "processors", "times"), [
    (0.0, 2, 1.0), (2.0, 2, 2.0), (3.0, 16, 1.1875), (1000.0, 2, 8.0), (-1.0, 2, 1.0)])
def test_a_busy_host_may_take_longer(load: float, processors: int, times: float) -> None:
    assert runner.slowness(load, processors) == times
