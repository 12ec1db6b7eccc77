"""The sandbox, as root and as an ordinary user: what is seen in it, and what it leaves behind.

As root, the whole file runs once more as a user that is made for it, and test_tree.py with it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu import sandbox
from katagpu.enter import ANSWERS, CAPABILITIES, HIDDEN_DIRECTORIES, HIDDEN_FILES
from katagpu.errors import StepError, UserError
from katagpu.run import CLEAN
from katagpu.sandbox import ENTER, Bind, Entry, Form, Root
from katagpu.tree import Capture
from tests import fakehost

ROOT = os.geteuid() == 0
USR = Bind(source=Path("/usr"), target="/usr")
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")


@pytest.fixture(autouse=True)
def nothing_stays_mounted(tmp_path: Path) -> Iterator[None]:
    """No test leaves a mount in the namespace of the tests."""
    yield
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    sandbox.remove(tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A root file system that has its programs from the host's /usr.

    Rootless, the host's whole root cannot be a lower directory: it has mounts of its own.
    """
    path = tmp_path / "base"
    for name in ("etc", "usr", "opt", "data/deep"):
        (path / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (path / name).symlink_to(f"usr/{name}")
    (path / "etc" / "hostname").write_text("base\n")
    return path


@pytest.fixture
def entry(tmp_path: Path, base: Path) -> Callable[..., Entry]:
    """Makes entries on such a root, with an upper directory in `tmp_path`."""
    made = 0

    def make(*argv: str, **more: Any) -> Entry:
        nonlocal made
        made += 1
        scratch = tmp_path / f"entry{made}"
        scratch.mkdir()
        roots = more.pop("roots", [Root(lower=(base,), upper=tmp_path / "upper")])
        binds = [*([] if more.get("stay") else [USR]), *more.pop("binds", [])]
        return Entry(argv=argv, roots=roots, binds=binds, scratch=scratch, **more)

    return make


@pytest.fixture
def said(entry: Callable[..., Entry]) -> Callable[..., str]:
    """What a shell script in a sandbox says."""

    def say(script: str, **more: Any) -> str:
        return sandbox.enter(entry("sh", "-ec", script, **more), capture=True).stdout.decode()

    return say


Make = Callable[..., Entry]
Say = Callable[..., str]


# what is seen


def test_it_has_namespaces_of_its_own(said: Say) -> None:
    inside = said("cd /proc/self/ns; for n in mnt pid ipc uts net; do readlink $n; done").split()
    outside = [os.readlink(f"/proc/self/ns/{name}")  # noqa: PTH115 (no path)
               for name in ("mnt", "pid", "ipc", "uts", "net")]
    assert not set(inside) & set(outside)


def test_the_host_name_is_fixed(said: Say) -> None:
    before = socket.gethostname()
    assert said("cat /proc/sys/kernel/hostname") == "katagpu\n"
    assert socket.gethostname() == before


def test_it_is_root_and_sees_its_own_processes_only(said: Say) -> None:
    assert said("id -u; id -g; ls /proc | grep -c '^[0-9]'; cat /proc/1/cmdline | tr '\\0' ' '") \
        .split("\n")[:2] == ["0", "0"]
    assert int(said("ls /proc | grep -c '^[0-9]'")) < 8


def test_the_environment_is_clean(
    entry: Make, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "1")
    found = sandbox.enter(entry("env", env={"EXTRA": "2"}), capture=True).stdout.decode()
    assert dict(line.split("=", 1) for line in found.splitlines()) == {
        **CLEAN, "HOME": "/root", "EXTRA": "2"}


def test_no_file_of_ours_is_open_in_it(entry: Make) -> None:
    found = sandbox.enter(entry("ls", "/proc/self/fd"), capture=True).stdout.split()
    assert found == [b"0", b"1", b"2", b"3"], "the last is the directory that ls reads"


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of the host's loopback that takes connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


CONNECT = 'exec 3<>"/dev/tcp/127.0.0.1/$0" && echo connected'


def test_there_is_no_network(entry: Make, said: Say, listener: int) -> None:
    interfaces = said("sed 1,2d /proc/net/dev")
    assert [line.split(":")[0].strip() for line in interfaces.splitlines()] == ["lo"]
    found = sandbox.enter(entry("bash", "-c", CONNECT, str(listener)), capture=True, check=False)
    assert found.status != 0 and found.stdout == b""


def test_a_fetch_step_has_the_hosts_network(entry: Make, listener: int) -> None:
    found = sandbox.enter(entry("bash", "-c", CONNECT, str(listener), network=True), capture=True)
    assert found.stdout == b"connected\n"


def test_sys_is_read_only_and_so_is_what_hides_the_hosts_devices(said: Say) -> None:
    assert said("touch /sys/x 2>/dev/null || echo refused; ls /sys | grep -c bus") == "refused\n1\n"
    for hidden in HIDDEN_DIRECTORIES:
        assert said(f"! [ -e /{hidden} ] || ! touch /{hidden}/x 2>/dev/null") == ""


def test_the_hosts_settings_cannot_be_written(said: Say) -> None:
    assert said("echo 1 2>/dev/null > /proc/sys/kernel/panic || echo refused") == "refused\n"
    assert said("[ ! -e /proc/sysrq-trigger ] || ! (: > /proc/sysrq-trigger) 2>/dev/null") == ""


def test_the_devices_are_few_and_work(said: Say) -> None:
    assert said("ls /dev").split() == sorted(
        ["fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
         "urandom", "zero"])
    assert said("stat -c '%n %F %t:%T' /dev/null /dev/zero /dev/full /dev/random /dev/urandom") \
        == "".join(f"/dev/{name} character special file 1:{minor}\n" for name, minor in (
            ("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)))
    assert said("echo x > /dev/null; head -c 3 /dev/zero | wc -c; stat -c %a /dev/shm") \
        == "3\n1777\n"
    assert said("echo x 2>/dev/null > /dev/full || echo full") == "full\n"
    assert said("[ -c /dev/ptmx ] && [ ! -e /dev/pts/0 ] && echo own") == "own\n"


def test_capabilities_that_reach_the_host_are_gone(said: Say) -> None:
    found = said("grep -E 'Cap(Bnd|Prm|Eff)' /proc/self/status")
    dropped = sum(1 << number for number in CAPABILITIES)
    for line in found.splitlines():
        assert int(line.split()[1], 16) & dropped == 0, line
    assert int(found.split()[1], 16) & (1 << 21 | 1 << 18 | 1), "sys_admin, sys_chroot, chown stay"
    assert said("mknod /x c 1 3 2>/dev/null || echo refused") == "refused\n"


def test_tmp_and_run_are_its_own_and_leave_nothing(said: Say, tmp_path: Path) -> None:
    (tmp_path / "on-the-host").write_text("")
    assert said("ls -A /tmp /run; echo x > /tmp/x; echo x > /run/x; stat -c %a /tmp /run") == \
        "/run:\n\n/tmp:\n1777\n755\n"
    assert list((tmp_path / "upper" / "tmp").iterdir()) == []


def test_the_layers_below_are_not_written(said: Say, base: Path, tmp_path: Path) -> None:
    said("echo changed > /etc/hostname; echo x > /new; rm -r /data; ! touch /usr/new 2>/dev/null")
    assert (base / "etc" / "hostname").read_text() == "base\n"
    assert (base / "data" / "deep").is_dir() and not (base / "new").exists()
    assert (tmp_path / "upper" / "new").read_text() == "x\n"
    assert said("cat /new /etc/hostname; ls /data 2>/dev/null || echo gone") == \
        "x\nchanged\ngone\n", "the next program goes on with it"


def test_without_an_upper_directory_it_is_read_only(
    entry: Make, base: Path, tmp_path: Path,
) -> None:
    for name in ("proc", "sys", "dev", "tmp", "run"):
        (base / name).mkdir()
    made = entry("sh", "-c", "touch /x 2>/dev/null || echo refused", roots=[Root(lower=(base,))])
    assert sandbox.enter(made, capture=True).stdout == b"refused\n"
    lower = tuple(tmp_path / name for name in ("top", "bottom"))
    for path in lower:
        path.mkdir()
        (path / "both").write_text(path.name)
        (path / path.name).write_text("")
    made = entry(roots=[Root(lower=lower, special=False)])
    script = 'cd "$0"; ls; cat both; touch x 2>/dev/null || echo refused'
    made = Entry(argv=["sh", "-c", script, str(made.mount)], roots=made.roots,
                 scratch=made.scratch, stay=True)
    found = sandbox.enter(made, capture=True).stdout.decode().split()
    assert found == ["both", "bottom", "top", "toprefused"]


def test_binds(entry: Make, tmp_path: Path) -> None:
    shared = Path("/dev/shm")  # often nosuid and nodev, which a user namespace must keep
    place = shared if os.access(shared, os.W_OK) else tmp_path
    readable, writable = place / f"katagpu-r{os.getpid()}", tmp_path / "writable"
    for directory in (readable, writable):
        directory.mkdir()
        (directory / "file").write_text("x\n")
    try:
        made = entry("sh", "-c", "cat /a/new/r/file /one; touch /a/new/r/no; (echo y > /one); "
                     "echo y > /w/new", binds=[
                         Bind(source=readable, target="/a/new/r"),
                         Bind(source=writable, target="/w", writable=True),
                         Bind(source=readable / "file", target="/one")])
        assert sandbox.enter(made, capture=True).stdout == b"x\nx\n"
        assert [path.name for path in readable.iterdir()] == ["file"]
        assert (readable / "file").read_text() == "x\n"
        assert (writable / "new").read_text() == "y\n"
    finally:
        shutil.rmtree(readable)


def test_several_roots_and_a_program_of_the_host(entry: Make, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.mkdir()
        (path / path.name).write_text(path.name)
    (one / "sub").mkdir()
    made = entry(roots=[Root(lower=(one,), upper=tmp_path / "u1", special=False),
                        Root(lower=(two,), upper=tmp_path / "u2", target="/sub", special=False)])
    mount = made.mount
    made = Entry(argv=["sh", "-ec", f"cat {mount}/one {mount}/sub/two; echo new > {mount}/sub/new"],
                 roots=made.roots, scratch=made.scratch, stay=True)
    assert sandbox.enter(made, capture=True).stdout == b"onetwo"
    assert (tmp_path / "u2" / "new").read_text() == "new\n"
    assert list(mount.iterdir()) == []


def test_odd_paths(tmp_path: Path) -> None:
    odd = tmp_path / "a,b:c d\\e=\"f"
    for name in ("one", "two", "scratch"):
        (odd / name).mkdir(parents=True)
        (odd / name / name).write_text("")
    made = Entry(argv=(), roots=(), scratch=odd / "scratch")
    made = Entry(argv=["sh", "-c", 'cd "$0"; ls; echo x > new', str(made.mount)], stay=True,
                 scratch=made.scratch,
                 roots=[Root(lower=(odd / "one", odd / "two"), upper=odd / "upper", special=False)])
    assert sandbox.enter(made, capture=True).stdout == b"one\ntwo\n"
    assert (odd / "upper" / "new").read_text() == "x\n"


def test_a_builder_of_root_file_systems_works_in_it(said: Say) -> None:
    assert said("""
        mkdir /inner; mount --rbind / /inner
        mount -t proc proc /inner/proc; mount -t tmpfs tmpfs /inner/tmp
        chroot /inner sh -ec 'test -d /proc/1; echo x > /dev/null; id -u'
        umount /inner/proc
        unshare --mount true && echo nested
    """) == "0\nnested\n"


def test_the_umask_and_the_upper_directory(entry: Make, tmp_path: Path) -> None:
    found = []
    for number, mask in enumerate((0o022, 0o077, 0o000)):
        lower, upper = tmp_path / f"lower{number}", tmp_path / f"upper{number}"
        lower.mkdir()
        old = os.umask(mask)
        try:
            sandbox.enter(entry("true", stay=True, roots=[Root(lower=(lower,), upper=upper)],
                                binds=[Bind(source=ENTER, target="/a/b/file")]))
        finally:
            os.umask(old)
        assert upper.stat().st_mode & 0o777 == 0o755
        found.append(sandbox.capture(upper, tmp_path / "blob", Form(overlay=True)))
    assert len(set(found)) == 1


# how it ends


def test_statuses_and_signals_come_through(entry: Make) -> None:
    def status(script: str) -> int:
        return sandbox.enter(entry("sh", "-c", script), check=False).status

    assert [status("exit 0"), status("exit 3"), status("kill -TERM $$")] == [0, 3, 128 + 15]
    assert [status("exit 124"), status("exit 125")] == [124, 125], "no refusals of ours"


def test_a_failure_shows_the_last_lines_and_the_log(entry: Make, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(StepError) as failed:
        sandbox.enter(entry("sh", "-c", "echo the reason >&2; exit 3"), log=log)
    assert "sh failed in the sandbox (status 3)" in str(failed.value)
    assert "the reason" in str(failed.value)
    assert str(log) in str(failed.value.hint)
    assert log.read_text().startswith("# in the sandbox: sh -c 'echo the reason")
    with pytest.raises(StepError, match="the reason"):
        sandbox.enter(entry("sh", "-c", "echo the reason >&2; exit 3"))


def test_a_missing_program_or_directory_is_named(entry: Make) -> None:
    with pytest.raises(StepError, match="cannot run no-such-program in /: No such file"):
        sandbox.enter(entry("no-such-program"))
    with pytest.raises(StepError, match="cannot run true in /nowhere"):
        sandbox.enter(entry("true", cwd="/nowhere"))


def test_input_and_background_processes(entry: Make) -> None:
    made = entry("sh", "-c", "cat; sleep 1000 & setsid sleep 1000 &")
    started = time.monotonic()
    assert sandbox.enter(made, stdin=b"hello", capture=True).stdout == b"hello"
    assert time.monotonic() - started < 60, "what runs on ends with the program"


SCRIPT = """
import json, sys
from pathlib import Path
from katagpu.sandbox import Bind, Entry, Root, enter
from katagpu.errors import KatagpuError
scratch, marker = Path(sys.argv[1]), sys.argv[2]
roots = [Root(lower=(scratch / "base",), upper=scratch / "upper")]
try:
    enter(Entry(argv=["sh", "-c", "setsid sleep $0 & sleep $0; true", marker], roots=roots,
                binds=[Bind(source=Path("/usr"), target="/usr")], scratch=scratch))
except KatagpuError as error:
    sys.exit(f"{type(error).__name__}: {error.what}")
"""


def table() -> dict[int, tuple[int, str, list[str]]]:
    """All processes: parent, name, words."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (path / "stat").read_text().partition("(")[2].rpartition(")")
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found[int(path.name)] = (int(rest.split()[1]), name, words)
    return found


def sleepers(marker: str) -> list[int]:
    """The processes that sleep so many seconds."""
    return [pid for pid, (_parent, name, words) in table().items()
            if name == "sleep" and marker in words]


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; does it come true?"""
    end = time.monotonic() + 20
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("victim", ["python", "unshare", "init", "program"])
def test_killing_any_of_them_ends_all(
    tmp_path: Path, base: Path, repository: Path, victim: str,
) -> None:
    assert base == tmp_path / "base"
    marker = f"70.{os.getpid()}{time.monotonic_ns() % 1_000_000_000}"
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), marker], cwd=repository,
                          stderr=subprocess.PIPE, text=True) as python:
        assert until(lambda: len(sleepers(marker)) == 2)
        known = table()
        unshare = next(pid for pid, (parent, name, _words) in known.items()
                       if parent == python.pid and name == "unshare")
        init = next(pid for pid, (parent, _name, _words) in known.items() if parent == unshare)
        program = next(pid for pid, (parent, _name, _words) in known.items() if parent == init)
        os.kill({"python": python.pid, "unshare": unshare, "init": init,
                 "program": program}[victim], signal.SIGKILL)
        _out, error = python.communicate(timeout=30)
    assert until(lambda: not sleepers(marker))
    if victim != "python":
        assert python.returncode == 1 and error.startswith("StepError: sh failed in the sandbox")


@pytest.mark.skipif(not ROOT, reason="the same as root, and simpler there")
def test_it_does_not_start_when_python_is_already_dead(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    ours, theirs = socket.socketpair()
    with theirs:
        spec.write_text(json.dumps({
            "line": theirs.fileno(), "roots": [], "argv": ["touch", str(tmp_path / "started")],
            "hostname": "x", "cwd": "/", "env": {"PATH": os.defpath}}))
        ours.close()
        argv = [*sandbox.namespaces(), sys.executable, "-I", str(ENTER), "run", str(spec)]
        assert subprocess.run(argv, pass_fds=[theirs.fileno()]).returncode == sandbox.REFUSED
    assert not (tmp_path / "started").exists()


# files of other owners


def test_the_upper_directory_is_captured_with_its_owners_and_removed(
    said: Say, tmp_path: Path, repository: Path,
) -> None:
    said("mkdir /own /own/deep; echo x > /own/deep/f; chown -R 33:44 /own; "
         "chmod 700 /own /own/deep; rm /etc/hostname; mkdir -p /opt; : > /opt/new; "
         "chmod 000 /opt/new")
    blob, target = tmp_path / "blob", tmp_path / "target"
    found = sandbox.capture(tmp_path / "upper", blob, Form(overlay=True))
    assert sandbox.unpack(blob, target, overlay=True) == found
    if ROOT:
        owner = (target / "own" / "deep" / "f").stat()
        assert (owner.st_uid, owner.st_gid) == (33, 44)
        assert Capture(target, overlay=True).write(io.BytesIO()) == found
    else:
        with pytest.raises(PermissionError):
            shutil.rmtree(tmp_path / "upper")
    assert sandbox.capture(target, tmp_path / "again", Form(overlay=True)) == found
    for path in (tmp_path / "upper", target, tmp_path / "entry1"):
        sandbox.remove(path)
        assert not path.exists()


def test_remove_takes_files_links_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    for name in ("file", "link", "nothing"):
        sandbox.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_remove_is_patient_with_processes_that_are_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tree").mkdir()
    real, tries = shutil.rmtree, 0

    def late(path: Path) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        real(path)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", late)
        sandbox.remove(tmp_path / "tree")
        assert tries == 3
        patched.setattr(sandbox, "PATIENCE", 2)
        patched.setattr(sandbox, "_remove", lambda path: late(path))
        tries = -10
        with pytest.raises(OSError, match="not empty"):
            sandbox.remove(tmp_path)


def test_a_refused_operation_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sandbox.capture(tmp_path / "empty", tmp_path / "blob", Form())
    with pytest.raises(StepError, match=r"unpack of .*blob failed.*\n.*File exists"):
        sandbox.unpack(tmp_path / "blob", tmp_path / "empty", overlay=False)
    with pytest.raises(StepError, match=r"capture of .*\n(.*\n)*.*No such file"):
        sandbox.capture(tmp_path / "nowhere", tmp_path / "blob", Form(), log=tmp_path / "log")


# refusals, each with its cure


def test_the_sandbox_opens_here() -> None:
    sandbox.probe()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host that refuses namespaces to an ordinary user; its settings are in the directory."""
    monkeypatch.setattr(sandbox, "rootless", lambda: True)
    monkeypatch.setattr(sandbox, "namespaces",
                        lambda **_kind: ["sh", "-c", "echo unshare: no >&2; exit 1"])
    names = {"APPARMOR": "kernel/apparmor_restrict_unprivileged_userns",
             "CLONE": "kernel/unprivileged_userns_clone", "MAXIMUM": "user/max_user_namespaces"}
    for constant, name in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        monkeypatch.setattr(sandbox, constant, tmp_path / name)
    entries = f"nobody-else:1:1\n{os.geteuid()}:100000:65536\n"
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text(entries)
    monkeypatch.setattr(sandbox, "SUBORDINATE", (tmp_path / "subuid", tmp_path / "subgid"))
    monkeypatch.setattr(shutil, "which", lambda name, **_more: f"/usr/bin/{name}")
    return tmp_path


def cure() -> str:
    """The cure that `probe` gives."""
    with pytest.raises(UserError, match=r"no user namespace .* can be opened here") as error:
        sandbox.probe()
    assert "unshare: no" in error.value.what
    return str(error.value.hint)


@pytest.mark.parametrize(("name", "value", "setting"), [
    ("kernel/apparmor_restrict_unprivileged_userns", "1",
     "kernel.apparmor_restrict_unprivileged_userns=0"),
    ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
    ("user/max_user_namespaces", "0", "user.max_user_namespaces=10000")])
def test_a_setting_of_the_kernel(refused: Path, name: str, value: str, setting: str) -> None:
    (refused / name).write_text(f"{value}\n")
    assert cure() == f"sudo sysctl {setting}, or build as root"
    (refused / name).write_text("9\n")
    assert "sysctl" not in cure()


@pytest.mark.parametrize("name", ["subuid", "subgid"])
def test_no_subordinate_ids(refused: Path, name: str) -> None:
    assert "usermod" not in cure()
    (refused / name).write_text(f"x{os.geteuid()}:1:1\n")
    assert cure().startswith("sudo usermod --add-subuids 100000-165535 --add-subgids")
    (refused / name).unlink()
    assert cure().startswith("sudo usermod --add-subuids 100000-165535 --add-subgids")


def test_no_newuidmap(refused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match="newuidmap") as error:
        sandbox.probe()
    assert error.value.hint == "sudo apt-get install uidmap"


def test_entering_without_namespaces_gives_the_cure_too(refused: Path, entry: Make) -> None:
    (refused / "user" / "max_user_namespaces").write_text("0\n")
    with pytest.raises(UserError, match="unshare: no") as error:
        sandbox.enter(entry("true"))
    assert "user.max_user_namespaces=10000" in str(error.value.hint)


def test_root_without_the_right_to_mount(refused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "rootless", lambda: False)
    with pytest.raises(UserError, match="lets root open no mount") as error:
        sandbox.probe()
    assert "CAP_SYS_ADMIN" in str(error.value.hint)


def test_a_missing_lower_directory_is_named(entry: Make, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"no sandbox for true: cannot mount an overlay .*No such"):
        sandbox.enter(entry("true", roots=[Root(lower=(tmp_path / "none",), upper=tmp_path / "u")]))


@pytest.mark.root
@needs_root
def test_a_store_on_an_overlay_is_refused_with_the_cure(base: Path, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "store"):
        (tmp_path / name).mkdir()
    place = tmp_path / "store"
    options = ",".join(f"{name}dir={tmp_path}/{name}" for name in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", place], check=True)
    try:
        (place / "scratch").mkdir()
        with pytest.raises(UserError) as error:
            sandbox.enter(Entry(argv=["true"], scratch=place / "scratch",
                                roots=[Root(lower=(base,), upper=place / "upper")]))
        assert f"whose files are in {place}/upper, on overlay: Invalid argument" in error.value.what
        assert "KATAGPU_STORE" in str(error.value.hint)
    finally:
        subprocess.run(["umount", place], check=True)


# the same as an ordinary user


VISIBLE = """
import os, subprocess, sys
user, group, names = sys.argv[1:4]
def mount(*words):
    subprocess.run(["mount", *words], check=True)
hidden = {}
for name in dict.fromkeys(names.split(":")):
    parents = [name[:at] for at in range(1, len(name)) if name[at] == "/"]
    for parent in parents:
        if not os.stat(parent).st_mode & 1:
            hidden.setdefault(parent, []).append(name)
            break
mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/mnt")
for number, (parent, below) in enumerate(hidden.items()):
    for each, name in enumerate(below):
        os.makedirs(f"/mnt/{number}/{each}")
        mount("--rbind", name, f"/mnt/{number}/{each}")
    mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", parent)
    for each, name in enumerate(below):
        os.makedirs(name, exist_ok=True)
        mount("--rbind", f"/mnt/{number}/{each}", name)
mount("-t", "tmpfs", "-o", "mode=1777,nosuid,nodev", "tmpfs", "/dev/shm")
os.execvp("setpriv", ["setpriv", "--reuid", user, "--regid", group, "--init-groups", "--",
                      *sys.argv[4:]])
"""


@pytest.fixture
def user(tmp_path: Path) -> Iterator[str]:
    """An ordinary user without subordinate ids."""
    name = f"katagpu{os.getpid()}"
    home = Path(f"/tmp/{name}")
    home.mkdir(mode=0o755)
    subprocess.run(["useradd", "--system", "--user-group", "--no-create-home",
                    "--home-dir", home, "--shell", "/bin/sh", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["userdel", name], check=False, capture_output=True)
        subprocess.run(["groupdel", name], check=False, capture_output=True)
        shutil.rmtree(home)


def as_user(user: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program as this user, with Python and this environment within reach.

    Directories that only root may pass are replaced by open ones, in a mount namespace.
    """
    home = f"/tmp/{user}"
    within = ":".join(dict.fromkeys([sys.base_prefix, sys.prefix]))
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--", sys.executable, "-c", VISIBLE,
         user, user, within, "env", "-i", f"HOME={home}", f"PATH={CLEAN['PATH']}",
         "PYTHONDONTWRITEBYTECODE=1", *argv], cwd=home, capture_output=True, text=True)


@pytest.mark.root
@needs_root
@pytest.mark.skipif(shutil.which("newuidmap") is None, reason="needs newuidmap (uidmap)")
def test_all_of_this_as_an_ordinary_user(user: str, repository: Path) -> None:
    home = Path("/tmp", user)
    for name in ("katagpu", "tests"):
        shutil.copytree(repository / name, home / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(repository / "pyproject.toml", home)
    for path in [home, *home.rglob("*")]:
        shutil.chown(path, user, user)
        path.chmod(0o755 if path.is_dir() else 0o644)

    probe = as_user(user, sys.executable, "-c", "from katagpu import sandbox; sandbox.probe()")
    assert "UserError: no user namespace with subordinate ids" in probe.stderr
    assert f"--add-subgids 100000-165535 {user}, or build as root" in probe.stderr

    ids = "2000000000-2000065535"
    subprocess.run(["usermod", "--add-subuids", ids, "--add-subgids", ids, user], check=True)
    ran = as_user(user, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                  "--basetemp", f"{home}/basetemp", "tests/test_sandbox.py", "tests/test_tree.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "passed" in ran.stdout
    if (home / "basetemp").exists():
        subprocess.run(["rm", "-rf", home / "basetemp"], check=True)



# a host with a GPU of its own

LOOK = """cd /
find sys/bus/pci sys/module sys/class/drm sys/firmware tmp -mindepth 1 2> /dev/null
cat proc/version proc/modules proc/sys/kernel/modprobe 2> /dev/null; true"""


def seen(entry: Make, monkeypatch: pytest.MonkeyPatch, program: Path) -> str:
    """What is seen in a sandbox of a host that has all that `fakehost` has."""
    monkeypatch.setattr(sandbox, "ENTER", program)
    return sandbox.enter(entry("sh", "-c", LOOK), capture=True).stdout.decode()


def test_nothing_of_a_host_with_a_driver_is_seen(
    entry: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loaded modules, kernel, modprobe, nouveau, a GPU, an X server, Secure Boot."""
    (base / "tmp").mkdir()
    hidden = seen(entry, monkeypatch, fakehost.program(tmp_path))
    assert hidden == "".join(ANSWERS[name] for name in ("proc/version", "proc/sys/kernel/modprobe"))
    shown = seen(entry, monkeypatch, fakehost.program(tmp_path, hiding=False))
    for files in fakehost.FAKES.values():
        for path, text in files.items():
            if path.startswith(("sys/", "tmp/")):
                assert path in shown.splitlines()
            elif "/comm" not in path:
                assert text in shown


@pytest.mark.parametrize("hidden", [*HIDDEN_FILES, *HIDDEN_DIRECTORIES, *ANSWERS])
def test_each_place_is_hidden_by_its_own_entry(
    entry: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: str,
) -> None:
    (base / "tmp").mkdir()
    program = fakehost.program(tmp_path)
    whole = seen(entry, monkeypatch, program)
    text = program.read_text()
    program.write_text(text.replace("hide_host, mount = enter", f"""
enter.HIDDEN_DIRECTORIES = tuple(n for n in enter.HIDDEN_DIRECTORIES if n != {hidden!r})
enter.HIDDEN_FILES = tuple(n for n in enter.HIDDEN_FILES if n != {hidden!r})
enter.ANSWERS = {{n: text for n, text in enter.ANSWERS.items() if n != {hidden!r}}}
hide_host, mount = enter""", 1))
    assert seen(entry, monkeypatch, program) != whole


def test_the_developers_variables_are_not_seen(
    said: Say, monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SYSSRC", "KBUILD_OUTPUT", "DISPLAY", "MAKEFLAGS"):
        monkeypatch.setenv(name, "x")
    assert said("env | grep -E 'SYSSRC|KBUILD|MAKEFLAGS|DISPLAY' || echo none") == "none\n"
