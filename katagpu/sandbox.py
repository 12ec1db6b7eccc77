"""The only way into a root file system: namespaces of its own, as root or rootless.

Mount, PID, IPC, UTS and network namespaces (network only for fetch steps that say so), and a user
namespace with the caller's subordinate ids when the caller is not root. See `enter` for what is
mounted inside.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from katagpu.errors import StepError, UserError
from katagpu.run import CLEAN, Result, run

ENTER = Path(__file__).with_name("enter.py")
REFUSED = 125  # enter.py's own exit status for what the kernel refused
HOST_NAME = "katagpu"


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

    With `stay` the program keeps the host's root and sees the assembled one at `mount`.
    """

    argv: Sequence[str]
    roots: Sequence[Root]
    scratch: Path
    binds: Sequence[Bind] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    network: bool = False
    stay: bool = False

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
    if result.status == 0:
        return
    if not rootless():
        raise UserError("this machine lets root open no mount and PID namespaces",
                        hint="a container needs CAP_SYS_ADMIN (docker run --privileged)")
    raise UserError("no user namespace with subordinate ids can be opened here", hint=_cure())


def _cure() -> str:
    restricted = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if restricted.exists() and restricted.read_text().strip() == "1":
        return "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0, or build as root"
    maximum = Path("/proc/sys/user/max_user_namespaces")
    if maximum.exists() and maximum.read_text().strip() == "0":
        return "sudo sysctl user.max_user_namespaces=10000, or build as root"
    import pwd

    user = pwd.getpwuid(os.geteuid()).pw_name
    for name in ("/etc/subuid", "/etc/subgid"):
        path = Path(name)
        if not path.exists() or f"{user}:" not in path.read_text():
            return (f"sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
                    ", or build as root")
    return "the container around this one masks /proc or forbids namespaces; or build as root"


def _spec(entry: Entry) -> Path:
    roots = []
    for index, root in enumerate(entry.roots):
        work = None
        if root.upper is not None:
            root.upper.mkdir(exist_ok=True)
            work = entry.scratch / f"work{index}"
            work.mkdir(exist_ok=True)
        roots.append({"lower": [str(path) for path in root.lower], "target": root.target,
                      "upper": str(root.upper) if root.upper else None,
                      "work": str(work) if work else None, "special": root.special})
    entry.mount.mkdir(exist_ok=True)
    spec = {"argv": list(entry.argv), "env": {**CLEAN, "HOME": "/root", **entry.env},
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

    Raises `StepError` when it fails (unless `check` is off) and when the kernel refuses a mount.
    """
    command = [*namespaces(network=entry.network), sys.executable, "-I", str(ENTER), "run",
               str(_spec(entry))]
    if log is not None:
        with_program = f"# in the sandbox: {' '.join(entry.argv)}\n"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as stream:
            stream.write(with_program)
    result = run(command, log=log, capture=capture, check=False, stdin=stdin)
    if result.status != 0 and (check or result.status == REFUSED):
        from katagpu.run import tail

        said = tail(log) if log is not None else ""
        raise StepError(f"{entry.argv[0]} failed in the sandbox (status {result.status}):\n{said}",
                        hint=f"whole log: {log}" if log is not None else None)
    return result


def _operation(words: Sequence[str | Path], log: Path | None) -> str:
    prefix = namespaces() if rootless() else []
    result = run([*prefix, sys.executable, "-I", str(ENTER), *words], capture=True, log=log,
                 check=False)
    if result.status == REFUSED and log is None:
        raise OSError(28, "the operation was refused", str(words[1]))
    if result.status != 0:
        raise StepError(f"{words[0]} of {words[1]} failed (status {result.status})")
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
    """Delete a directory inside the namespace that owns its files."""
    if not path.exists():
        return
    if not rootless():
        shutil.rmtree(path)
        return
    try:
        shutil.rmtree(path)
    except PermissionError:
        _operation(["remove", path], None)
