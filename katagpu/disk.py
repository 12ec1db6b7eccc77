"""Kata's disk image: partition tables and the DAX header around a file system, and the way back.

The layout is that of Kata's osbuilder (`image_builder.sh`): an MBR, the root file system in p1 from
1 MiB on, and for dm-verity its hash tree in p2. With a DAX header, 2 MiB stand before all that, so
that one file boots as `/dev/vda1` (first MBR) and as `/dev/pmem0p1` (second MBR). Nothing here
needs root, a loop device or a mount, and the same input gives the same bytes. All sizes are bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from katagpu.errors import StepError, UserError

MIB = 1 << 20
SECTOR = 512
START = MIB  # p1, from the start of its MBR
DAX_SIZE = 2 * MIB
DAX_ALIGN = 2 * MIB  # a huge page, the alignment at which pmem is mapped
EXT4_ALIGN = 128 * MIB
LINUX = 0x83  # what parted writes for ext4, xfs, and for Kata's erofs, which it is told is ext4
PROTECTIVE = 0xEE

# parted's geometry for image files; nothing but old firmware reads CHS, but this makes the entries
# the same bytes as Kata's.
HEADS, SECTORS_PER_TRACK, MAX_CYLINDER = 4, 32, 1023

PFN_OFFSET = 4096  # in the pmem namespace: nd_pfn_validate() reads it there
PFN_SIZE = 4096
PFN_SIGNATURE = b"NVDIMM_PFN_INFO\0"
PFN_MODE_RAM = 1
PFN_VERSION = (0, 2)  # 0.2 knows `align`; later ones describe a page map kept on the medium


class FsType(StrEnum):
    """File systems found in Kata's guest images."""

    EXT4 = "ext4"
    EROFS = "erofs"
    XFS = "xfs"
    SQUASHFS = "squashfs"


# Offset of the magic in the file system, and its bytes as they lie there.
MAGICS = {
    FsType.EXT4: (1024 + 56, b"\x53\xef"),
    FsType.EROFS: (1024, b"\xe2\xe1\xf5\xe0"),
    FsType.XFS: (0, b"XFSB"),
    FsType.SQUASHFS: (0, b"hsqs"),
}


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One entry of a partition table; `offset` counts from the start of the file."""

    offset: int
    size: int
    type: int = LINUX
    boot: bool = False


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything lies in an image of `size` bytes."""

    size: int
    dax: bool
    partitions: tuple[Partition, ...]


def erofs_size(content: int, *, dax: bool = False, hashed: bool = False) -> int:
    """Size of the image for an erofs file system of `content` bytes.

    Kata's rule: whole MiB, one for the start and one to spare, and not aligned to 128 MiB; with a
    hash partition a 99th more, since that takes the last hundredth. Kata's is also odd at times
    with a DAX header, and then the kernel refuses the namespace ("resource end misaligned" in
    nd_pfn_validate()): with one, ours is a multiple of 2 MiB.
    """
    mebibytes = (content + MIB) // MIB + 2
    if hashed:
        mebibytes = mebibytes * 100 // 99 + 1
    size = mebibytes * MIB
    return _up(size + DAX_SIZE, DAX_ALIGN) if dax else size


def ext4_size(content: int, *, dax: bool = False, hashed: bool = False, free: int = 0) -> int:
    """Size of the image whose ext4 file system has at least `content` + `free` bytes.

    Kata's rule: everything rounded up to 128 MiB. The file system then fills the partition, so its
    size is that of `layout(…).partitions[0]`.
    """
    size = START + content + free
    if hashed:
        size = size * 100 // 99 + MIB
    return _up(size + (DAX_SIZE if dax else 0), EXT4_ALIGN)


