"""NVIDIA's function: boot registers, models, and what a port needs for it."""

from __future__ import annotations

import pytest

from katagpu.boot.gpu import Gpu, RootPort, physical_bits, root_port
from katagpu.boot.pcifunction import GIB, KIB, MIB, Bar, Function
from katagpu.chips import KNOWN, Chip
from katagpu.errors import UserError
from tests.boot.deadgpu import ALL_ONES, fallen_off


def boot(gpu: Gpu) -> tuple[int, int]:
    device = gpu.power_on()
    return (int.from_bytes(device.read(0, 0, 4), "little"),
            int.from_bytes(device.read(0, 0xA00, 4), "little"))


@pytest.mark.parametrize(("device", "expected", "model"), [
    (0x20B7, (0x170000A1, 0x170A1000), "NVIDIA A30"),
    (0x20B9, (0x170000A1, 0x170A1000), "Unknown"),
    (0x2335, (0x180000A1, 0x180A1000), "NVIDIA H200"),
    (0x2236, (0x172000A1, 0x172A1000), "NVIDIA A10"),
    (0x27B8, (0x194000A1, 0x194A1000), "NVIDIA L4"),
])
def test_boot_registers(device: int, expected: tuple[int, int], model: str) -> None:
    gpu = Gpu(device=device)
    assert boot(gpu) == expected
    assert gpu.model == model
    assert gpu.function.device == device and gpu.function.class_code == 0x030200


@pytest.mark.parametrize(("gpu", "bars"), [
    (Gpu(), {0: (16 * MIB, False), 1: (32 * GIB, True), 3: (32 * MIB, True)}),
    # as a real H200's sysfs shows them
    (Gpu(device=0x2335, bar1=256 * GIB),
     {0: (16 * MIB, True), 2: (256 * GIB, True), 4: (32 * MIB, True)}),
    (Gpu(device=0x2901, boot0=0x1B2000A1, boot42=0x1B2A1000),
     {0: (16 * MIB, True), 2: (32 * GIB, True), 4: (32 * MIB, True)}),
    (fallen_off(Gpu()), {0: (16 * MIB, False), 1: (32 * GIB, True), 3: (32 * MIB, True)}),
])
def test_bars(gpu: Gpu, bars: dict[int, tuple[int, bool]]) -> None:
    found = gpu.function.bars
    assert {number: (bar.size, bar.wide) for number, bar in found.items()} == bars
    assert all(bar.wide == bar.prefetchable for bar in found.values())


def test_an_architecture_beyond_five_bits_has_its_high_bit_apart() -> None:
    chip = Chip(architecture=0x21, implementation=3, major=0xB, minor=2)
    assert chip.boot0 == 0x013001B2
    assert chip.boot42 == 0x213B2000


def test_the_guide_and_the_issue_devices_are_known() -> None:
    assert {0x20B7, 0x20B9, 0x2335} <= set(KNOWN)
    assert len({known.model for known in KNOWN.values()}) == len(KNOWN)


def test_another_device_needs_its_registers() -> None:
    with pytest.raises(UserError, match="10de:1234") as caught:
        Gpu(device=0x1234, boot0=1)
    assert "20b7" in str(caught.value.hint)
    gpu = Gpu(device=0x1234, boot0=0x1B2000A1, boot42=0x1B2A1000, subsystem=0x99)
    assert boot(gpu) == (0x1B2000A1, 0x1B2A1000)
    assert gpu.model == "Unknown" and gpu.function.subsystem == 0x99


def test_a_gpu_that_has_fallen_off_the_bus() -> None:
    dead = fallen_off(Gpu(bar1=GIB))
    assert boot(dead) == (0xFFFFFFFF, 0xFFFFFFFF)
    assert dead.bar1 == GIB and dead.function.device == 0x20B7, "its config space is whole"
    assert boot(Gpu(boot0=ALL_ONES)) == (0xFFFFFFFF, 0x170A1000)
    assert boot(Gpu(boot0=0))[0] == 0, "nought is a value, too"


def test_the_name_hangs_on_the_subsystem() -> None:
    assert Gpu().function.subsystem == 0x1532
    assert Gpu(subsystem=0).model == "Unknown"
    assert Gpu(subsystem=0).function.subsystem == 0


def test_only_the_boot_registers_are_not_zero() -> None:
    device = Gpu().power_on()
    read = device.read(0, 0, 16 * MIB)
    assert {at for at in range(0, 16 * MIB, 4) if read[at:at + 4] != bytes(4)} == {0, 0xA00}


@pytest.mark.parametrize(("bar1", "pref64"), [
    (256 * MIB, 512), (16 * GIB, 32 << 10), (32 * GIB, 64 << 10), (128 * GIB, 256 << 10),
    (256 * GIB, 512 << 10)])
def test_what_a_port_keeps_free(bar1: int, pref64: int) -> None:
    port = root_port(Gpu(bar1=bar1).function)
    assert port == RootPort(pref64=pref64 * MIB, mem=32 * MIB)
    assert port.options == f"pref64-reserve={pref64 * MIB},mem-reserve={32 * MIB}"


def test_a_port_for_a_small_function() -> None:
    small = Function(vendor=1, device=1, class_code=0, bars={0: Bar(size=4 * KIB)})
    assert root_port(small) == RootPort(pref64=2 * MIB, mem=2 * MIB)
    several = Function(vendor=1, device=1, class_code=0,
                       bars={number: Bar(size=16 * MIB) for number in range(5)})
    assert root_port(several).mem == 128 * MIB


@pytest.mark.parametrize(("bars", "expected"), [
    ([], 40), ([32], 40), ([32, 32], 40), ([128], 40), ([32] * 4, 40), ([32] * 5, 46),
    ([256], 46), ([128, 32], 46), ([256] * 8, 46), ([256] * 32, 46)])
def test_physical_bits(bars: list[int], expected: int) -> None:
    ports = [root_port(Gpu(bar1=bar * GIB).function) for bar in bars]
    assert physical_bits(ports) == expected


def test_more_than_any_address_space() -> None:
    with pytest.raises(UserError, match="GiB of reserve"):
        physical_bits([RootPort(pref64=512 * GIB, mem=32 * MIB)] * 33)
