"""Disk images: the bytes that parted and Kata's tools write, and reading them back.

Host tools: sfdisk (package fdisk) for one test, skipped without it.
"""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from katagpu import disk
from katagpu.disk import MIB, FsType, Partition
from katagpu.errors import StepError, UserError

SIGNATURE = 0x11223344

# Bytes 446 to 510 as parted 3.5 wrote them for `mklabel msdos mkpart primary ext4 1MiB …`.
PARTED = {
    (9 * MIB, False): "0000011083 03208f0008000000400000" + "00" * 48,
    (200 * MIB, True): "80000110830 3e0ff0008000000280600 0003e0ff83 03e0ff0030060000100000"
                       + "00" * 32,
    (9000 * MIB, True): "00000110830 3e0ff0008000000181601 0003e0ff8303e0ff0020160100200300"
                        + "00" * 32,
}


@pytest.fixture
def content(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(b"content" * 1000)
    return path


def fletcher(words: list[int]) -> int:
    """The checksum by its definition: the sum, and the sum of the sums, both modulo 2^32."""
    sums = [sum(words[:count]) % 2**32 for count in range(1, len(words) + 1)]
    return sum(sums) % 2**32 * 2**32 + sums[-1]


@pytest.mark.parametrize(("size", "hashed"), PARTED)
def test_entries_are_those_of_parted(size: int, hashed: bool) -> None:
    plan = disk.layout(size, hashed=hashed)
    parts = plan.partitions
    if (size, hashed) == (9000 * MIB, True):  # there it was 1 % less round, and not bootable
        parts = (Partition(offset=MIB, size=8899 * MIB),
                 Partition(offset=8900 * MIB, size=100 * MIB))
    record = disk.mbr(parts, disk_signature=SIGNATURE)
    assert record[446:510].hex() == PARTED[size, hashed].replace(" ", "")
    assert record[440:446] == bytes.fromhex("443322110000")
    assert record[510:] == b"\x55\xaa"


@pytest.mark.parametrize(("content", "dax", "hashed", "mebibytes"), [
    (5 * MIB, False, False, 8),  # (5+1)/1 + 1 + 1
    (5 * MIB - 1, False, False, 7),
    (5 * MIB, True, False, 10),
    (5 * MIB - 1, True, False, 10),  # Kata's own 9 would be refused by the nvdimm driver
    (150_000_000, False, False, 146),
    (150_000_000, False, True, 148),
])
def test_erofs_size(content: int, dax: bool, hashed: bool, mebibytes: int) -> None:
    assert disk.erofs_size(content, dax=dax, hashed=hashed) == mebibytes * MIB


def test_ext4_size_is_aligned() -> None:
    assert disk.ext4_size(1) == 128 * MIB
    assert disk.ext4_size(127 * MIB) == 128 * MIB
    assert disk.ext4_size(127 * MIB, dax=True) == 256 * MIB
    assert disk.ext4_size(100 * MIB, free=28 * MIB) == 256 * MIB


@pytest.mark.parametrize("dax", [False, True])
@pytest.mark.parametrize("megabytes", [3, 45, 101, 151, 202, 300])
def test_content_always_fits(megabytes: int, dax: bool) -> None:
    size = megabytes * 1_000_000
    for hashed in (False, True):
        for total in (disk.erofs_size(size, dax=dax, hashed=hashed),
                      disk.ext4_size(size, dax=dax, hashed=hashed)):
            assert disk.layout(total, dax=dax, hashed=hashed).partitions[0].size >= size
            assert not dax or total % disk.DAX_ALIGN == 0


def test_layout_refuses_what_cannot_be() -> None:
    for size in (MIB, 5 * MIB + 1):
        with pytest.raises(ValueError):
            disk.layout(size)


def test_pfn_superblock() -> None:
    block = disk.pfn_superblock()
    assert len(block) == 4096
    assert block[:16] == b"NVDIMM_PFN_INFO\0"
    fields = {52: ("<H", 0), 54: ("<H", 2), 56: ("<Q", 2 << 20), 64: ("<Q", 0), 72: ("<I", 1),
              76: ("<I", 0), 80: ("<I", 0), 84: ("<I", 2 << 20)}
    for offset, (code, value) in fields.items():
        assert struct.unpack_from(code, block, offset) == (value,), offset
    assert not any(block[16:52]) and not any(block[88:4088])
    words = list(struct.unpack("<1024I", block[:4088] + bytes(8)))
    assert struct.unpack("<Q", block[4088:]) == (fletcher(words),)


def test_fletcher64_wraps() -> None:
    data = b"\xff" * 4096
    assert disk.fletcher64(data) == fletcher([0xFFFFFFFF] * 1024)


def test_image_has_its_content(tmp_path: Path, content: Path) -> None:
    image = tmp_path / "image"
    disk.write(image, disk.layout(4 * MIB), [content], disk_signature=SIGNATURE)
    data = image.read_bytes()
    assert len(data) == 4 * MIB
    assert data[MIB:].rstrip(b"\0") == content.read_bytes()
    assert disk.partitions(image) == [Partition(offset=MIB, size=3 * MIB)]
    assert not disk.has_dax_header(image)


def test_dax_image_shows_one_partition_in_both_views(tmp_path: Path, content: Path) -> None:
    image, namespace = tmp_path / "image", tmp_path / "pmem"
    disk.write(image, disk.layout(6 * MIB, dax=True), [content], disk_signature=SIGNATURE)
    namespace.write_bytes(image.read_bytes()[disk.DAX_SIZE:])
    assert disk.has_dax_header(image)
    assert disk.partitions(image) == [Partition(offset=3 * MIB, size=3 * MIB)]
    assert disk.partitions(namespace) == [Partition(offset=MIB, size=3 * MIB)]
    with namespace.open("rb") as stream:
        stream.seek(MIB)
        assert stream.read(7000) == content.read_bytes()


@pytest.mark.parametrize("dax", [False, True])
def test_second_partition(tmp_path: Path, content: Path, dax: bool) -> None:
    tree = tmp_path / "hashes"
    tree.write_bytes(b"hash" * 64)
    image = tmp_path / "image"
    plan = disk.layout(202 * MIB, dax=dax, hashed=True)
    disk.write(image, plan, [content, tree], disk_signature=SIGNATURE)
    data, hashes = disk.partitions(image)
    assert (data, hashes) == plan.partitions
    assert data.boot and not hashes.boot
    assert data.offset + data.size == hashes.offset
    assert hashes.offset + hashes.size == plan.size
    with image.open("rb") as stream:
        stream.seek(hashes.offset)
        assert stream.read(256) == tree.read_bytes()


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, image = tmp_path / "source", tmp_path / "image"
    with source.open("wb") as stream:
        stream.truncate(64 * MIB)
        stream.seek(40 * MIB)
        stream.write(b"x" * 5000)
    disk.write(image, disk.layout(disk.ext4_size(64 * MIB)), [source], disk_signature=1)
    assert image.stat().st_blocks * 512 < MIB
    with image.open("rb") as stream:
        stream.seek(41 * MIB)
        assert stream.read(5001) == b"x" * 5000 + b"\0"


def test_copy_without_the_kernels_help(tmp_path: Path, content: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    first, second = tmp_path / "first", tmp_path / "second"
    disk.write(first, disk.layout(4 * MIB), [content], disk_signature=1)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    disk.write(second, disk.layout(4 * MIB), [content], disk_signature=1)
    assert first.read_bytes() == second.read_bytes()


def test_too_large_a_content_leaves_nothing(tmp_path: Path) -> None:
    source, image = tmp_path / "source", tmp_path / "image"
    source.write_bytes(bytes(3 * MIB + 1))
    with pytest.raises(StepError, match="has room for 3145728"):
        disk.write(image, disk.layout(4 * MIB), [source], disk_signature=1)
    assert not image.exists()


def test_signature_is_never_zero() -> None:
    assert disk.signature("0123456789abcdef") == 0x01234567
    assert disk.signature("0" * 64) == 1


@pytest.mark.skipif(shutil.which("sfdisk") is None, reason="needs sfdisk")
@pytest.mark.parametrize("hashed", [False, True])
def test_sfdisk_agrees(tmp_path: Path, content: Path, hashed: bool) -> None:
    image = tmp_path / "image"
    plan = disk.layout(101 * MIB, hashed=hashed)
    disk.write(image, plan, [content, content][:1 + hashed], disk_signature=SIGNATURE)
    told = subprocess.run(["sfdisk", "--json", image], check=True, capture_output=True).stdout
    table = json.loads(told)["partitiontable"]
    assert (table["label"], table["id"]) == ("dos", "0x11223344")
    assert [(row["start"] * 512, row["size"] * 512, row["type"], row.get("bootable", False))
            for row in table["partitions"]] == [
        (part.offset, part.size, "83", part.boot) for part in plan.partitions]


@pytest.mark.parametrize(("kind", "offset", "magic"), [
    (FsType.EXT4, 1080, b"\x53\xef"), (FsType.EROFS, 1024, b"\xe2\xe1\xf5\xe0"),
    (FsType.XFS, 0, b"XFSB"), (FsType.SQUASHFS, 0, b"hsqs"), (None, 0, b""),
])
def test_fs_type(tmp_path: Path, kind: FsType | None, offset: int, magic: bytes) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB + offset) + magic + bytes(100))
    assert disk.fs_type(image, MIB) is kind
    assert disk.fs_type(image) is None


def test_reader_says_what_is_wrong(tmp_path: Path, content: Path) -> None:
    image = tmp_path / "image"
    with pytest.raises(UserError, match="no partition table at byte 0"):
        disk.partitions(content)
    disk.write(image, disk.layout(6 * MIB, dax=True), [content], disk_signature=1)
    data = bytearray(image.read_bytes())
    image.write_bytes(data[:5 * MIB])
    with pytest.raises(UserError, match="ends at byte 6291456, the file at 5242880"):
        disk.partitions(image)
    data[disk.DAX_SIZE + 450] ^= 1
    image.write_bytes(data)
    with pytest.raises(UserError, match="do not agree"):
        disk.partitions(image)
    data[5000] ^= 1  # a broken superblock is none: then the kernel does not heed it either
    image.write_bytes(data)
    assert not disk.has_dax_header(image)
    data[450] = 0xEE
    image.write_bytes(data)
    with pytest.raises(UserError, match="GPT"):
        disk.partitions(image)
