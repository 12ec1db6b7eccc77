"""Why a guest did not come up, from the last words on its serial line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# fs/erofs/super.c; what it says beside errors is how it was mounted.
EROFS = r"erofs:? \(device [^)]+\): (?!mounted with|EXPERIMENTAL|\[deprecated\])"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A sentence for what a pattern in the log means, and the cure."""

    pattern: re.Pattern[str]
    cause: str
    cure: str


# The first that is found counts, so what comes first in a boot stands first.
CAUSES = (
    Cause(pattern=re.compile(r"Trying to load image|PVH ELF Note|not a supported kernel"),
          cause="QEMU cannot start this kernel",
          cure="kernel-configs: keep PVH; ./doitw build_kernel"),
    Cause(pattern=re.compile(r"dm-verity.*(mismatch|corrupt)|metadata block \d+ is corrupted|"
                             r"data block \d+ is corrupted|verity.*root hash"),
          cause="the disk's content is not what its hash tree says: it was altered or damaged, or "
                "the root hash of the drop-in is another build's",
          cure="./doitw build_image, and install image and drop-in together"),
    Cause(pattern=re.compile(rf"{EROFS}|EXT4-fs.*error|Can't find ext4|bad superblock|"
                             r"beyond EOD|beyond end of device"),
          cause="the root file system cannot be read: the image is truncated or damaged, or the "
                "kernel lacks its compressor",
          cure="./doitw cache:verify, then ./doitw build_image; kernel-configs: EROFS_FS_ZIP_*"),
    Cause(pattern=re.compile(r"Unable to mount root fs|Cannot open root device"),
          cause="the kernel finds no root: the disk's driver or file system is not built in, or "
                "the image has no partition table",
          cure="kernel-configs: VIRTIO_BLK, VIRTIO_PCI, EROFS_FS or EXT4_FS built in; "
               "./doitw build_image"),
    Cause(pattern=re.compile(r"Requested init .* failed|No working init|Attempted to kill init|"
                             r"Run .* as init process.*\n.*(not found|No such)"),
          cause="init cannot be started: /sbin/init, its loader or a library is missing",
          cure="./doitw build_rootfs checks that; look at the lines above"),
    Cause(pattern=re.compile(r"Out of memory|page allocation failure"),
          cause="the guest has too little memory", cure="give the check more: boot_check memory"),
    Cause(pattern=re.compile(r"Kernel panic"), cause="the kernel stopped",
          cure="the lines above it say where"),
)


def explain(log: Sequence[str], qemu: str = "") -> tuple[str, str]:
    """Cause and cure for the last lines of a log; in general words when nothing is known.

    `qemu` is what became of QEMU.
    """
    text = "\n".join(log)
    for known in CAUSES:
        if known.pattern.search(f"{text}\n{qemu}"):
            return known.cause, known.cure
    if not text.strip():
        if qemu.startswith("QEMU ended"):
            return "QEMU ended before the kernel said a word", "its own words, above, say why"
        return ("the kernel says nothing at all: it is damaged, or not for this machine",
                "./doitw cache:verify, then ./doitw build_kernel")
    return ("the guest stopped, or something in it waits for ever",
            "look at the whole log; ./doitw boot_shell shows more")
