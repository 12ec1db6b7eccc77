"""The chips of NVIDIA's devices that a boot check can emulate without being told more.

The fields of their boot registers are in nv_ref.h of NVIDIA's open kernel modules
(src/common/inc/swref/published/nv_ref.h).
"""

from __future__ import annotations

from dataclasses import dataclass


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
