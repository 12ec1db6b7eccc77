"""Programs that stand for a QEMU where the point is what we make of its words.

The words are genuine: QEMU 7.2.22 (Debian 12) and 11.1.3 (trixie-backports), long lists cut.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from katagpu.boot import qemu

DEBIAN12 = "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)"
BACKPORTS = "11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)"
PORT = """pcie-root-port options:
  addr=<int32>           - Slot and optional function number, example: 06.0 or 06 (default: -1)
  mem-reserve=<size>     -  (default: 18446744073709551615)
  pref64-reserve=<size>  -  (default: 18446744073709551615)
  slot=<uint16>          -  (default: 0)
"""
BRIDGE = """ICH9-LPC options:
  acpi-index=<uint32>    -  (default: 0)
  acpi-pci-hotplug-with-bridge-support=<bool>
  acpi_disable_cmd=<uint8>
"""
TESTDEV = """pci-testdev options:
  addr=<int32>           - Slot and optional function number, example: 06.0 or 06 (default: -1)
  membar=<size>          -  (default: 0)
"""
VFIO_USER = """vfio-user-pci options:
  rombar=<int32>         -  (default: -1)
  socket=<SocketAddress> - SocketAddress (UNIX sockets only)
  x-send-queued=<bool>   - on/off (default: off)
"""
OLD: Mapping[str, str] = {"pcie-root-port": PORT, "ICH9-LPC": BRIDGE, "pci-testdev": TESTDEV}
NEW: Mapping[str, str] = {**OLD, "vfio-user-pci": VFIO_USER}


def program(path: Path, body: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def emulator(path: Path, version: str = DEBIAN12, devices: Mapping[str, str] = OLD, *,
             skipped: int = 0, otherwise: str = "exit 1") -> Path:
    """A QEMU that answers questions; with other words it does `otherwise`.

    `skipped` words before them are another program's.
    """
    cases = "".join(f"*'-device {name},help') printf %s {shlex.quote(text)}; exit 0;;\n"
                    for name, text in devices.items())
    return program(path, f"""
test "$#" -gt {skipped} && shift {skipped}
case "$*" in
*--version) echo {shlex.quote(f'QEMU emulator version {version}')}
echo 'Copyright (c) 2003-2022 Fabrice Bellard and the QEMU Project developers'; exit 0;;
{cases}*,help) name=${{2%,help}}
echo "qemu-system-x86_64: $*: Device '$name' not found" >&2; exit 0;;
esac
{otherwise}""")


def own(root: Path, version: str = BACKPORTS, devices: Mapping[str, str] = NEW) -> Path:
    """A root of the pipeline's own whose loader stands for the QEMU that it would start."""
    loader = emulator(root / qemu.LIBRARIES / "ld-linux-x86-64.so.2", version, devices, skipped=8)
    assert qemu.command(root)[0][0] == str(loader)
    return root


def runs(pid: int) -> bool:
    """Is there such a process, and is it more than a zombie?"""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Has it ended, at the latest after so many seconds?"""
    return until(lambda: not runs(pid), seconds)


def until(done: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait until it is so; False when it is not in time."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def pids(path: Path, count: int) -> list[int]:
    """The process ids that a program writes to a file, one a line, once there are so many."""
    assert until(lambda: path.exists() and path.read_text().count("\n") >= count), "not started"
    return [int(line) for line in path.read_text().split()]
