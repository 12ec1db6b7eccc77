"""A PCI function without hardware: its config space, its BARs, and the registers in them.

Layouts: PCI Local Bus 3.0 (header type 0, MSI, MSI-X), PCI Power Management 1.2, PCI Express Base
4.0 section 7.5 (Express capability); names as in `<linux/pci_regs.h>`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from katagpu.errors import UserError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CONFIG_SIZE, EXTENDED_SIZE = 256, 4096
LARGEST_BAR = 256 * GIB

# Where the capabilities are, as on NVIDIA's GPUs; nothing depends on it.
PM_AT, MSI_AT, EXPRESS_AT, MSIX_AT = 0x60, 0x68, 0x78, 0xC8
PM, MSI, EXPRESS, MSIX = 0x01, 0x05, 0x10, 0x11


class OutOfRange(Exception):
    """An access outside of a region, or to a region that the function does not have."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A memory BAR of `size` bytes, a power of two. `wide`: 64 bits, so it takes two registers."""

    size: int
    wide: bool = False
    prefetchable: bool = False

    def __post_init__(self) -> None:
        if self.size & (self.size - 1) or not 4 * KIB <= self.size <= LARGEST_BAR:
            raise UserError(f"a BAR of {self.size} bytes",
                            hint="a BAR's size is a power of two from 4 KiB to 256 GiB")
        if not self.wide and self.size > 2 * GIB:
            raise UserError(f"a 32-bit BAR of {self.size} bytes", hint="give it 64 bits")


@dataclass(frozen=True, kw_only=True)
class MsixTable:
    """The MSI-X capability: how many vectors, and where table and pending bits are in a BAR."""

    vectors: int
    bar: int
    table: int
    pending: int


@dataclass(frozen=True, kw_only=True)
class Function:
    """What a function is. `Device` is one at work.

    `class_code` has 24 bits (0x030200 is a 3D controller). `registers` holds 32-bit values by
    (BAR, offset), offsets multiples of 4; every other byte of a BAR reads 0. `express` False makes
    a conventional PCI function with 256 bytes of config space, for a slot of a conventional bridge.
    """

    vendor: int
    device: int
    class_code: int
    bars: Mapping[int, Bar]
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0
    registers: Mapping[tuple[int, int], int] = field(default_factory=dict)
    express: bool = True
    msix: MsixTable | None = None

    def __post_init__(self) -> None:
        taken = [number + half for number, bar in self.bars.items()
                 for half in range(1 + bar.wide)]
        if len(set(taken)) < len(taken) or not set(taken) <= set(range(6)):
            raise UserError(f"BARs {sorted(self.bars)} of function {self.vendor:04x}:"
                            f"{self.device:04x} overlap, or there are more than 6",
                            hint="a 64-bit BAR takes its own number and the next one")
        for bar, offset in self.registers:
            if bar not in self.bars or offset % 4 or not 0 <= offset < self.bars[bar].size:
                raise UserError(f"a register at BAR{bar}+{offset:#x}, where the function has none")
        if self.msix and (self.msix.bar not in self.bars or max(
                self.msix.table + 16 * self.msix.vectors,
                self.msix.pending + 8) > self.bars[self.msix.bar].size):
            raise UserError(f"an MSI-X table outside of BAR{self.msix.bar}")

    def power_on(self) -> Device:
        """The function at work, as after power-on."""
        return Device(self)


class _Layout:
    """Config space while it is laid out: values, and which bits software may change."""

    def __init__(self, size: int) -> None:
        self.values, self.writable = bytearray(size), bytearray(size)

    def put(self, offset: int, width: int, value: int, writable: int = 0) -> None:
        """A register of `width` bytes."""
        self.values[offset:offset + width] = value.to_bytes(width, "little")
        self.writable[offset:offset + width] = writable.to_bytes(width, "little")


def _lay_out(function: Function) -> _Layout:
    """The config space after power-on."""
    space = _Layout(EXTENDED_SIZE if function.express else CONFIG_SIZE)
    space.put(0x00, 2, function.vendor)
    space.put(0x02, 2, function.device)
    # Memory, bus master, parity, SERR, INTx disable. No I/O BAR: its bit stays 0.
    space.put(0x04, 2, 0, 0x0546)
    space.put(0x06, 2, 0x0010)  # has capabilities; the error bits are never set
    space.put(0x08, 1, function.revision)
    space.put(0x09, 3, function.class_code)
    space.put(0x0C, 1, 0, 0xFF)  # cache line size
    space.put(0x0D, 1, 0, 0 if function.express else 0xF8)  # latency timer
    for number, bar in function.bars.items():
        flags = 4 * bar.wide | 8 * bar.prefetchable
        width = 8 if bar.wide else 4
        space.put(0x10 + 4 * number, width, flags, -bar.size & (1 << 8 * width) - 1)
    space.put(0x2C, 2, function.subsystem_vendor)
    space.put(0x2E, 2, function.subsystem)
    space.put(0x3C, 1, 0, 0xFF)  # interrupt line
    space.put(0x3D, 1, 1)  # INTA
    _lay_out_capabilities(function, space)
    return space


