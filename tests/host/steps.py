"""Runs inside the guest of test_real.py, as root: every step's answer goes to the serial line.

The GPU is emulated; kernel, IOMMU driver, vfio-pci, udev and /proc are real. pci-stub stands for a
driver of the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PYZ = "/katagpu-host.pyz"
sys.path.insert(0, PYZ)

from katagpu.host import cli  # noqa: E402

GROUP_GET_STATUS = 0x3B67  # <linux/vfio.h>: _IO(';', 100 + 3)
MARK = "katagpu-step "


def host(*words: str, user: int = 0) -> dict[str, Any]:
    """A command of `katagpu host`, in JSON: a process of its own, but no new Python, which is slow.
    """
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            status = 70
            try:
                os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.setuid(user)
                status = cli.main([*words, "--json"])
                sys.stdout.flush()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        said = out.read()
    try:
        return {"status": status, **json.loads(said)}
    except ValueError:
        return {"status": status, "out": said}


def driver(address: str) -> str | None:
    """The driver that has a function."""
    link = Path(f"/sys/bus/pci/devices/{address}/driver")
    return link.readlink().name if link.is_symlink() else None


def viable(group: int) -> int:
    """The flags of a group, as VFIO gives them to who would use it: 1 is viable."""
    handle = os.open(f"/dev/vfio/{group}", os.O_RDWR)
    try:
        answer = fcntl.ioctl(handle, GROUP_GET_STATUS, struct.pack("II", 8, 0))
        return int(struct.unpack("II", answer)[1])
    finally:
        os.close(handle)


def steps() -> dict[str, Any]:
    """All of them."""
    found: dict[str, Any] = {}
    subprocess.run(["modprobe", "pci-stub", "ids=10de:20b7"], check=True)
    found["gpus"] = json.loads(subprocess.run(
        [sys.executable, PYZ, "gpus", "--json"], capture_output=True, check=True).stdout)
    gpu = found["gpus"]["gpus"][0]
    address, group = gpu["bdf"], gpu["iommu_group"]
    found["before"] = driver(address)
    found["check"] = host("check")
    found["nobody"] = [host("bind", address, "--yes", user=65534), driver(address)]
    found["dry"] = [host("bind", address, "--dry-run"), driver(address)]
    found["bind"] = [host("bind", address, "--yes"), driver(address), viable(group)]
    with holding(f"/dev/vfio/{group}"):
        found["used"] = [host("unbind", address, "--yes"), driver(address)]
    found["unbind"] = [host("unbind", address, "--yes"), driver(address),
                       Path(f"/dev/vfio/{group}").exists()]
    found["refused"] = refused(address)
    said = host("persist", address, "--yes")
    boot()
    found["persist"] = [said, driver(address), viable(group)]
    found["verify"] = subprocess.run(
        ["udevadm", "verify", "/etc/udev/rules.d/60-katagpu-vfio.rules"], capture_output=True,
        text=True).returncode
    found["removed"] = [host("persist", "--remove", "--yes"), host("unbind", address, "--yes")]
    boot()
    found["after"] = driver(address)
    return found


@contextlib.contextmanager
def holding(node: str) -> Iterator[None]:
    """A process that has a device open, as a guest would."""
    child = subprocess.Popen(["sh", "-c", f'exec 3<>{node}; echo open; read word'],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    try:
        yield
    finally:
        child.communicate(b"\n")


def refused(address: str) -> list[Any]:
    """The kernel has a name for a driver that takes no PCI function, so that the probe finds none.

    vfio-pci is away, and a module of that name does nothing: what was done is undone.
    """
    subprocess.run(["modprobe", "-r", "vfio-pci"], check=True)
    Path("/etc/modprobe.d").mkdir(exist_ok=True)
    nothing = Path("/etc/modprobe.d/nothing.conf")
    nothing.write_text("install vfio-pci /usr/bin/true\ninstall vfio_pci /usr/bin/true\n")
    override = Path(f"/sys/bus/pci/devices/{address}/driver_override")
    found = [host("bind", address, "--yes"), driver(address), override.read_text().strip()]
    nothing.unlink()
    return found


def boot() -> None:
    """What udev does at boot: rules are read anew, and every device is told as added."""
    for words in (["control", "--reload"], ["trigger", "--action=add", "--subsystem-match=pci"],
                  ["settle"]):
        subprocess.run(["udevadm", *words], check=True)


if __name__ == "__main__":
    answer: dict[str, Any]
    try:
        answer = {"found": steps()}
    except BaseException as failure:
        import traceback

        answer = {"failed": repr(failure), "where": traceback.format_exc()}
    with Path("/dev/ttyS0").open("w") as serial:
        serial.write(f"\n{MARK}{json.dumps(answer)}\n")
