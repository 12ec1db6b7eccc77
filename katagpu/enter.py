"""Runs inside fresh namespaces: builds the root, enters it, and is PID 1 there.

Started by `sandbox` as a script, with nothing but the standard library, so that it works from any
directory and interpreter. Everything is mounted inside the namespace: when its PID 1 dies, by
whatever signal, the kernel takes it all down and nothing stays mounted.

    enter.py run SPEC.json
    enter.py capture DIRECTORY TARGET overlay|plain[,final]
    enter.py unpack BLOB TARGET overlay|plain
    enter.py remove PATH

`line` in the spec is a socket to the Python that started us. We say `+` on it when the namespaces
are open, and then, in JSON, what the kernel refused; when its other end is closed, that Python is
dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 16384
# statvfs flags that a user namespace must not drop when it mounts anew, and their mount flags:
# nosuid, nodev, noexec, noatime, nodiratime, relatime (mount_namespaces(7), locked flags)
LOCKED = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}
MNT_DETACH = 2
PR_CAPBSET_DROP = 24
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# Capabilities that reach the host's kernel, by number (linux/capability.h): linux_immutable,
# sys_module, sys_rawio, sys_pacct, sys_boot, sys_time, sys_tty_config, mknod, audit_control,
# mac_override, mac_admin, syslog, wake_alarm, perfmon, bpf.
CAPABILITIES = (9, 16, 17, 20, 22, 25, 26, 27, 30, 32, 33, 34, 35, 38, 39)
# The build host's GPUs and modules must not matter, and NVIDIA's installer runs rmmod on what it
# sees loaded.
HIDDEN_DIRECTORIES = ("sys/bus/pci", "sys/module", "sys/class/drm", "sys/firmware")
HIDDEN_FILES = ("proc/modules",)
# NVIDIA's installer wants the program named here to be in the guest; the host's may lie elsewhere.
# Which kernel the build host runs, and what compiled that, is not a guest's matter.
ANSWERS = {"proc/version": "Linux version 0.0.0 (katagpu@katagpu) #1\n",
           "proc/sys/kernel/modprobe": "/sbin/modprobe\n"}
# Here root writes to the host's kernel without any capability.
READ_ONLY = ("proc/sys", "proc/sysrq-trigger", "proc/irq", "proc/bus")
REFUSED, NO_SPACE = 125, 124  # exit statuses for what the kernel refused

_libc = ctypes.CDLL(None, use_errno=True)


class MountError(OSError):
    """A mount that the kernel refused."""

    def __str__(self) -> str:
        return str(self.strerror)


def refused(what: str) -> MountError:
    """The error of the system call that failed just now."""
    number = ctypes.get_errno()
    return MountError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises `MountError`."""
    if _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags),
                   os.fsencode(options)) != 0:
        raise refused(f"cannot mount {kind or source or 'read-only'} on {target}")


def bind(source: Path, target: Path, *, writable: bool) -> None:
    """Bind a file or directory, creating the mount point."""
    if not target.exists():
        if source.is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
    mount(str(source), target, "", MS_BIND | MS_REC)
    if not writable:
        read_only(target)


def read_only(target: Path) -> None:
    """Make a bind mount read-only, keeping the flags that it came with."""
    found = os.statvfs(target).f_flag
    kept = sum(flag for shown, flag in LOCKED.items() if found & shown)
    mount("", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY | kept)


def escaped(path: str) -> str:
    """A path as overlay's option parser takes it."""
    return path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")


def mount_overlay(spec: dict[str, Any], target: Path) -> None:
    """Mount a stack of directories; read-only where there is no upper one."""
    lowers: list[str] = spec["lower"]
    upper = spec.get("upper")
    if upper is None and len(lowers) == 1:
        bind(Path(lowers[0]), target, writable=False)
        return
    # userxattr: the same markers as root and rootless; it also turns redirect_dir off by itself
    options = "userxattr,metacopy=off,index=off,xino=off,lowerdir=" + ":".join(
        escaped(lower) for lower in lowers)
    if upper is not None:
        # volatile: no fsync of what is captured afterwards and synced then
        options += f",upperdir={escaped(upper)},workdir={escaped(spec['work'])},volatile"
    try:
        mount("overlay", target, "overlay", 0, options)
    except MountError as refusal:
        place = upper or lowers[0]
        raise MountError(refusal.errno, f"cannot mount an overlay whose files are in {place}, on "
                         f"{file_system(place)}: {os.strerror(refusal.errno or 0)}") from None


def file_system(path: str) -> str:
    """The kind of file system that a path is on, as the mount table has it."""
    best, kind = "", "an unknown file system"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if Path(path).is_relative_to(point) and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind


