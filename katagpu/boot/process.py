"""QEMU as a process beside us: started, watched, asked over its monitor, and always ended.

Whatever becomes of us, no QEMU is left (katagpu/run.py); when it ends early, its last words are
turned into what a user can do.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from katagpu.boot.qemu import OLDEST, Qemu, value
from katagpu.boot.qmp import Monitor
from katagpu.errors import KatagpuError, StepError
from katagpu.run import Running, start, tail

# QEMU's words (7.2 and 11.1), what they mean, and the cure.
CAUSES: Sequence[tuple[str, str, str]] = (
    (r"Address already in use|Failed to find an available port",
     "a socket or port that it needs is in use",
     "end what holds it (another boot check?), and try again"),
    (r"UNIX socket path .* is too long", "the path of a socket is too long",
     "work in a directory with a shorter path"),
    (r"Failed to connect to '|Failed to connect socket|Connection refused",
     "a program that it connects to (the emulated GPU, vsock) is not there",
     "see that program's log beside this one"),
    (r"annot set up guest memory|[Cc]annot allocate memory|os_mem_prealloc|Insufficient memory",
     "there is not enough memory",
     "end other programs, or raise the limit (ulimit -v, control group)"),
    (r"failed to initialize kvm: Permission denied|KVM kernel module: Permission denied",
     "it may not use /dev/kvm", "join the group kvm, and log in anew"),
    (r"failed to initialize kvm|KVM is not supported|kvm_buf_set_msrs|KVM_\w+ failed",
     "KVM does not work here", "it is tried anew within the hour; the boot check then takes TCG"),
    (r"is not a valid device model name|Property '.*' not found|unsupported machine type|"
     r"invalid option|Invalid parameter|Unexpected parameter|invalid accelerator",
     "this QEMU does not know what it is asked for",
     f"it is too old, or was built without that; {OLDEST} or newer of Debian or Ubuntu will do"),
    (r"Only modules from the same build can be loaded|error while loading shared libraries",
     "its modules or libraries are not its own",
     "remove the other QEMU's, or build QEMU's root anew: ./doitw lock"),
    (r"[Cc]ould not open|could not load|failed to open",
     "a file or device that it needs is not there, or may not be read",
     "is the guest built? ./doitw build_image"),
)


def explain(status: int, said: str, log: Path) -> StepError:
    """The error of a QEMU that ended by itself, with the cause where its words tell it."""
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    found = next(((cause, cure) for pattern, cause, cure in CAUSES if re.search(pattern, said)),
                 None)
    if found is None and status == -signal.SIGKILL:
        found = ("something killed it, perhaps the kernel for want of memory",
                 "see `dmesg`, and give the host more memory")
    cause = f": {found[0]}" if found is not None else ""
    return StepError(f"QEMU ended with {how}{cause}\n{said or '(it said nothing)'}\n"
                     f"  whole log: {log}",
                     hint=found[1] if found is not None else "the log's first line is its command")


class Process:
    """A QEMU that runs. `monitor` is its QMP connection."""

    def __init__(self, running: Running, monitor: Path) -> None:
        self.running = running
        self._path = monitor
        self._monitor: Monitor | None = None

    @property
    def monitor(self) -> Monitor:
        """Its monitor, connected at the first use. Raises `StepError` where QEMU ended."""
        if self._monitor is None:
            self._monitor = Monitor.connect(self._path, self.check)
        return self._monitor

    def said(self) -> str:
        """The last lines of its output, without those of earlier runs in the same log."""
        lines: list[str] = []
        for line in tail(self.running.log).splitlines():
            lines = [] if line.startswith("$ ") else [*lines, line]
        return "\n".join(lines)

    def check(self) -> None:
        """Raises `StepError`, with the cause where it is known, when QEMU does not run."""
        status = self.running.poll()
        if status is not None:
            raise explain(status, self.said(), self.running.log)

    def wait(self, timeout: float | None = None) -> None:
        """Until it ends well: the guest powered off. `timeout` in seconds.

        Raises `TookTooLong`, and `StepError` when it ended otherwise.
        """
        if self.running.wait(timeout) != 0:
            self.check()

    def stop(self) -> None:
        """Kill it. May be called again, and when it has ended."""
        self.running.stop()
        if self._monitor is not None:
            self._monitor.close()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def running(qemu: Qemu, arguments: Sequence[str], *, monitor: Path, log: Path,
            terminal: bool = False, descriptors: Sequence[int] = ()) -> Iterator[Process]:
    """QEMU with these arguments, ended however the block is left.

    `monitor` is the path of its socket: `-qmp unix:PATH,server=on,wait=off` is added. Its output is
    appended to `log`; with `terminal` its stdin and stdout are ours. `descriptors` stay
    open in it.
    """
    with contextlib.suppress(OSError):
        monitor.unlink(missing_ok=True)  # of a run that was killed
    begun = start([*qemu.argv, *arguments, "-qmp", f"unix:{value(monitor)},server=on,wait=off"],
                  env=qemu.env, log=log, terminal=terminal, pass_fds=descriptors)
    process = Process(begun, monitor)
    try:
        yield process
    except KatagpuError as failure:
        # A check that fails for want of an answer fails because QEMU is gone, where it is.
        status = begun.poll()
        if status in (0, None) or failure.what.startswith("QEMU ended"):
            raise
        raise explain(status, process.said(), log) from failure
    finally:
        process.stop()