def layout(size: int, *, dax: bool = False, hashed: bool = False) -> Layout:
    """The partitions of an image of `size` bytes; with `hashed`, p2 is the last hundredth.

    Kata computes p2's start once for each MBR, and with a DAX header the two can be 1 MiB apart;
    here the second MBR's is the only one, so that both views show the same partitions.
    """
    head = DAX_SIZE if dax else 0
    smallest = head + START + (2 * MIB if hashed else SECTOR)
    if size % SECTOR or size < smallest:
        raise ValueError(f"an image of {size} bytes: want whole sectors and at least {smallest}")
    end = size - head
    if not hashed:
        cuts = [(START, end)]
    else:
        cut = max(end // MIB * 99 // 100 * MIB, START + MIB)
        cuts = [(START, cut), (cut, end)]
    return Layout(size=size, dax=dax, partitions=tuple(
        Partition(offset=head + start, size=stop - start, boot=hashed and index == 0)
        for index, (start, stop) in enumerate(cuts)))


def signature(digest: str) -> int:
    """A disk signature (32 bit, never 0) from the hexadecimal digest of what the image is made of.

    Linux names partitions after it (`PARTUUID=<signature>-01`).
    """
    return int(digest[:8], 16) or 1


def write(target: Path, plan: Layout, contents: Sequence[Path], *, disk_signature: int) -> None:
    """Write the image: the tables of `plan`, and one file for each partition, zeros after it.

    Holes stay holes. Raises `StepError` when a content does not fit; then there is no target.
    """
    for number, (part, source) in enumerate(zip(plan.partitions, contents, strict=True), 1):
        if source.stat().st_size > part.size:
            raise StepError(f"{source} has {source.stat().st_size} bytes, "
                            f"partition {number} of {target} has room for {part.size}",
                            hint="this is a fault in the size rules, please report it")
    try:
        with target.open("wb") as image:
            image.truncate(plan.size)
            image.write(mbr(plan.partitions, disk_signature=disk_signature))
            if plan.dax:
                image.seek(PFN_OFFSET)
                image.write(pfn_superblock())
                image.seek(DAX_SIZE)
                image.write(mbr(plan.partitions, disk_signature=disk_signature, base=DAX_SIZE))
            image.flush()
            for part, source in zip(plan.partitions, contents, strict=True):
                with source.open("rb") as content:
                    _copy(content.fileno(), image.fileno(), part.offset)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def mbr(partitions: Sequence[Partition], *, disk_signature: int, base: int = 0) -> bytes:
    """A master boot record for a disk that starts `base` bytes into the file.

    No boot code: nothing in a Kata guest executes it (parted puts a small one there).
    """
    table = b"".join(_entry(part, base) for part in partitions)
    return struct.pack("<440xI2x64s2s", disk_signature, table, b"\x55\xaa")


def pfn_superblock(*, data_offset: int = DAX_SIZE, align: int = DAX_ALIGN) -> bytes:
    """The info block by which the kernel's nvdimm driver makes a pmem disk of a namespace.

    Fields of `struct nd_pfn_sb` (drivers/nvdimm/pfn.h), all little endian: signature[16], uuid[16],
    parent_uuid[16], flags 4, version 2 + 2, dataoff 8, npfns 8, mode 4, start_pad 4, end_trunc 4,
    align 4, zeros, and the checksum in the last 8 bytes. The UUIDs are zero, as in Kata's: the
    namespace that QEMU's nvdimm gives has no label, thus no UUID for parent_uuid to match.
    """
    head = struct.pack("<16s32xIHHQQIIII", PFN_SIGNATURE, 0, *PFN_VERSION, data_offset, 0,
                       PFN_MODE_RAM, 0, 0, align)
    body = head.ljust(PFN_SIZE - 8, b"\0")
    return body + struct.pack("<Q", fletcher64(body + bytes(8)))


def fletcher64(data: bytes) -> int:
    """Fletcher's checksum as the nvdimm driver takes it, over little-endian 32-bit words.

    Both sums run modulo a power of two (not 2^32 - 1): the low one in 32 bits, and of the high one
    the low 32 bits survive.
    """
    words = array("I", data)
    if struct.pack("=I", 1) != struct.pack("<I", 1):
        words.byteswap()
    low = high = 0
    for word in words:
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    return high << 32 | low


def has_dax_header(image: Path) -> bool:
    """Whether a pfn superblock with the right checksum lies where the kernel looks for it."""
    block = _read(image, PFN_OFFSET, PFN_SIZE)
    if len(block) < PFN_SIZE or not block.startswith(PFN_SIGNATURE):
        return False
    (checksum,) = struct.unpack("<Q", block[-8:])
    return fletcher64(block[:-8] + bytes(8)) == int(checksum)


def partitions(image: Path) -> list[Partition]:
    """The partitions of an MBR image, with or without a DAX header.

    Raises `UserError` where there is no table, a GPT, a partition outside the file, or a DAX header
    whose two tables do not show the same partitions.
    """
    found = _table(image, 0)
    if has_dax_header(image) and _table(image, DAX_SIZE) != found:
        raise UserError(f"{image}: the two partition tables of its DAX header do not agree",
                        hint="the file is damaged: take the image anew from where it came")
    return found


def fs_type(image: Path, offset: int = 0) -> FsType | None:
    """The file system that starts `offset` bytes into the file, by its magic number."""
    for kind, (where, magic) in MAGICS.items():
        if _read(image, offset + where, len(magic)) == magic:
            return kind
    return None


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _read(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        return stream.read(count)


def _chs(sector: int) -> bytes:
    """A sector number as cylinder, head, sector; beyond the last cylinder, the last of all."""
    track, position = divmod(sector, SECTORS_PER_TRACK)
    cylinder, head = divmod(track, HEADS)
    if cylinder > MAX_CYLINDER:
        cylinder, head, position = MAX_CYLINDER, HEADS - 1, SECTORS_PER_TRACK - 1
    return bytes([head, (position + 1) | (cylinder >> 8) << 6, cylinder & 0xFF])


def _entry(part: Partition, base: int) -> bytes:
    start, count = (part.offset - base) // SECTOR, part.size // SECTOR
    return struct.pack("<B3sB3sII", 0x80 if part.boot else 0, _chs(start), part.type,
                       _chs(start + count - 1), start, count)


def _table(image: Path, base: int) -> list[Partition]:
    """The MBR that lies at `base`; offsets count from the start of the file."""
    record = _read(image, base, SECTOR)
    if len(record) < SECTOR or record[510:] != b"\x55\xaa":
        raise UserError(f"{image}: no partition table at byte {base}",
                        hint="a disk image of Kata Containers starts with an MBR")
    size, found = image.stat().st_size, []
    for boot, kind, start, count in struct.iter_unpack("<B3xB3xII", record[446:510]):
        if kind == 0:
            continue
        if kind == PROTECTIVE:
            raise UserError(f"{image}: it has a GPT",
                            hint="disk images of Kata Containers have an MBR")
        part = Partition(offset=base + start * SECTOR, size=count * SECTOR, type=kind,
                         boot=boot == 0x80)
        if part.size == 0 or part.offset + part.size > size:
            raise UserError(f"{image}: a partition ends at byte {part.offset + part.size}, "
                            f"the file at {size}",
                            hint="the file is truncated or damaged: take it anew")
        found.append(part)
    return found


def _copy(source: int, target: int, offset: int) -> None:
    """Copy a file's data, not its holes, to `offset` of another; inside the kernel if it can."""
    end, position = os.fstat(source).st_size, 0
    while position < end:
        try:
            position = os.lseek(source, position, os.SEEK_DATA)
        except OSError as failure:
            if failure.errno == errno.ENXIO:
                return
            raise
        hole = os.lseek(source, position, os.SEEK_HOLE)
        while position < hole:
            count = _copy_some(source, target, hole - position, position, offset + position)
            if count == 0:
                raise StepError("a file became shorter while it was copied into an image",
                                hint="run the same command again")
            position += count


def _copy_some(source: int, target: int, count: int, read_at: int, write_at: int) -> int:
    with contextlib.suppress(OSError):
        # Not possible across some file systems; what is wrong for good shows again below.
        return os.copy_file_range(source, target, count, read_at, write_at)
    chunk = os.pread(source, min(count, MIB), read_at)
    return os.pwrite(target, chunk, write_at)
