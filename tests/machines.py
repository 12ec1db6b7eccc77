"""Virtual machines for tests, by variables that `./doitw test` sets once the guest is built.

KATAGPU_TEST_QEMU is the command that starts a QEMU with vfio-user-pci, with its first arguments:
`KATAGPU_TEST_QEMU="qemu-system-x86_64 -L /usr/share/qemu"`. KATAGPU_TEST_KERNEL is a guest's
`vmlinux`. Tests do not see our variables (tests/conftest.py), so they are read here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import pytest

QEMU = os.environ.get("KATAGPU_TEST_QEMU", "")
KERNEL = os.environ.get("KATAGPU_TEST_KERNEL", "")
NEEDS_QEMU = (pytest.mark.qemu,
              pytest.mark.skipif(not QEMU, reason="needs KATAGPU_TEST_QEMU"))
NEEDS_KERNEL = (*NEEDS_QEMU,
                pytest.mark.skipif(not KERNEL, reason="needs KATAGPU_TEST_KERNEL"))
Test = TypeVar("Test", bound=Callable[..., None])


def needs_qemu(test: Test) -> Test:
    """Marks one test of a module whose others need none."""
    marked: Test = NEEDS_QEMU[0](NEEDS_QEMU[1](test))
    return marked