def special(root: Path) -> None:
    """The special file systems of a root: proc, read-only sys, a minimal dev, tmp, run."""
    for name in ("proc", "sys", "dev", "tmp", "run"):
        (root / name).mkdir(exist_ok=True)
    mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    with contextlib.suppress(MountError):  # refused in a user namespace that shares the network
        mount("sysfs", root / "sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    devices(root / "dev")
    hide_host(root)
    mount("tmpfs", root / "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    mount("tmpfs", root / "run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")


def devices(dev: Path) -> None:
    """A minimal /dev."""
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for name in DEVICES:
        (dev / name).touch()
        mount(f"/dev/{name}", dev / name, "", MS_BIND)
    (dev / "pts").mkdir()
    mount("devpts", dev / "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666")
    (dev / "shm").mkdir()
    (dev / "shm").chmod(0o1777)
    for link, to in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"),
                     ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):
        (dev / link).symlink_to(to)


def hide_host(root: Path) -> None:
    """Cover what proc and sys would tell of the host's kernel, and let nothing be written there."""
    for name in HIDDEN_DIRECTORIES:
        if (root / name).is_dir():
            mount("tmpfs", root / name, "tmpfs", MS_RDONLY, "size=4k,mode=555")
    for name in HIDDEN_FILES:
        if (root / name).exists():
            mount("/dev/null", root / name, "", MS_BIND)
    for name in READ_ONLY:
        if (root / name).exists():
            mount(str(root / name), root / name, "", MS_BIND)
            read_only(root / name)
    for number, (name, answer) in enumerate(ANSWERS.items()):
        if (root / name).exists():
            ours = root / "dev" / f"answer{number}"
            ours.write_text(answer)
            mount(str(ours), root / name, "", MS_BIND)
            ours.unlink()


def build_root(spec: dict[str, Any]) -> None:
    """Mount the root of `spec` with all that goes into it; make it `/` unless it says `stay`."""
    base = Path(spec["mount"])
    for part in spec["roots"]:
        target = base / part["target"].lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        mount_overlay(part, target)
        if part["special"]:
            special(target)
    for item in spec["binds"]:
        bind(Path(item["source"]), base / item["target"].lstrip("/"), writable=item["writable"])
    if spec["stay"]:
        return
    os.chdir(base)
    number = SYS_PIVOT_ROOT[os.uname().machine]
    if _libc.syscall(ctypes.c_long(number), b".", b".") != 0:
        raise refused(f"cannot enter {base}")
    if _libc.umount2(b".", MNT_DETACH) != 0:
        raise refused("cannot leave the host's root")
    os.chdir("/")


def drop_capabilities() -> None:
    """Take `CAPABILITIES` out of the bounding set; those that this kernel does not know are not."""
    for capability in CAPABILITIES:
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 \
                and ctypes.get_errno() != errno.EINVAL:
            raise refused(f"cannot drop the capability {capability}")


def run(path: str) -> int:
    """Build the root, run the program in it, reap everything, and pass its status on."""
    spec = json.loads(Path(path).read_text())
    if "line" not in spec:
        return _run(spec)
    with socket.socket(fileno=spec["line"]) as line:
        line.set_inheritable(False)
        try:
            line.send(b"+")
            if select.select([line], [], [], 0)[0]:  # only an end of file: nobody writes to us
                return REFUSED
            return _run(spec)
        except OSError as refusal:
            said = {"errno": refusal.errno, "what": str(refusal)}
            with contextlib.suppress(OSError):
                line.send(json.dumps(said).encode())
            raise


def _run(spec: dict[str, Any]) -> int:
    os.umask(0o022)
    with contextlib.suppress(OSError):
        socket.sethostname(spec["hostname"])
    # opened here: the host's paths are out of reach once the root is entered
    usage = os.open(spec["usage"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    if spec["roots"]:
        build_root(spec)
    drop_capabilities()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            os.chdir(spec["cwd"])
            os.execvpe(spec["argv"][0], spec["argv"], spec["env"])
        except OSError as missing:
            sys.stderr.write(f"cannot run {spec['argv'][0]} in {spec['cwd']}: {missing.strerror}\n")
            sys.stderr.flush()
            os._exit(127)
    while True:
        pid, status = os.wait()
        if pid == child:
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            os.write(usage, f"{spent.ru_utime + spent.ru_stime:.2f}".encode())
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def main(argv: list[str]) -> int:
    """Dispatch one of the four operations."""
    if argv[0] == "run":
        return run(argv[1])
    if argv[0] == "remove":
        shutil.rmtree(argv[1])
        return 0
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from katagpu import tree

    source, target, form = Path(argv[1]), Path(argv[2]), argv[3].split(",")
    overlay = "overlay" in form
    if argv[0] == "capture":
        print(tree.capture(source, target, overlay=overlay, final="final" in form))
    else:
        print(tree.unpack(source, target, overlay=overlay))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as refusal:
        sys.stderr.write(f"sandbox: {refusal}\n")
        sys.exit(NO_SPACE if refusal.errno in (errno.ENOSPC, errno.EDQUOT) else REFUSED)
