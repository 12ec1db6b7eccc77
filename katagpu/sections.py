"""Sections of a recipe that stand by themselves, and the base of all (see `schema`)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from katagpu.words import BarSize, DeviceId, GuestMemory, Register


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the recipe's parts: immutable, and an unknown field is an error."""


class Sign(Section, frozen=True, kw_only=True):
    """Signed kernel modules (docs/kernel.md)."""

    key: Annotated[str, Meta(description=(
        "path of the private key, RSA in PEM, outside of the repository; `KBUILD_SIGN_PIN` in the "
        "environment is its passphrase"))]
    cert: Annotated[str, Meta(description=(
        "path of its certificate (X.509, PEM), which goes into the kernel"))]
    force: Annotated[bool, Meta(description=(
        "a kernel that refuses modules without a signature by it (`MODULE_SIG_FORCE`)"))] = False


class BootCheck(Section, frozen=True, kw_only=True):
    """What `./doitw boot_check` boots the guest with (docs/boot.md)."""

    device: Annotated[DeviceId, Meta(description=(
        "PCI device id of the emulated GPU, four hexadecimal digits; known ones: docs/boot.md"))
    ] = "20b7"
    boot0: Annotated[Register | None, Meta(description=(
        "its register PMC_BOOT_0, for another id; `ffffffff`: a GPU that does not answer"))] = None
    boot42: Annotated[Register | None, Meta(description=(
        "its register PMC_BOOT_42, for another id"))] = None
    bar1_gib: Annotated[BarSize, Meta(description="its large BAR, in GiB")] = 32
    memory: Annotated[GuestMemory, Meta(description="memory of each machine, in MiB")] = 2048
