"""The only way into a root file system: namespaces of its own, as root or rootless.

Mount, PID, IPC, UTS and network namespaces (network only for fetch steps that say so), and a user
namespace with the caller's subordinate ids when the caller is not root. See `enter` for what is
mounted inside.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from katagpu.errors import StepError, UserError
from katagpu.run import CLEAN, Result, run, tail

ENTER = Path(__file__).with_name("enter.py")
REFUSED, NO_SPACE = 125, 124  # enter.py's own exit statuses for what the kernel refused
HOST_NAME = "katagpu"
LOCAL = "set KATAGPU_STORE to a directory on a local file system (ext4, xfs, btrfs; in a " \
        "container, a volume: not its overlay)"
APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
CLONE = Path("/proc/sys/kernel/unprivileged_userns_clone")
MAXIMUM = Path("/proc/sys/user/max_user_namespaces")
SUBORDINATE = (Path("/etc/subuid"), Path("/etc/subgid"))
NO_OVERLAY = (errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENODEV)
FULL = 64 << 20  # bytes: with less than this left, a full disk is the store's
PATIENCE = 40  # tries, a twentieth of a second apart, while a killed sandbox still ends


@dataclass(frozen=True, kw_only=True)
class Root:
    """A stack of directories (topmost first) that becomes a root, at `target`.

    `upper` receives what is written; without it the stack is read-only. `special` mounts proc, sys,
    dev, tmp and run in it.
    """

    lower: tuple[Path, ...]
    upper: Path | None = None
    target: str = "/"
    special: bool = True


@dataclass(frozen=True, kw_only=True)
class Bind:
    """A host file or directory that is seen at `target`."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One program in one sandbox. `scratch` is a directory for mount point, work and spec.

    With `stay` the program keeps the host's root and sees the assembled one at `mount`. It has
    `timeout` seconds.
    """

    argv: Sequence[str]
    roots: Sequence[Root]
    scratch: Path
    binds: Sequence[Bind] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    network: bool = False
    stay: bool = False
    timeout: float | None = None

    @property
    def mount(self) -> Path:
        """Where the root is assembled."""
        return self.scratch / "mnt"

    @property
    def cpu(self) -> float:
        """CPU seconds (user + system) of what has run in it, once it has ended."""
        try:
            return float((self.scratch / "usage").read_text())
        except (OSError, ValueError):
            return 0.0


def rootless() -> bool:
    """Are we an ordinary user, who needs a user namespace?"""
    return os.geteuid() != 0


def namespaces(*, network: bool = False) -> list[str]:
    """The command that opens the namespaces for what follows it."""
    argv = ["unshare", "--mount", "--propagation", "private", "--pid", "--ipc", "--uts", "--fork",
            "--kill-child=KILL"]
    if not network:
        argv.append("--net")
    if rootless():
        argv += ["--user", "--map-auto", "--map-root-user"]
    return [*argv, "--"]


def probe() -> None:
    """Check that a sandbox can be opened here. Raises `UserError` with the cure."""
    if rootless() and not (shutil.which("newuidmap") and shutil.which("newgidmap")):
        raise UserError("rootless builds need newuidmap and newgidmap",
                        hint="sudo apt-get install uidmap")
    result = run([*namespaces(), "mount", "-t", "proc", "proc", "/proc"], check=False)
    if result.status != 0:
        raise _closed(result.stderr.decode(errors="replace").strip())


def _closed(said: str) -> UserError:
    if rootless():
        return UserError("no user namespace with subordinate ids can be opened here"
                         f" ({said or 'it said nothing'})", hint=_cure())
    return UserError("this machine lets root open no mount and PID namespaces"
                     f" ({said or 'it said nothing'})",
                     hint="a container needs CAP_SYS_ADMIN (docker run --privileged)")


def _cure() -> str:
    for path, bad, good in ((APPARMOR, "1", "0"), (CLONE, "0", "1"), (MAXIMUM, "0", "10000")):
        if path.exists() and path.read_text().strip() == bad:
            name = ".".join(path.parts[-2:])
            return f"sudo sysctl {name}={good}, or build as root"
    import pwd

    user = str(os.geteuid())
    names = {user}
    with contextlib.suppress(KeyError):
        user = pwd.getpwuid(os.geteuid()).pw_name
        names.add(user)
    for path in SUBORDINATE:
        entries = path.read_text().splitlines() if path.exists() else []
        if not any(entry.split(":")[0] in names for entry in entries):
            return (f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
                    ", or build as root")
    return "the container around this one masks /proc or forbids namespaces; or build as root"


def _spec(entry: Entry, line: int) -> Path:
    roots = []
    for index, root in enumerate(entry.roots):
        work = None
        if root.upper is not None:
            if not root.upper.exists():
                root.upper.mkdir()
                root.upper.chmod(0o755)  # it is the root directory that programs see
            work = entry.scratch / f"work{index}"
            work.mkdir(exist_ok=True)
        roots.append({"lower": [str(path) for path in root.lower], "target": root.target,
                      "upper": str(root.upper) if root.upper else None,
                      "work": str(work) if work else None, "special": root.special})
    entry.mount.mkdir(exist_ok=True)
    spec = {"line": line, "argv": list(entry.argv), "env": {**CLEAN, "HOME": "/root", **entry.env},
            "cwd": entry.cwd, "hostname": HOST_NAME, "mount": str(entry.mount),
            "usage": str(entry.scratch / "usage"),
            "stay": entry.stay, "roots": roots,
            "binds": [{"source": str(item.source), "target": item.target,
                       "writable": item.writable} for item in entry.binds]}
    path = entry.scratch / "spec.json"
    path.write_text(json.dumps(spec, indent=1))
    return path


def enter(entry: Entry, *, log: Path | None = None, capture: bool = False, check: bool = True,
          stdin: bytes | None = None) -> Result:
    """Run a program in a sandbox.

    Raises `StepError` when it fails (unless `check` is off) or the kernel refuses a mount,
    `UserError` when no sandbox can be opened here, and `OSError` (ENOSPC) when the disk is full.
    """
    log = log or entry.scratch / "log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        stream.write(f"# in the sandbox: {shlex.join(entry.argv)}\n")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command: list[str | Path] = [
            *namespaces(network=entry.network), sys.executable, "-I", ENTER, "run",
            _spec(entry, theirs.fileno())]
        result = run(command, log=log, capture=capture, check=False, stdin=stdin,
                     timeout=entry.timeout, pass_fds=[theirs.fileno()])
        theirs.close()
        ours.setblocking(False)
        told = b""
        with contextlib.suppress(OSError):
            told = ours.recv(1 << 16)
    _raise_refusal(result.status, told, log, entry)
    if result.status != 0 and check:
        said = tail(log)
        if "No space left on device" in said and shutil.disk_usage(entry.scratch).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(entry.scratch))
        raise StepError(f"{entry.argv[0]} failed in the sandbox (status {result.status}):\n{said}",
                        hint=f"whole log: {log}")
    return result


def _raise_refusal(status: int, told: bytes, log: Path, entry: Entry) -> None:
    """Raise what enter.py told us went wrong before the program started."""
    if status > 0 and not told:
        raise _closed(tail(log, 1))
    if len(told) > 1:
        refusal = json.loads(told[1:])
        if refusal["errno"] in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(entry.scratch))
        if "mount an overlay" in refusal["what"] and refusal["errno"] in NO_OVERLAY:
            raise UserError(refusal["what"], hint=LOCAL)
        raise StepError(f"no sandbox for {entry.argv[0]}: {refusal['what']}")


def _operation(words: Sequence[str | Path], log: Path | None) -> str:
    prefix = namespaces() if rootless() else []
    result = run([*prefix, sys.executable, "-I", ENTER, *words], capture=True, log=log, check=False)
    if result.status == NO_SPACE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(words[1]))
    if result.status != 0:
        said = tail(log) if log is not None else result.stderr.decode(errors="replace").strip()
        raise StepError(f"{words[0]} of {words[1]} failed (status {result.status}):\n{said}")
    return result.stdout.decode().strip()


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a directory becomes a tree: see `tree.capture`."""

    overlay: bool = False
    final: bool = False

    def __str__(self) -> str:
        return ("overlay" if self.overlay else "plain") + (",final" if self.final else "")


def capture(directory: Path, target: Path, form: Form, *, log: Path | None = None) -> str:
    """Write a directory as a compressed tree to `target`; its identity."""
    return _operation(["capture", directory, target, str(form)], log)


def unpack(blob: Path, target: Path, *, overlay: bool, log: Path | None = None) -> str:
    """Unpack a tree into a new directory; the identity of what came out."""
    return _operation(["unpack", blob, target, "overlay" if overlay else "plain"], log)


def remove(path: Path) -> None:
    """Delete a file or directory inside the namespace that owns its files.

    What a killed sandbox wrote there may still grow for a moment: its processes are ending.
    """
    for left in reversed(range(PATIENCE)):
        try:
            _remove(path)
            return
        except (OSError, StepError):
            if left == 0:
                raise
            time.sleep(0.05)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except PermissionError:
        if not rootless():
            raise
        _operation(["remove", path], None)
