"""QEMU as a process: what its last words mean, and that nothing of it is ever left."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from katagpu.boot import process, qemu
from katagpu.boot.qemu import Qemu
from katagpu.boot.qmp import Refused
from katagpu.errors import StepError, TookTooLong, UserError
from tests.machines import QEMU, needs_qemu

from . import standin

BASE = ("-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35", "-m", "64",
        "-accel", "tcg", "-S")
P = "qemu-system-x86_64: "

# Each as QEMU 7.2.22 or 11.1.3 said it here, or under KVM of other hosts; then a part of the cause
# and of the cure.
WORDS = {
    "port in use": (
        P + "-qmp tcp:127.0.0.1:4444,server=on,wait=off: Failed to find an available port: Address "
        "already in use", "socket or port that it needs is in use", "another boot check"),
    "path too long": (
        P + "-qmp unix:/t/xx,server=on,wait=off: UNIX socket path '/t/xx' is too long\n"
        "Path must be less than 108 bytes", "path of a socket is too long", "shorter path"),
    "no server": (
        P + '-device {"driver":"vfio-user-pci","socket":{"type":"unix","path":"/t/gpu0"}}: Failed '
        "to connect to '/t/gpu0': No such file or directory", "is not there", "log beside this"),
    "server ended": (
        P + "-chardev socket,id=c,path=/t/v: Failed to connect to '/t/v': Connection refused",
        "is not there", "log beside this"),
    "memory": (P + "cannot set up guest memory 'pc.ram': Cannot allocate memory",
               "not enough memory", "end other programs"),
    "shared memory": (P + "unable to map backing store for guest RAM: Cannot allocate memory",
                      "not enough memory", "ulimit -v"),
    "kvm's group": ("Could not access KVM kernel module: Permission denied\n" + P
                    + "failed to initialize kvm: Permission denied",
                    "may not use /dev/kvm", "group kvm"),
    "kvm busy": (P + "failed to initialize kvm: Device or resource busy",
                 "KVM does not work here", "TCG"),
    "kvm's registers": (
        P + "error: failed to set MSR 0x10a to 0x69\n" + P + "../../target/i386/kvm/kvm.c:3183: "
        "kvm_buf_set_msrs: Assertion `ret == cpu->kvm_msr_buf->nmsrs' failed.",
        "KVM does not work here", "TCG"),
    "no such device": (P + "-device vfio-user-pci,id=x: 'vfio-user-pci' is not a valid device "
                       "model name", "does not know what it is asked for", "6.1 or newer"),
    "no such property": (P + "-device pcie-root-port,nope=1: Property 'pcie-root-port.nope' not "
                         "found", "does not know", "too old"),
    "no such machine": (P + "unsupported machine type\nUse -machine help to list supported "
                        "machines", "does not know", "too old"),
    "no such option": (P + "-nope: invalid option", "does not know", "too old"),
    "no such accelerator": (P + "-accel foo: invalid accelerator foo", "does not know", "too old"),
    "foreign modules": (
        "Failed to initialize module: /usr/lib/x86_64-linux-gnu/qemu/hw-display-qxl.so\nOnly "
        "modules from the same build can be loaded.", "not its own", "./doitw lock"),
    "no library": (P.strip() + " error while loading shared libraries: libfdt.so.1: cannot open "
                   "shared object file: No such file or directory", "not its own", "./doitw lock"),
    "no kernel": ("qemu: could not open kernel file '/t/vmlinuz': No such file or directory",
                  "file or device that it needs is not there", "./doitw build_image"),
    "no disk": (P + "-drive file=/t/image,format=raw: Could not open '/t/image': Permission denied",
                "may not be read", "./doitw build_image"),
}


def stand(place: Path, body: str) -> Qemu:
    """A program that stands for a QEMU which starts, and does `body`."""
    program = standin.program(place / "qemu", body)
    return Qemu(argv=(str(program),), version="0", vfio_user=False, why="", identity="")


@pytest.mark.parametrize("name", WORDS)
def test_its_last_words_are_explained(tmp_path: Path, name: str) -> None:
    said, cause, cure = WORDS[name]
    found = stand(tmp_path, f"echo {shlex.quote(said)} >&2; exit 1")
    log = tmp_path / "log"
    with pytest.raises(StepError) as failed, \
            process.running(found, ["-m", "64"], monitor=tmp_path / "qmp", log=log) as running:
        running.monitor.command("query-status")
    first, *rest = failed.value.what.splitlines()
    assert first.startswith("QEMU ended with status 1: ") and cause in first
    assert rest == [*said.splitlines(), f"  whole log: {log}"]
    assert cure in str(failed.value.hint)
    command, *lines = log.read_text().splitlines()
    assert command == (f"$ {found.argv[0]} -m 64 -qmp "
                       f"unix:{tmp_path}/qmp,server=on,wait=off")
    assert lines == said.splitlines()


def test_words_that_nobody_knows(tmp_path: Path) -> None:
    found = process.explain(1, "qemu-system-x86_64: oh", tmp_path / "log")
    assert found.what == f"QEMU ended with status 1\nqemu-system-x86_64: oh\n" \
                         f"  whole log: {tmp_path}/log"
    assert found.hint == "the log's first line is its command"
    assert "(it said nothing)" in process.explain(1, "", tmp_path / "log").what


@pytest.mark.parametrize(("status", "said"), [
    (-signal.SIGKILL, "QEMU ended with signal SIGKILL: something killed it, perhaps the kernel "
                      "for want of memory"),
    (-signal.SIGSEGV, "QEMU ended with signal SIGSEGV"),
    (-signal.SIGABRT, "QEMU ended with signal SIGABRT")])
def test_signals(tmp_path: Path, status: int, said: str) -> None:
    assert process.explain(status, "", tmp_path).what.splitlines()[0] == said


def test_a_cause_in_its_words_comes_before_the_signal(tmp_path: Path) -> None:
    found = process.explain(-signal.SIGABRT, WORDS["kvm's registers"][0], tmp_path)
    assert found.what.startswith("QEMU ended with signal SIGABRT: KVM does not work here")


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    found = Qemu(argv=(str(tmp_path / "none"),), version="", vfio_user=False, why="", identity="")
    with pytest.raises(UserError, match="is not installed"), \
            process.running(found, [], monitor=tmp_path / "qmp", log=tmp_path / "log"):
        pass


def test_it_is_ended_with_its_group_however_the_block_is_left(tmp_path: Path) -> None:
    place = tmp_path / "pids"
    found = stand(tmp_path, f"echo $$ >{place}; sleep 100 & echo $! >>{place}; wait")
    for leave in (None, KeyboardInterrupt, ValueError, StepError):
        place.unlink(missing_ok=True)
        try:
            with process.running(found, [], monitor=tmp_path / "qmp",
                                 log=tmp_path / "log") as running:
                pids = standin.pids(place, 2)
                assert pids[0] == running.running.pid and all(map(standin.runs, pids))
                if leave is not None:
                    raise leave("x")
        except (KeyboardInterrupt, ValueError, StepError) as failure:
            assert type(failure) is leave, "what is raised inside is what comes out"
        assert all(standin.gone(pid) for pid in pids)


@pytest.mark.parametrize(("body", "said"), [
    ("echo 'qemu-system-x86_64: cannot set up guest memory' >&2; exit 1",
     r"^QEMU ended with status 1: there is not enough memory"),
    ("exit 0", r"^the guest does not answer")], ids=["failed", "powered off"])
def test_a_check_that_fails_since_qemu_is_gone_says_so(
    tmp_path: Path, body: str, said: str,
) -> None:
    late = TookTooLong("the guest does not answer")
    with pytest.raises(StepError, match=said) as failed, \
            process.running(stand(tmp_path, body), [], monitor=tmp_path / "qmp",
                            log=tmp_path / "log") as running:
        running.running.wait(10)
        raise late
    assert late in {failed.value, failed.value.__cause__}


def test_the_words_of_an_earlier_run_are_not_its_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for body, cause in (("echo 'cannot set up guest memory'; exit 1", "there is not enough memory"),
                        ("exit 3", None)):
        with pytest.raises(StepError) as failed, process.running(
                stand(tmp_path, body), [], monitor=tmp_path / "qmp", log=log) as running:
            running.wait(10)
        assert (cause or "(it said nothing)") in failed.value.what
    assert "memory" not in failed.value.what
    assert "memory" in log.read_text(), "the log keeps both"


def test_the_socket_of_a_run_that_was_killed_is_not_in_the_way(tmp_path: Path) -> None:
    monitor = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(monitor))
    found = stand(tmp_path, f"test -e {monitor} && exit 1; exit 0")
    with process.running(found, [], monitor=monitor, log=tmp_path / "log") as running:
        running.wait(10)
    assert not monitor.exists()


def test_descriptors_and_environment_reach_it(tmp_path: Path) -> None:
    program = standin.program(tmp_path / "qemu", "cat /proc/self/fd/$FD; test -z \"$LEAK\"")
    reader, writer = os.pipe()
    os.write(writer, b"through the pipe\n")
    os.close(writer)
    os.environ["LEAK"] = "1"
    found = Qemu(argv=(str(program),), env={"FD": str(reader)}, version="", vfio_user=False,
                 why="", identity="")
    try:
        with process.running(found, [], monitor=tmp_path / "qmp", log=tmp_path / "log",
                             descriptors=[reader]) as running:
            running.wait(10)
            assert running.said() == "through the pipe"
    finally:
        del os.environ["LEAK"]
        os.close(reader)


def test_waiting_has_an_end(tmp_path: Path) -> None:
    with process.running(stand(tmp_path, "exec sleep 100"), [], monitor=tmp_path / "qmp",
                         log=tmp_path / "log") as running:
        with pytest.raises(TookTooLong, match="did not end within 0 s"):
            running.wait(0.2)
        running.check()
        running.stop()
        running.stop()
        assert standin.gone(running.running.pid)


SCRIPT = """
import sys
from pathlib import Path
from katagpu.boot import process
from katagpu.boot.gpu import Gpu
from katagpu.boot.qemu import Qemu
from katagpu.boot.vfiouser import Server
from katagpu.run import die_cleanly_on_signals

