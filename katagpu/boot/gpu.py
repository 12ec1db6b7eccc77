"""NVIDIA's function as its kernel driver sees it at probe, and what a root port needs for it.

PMC_BOOT_0 and PMC_BOOT_42 tell the driver which chip it has. Their fields are in nv_ref.h of
NVIDIA's open kernel modules (src/common/inc/swref/published/nv_ref.h).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

from katagpu.boot.pcifunction import GIB, MIB, Bar, Device, Function, MsixTable
from katagpu.errors import UserError

VENDOR = 0x10DE
CLASS_3D = 0x030200
PMC_BOOT_0, PMC_BOOT_42 = 0x0, 0xA00
MSIX = MsixTable(vectors=6, bar=0, table=0xB90000, pending=0xBA0000)
ALL_ONES = 0xFFFFFFFF
"""What a register of a GPU reads that no read reaches."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A chip by the fields of its boot registers. `major`, `minor`: the revision, A1 is 0xa, 1."""

    architecture: int
    implementation: int
    major: int = 0xA
    minor: int = 0x1

    @property
    def boot0(self) -> int:
        """PMC_BOOT_0: ARCHITECTURE_1 bit 8, ARCHITECTURE_0 28:24, IMPLEMENTATION 23:20, revision
        7:4 and 3:0.
        """
        return ((self.architecture & 0x1F) << 24 | (self.architecture >> 5) << 8
                | self.implementation << 20 | self.major << 4 | self.minor)

    @property
    def boot42(self) -> int:
        """PMC_BOOT_42: ARCHITECTURE 29:24, IMPLEMENTATION 23:20, revision 19:16 and 15:12."""
        return (self.architecture << 24 | self.implementation << 20
                | self.major << 16 | self.minor << 12)


GA100 = Chip(architecture=0x17, implementation=0)
GA102 = Chip(architecture=0x17, implementation=2)
GH100 = Chip(architecture=0x18, implementation=0)
AD102 = Chip(architecture=0x19, implementation=2)
AD104 = Chip(architecture=0x19, implementation=4)
UNNAMED = "Unknown"
"""What the driver says for a device and subsystem that its table of names has not."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A device's chip, and the subsystem (of NVIDIA's) by which the driver names the model."""

    chip: Chip
    subsystem: int
    model: str


KNOWN = {
    0x20B7: Known(chip=GA100, subsystem=0x1532, model="NVIDIA A30"),
    0x20B9: Known(chip=GA100, subsystem=0, model=UNNAMED),
    0x20B2: Known(chip=GA100, subsystem=0x1463, model="NVIDIA A100-SXM4-80GB"),
    0x20B5: Known(chip=GA100, subsystem=0x1533, model="NVIDIA A100 80GB PCIe"),
    0x20F1: Known(chip=GA100, subsystem=0x145F, model="NVIDIA A100-PCIE-40GB"),
    0x2236: Known(chip=GA102, subsystem=0x1482, model="NVIDIA A10"),
    0x2330: Known(chip=GH100, subsystem=0x16C1, model="NVIDIA H100 80GB HBM3"),
    0x2331: Known(chip=GH100, subsystem=0x1626, model="NVIDIA H100 PCIe"),
    0x2335: Known(chip=GH100, subsystem=0x18BE, model="NVIDIA H200"),
    0x26B9: Known(chip=AD102, subsystem=0x1851, model="NVIDIA L40S"),
    0x27B8: Known(chip=AD104, subsystem=0x16CA, model="NVIDIA L4"),
}
"""Devices and models as the open 550.163.01 driver names them in
`/proc/driver/nvidia/gpus/*/information`, each tried in a guest. Subsystems are from the table of
names in its nv-kernel.o_binary.
"""


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


def fallen_off(gpu: Gpu) -> Gpu:
    """The GPU as a device that a check must refuse: the driver says "fallen off the bus".

    Both boot registers read all ones. With PMC_BOOT_0 alone the open 550.163.01 driver binds and
    names the model all the same; the closed one does not.
    """
    return replace(gpu, boot0=ALL_ONES, boot42=ALL_ONES)


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
