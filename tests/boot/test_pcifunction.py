"""Config space, BARs and registers of an emulated function, read as software reads them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from katagpu.boot.gpu import MSIX, Gpu
from katagpu.boot.pcifunction import GIB, KIB, MIB, Bar, Device, Function, MsixTable, OutOfRange
from katagpu.errors import UserError

CONFIG = Device.CONFIG
PLAIN = Function(vendor=0x1B36, device=5, class_code=0xFF0000, express=False,
                 bars={0: Bar(size=4 * KIB), 2: Bar(size=MIB, wide=True, prefetchable=True)})


def number(device: Device, offset: int, width: int) -> int:
    return int.from_bytes(device.read(CONFIG, offset, width), "little")


def put(device: Device, offset: int, width: int, value: int) -> int:
    """Write a register, and give what it reads then."""
    device.write(CONFIG, offset, value.to_bytes(width, "little"))
    return number(device, offset, width)


def capabilities(device: Device) -> dict[int, int]:
    """The chain's ids and places, walked as an operating system walks it."""
    found: dict[int, int] = {}
    at = number(device, 0x34, 1)
    while at:
        kind = number(device, at, 1)
        assert at >= 0x40 and at % 4 == 0 and kind not in found
        found[kind] = at
        at = number(device, at + 1, 1)
    return found


def bar_sizes(device: Device) -> dict[int, tuple[int, int]]:
    """Size and flags of each BAR, found by writing ones, as firmware does."""
    found = {}
    index = 0
    while index < 6:
        at = 0x10 + 4 * index
        flags = number(device, at, 4) & 0xF
        width = 8 if flags & 4 else 4
        ones = (1 << 8 * width) - 1
        # Two accesses of 4 bytes: what x86 configuration access can do.
        for half in range(0, width, 4):
            put(device, at + half, 4, 0xFFFFFFFF)
        kept = number(device, at, width) & ~0xF
        if kept:
            found[index] = (-kept & ones), flags
        for half in range(0, width, 4):
            put(device, at + half, 4, 0)
        index += width // 4
    return found


def test_identity() -> None:
    device = Gpu().power_on()
    assert [number(device, at, 2) for at in (0, 2, 0x2C, 0x2E)] == [0x10DE, 0x20B7, 0x10DE, 0x1532]
    assert number(device, 8, 4) == 0x030200A1
    assert number(device, 0xE, 1) == 0, "header type 0, one function"
    assert number(device, 0x3D, 1) == 1
    assert number(device, 6, 2) & 0x10, "has capabilities"


def test_identity_cannot_be_written() -> None:
    device = Gpu().power_on()
    before = device.read(CONFIG, 0, 4) + device.read(CONFIG, 8, 4) + device.read(CONFIG, 0x2C, 4)
    device.write(CONFIG, 0, b"\xff" * 64)
    assert device.read(CONFIG, 0, 4) + device.read(CONFIG, 8, 4) \
        + device.read(CONFIG, 0x2C, 4) == before


def test_capabilities_of_a_gpu() -> None:
    device = Gpu(msix=True).power_on()
    found = capabilities(device)
    assert set(found) == {0x01, 0x05, 0x10, 0x11}
    assert set(capabilities(Gpu().power_on())) == {0x01, 0x05, 0x10}
    assert number(device, found[0x01] + 2, 2) & 7 == 3
    assert number(device, found[0x05] + 2, 2) & 0x80, "64-bit addresses"
    express = number(device, found[0x10] + 2, 2)
    assert express & 0xF == 2 and express >> 4 & 0xF == 0, "version 2, an endpoint"
    assert number(device, found[0x10] + 18, 2) >> 4 & 0x3F == 16
    assert number(device, found[0x11] + 2, 2) == 5, "6 vectors"
    assert number(device, found[0x11] + 4, 4) == MSIX.table
    assert number(device, found[0x11] + 8, 4) == MSIX.pending
    # No two capabilities lie over each other: PM 8, MSI 14, Express v2 60, MSI-X 12 bytes.
    sizes = {0x01: 8, 0x05: 14, 0x10: 60, 0x11: 12}
    places = sorted((at, at + sizes[kind]) for kind, at in found.items())
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(places))


def test_a_conventional_function_has_no_extended_space() -> None:
    device = PLAIN.power_on()
    assert set(capabilities(device)) == {0x01, 0x05}
    assert device.size(CONFIG) == 256
    with pytest.raises(OutOfRange):
        device.read(CONFIG, 256, 4)
    assert put(device, 0xD, 1, 0xFF) == 0xF8, "a latency timer"


def test_an_express_function_has_no_extended_capability() -> None:
    device = Gpu().power_on()
    assert number(device, 0x100, 4) == 0 and device.size(CONFIG) == 4096
    assert put(device, 0xD, 1, 0xFF) == 0


