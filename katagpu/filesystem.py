"""File systems: a root tree as erofs, ext4 or a compressed initrd.

Command lines for tools of one pinned suite (erofs-utils 1.8.6, e2fsprogs 1.47.2), and the sizes
that they need. All of them read a directory, at a path that the caller chooses: from a tar, neither
mkfs.erofs (the root directory becomes 0777 where the tar has no entry for it) nor mke2fs (extended
attributes other than capabilities are lost) makes the same file system. What the bytes depend on,
and what not, is in docs/image.md.
"""

from __future__ import annotations

import os
import stat
import uuid
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath

from katagpu.errors import UserError

BLOCK = 4096
MIB = 1 << 20
RESERVED_PERCENT = 3  # as Kata's `tune2fs -m 3`
JOURNAL = 4 * MIB  # the smallest that ext4 takes with 4 KiB blocks
SMALLEST = 16 * MIB  # in one of 7 MiB, mke2fs leaves the journal out, with status 0
GROUP = 32768  # blocks in a block group
LOST_AND_FOUND = 4
EXTENT_REACH = 4096  # blocks of a file for which one more extent block is counted


class Compressor(StrEnum):
    """What erofs data are compressed with; the guest kernel needs the matching EROFS_FS_ZIP*."""

    NONE = "none"
    LZ4HC = "lz4hc"
    ZSTD = "zstd"


# Highest level of each, as the tool says; zstd's above 19 need a window that unzstd in the kernel
# does not have to accept.
LEVELS = {Compressor.NONE: 0, Compressor.LZ4HC: 12, Compressor.ZSTD: 19}
PACKED = ".zst"  # what packing adds to an initrd's name


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Compressor and level of an erofs image; `cluster` is the most bytes packed as one piece."""

    compressor: Compressor = Compressor.ZSTD
    level: int = 3
    cluster: int = 65536

    def __post_init__(self) -> None:
        _check_level(self.compressor, self.level, LEVELS[self.compressor])


@dataclass(frozen=True, kw_only=True)
class TreeSize:
    """What a tree takes in ext4: inodes, and 4 KiB blocks of data and directories."""

    inodes: int
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Ext4Size:
    """Size of a file system: bytes in whole blocks, and inodes to make."""

    size: int
    inodes: int


def _check_level(name: str, level: int, highest: int) -> None:
    if not 0 <= level <= highest or (level == 0 and highest):
        raise UserError(f"compression level {level} of {name}: it has 1 to {highest}",
                        hint="higher is smaller and slower to pack; it costs the guest nothing")


def fs_uuid(digest: str) -> str:
    """The file system's UUID: 16 bytes of a hex digest, marked as version 8 (RFC 9562)."""
    raw = bytearray.fromhex(digest[:32])
    raw[6] = raw[6] & 0x0F | 0x80
    raw[8] = raw[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(raw)))


def erofs(tree: PurePosixPath, target: PurePosixPath, *, identity: str, time: int,
          compression: Compression, dax: bool) -> list[str]:
    """mkfs.erofs(1): every file gets the same time, which keeps inodes at 32 bytes.

    Not so with SOURCE_DATE_EPOCH in the environment, which overrules -T without a word.
    `dax` for an image with a DAX header. It lays the tail of a file into a block of its own: the
    kernel maps only files that are neither compressed nor tail-packed (fs/erofs/inode.c). Kata does
    so always; without DAX it costs 5 % and gives nothing.
    """
    argv = ["env", "--unset=SOURCE_DATE_EPOCH", "mkfs.erofs", "--quiet", f"-T{time}",
            "--all-time", f"-U{identity}", f"-b{BLOCK}"]
    if compression.compressor is not Compressor.NONE:
        argv += [f"-z{compression.compressor},level={compression.level}",
                 f"-C{compression.cluster}"]
    if dax:
        argv.append("-Enoinline_data")
    return [*argv, str(target), str(tree)]


def ext4(tree: PurePosixPath, target: PurePosixPath, *, identity: str, time: int,
         size: Ext4Size) -> list[str]:
    """mke2fs(8): its own times are `time`, the tree's (access times too) at most that.

    A journal although the guest never writes: Kata mounts with `data=ordered`, which ext4 refuses
    without one. No room to grow the group descriptors (`resize_inode`): it is never resized.
    """
    return ["env", f"SOURCE_DATE_EPOCH={time}",
            "mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-I", "256",
            "-N", str(size.inodes), "-m", str(RESERVED_PERCENT), "-J", f"size={JOURNAL // MIB}",
            "-O", "^resize_inode", "-U", identity, "-E", f"hash_seed={identity},root_owner=0:0",
            "-d", str(tree), str(target), str(size.size // BLOCK)]


def pack(archive: PurePosixPath, *, level: int) -> list[str]:
    """Replace an initrd by its form compressed with zstd, at `packed(…)`."""
    _check_level(Compressor.ZSTD, level, LEVELS[Compressor.ZSTD])
    # Any number of threads gives the same bytes, which `--single-thread` does not.
    return ["zstd", "--quiet", "--force", "--rm", "--threads=0", f"-{level}", str(archive)]


def packed(archive: PurePosixPath) -> PurePosixPath:
    """Where `pack` leaves its result."""
    return archive.with_name(archive.name + PACKED)


def measure(tree: Path) -> TreeSize:
    """What a directory takes in ext4, rounded up where it depends on how entries fall into blocks.

    Must run where the tree's files can be seen, thus inside the sandbox for one with owners.
    """
    inodes, blocks = 0, 0
    seen: set[tuple[int, int]] = set()
    pending = [tree]
    while pending:
        here = pending.pop()
        entries = 12 + 12  # "." and ".."
        with os.scandir(here) as scan:
            for entry in scan:
                entries += 8 + -(-len(os.fsencode(entry.name)) // 4) * 4
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    pending.append(Path(entry.path))
                elif found.st_nlink == 1 or (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    inodes += 1
                    blocks += _file_blocks(found)
        inodes += 1
        # An entry does not cross a block's end, where the checksum is.
        blocks += -(-entries // (BLOCK - 12 - 263))
    return TreeSize(inodes=inodes, blocks=blocks)


def _file_blocks(found: os.stat_result) -> int:
    if stat.S_ISLNK(found.st_mode):
        return 1 if found.st_size >= 60 else 0  # shorter ones lie in the inode
    if not stat.S_ISREG(found.st_mode):
        return 0
    count = -(-found.st_size // BLOCK)
    return count + count // EXTENT_REACH


def ext4_need(tree: TreeSize) -> Ext4Size:
    """The smallest size at which the tree fits and 3 % stay reserved, with a little to spare.

    Raise it to the partition's size with `dataclasses.replace`: inodes stay as they are.
    """
    inodes = tree.inodes + tree.inodes // 4 + 256
    fixed = (tree.blocks + LOST_AND_FOUND + JOURNAL // BLOCK + -(-inodes * 256 // BLOCK))
    total = max(fixed, SMALLEST // BLOCK)
    while True:
        groups = -(-total // GROUP)
        # Two bitmaps, a rounded-up inode table, and at most superblock + descriptors, in each.
        overhead = groups * (2 + 16 + 1 + -(-groups * 64 // BLOCK))
        wanted = -(-(fixed + overhead) * 100 // (100 - RESERVED_PERCENT)) + fixed // 100
        if wanted <= total:
            return Ext4Size(size=total * BLOCK, inodes=inodes)
        total = wanted
