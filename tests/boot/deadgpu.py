"""A GPU that has fallen off the bus, which a check must refuse."""

from __future__ import annotations

from dataclasses import replace

from katagpu.boot.gpu import Gpu

ALL_ONES = 0xFFFFFFFF
"""What a register of a GPU reads that no read reaches."""


def fallen_off(gpu: Gpu) -> Gpu:
    """The GPU as a device of which the driver says "fallen off the bus".

    Both boot registers read all ones. With PMC_BOOT_0 alone the open 550.163.01 driver binds and
    names the model all the same; the closed one does not.
    """
    return replace(gpu, boot0=ALL_ONES, boot42=ALL_ONES)