@pytest.mark.parametrize(("bars", "expected"), [
    (Gpu().function.bars, {0: (16 * MIB, 0), 1: (32 * GIB, 0xC), 3: (32 * MIB, 0xC)}),
    (Gpu(bar1=256 * GIB).function.bars,
     {0: (16 * MIB, 0), 1: (256 * GIB, 0xC), 3: (32 * MIB, 0xC)}),
    (Gpu(bar1=4 * GIB).function.bars, {0: (16 * MIB, 0), 1: (4 * GIB, 0xC), 3: (32 * MIB, 0xC)}),
    (PLAIN.bars, {0: (4 * KIB, 0), 2: (MIB, 0xC)}),
    ({0: Bar(size=2 * GIB), 1: Bar(size=8 * KIB), 4: Bar(size=MIB, wide=True)},
     {0: (2 * GIB, 0), 1: (8 * KIB, 0), 4: (MIB, 4)}),
])
def test_bars_are_sized_as_firmware_does_it(bars: dict[int, Bar],
                                            expected: dict[int, tuple[int, int]]) -> None:
    assert bar_sizes(replace(PLAIN, bars=bars).power_on()) == expected


def test_addresses_are_what_the_guest_wrote() -> None:
    device = Gpu().power_on()
    put(device, 0x10, 4, 0xFB001234)
    put(device, 0x14, 4, 0x12345678)
    put(device, 0x18, 4, 0x000000A0)
    assert device.addresses() == {0: 0xFB000000, 1: 0xA0_0000_0000, 3: 0}
    device.reset()
    assert device.addresses() == {0: 0, 1: 0, 3: 0}


def test_memory_is_decoded_when_the_guest_says_so() -> None:
    device = Gpu().power_on()
    seen = [device.decodes_memory]
    assert put(device, 4, 2, 0xFFFF) == 0x0546, "no I/O space"
    seen.append(device.decodes_memory)
    device.reset()
    assert [*seen, device.decodes_memory] == [False, True, False]


def test_writable_bits_of_capabilities() -> None:
    device = Gpu(msix=True).power_on()
    found = capabilities(device)
    assert put(device, found[0x01] + 4, 2, 0xFFFF) == 0x000B, "power state, no PME"
    assert put(device, found[0x05] + 2, 2, 0xFFFF) == 0x00F1
    assert put(device, found[0x05] + 4, 4, 0xFEE01007) == 0xFEE01004
    assert put(device, found[0x05] + 12, 2, 0x4041) == 0x4041
    assert put(device, found[0x11] + 2, 2, 0xFFFF) == 0xC005
    assert put(device, found[0x11] + 4, 4, 0) == MSIX.table
    assert put(device, found[0x10] + 8, 2, 0xFFFF) == 0x78FF, "no function level reset"
    assert put(device, found[0x10] + 12, 4, 0) == 0x104


def test_a_write_over_a_register_changes_only_its_bits() -> None:
    device = Gpu().power_on()
    device.write(CONFIG, 3, b"\xff\x02")  # a byte of the device id, a byte of the command
    assert number(device, 2, 2) == 0x20B7 and number(device, 4, 2) == 2


def test_registers_and_zeros_without_memory() -> None:
    function = replace(PLAIN, bars={1: Bar(size=256 * GIB, wide=True, prefetchable=True)},
                       registers={(1, 0): 0x11223344, (1, 256 * GIB - 4): 0x55667788})
    device = function.power_on()
    assert device.read(1, 0, 8) == bytes.fromhex("4433221100000000")
    assert device.read(1, 3, 1) == b"\x11" and device.read(1, 4, 1) == b"\0"
    assert device.read(1, 256 * GIB - 5, 5) == bytes.fromhex("0088776655")
    device.write(1, 0, b"\0\0\0\0")
    assert device.read(1, 0, 4) == bytes.fromhex("44332211")
    for region, offset, count in ((1, 256 * GIB, 1), (1, -1, 1), (2, 0, 1), (1, 0, 0)):
        with pytest.raises(OutOfRange):
            device.read(region, offset, count)
    for region, offset, data in ((1, 256 * GIB - 1, b"ab"), (0, 0, b"a"), (CONFIG, 255, b"ab")):
        with pytest.raises(OutOfRange):
            device.write(region, offset, data)


@pytest.mark.parametrize("size", [0, 2 * KIB, 3 * MIB, 512 * GIB, -MIB])
def test_sizes_that_no_bar_has(size: int) -> None:
    with pytest.raises(UserError, match="a BAR of"):
        Bar(size=size, wide=True)


def test_a_large_bar_needs_64_bits() -> None:
    with pytest.raises(UserError, match="32-bit"):
        Bar(size=4 * GIB)


@pytest.mark.parametrize("bars", [
    {5: Bar(size=MIB, wide=True)}, {6: Bar(size=MIB)},
    {0: Bar(size=MIB, wide=True), 1: Bar(size=MIB)}])
def test_bars_that_overlap(bars: dict[int, Bar]) -> None:
    with pytest.raises(UserError, match="overlap"):
        replace(PLAIN, bars=bars)


@pytest.mark.parametrize("place", [(1, 0), (0, 2), (0, 4 * KIB), (0, -4)])
def test_registers_outside_of_bars(place: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="a register at"):
        replace(PLAIN, registers={place: 1})


@pytest.mark.parametrize("table", [
    MsixTable(vectors=1, bar=1, table=0, pending=64),
    MsixTable(vectors=6, bar=0, table=4 * KIB - 80, pending=0),
    MsixTable(vectors=6, bar=0, table=0, pending=4 * KIB)])
def test_msix_tables_outside_of_bars(table: MsixTable) -> None:
    with pytest.raises(UserError, match="MSI-X"):
        replace(PLAIN, msix=table)
