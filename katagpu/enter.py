"""Runs inside fresh namespaces: builds the root, enters it, and is PID 1 there.

Started by `sandbox` as a script, with nothing but the standard library, so that it works from any
directory and interpreter. Everything is mounted inside the namespace: when its PID 1 dies, by
whatever signal, the kernel takes it all down and nothing stays mounted.

    enter.py run SPEC.json
    enter.py capture DIRECTORY TARGET overlay|plain[,final]
    enter.py unpack BLOB TARGET overlay|plain
    enter.py remove PATH
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 16384
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

_libc = ctypes.CDLL(None, use_errno=True)


class MountError(Exception):
    """A mount that the kernel refused."""


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2). Raises `MountError`."""
    if _libc.mount(source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags),
                   options.encode()) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise MountError(f"cannot mount {kind or source} on {target}: {reason}")


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
        with contextlib.suppress(MountError):  # locked flags of an outer namespace: bind as it is
            mount("", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY)


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
    mount("overlay", target, "overlay", 0, options)


def special(root: Path) -> None:
    """The special file systems of a root: proc, read-only sys, a minimal dev, tmp, run."""
    for name in ("proc", "sys", "dev", "tmp", "run"):
        (root / name).mkdir(exist_ok=True)
    mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    with contextlib.suppress(MountError):  # refused in a user namespace that shares the network
        mount("sysfs", root / "sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for name in HIDDEN_DIRECTORIES:
        if (root / name).is_dir():
            mount("tmpfs", root / name, "tmpfs", MS_RDONLY, "size=4k,mode=555")
    dev = root / "dev"
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for name in DEVICES:
        (dev / name).touch()
        mount(f"/dev/{name}", dev / name, "", MS_BIND)
    for name in HIDDEN_FILES:
        if (root / name).exists():
            mount("/dev/null", root / name, "", MS_BIND)
    (dev / "pts").mkdir()
    mount("devpts", dev / "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666")
    (dev / "shm").mkdir()
    for link, to in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"),
                     ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")):
        (dev / link).symlink_to(to)
    mount("tmpfs", root / "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    mount("tmpfs", root / "run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")


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
        raise MountError(f"cannot enter {base}: {os.strerror(ctypes.get_errno())}")
    if _libc.umount2(b".", MNT_DETACH) != 0:
        raise MountError(f"cannot leave the host's root: {os.strerror(ctypes.get_errno())}")
    os.chdir("/")


def run(path: str) -> int:
    """Build the root, run the program in it, reap everything, and pass its status on."""
    spec = json.loads(Path(path).read_text())
    with contextlib.suppress(OSError):
        socket.sethostname(spec["hostname"])
    # opened here: the host's paths are out of reach once the root is entered
    usage = os.open(spec["usage"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    if spec["roots"]:
        build_root(spec)
    child = os.fork()
    if child == 0:
        for capability in CAPABILITIES:
            _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.umask(0o022)
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
    except (MountError, OSError) as refused:
        sys.stderr.write(f"sandbox: {refused}\n")
        sys.exit(125)