place = Path(sys.argv[1])
if sys.argv[2] == "as the command line does":
    die_cleanly_on_signals()
qemu = Qemu(argv=(str(place / "qemu"),), version="", vfio_user=True, why="", identity="")
with Server(place / "gpu", Gpu()), process.running(
        qemu, [], monitor=place / "qmp", log=place / "log") as running:
    running.wait()
"""


@pytest.mark.parametrize(("number", "how"), [
    (signal.SIGINT, "as the command line does"), (signal.SIGTERM, "as the command line does"),
    (signal.SIGHUP, "as the command line does"), (signal.SIGINT, "as a library"),
    (signal.SIGTERM, "as a library"), (signal.SIGKILL, "as a library")])
def test_nothing_is_left_of_it_when_we_are_ended(
    tmp_path: Path, repository: Path, number: signal.Signals, how: str,
) -> None:
    place = tmp_path / "pids"
    cleanly = how == "as the command line does" or number is signal.SIGINT
    # QEMU is one process. What it would start is ended too where we have the time for that.
    child = f"sleep 100 & echo $! >>{place}\n" if cleanly else ""
    standin.program(tmp_path / "qemu", f"echo $$ >{place}\n{child}exec sleep 100")
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), how], cwd=repository,
                          stderr=subprocess.PIPE) as python:
        try:
            pids = standin.pids(place, 2 if cleanly else 1)
            assert (tmp_path / "gpu").is_socket()
            python.send_signal(number)
            _out, said = python.communicate(timeout=60)
        finally:
            python.kill()
    assert python.returncode == (128 + number if how != "as a library" else -number), said
    assert all(standin.gone(pid) for pid in pids)
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(
            (ConnectionRefusedError, FileNotFoundError)):
        client.connect(str(tmp_path / "gpu"))


def of_environment() -> Qemu:
    """The real one."""
    return qemu.look(shlex.split(QEMU))


@needs_qemu
@pytest.mark.parametrize("name", ["qmp", "a,b"])
def test_a_real_one_starts_answers_and_quits(tmp_path: Path, name: str) -> None:
    with process.running(of_environment(), BASE, monitor=tmp_path / name,
                         log=tmp_path / "log") as running:
        assert running.monitor.command("query-status")["status"] == "prelaunch"
        with pytest.raises(Refused, match="not a valid device model name"):
            running.monitor.command("device_add", driver="no-such-device", id="x")
        running.monitor.command("cont")
        assert running.monitor.wait_event("RESUME", 10) == {}
        running.monitor.command("quit")
        running.wait(20)
    assert not (tmp_path / name).exists()


@needs_qemu
def test_a_real_one_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="QEMU ended with signal SIGKILL: something killed it"), \
            process.running(of_environment(), BASE, monitor=tmp_path / "qmp",
                            log=tmp_path / "log") as running:
        assert running.monitor.command("query-status")
        os.kill(running.running.pid, signal.SIGKILL)
        begun = time.monotonic()
        running.monitor.command("query-status")
    assert time.monotonic() - begun < 5


@needs_qemu
@pytest.mark.parametrize(("words", "said"), [
    (["-device", "no-such-device"], "does not know what it is asked for"),
    (["-device", "pcie-root-port,nope=1"], "does not know what it is asked for"),
    (["-machine", "q99"], "does not know what it is asked for"),
    (["-kernel", "/no/such/kernel"], "a file or device that it needs is not there"),
    (["-chardev", "socket,id=c,path=/no/such/socket"], "is not there"),
    (["-object", "memory-backend-ram,id=m,size=900000G"], "there is not enough memory"),
])
def test_a_real_one_s_words_are_explained(
    tmp_path: Path, words: Sequence[str], said: str,
) -> None:
    with pytest.raises(StepError) as failed, process.running(
            of_environment(), [*BASE, *words], monitor=tmp_path / "qmp",
            log=tmp_path / "log") as running:
        running.monitor.command("query-status")
    assert said in failed.value.what.splitlines()[0], failed.value.what


@needs_qemu
def test_a_real_one_with_a_port_in_use_or_a_path_too_long(tmp_path: Path) -> None:
    found = of_environment()
    with socket.create_server(("127.0.0.1", 0)) as holder:
        words = ["-serial", f"tcp:127.0.0.1:{holder.getsockname()[1]},server=on,wait=off"]
        with pytest.raises(StepError, match="a socket or port that it needs is in use"), \
                process.running(found, [*BASE, *words], monitor=tmp_path / "qmp",
                                log=tmp_path / "log") as running:
            running.wait(20)
    with pytest.raises(StepError, match="the path of a socket is too long"), \
            process.running(found, BASE, monitor=tmp_path / ("x" * 120),
                            log=tmp_path / "log") as running:
        running.wait(20)
