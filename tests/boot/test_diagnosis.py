"""Why a guest did not come up: lines as real kernels and QEMU print them."""

from __future__ import annotations

import pytest

from katagpu.boot import diagnosis

BOOT = [
    "[    0.000000] Linux version 6.12.117-nvidia-gpu (katagpu@katagpu) (gcc 14.2.0) #1 SMP",
    "[    0.000000] Command line: tsc=reliable no_timer_check root=/dev/vda1 rootflags=ro "
    "rootfstype=erofs console=ttyS0 panic=1 init=/bin/sh -- -c \"exec /sbin/init\"",
    "[    0.000000] BIOS-provided physical RAM map:",
    "[    0.113520] ACPI: 1 ACPI AML tables successfully loaded",
    "[    0.520000] device-mapper: ioctl: 4.48.0-ioctl (2023-03-01) initialised",
    "[    0.611182] virtio_blk virtio2: [vda] 400000 512-byte logical blocks (205 MB/195 MiB)",
]
MOUNTED = [
    "[    0.811182] erofs: (device vda1): mounted with root inode @ nid 36.",
    "[    0.812000] VFS: Mounted root (erofs filesystem) readonly on device 254:1.",
    "[    0.821182] Run /bin/sh as init process",
]
PANIC = "[    1.211182] Kernel panic - not syncing: "


@pytest.mark.parametrize(("lines", "words"), [
    (["Trying to load image: not a kernel"], "cannot start this kernel"),
    ([*BOOT, "[    0.90] device-mapper: verity: 254:1: metadata block 1 is corrupted",
      "[    0.91] Buffer I/O error on dev dm-0, logical block 0, async page read",
      f"{PANIC}VFS: Unable to mount root fs on unknown-block(253,0)"], "hash tree"),
    ([*BOOT, *MOUNTED, "[    2.0] device-mapper: verity: 254:1: data block 77 is corrupted"],
     "hash tree"),
    ([*BOOT, "[    0.90] EXT4-fs (vda1): VFS: Can't find ext4 filesystem",
      f"{PANIC}VFS: Unable to mount root fs on unknown-block(254,1)"], "cannot be read"),
    ([*BOOT, "[    0.90] erofs: (device vda1): erofs_read_superblock: cannot find valid erofs "
      "superblock", f"{PANIC}VFS: Unable to mount root fs on unknown-block(254,1)"],
     "cannot be read"),
    ([*BOOT, *MOUNTED, "[    3.1] erofs: (device vda1): z_erofs_lz4_decompress_mem: failed to "
      "decompress -22 in[4096, 0] out[8192]"], "cannot be read"),
    ([*BOOT, "[    0.90] /dev/root: Can't open blockdev",
      "[    0.91] VFS: Cannot open root device \"/dev/vda1\" or unknown-block(254,1): error -6",
      f"{PANIC}VFS: Unable to mount root fs on unknown-block(254,1)"], "finds no root"),
    ([*BOOT, "[    0.90] List of all bdev filesystems:", " ext4",
      f"{PANIC}VFS: Unable to mount root fs on unknown-block(254,1)"], "finds no root"),
    ([*BOOT, *MOUNTED, "[    0.90] Starting init: /bin/sh exists but couldn't execute it "
      "(error -8)", f"{PANIC}Requested init /bin/sh failed (error -8)."], "init cannot be started"),
    ([*BOOT, *MOUNTED, "/bin/sh: 1: exec: /sbin/init: not found",
      f"{PANIC}Attempted to kill init! exitcode=0x00007f00"], "init cannot be started"),
    ([*BOOT, f"{PANIC}No working init found.  Try passing init= option to kernel."],
     "init cannot be started"),
    ([*BOOT, *MOUNTED, "[    9.1] Out of memory: Killed process 1 (systemd)"],
     "too little memory"),
    ([*BOOT, "[    0.50] Out of memory and no killable processes...",
      f"{PANIC}System is deadlocked on memory"], "too little memory"),
    ([*BOOT, "[    0.61] vda: p1 size 407552 extends beyond EOD, truncated",
      f"{PANIC}VFS: Unable to mount root fs on unknown-block(254,1)"], "cannot be read"),
    ([*BOOT, "[    0.90] erofs (device vda1): cannot find valid erofs superblock"],
     "cannot be read"),
    ([*BOOT, "[    0.90] erofs: (device vda1): z_erofs_parse_cfgs: algorithm 3 isn't enabled on "
      "this kernel"], "cannot be read"),
    ([*BOOT, f"{PANIC}stack-protector: Kernel stack is corrupted"], "the kernel stopped"),
    ([], "says nothing at all"), (["", "  "], "says nothing at all"),
    ([*BOOT, *MOUNTED, "[    1.5] systemd[1]: Hostname set to <kata>."], "waits for ever"),
    # a guest that comes up: nothing in its log is a cause of anything
    ([*BOOT, *MOUNTED], "waits for ever")])
def test_the_cause(lines: list[str], words: str) -> None:
    cause, cure = diagnosis.explain(lines)
    assert words in cause
    assert cure


def test_what_became_of_qemu() -> None:
    ended = "QEMU ended with status 1: "
    assert "cannot start this kernel" in diagnosis.explain(
        [], f"{ended}\nqemu: Error loading uncompressed kernel without PVH ELF Note")[0]
    assert "before the kernel said a word" in diagnosis.explain([], f"{ended}Address in use")[0]
    assert "waits for ever" in diagnosis.explain([*BOOT, *MOUNTED], "QEMU ended with status 0")[0]
    assert "says nothing at all" in diagnosis.explain([""], "no answer within 90 s")[0]


def test_every_cause_is_found_by_a_test() -> None:
    marks = test_the_cause.pytestmark  # type: ignore[attr-defined]
    found = {diagnosis.explain(lines) for lines, _words in marks[0].args[1]}
    assert {(known.cause, known.cure) for known in diagnosis.CAUSES} <= found