def _lay_out_capabilities(function: Function, space: _Layout) -> None:
    """The chain of capabilities from 0x34 on. There are no extended ones: 0x100 reads 0."""
    space.put(PM_AT + 2, 2, 0x0003)  # version 1.2, no D1, D2 or PME
    space.put(PM_AT + 4, 2, 0x0008, 0x0003)  # keeps its state in D3hot; power state
    space.put(MSI_AT + 2, 2, 0x0080, 0x0071)  # 64 bits, one vector; enable
    space.put(MSI_AT + 4, 4, 0, 0xFFFFFFFC)
    space.put(MSI_AT + 8, 4, 0, 0xFFFFFFFF)
    space.put(MSI_AT + 12, 2, 0, 0xFFFF)
    chain = [(PM_AT, PM), (MSI_AT, MSI)]
    if function.express:
        _lay_out_express(space)
        chain.append((EXPRESS_AT, EXPRESS))
    if msix := function.msix:
        space.put(MSIX_AT + 2, 2, msix.vectors - 1, 0xC000)
        space.put(MSIX_AT + 4, 4, msix.table | msix.bar)
        space.put(MSIX_AT + 8, 4, msix.pending | msix.bar)
        chain.append((MSIX_AT, MSIX))
    pointer = 0x34
    for at, kind in chain:
        space.put(pointer, 1, at)
        space.put(at, 1, kind)
        pointer = at + 1


def _lay_out_express(space: _Layout) -> None:
    """An endpoint of version 2, 16 GT/s, 16 lanes, without function level reset."""
    space.put(EXPRESS_AT + 2, 2, 0x0002)
    space.put(EXPRESS_AT + 4, 4, 0x00008001)  # role-based errors, 256 bytes of payload
    space.put(EXPRESS_AT + 8, 2, 0x2810, 0x78FF)
    space.put(EXPRESS_AT + 12, 4, 0x00000104)  # 16 lanes at most, speed 4
    space.put(EXPRESS_AT + 16, 2, 0, 0x01C8)  # read completion boundary, clock, extended sync
    space.put(EXPRESS_AT + 18, 2, 0x0104)
    space.put(EXPRESS_AT + 36, 4, 0x00000010)  # completion timeout can be disabled
    space.put(EXPRESS_AT + 40, 2, 0, 0x0010)
    space.put(EXPRESS_AT + 44, 4, 0x0000001E)  # 2.5 to 16 GT/s
    space.put(EXPRESS_AT + 48, 2, 0x0004, 0x000F)


class Device:
    """A function at work: config space as the guest left it. Nothing is allocated for its BARs.

    Writes into BARs change nothing. NVIDIA's driver tests no register by writing it; a register
    that kept its value would look like a GPU that half works, and zeros stop the driver at the
    same line each time. Which registers were written is in the server's record of accesses.
    """

    CONFIG = 7  # VFIO_PCI_CONFIG_REGION_INDEX

    def __init__(self, function: Function) -> None:
        self.function = function
        self._layout = _lay_out(function)
        self._lock = threading.Lock()
        self._config = bytearray(self._layout.values)

    def size(self, region: int) -> int:
        """Bytes of a VFIO region (0-5 BARs, 6 ROM, 7 config, 8 VGA); 0 for one it has not."""
        if region == self.CONFIG:
            return len(self._layout.values)
        bar = self.function.bars.get(region)
        return bar.size if bar else 0

    def read(self, region: int, offset: int, count: int) -> bytes:
        """Bytes of a region. Raises `OutOfRange`."""
        self._check(region, offset, count)
        if region == self.CONFIG:
            with self._lock:
                return bytes(self._config[offset:offset + count])
        # With 3 bytes before and after, so that a register may be read by any of its bytes.
        around = bytearray(count + 6)
        for (bar, at), value in self.function.registers.items():
            if bar == region and offset - 4 < at < offset + count:
                around[at - offset + 3:at - offset + 7] = value.to_bytes(4, "little")
        return bytes(around[3:3 + count])

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Write into a region: config space's writable bits change, BARs do not."""
        self._check(region, offset, len(data))
        if region == self.CONFIG:
            with self._lock:
                for at, byte in enumerate(data, offset):
                    mask = self._layout.writable[at]
                    self._config[at] = self._config[at] & ~mask | byte & mask

    def reset(self) -> None:
        """As after power-on."""
        with self._lock:
            self._config[:] = self._layout.values

    def addresses(self) -> dict[int, int]:
        """Where the guest has put each BAR, as it last wrote them; 0 is where it has not."""
        found = {}
        for number, bar in self.function.bars.items():
            raw = self.read(self.CONFIG, 0x10 + 4 * number, 8 if bar.wide else 4)
            found[number] = int.from_bytes(raw, "little") & ~0xF
        return found

    @property
    def decodes_memory(self) -> bool:
        """The guest has switched on the memory bit of the command register."""
        return bool(self.read(self.CONFIG, 4, 2)[0] & 2)

    def _check(self, region: int, offset: int, count: int) -> None:
        if count < 1 or offset < 0 or offset + count > self.size(region):
            raise OutOfRange(f"{count} bytes at {offset:#x} of region {region},"
                             f" which has {self.size(region)}")
