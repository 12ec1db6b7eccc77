"""What sysfs shows of PCI functions: by text, and as the guest's shell prints it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu.boot import pci
from katagpu.boot.pci import Function, Region

from .scripted import UNSET, Scripted, gpu_regions, shown

GPU = """\
0000:01:00.0/vendor:0x10de
0000:01:00.0/device:0x20b7
0000:01:00.0/class:0x030200
0000:01:00.0/resource:0x00000000fc000000 0x00000000fcffffff 0x0000000000040200
0000:01:00.0/resource:0x0000380000000000 0x00003807ffffffff 0x000000000014220c
0000:01:00.0/resource:0x0000000000000000 0x0000000000000000 0x0000000000000000
0000:01:00.0/resource:0x0000380800000000 0x0000380801ffffff 0x000000000014220c
0000:01:00.0/resource:0x0000000000000000 0x0000000000000000 0x0000000000000000
0000:01:00.0/resource:0x0000000000000000 0x0000000000000000 0x0000000000000000
0000:01:00.0/resource:0x00000000fd000000 0x00000000fd07ffff 0x0000000000046200
0000:01:00.0/driver:../../../../bus/pci/drivers/nvidia
"""
BRIDGE = """\
0000:00:1f.3/vendor:0x8086
0000:00:1f.3/device:0x2930
0000:00:1f.3/class:0x0c0500
0000:00:1f.3/resource:0x0000000000000700 0x000000000000073f 0x0000000000040101
"""


def test_a_gpu() -> None:
    """The seventh row is its ROM; ports are no BARs to us."""
    bridge, gpu = pci.parse(GPU + BRIDGE)
    assert gpu == Function(
        address="0000:01:00.0", vendor=0x10DE, device=0x20B7, pci_class=0x030200, driver="nvidia",
        regions=(Region(number=0, start=0xFC000000, end=0xFCFFFFFF, flags=0x40200),
                 Region(number=1, start=0x380000000000, end=0x3807FFFFFFFF, flags=0x14220C),
                 Region(number=3, start=0x380800000000, end=0x380801FFFFFF, flags=0x14220C)))
    assert gpu.gpu and str(gpu) == "0000:01:00.0 10de:20b7 class 0302, driver nvidia"
    assert [str(region) for region in gpu.regions] == [
        "BAR0 16 MiB at 0xfc000000", "BAR1 64-bit 32 GiB at 0x380000000000",
        "BAR3 64-bit 32 MiB at 0x380800000000"]
    assert not bridge.gpu and bridge.regions == () and str(bridge).endswith(", no driver")


@pytest.mark.parametrize(("row", "assigned", "words"), [
    ((0x1000, 0x1FFF, 0x200), True, "BAR2 4096 bytes at 0x1000"),
    ((0, 0xFFFFFF, 0x200), False, "BAR2 16 MiB without an address"),
    ((0x1000, 0x1FFF, 0x200 | UNSET), False, "BAR2 4096 bytes without an address")])
def test_a_bar_without_an_address(row: tuple[int, int, int], assigned: bool, words: str) -> None:
    region = Region(number=2, start=row[0], end=row[1], flags=row[2])
    assert region.assigned is assigned and str(region) == words


@pytest.mark.parametrize(("class_code", "vendor", "gpu"), [
    (0x030000, 0x10DE, True), (0x030200, 0x10DE, True), (0x040300, 0x10DE, False),
    (0x068000, 0x10DE, False), (0x030000, 0x1234, False)])
def test_what_is_a_gpu(class_code: int, vendor: int, gpu: bool) -> None:
    found, = pci.parse(shown("0000:01:00.0", vendor, 1, class_code, None, {}))
    assert found.gpu is gpu


@pytest.mark.parametrize("text", ["", "\n\n", "no function\n"])
def test_an_empty_bus(text: str) -> None:
    assert pci.parse(text) == []


def test_the_script_on_a_real_tree(tmp_path: Path) -> None:
    """A copy of sysfs' layout; `driver` is a link to a directory."""
    place = tmp_path / "devices"
    (tmp_path / "drivers/nvidia").mkdir(parents=True)
    for text in (GPU, BRIDGE):
        for line in text.splitlines():
            name, _colon, value = line.rpartition(":")
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name == "driver":
                path.symlink_to("../../drivers/nvidia")
            else:
                with path.open("a") as stream:
                    stream.write(f"{value}\n")
    script = pci._SCRIPT.replace("/sys/bus/pci/devices", str(place))
    assert script != pci._SCRIPT
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert pci.parse(said.stdout) == pci.parse(GPU + BRIDGE)


def test_functions_of_a_guest(scripted: Callable[..., Scripted]) -> None:
    found = scripted()
    found.put("0000:02:00.0", driver=None)
    found.put("0000:01:00.0")
    assert [each.address for each in pci.functions(found.channel)] == [
        "0000:01:00.0", "0000:02:00.0"]
    assert pci.functions(found.channel)[0].regions[1].size == gpu_regions()[1][1]
