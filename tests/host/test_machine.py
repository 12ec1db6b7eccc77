"""What a host is changed through: asked first, printed, undone, and never for ever."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from katagpu.errors import UserError
from katagpu.host import changes, machine
from katagpu.host.changes import Place, Remove, Run, Write
from katagpu.host.machine import Machine, Refused
from katagpu.host.programs import Missing, Programs, TooLong


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The root of a host with a few attributes."""
    for name in ("one", "two", "three"):
        (tmp_path / "sys").mkdir(exist_ok=True)
        (tmp_path / "sys" / name).write_text("old\n")
    return tmp_path


def old(name: str) -> Write:
    """An attribute as it was."""
    return Write(f"/sys/{name}", "old\n")


def contents(place: Path) -> dict[str, str]:
    """All files."""
    return {path.name: path.read_text() for path in place.rglob("*") if path.is_file()}


def test_all_or_nothing(place: Path) -> None:
    before = contents(place)
    (place / "etc").mkdir()
    (place / "etc/mine").write_text("as it was")
    before["mine"] = "as it was"
    host = Machine(place, yes=True)
    host.agree("change")
    with pytest.raises(UserError) as refusal, host.together():
        host.write("/sys/one", "new", undo=[old("one")])
        host.place("/etc/new.conf", "text\n")
        host.place("/etc/mine", "other\n")
        host.remove("/etc/mine")
        host.write("/sys/missing", "new", undo=[old("three")])
    assert contents(place) == before
    said = refusal.value.what
    assert "/sys/missing: No such file or directory" in said
    undone = [line.strip() for line in said.splitlines()[1:]]
    assert undone == ["undone by: write the file /etc/mine",
                      "undone by: write the file /etc/mine", "undone by: rm -f /etc/new.conf",
                      "undone by: echo old > /sys/one"]


def test_what_went_well_stays(place: Path) -> None:
    host = Machine(place, yes=True)
    host.agree("change")
    with host.together():
        host.write("/sys/one", "new", undo=[old("one")])
    with pytest.raises(Refused), host.together():
        host.write("/sys/two", "new", undo=[old("two")])
        host.write("/sys/none", "new")
    assert contents(place) == {"one": "new", "two": "old\n", "three": "old\n"}


def test_a_change_before_the_user_agreed_is_a_bug(place: Path) -> None:
    with pytest.raises(AssertionError):
        Machine(place, yes=True).write("/sys/one", "new")


