"""NVIDIA's function as its kernel driver sees it at probe, and what a root port needs for it.

PMC_BOOT_0 and PMC_BOOT_42 tell the driver which chip it has (`chips`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from katagpu.boot.pcifunction import GIB, MIB, Bar, Device, Function, MsixTable
from katagpu.chips import GH100, KNOWN, UNNAMED
from katagpu.errors import UserError

VENDOR = 0x10DE
CLASS_3D = 0x030200
PMC_BOOT_0, PMC_BOOT_42 = 0x0, 0xA00
MSIX = MsixTable(vectors=6, bar=0, table=0xB90000, pending=0xBA0000)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU to serve. `bar1`: bytes of its large BAR, a power of two up to 256 GiB.

    A device that is not in `KNOWN` needs `boot0` and `boot42`. `msix` adds the MSI-X capability,
    for a GPU that is never unplugged: QEMU 11.1.3 aborts at device_del of a vfio-user function that
    has it (vfio_user_instance_finalize takes the pending bits out of a BAR that is gone by then).
    """

    device: int = 0x20B7
    bar1: int = 32 * GIB
    boot0: int | None = None
    boot42: int | None = None
    subsystem: int | None = None
    msix: bool = False

    def __post_init__(self) -> None:
        if self.device not in KNOWN and (self.boot0 is None or self.boot42 is None):
            names = ", ".join(f"{device:04x}" for device in KNOWN)
            raise UserError(f"device {VENDOR:04x}:{self.device:04x}: which chip it has is not"
                            " known", hint=f"give boot0 and boot42, or one of {names}")

    @property
    def model(self) -> str:
        """The name that the driver gives it."""
        known = KNOWN.get(self.device)
        named = known is not None and self.subsystem in {None, known.subsystem}
        return known.model if known and named else UNNAMED

    @property
    def function(self) -> Function:
        """Its PCI function. All registers but the two boot registers read 0."""
        known = KNOWN.get(self.device)
        chip, subsystem = (known.chip, known.subsystem) if known else (None, 0)
        boot0 = chip.boot0 if self.boot0 is None and chip else self.boot0
        boot42 = chip.boot42 if self.boot42 is None and chip else self.boot42
        assert boot0 is not None and boot42 is not None, "checked when it was made"
        return Function(
            vendor=VENDOR, device=self.device, class_code=CLASS_3D, revision=0xA1,
            subsystem_vendor=VENDOR,
            subsystem=subsystem if self.subsystem is None else self.subsystem,
            bars=_bars(chip.architecture if chip else boot42 >> 24 & 0x3F, self.bar1),
            registers={(0, PMC_BOOT_0): boot0, (0, PMC_BOOT_42): boot42},
            msix=MSIX if self.msix else None)

    def power_on(self) -> Device:
        """The function at work."""
        return Device(self.function)


def _bars(architecture: int, large: int) -> dict[int, Bar]:
    """Registers, the large one, and RAMIN. Since Hopper the registers' is 64 bits wide too, which
    moves the others: an H200's are 0, 2 and 4, of 16 MiB, 256 GiB and 32 MiB.
    """
    hopper = architecture >= GH100.architecture
    return {0: Bar(size=16 * MIB, wide=hopper, prefetchable=hopper),
            1 + hopper: Bar(size=large, wide=True, prefetchable=True),
            3 + hopper: Bar(size=32 * MIB, wide=True, prefetchable=True)}


@dataclass(frozen=True, kw_only=True)
class RootPort:
    """Bytes that QEMU's `pcie-root-port` must keep free for a function that is plugged later."""

    pref64: int
    mem: int

    @property
    def options(self) -> str:
        """As the device's properties."""
        return f"pref64-reserve={self.pref64},mem-reserve={self.mem}"


def root_port(function: Function) -> RootPort:
    """The windows that a function's BARs need on a port of its own; powers of two.

    Prefetchable 64-bit BARs lie in one window, all others in the one below 4 GiB. SeaBIOS puts a
    window at any multiple of 2 MiB (1 GiB for the high one), so only twice the largest BAR surely
    holds that BAR at a multiple of its size. A window that is too small leaves BARs without an
    address: BAR0 of 16 MiB had none in 2 MiB (the default), nor in 16 MiB at 0xfd800000.
    """
    high = [bar.size for bar in function.bars.values() if bar.wide and bar.prefetchable]
    low = [bar.size for bar in function.bars.values() if not (bar.wide and bar.prefetchable)]
    return RootPort(pref64=_window(high), mem=_window(low))


def physical_bits(ports: list[RootPort]) -> int:
    """Bits of the guest's physical addresses (`-cpu …,phys-bits=`) for functions plugged later.

    40 is what QEMU's TCG has by itself. Firmware gives the 64-bit windows the upper half of the
    address space: 256 GiB of reserve fit into 40 bits, and 512 GiB do not (the window is then
    programmed to address 0). 46 is what servers' processors have.
    """
    total = reduce(lambda end, port: _aligned(end, port.pref64) + port.pref64, ports, 0)
    for bits in (40, 46):
        if total <= 1 << bits - 2:
            return bits
    raise UserError(f"{total >> 30} GiB of reserve for hot-plugged GPUs",
                    hint="plug fewer GPUs, or smaller BARs")


def _window(sizes: list[int]) -> int:
    least = max(sum(sizes), 2 * max(sizes, default=0), 2 * MIB)
    return 1 << (least - 1).bit_length()


def _aligned(value: int, unit: int) -> int:
    return -(-value // unit) * unit
