"""`katagpu-host.pyz` on a real kernel: Debian's, in QEMU, with an IOMMU and an emulated GPU.

The QEMU is that of tests/boot (tests/machines.py). Debian's packages come from the
mirror that this machine uses.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from katagpu.boot.gpu import Gpu
from katagpu.boot.vfiouser import Server
from katagpu.release import pyz
from tests.host import realguest
from tests.machines import NEEDS_QEMU, QEMU

MARK = "katagpu-step "  # of steps.py, which only the guest can import
LASTS = 900.0  # seconds; about 60 under TCG on an idle machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    *NEEDS_QEMU,
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="needs mmdebstrap"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the steps in the guest said."""
    place = tmp_path_factory.mktemp("guest")
    pyz.write_host(place / "katagpu-host.pyz")
    guest = realguest.make(place, {"katagpu-host.pyz": place / "katagpu-host.pyz",
                                   "steps.py": Path(__file__).with_name("steps.py")})
    serial = place / "serial"
    with Server(place / "gpu", Gpu()) as server:
        device = {"driver": "vfio-user-pci", "id": "gpu0", "bus": "rp0",
                  "socket": {"type": "unix", "path": str(server.path)}}
        argv = [
            *shlex.split(QEMU), "-nodefaults", "-no-user-config", "-display", "none", "-M", "q35",
            "-accel", "tcg", "-cpu", "max,phys-bits=40", "-m", "1024", "-no-reboot",
            "-device", "intel-iommu,intremap=on,caching-mode=on",  # QEMU's own vfio wants it
            "-kernel", str(guest.kernel), "-initrd", str(guest.initrd),
            "-append", "console=ttyS0 quiet intel_iommu=on panic=-1",
            "-serial", f"file:{serial}",
            "-device", "pcie-root-port,id=rp0,bus=pcie.0,chassis=1,slot=1",
            "-device", json.dumps(device)]
        subprocess.run(["nice", "-n", "19", *argv], check=True, timeout=LASTS,
                       stdin=subprocess.DEVNULL)
    said = serial.read_text(errors="replace")
    lines = [line for line in said.splitlines() if line.startswith(MARK)]
    assert lines, said[-4000:]
    answer = json.loads(lines[-1].removeprefix(MARK))
    assert "found" in answer, f"{answer}\n{said[-3000:]}"
    return dict(answer["found"])


def test_the_gpu(found: dict[str, Any]) -> None:
    (gpu,) = found["gpus"]["gpus"]
    assert (gpu["vendor"], gpu["device"]) == ("10de", "20b7")
    assert [(bar["number"], bar["size"], bar["assigned"]) for bar in gpu["bars"]] == [
        (0, 16 << 20, True), (1, 32 << 30, True), (3, 32 << 20, True)]
    assert gpu["large"] is True
    assert isinstance(gpu["iommu_group"], int)
    assert found["before"] == "pci-stub"


def test_the_check(found: dict[str, Any]) -> None:
    lines = {(line["name"], line["state"]) for line in found["check"]["checks"]}
    for name in ("kernel", "iommu", "bars", "group"):
        assert (name, "pass") in lines
        assert (name, "fail") not in lines, found["check"]
    assert ("kata", "fail") in lines


def test_without_rights(found: dict[str, Any]) -> None:
    said, driver = found["nobody"]
    assert said["status"] == 1
    assert "not permitted" in said["error"], said
    assert "sudo" in said["hint"]
    assert driver == "pci-stub"


def test_there_and_back(found: dict[str, Any]) -> None:
    assert found["dry"][1] == "pci-stub"
    said, driver, flags = found["bind"]
    assert said["status"] == 0, said
    assert driver == "vfio-pci"
    assert flags & 1, "the group is not viable"
    assert said["functions"][0]["vfio"]
    said, driver, node = found["unbind"]
    assert (said["status"], driver, node) == (0, "pci-stub", False), said


def test_a_guest_that_has_it_is_named(found: dict[str, Any]) -> None:
    said, driver = found["used"]
    assert said["status"] == 1
    assert "sh (pid " in said["error"]
    assert driver == "vfio-pci"


def test_what_the_kernel_does_not_do_is_undone(found: dict[str, Any]) -> None:
    said, driver, override = found["refused"]
    assert said["status"] == 1
    assert "was not taken by vfio-pci" in said["error"]
    assert "NOT undone" not in said["error"]
    assert (driver, override) == ("pci-stub", "(null)")


def test_a_boot_with_the_rule_and_one_without(found: dict[str, Any]) -> None:
    said, driver, flags = found["persist"]
    assert said["status"] == 0, said
    assert driver == "vfio-pci"
    assert flags & 1
    assert found["verify"] == 0
    assert [said["status"] for said in found["removed"]] == [0, 0]
    assert found["after"] == "pci-stub"