def test_an_interrupt_undoes(place: Path) -> None:
    def interrupted(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        if data == b"new" and path.name == "two":
            raise KeyboardInterrupt

    host = Machine(place, yes=True, attributes=interrupted)
    host.agree("change")
    with pytest.raises(KeyboardInterrupt), host.together():
        host.write("/sys/one", "new", undo=[old("one")])
        host.write("/sys/two", "new", undo=[old("two")])
    assert contents(place) == {"one": "old\n", "two": "old\n", "three": "old\n"}


def test_one_at_a_time(place: Path) -> None:
    host = Machine(place, yes=True)
    host.agree("change")
    handle = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run"), host.together():
            host.write("/sys/one", "new")
    finally:
        os.close(handle)
    with host.together(), host.together():
        host.write("/sys/one", "new")
    assert contents(place)["one"] == "new"


@pytest.mark.parametrize(("number", "hint"), [
    (errno.EACCES, "sudo"), (errno.EROFS, "read-only here"), (errno.EBUSY, "uses it"),
    (errno.ENODEV, "dmesg"), (errno.EIO, None)])
def test_refusals_have_their_cure(place: Path, number: int, hint: str | None) -> None:
    def refusing(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    host = Machine(place, yes=True, attributes=refusing)
    host.agree("change")
    with pytest.raises(Refused) as refusal:
        host.write("/sys/one", "new")
    assert refusal.value.number == number
    assert os.strerror(number) in refusal.value.what
    assert (hint is None) == (refusal.value.hint is None)
    assert hint is None or hint in (refusal.value.hint or "")


def test_a_write_that_never_ends(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(place / "sys/hangs")  # opening it waits for a reader, as a driver for its last user
    monkeypatch.setattr(machine, "PATIENCE", 0.3)
    host = Machine(place, yes=True)
    host.agree("change")
    started = time.monotonic()
    with pytest.raises(Refused) as refusal, host.together():
        host.write("/sys/one", "new", undo=[old("one")])
        host.write("/sys/hangs", "x")
    assert time.monotonic() - started < 5
    assert "did not come back" in refusal.value.what
    assert contents(place)["one"] == "old\n"
    os.close(os.open(place / "sys/hangs", os.O_RDWR | os.O_NONBLOCK))


def test_a_real_write_says_what_the_kernel_says(place: Path) -> None:
    with pytest.raises(OSError) as refusal:
        machine.store(place / "sys", b"x")
    assert refusal.value.errno == errno.EISDIR
    machine.store(place / "sys/one", b"x")
    assert contents(place)["one"] == "x"
    with pytest.raises(FileNotFoundError):
        machine.store(place / "sys/none", b"x")
    assert not (place / "sys/none").exists()


def test_a_full_or_read_only_place(place: Path) -> None:
    host = Machine(place, yes=True)
    host.agree("change")
    (place / "etc").write_text("no directory")
    with pytest.raises(Refused):
        host.place("/etc/modprobe.d/x.conf", "text")
    assert (place / "etc").read_text() == "no directory"


def test_links_stay_below_the_root(place: Path) -> None:
    (place / "opt").mkdir()
    (place / "opt/file").write_text("inside")
    (place / "absolute").symlink_to("/opt")
    (place / "outside").symlink_to("/opt/file")
    (place / "up").symlink_to("../../../../opt/file")
    (place / "circle").symlink_to("/circle")
    host = Machine(place)
    assert [host.text(name) for name in ("/absolute/file", "/outside", "/up")] == ["inside"] * 3
    assert host.real("/absolute/file") == "/opt/file"
    assert host.names("/absolute") == ["file"]
    assert host.text("/circle") is None
    assert host.link("/outside") == "file"


def test_programs_are_asked_in_english_and_only_so_long(tmp_path: Path) -> None:
    for name, text in (("says", 'echo "$LC_ALL $LANG $PWD $1"; echo wrong >&2; exit 3'),
                       ("hangs", f"sleep 61 & echo $! > {tmp_path}/pid; wait")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    programs = Programs(search=str(tmp_path))
    found = programs.run(["says", "a b"], 10)
    assert (found.status, found.out, found.err) == (3, "C C / a b\n", "wrong\n")
    with pytest.raises(Missing):
        programs.run(["nvidia-smi"], 10)
    started = time.monotonic()
    with pytest.raises(TooLong):
        programs.run(["hangs"], 0.5)
    assert time.monotonic() - started < 10
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("a child of the program lives on")


def test_programs_of_another_root_run_in_it(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/tool").write_bytes(b"")
    (tmp_path / "usr/bin/tool").chmod(0o755)
    programs = Programs(str(tmp_path))
    assert programs.find("tool") == "/usr/bin/tool"
    assert programs.find("sh") is None
    found = programs.run(["tool"], 10)  # chroot(8) says that it cannot be started there
    assert found.status in (125, 126, 127)
    assert "chroot" in found.err


def test_links_to_programs_stay_below_the_root(tmp_path: Path) -> None:
    """Debian's nvidia-smi is a link to /etc/alternatives, and absolute."""
    for name in ("usr/bin", "etc/alternatives", "usr/lib/nvidia"):
        (tmp_path / name).mkdir(parents=True)
    real = tmp_path / "usr/lib/nvidia/nvidia-smi"
    real.touch(0o755)
    (tmp_path / "etc/alternatives/nvidia-smi").symlink_to("/usr/lib/nvidia/nvidia-smi")
    (tmp_path / "usr/bin/nvidia-smi").symlink_to("/etc/alternatives/nvidia-smi")
    (tmp_path / "usr/bin/sh").symlink_to("/bin/sh")  # is there, but not below this root
    programs = Programs(str(tmp_path))
    assert programs.find("nvidia-smi") == "/usr/bin/nvidia-smi"
    assert programs.find("sh") is None


def test_what_programs_get_of_the_user_s_environment(tmp_path: Path) -> None:
    (tmp_path / "says").write_text("#!/bin/sh\nenv\n")
    (tmp_path / "says").chmod(0o755)
    wanted = {"https_proxy": "http://proxy:1", "NO_PROXY": "x", "CONTAINERD_ADDRESS": "/run/c.sock",
              "CONTAINERD_NAMESPACE": "k8s.io", "CONTAINER_RUNTIME_ENDPOINT": "unix:///c",
              "IMAGE_SERVICE_ENDPOINT": "unix:///i", "CRI_CONFIG_FILE": "/etc/crictl.yaml"}
    other = {"LANG": "de_DE", "LD_PRELOAD": "/x.so", "PATH": "/mine", "HOME": "/me"}
    said = Programs(search=str(tmp_path), environment={**wanted, **other}).run(["says"], 10).out
    found = dict(line.split("=", 1) for line in said.splitlines())
    assert {name: found.get(name) for name in wanted} == wanted
    assert "LD_PRELOAD" not in found and (found["LANG"], found["HOME"]) == ("C", "/")


def test_a_program_that_changes_and_fails(tmp_path: Path) -> None:
    host = Machine(tmp_path, yes=True, search="/bin:/usr/bin")
    host.agree("change")
    with pytest.raises(UserError, match="status 2"), host.together():
        host.run(["sh", "-c", f"echo here > {tmp_path}/made"],
                 undo=[Run(("rm", f"{tmp_path}/made"))])
        host.run(["sh", "-c", "echo no >&2; exit 2"])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("script", "atomic", "stays"), [
    ("touch $0; exit 1", False, False), ("touch $0; sleep 30", False, False),
    ("touch $0; exit 1", True, True)])
def test_what_a_failed_program_did_half_way_is_undone(tmp_path: Path, script: str, atomic: bool,
                                                      stays: bool) -> None:
    host = Machine(tmp_path, yes=True, search="/bin:/usr/bin")
    host.agree("change")
    made = str(tmp_path / "made")
    with pytest.raises(UserError), host.together():
        host.run(["sh", "-c", script, made], timeout=1, undo=[Run(("rm", made))], atomic=atomic)
    assert (tmp_path / "made").exists() is stays


def test_a_program_that_is_not_there_has_done_nothing(tmp_path: Path) -> None:
    host = Machine(tmp_path, yes=True, search="/bin:/usr/bin")
    host.agree("change")
    with pytest.raises(Missing) as failure, host.together():
        host.run(["no-such-program"], undo=[Run(("false",))])
    assert "undone" not in failure.value.what


def test_a_write_that_is_given_up_may_be_done(place: Path) -> None:
    def slow(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        if data == b"new":
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), str(path))

    host = Machine(place, yes=True, attributes=slow)
    host.agree("change")
    with pytest.raises(Refused), host.together():
        host.write("/sys/one", "new", undo=[old("one")])
    assert contents(place)["one"] == "old\n"


def test_lines_that_can_be_pasted(tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("x")
    for change in (Write(f"{tmp_path}/a file", "some words\n"), Write(f"{tmp_path}/a file", "\n")):
        subprocess.run(["sh", "-c", change.lines()[0]], check=True)
        assert (tmp_path / "a file").read_text() == f"{change.text.strip()}\n"
    subprocess.run(["sh", "-c", Remove(f"{tmp_path}/a file").lines()[0]], check=True)
    assert not (tmp_path / "a file").exists()
    assert Place("/etc/x", "one\n\ntwo\n").lines() == ["write the file /etc/x:", "    one", "",
                                                       "    two"]
    assert changes.below("/", "/etc/x") == "/etc/x"


def test_a_signal_undoes(place: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from katagpu.host import cli, machine
from katagpu.host.changes import Write
from katagpu.host.command import Answer, new
class Module:
    @staticmethod
    def add(commands):
        new(commands, "toy", Module.run, "change and wait")
    @staticmethod
    def run(host, given):
        host.agree("change")
        with host.together():
            host.write("/sys/one", "new", undo=[Write("/sys/one", "old\\n")])
            print("ready", flush=True)
            signal.pause()
        return Answer()
cli.COMMANDS = (Module,)
sys.exit(cli.main(["toy", "--yes", "--root", {str(place)!r}]))
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True,
                             cwd=Path(machine.__file__).parents[2])
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert contents(place)["one"] == "new"
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "undone by: echo old > /sys/one" in said
    assert "Traceback" not in said
    assert contents(place)["one"] == "old\n"
