"""File systems: the command lines, the sizes, and what the real tools make of them.

Host tools: mke2fs, e2fsck and debugfs (package e2fsprogs, on every Debian); mkfs.erofs 1.8 or newer
(package erofs-utils of trixie), zstd and gzip for the rest, each skipped where it is not there.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from katagpu import filesystem
from katagpu.disk import FsType, fs_type
from katagpu.errors import UserError
from katagpu.filesystem import Compression, Compressor, Ext4Size, TreeSize

UUID = "00112233-4455-8677-8899-aabbccddeeff"
TIME = 1_700_000_000
TREE, OUT = PurePosixPath("/tree"), PurePosixPath("/out/root.img")


def tool_version(program: str, option: str) -> tuple[int, ...]:
    if shutil.which(program) is None:
        return (0,)
    told = subprocess.run([program, option], capture_output=True, text=True)
    found = re.search(r"\d+\.\d+(\.\d+)?", told.stdout + told.stderr)
    return tuple(int(part) for part in found.group().split(".")) if found else (0,)


def fill(root: Path, *, reverse: bool = False, touched: int = TIME) -> Path:
    """A small tree with what can differ from run to run: order, times, links, modes."""
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    names = [f"etc/file{number}" for number in range(300)]
    names += ["usr/lib/big", "usr/bin/tool", "a" * 200]
    for name in sorted(names, reverse=reverse):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * (100_000 if name.endswith("big") else 40))
        path.chmod(0o644)
    (root / "usr/bin/tool").chmod(0o4755)
    (root / "usr/bin/link").hardlink_to(root / "usr/bin/tool")
    (root / "etc/long").symlink_to("x" * 100)
    for path in (root, *root.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
        os.utime(path, (touched, touched), follow_symlinks=False)
    return root


def test_erofs_command() -> None:
    assert filesystem.erofs(TREE, OUT, identity=UUID, time=TIME, compression=Compression(),
                            dax=False) == [
        "env", "--unset=SOURCE_DATE_EPOCH", "mkfs.erofs", "--quiet", "-T1700000000", "--all-time",
        f"-U{UUID}", "-b4096",
        "-zzstd,level=3", "-C65536", "/out/root.img", "/tree"]
    plain = Compression(compressor=Compressor.NONE, level=0)
    assert filesystem.erofs(TREE, OUT, identity=UUID, time=TIME, compression=plain, dax=True) == [
        "env", "--unset=SOURCE_DATE_EPOCH", "mkfs.erofs", "--quiet", "-T1700000000", "--all-time",
        f"-U{UUID}", "-b4096",
        "-Enoinline_data", "/out/root.img", "/tree"]


def test_ext4_command() -> None:
    size = Ext4Size(size=64 << 20, inodes=1000)
    assert filesystem.ext4(TREE, OUT, identity=UUID, time=TIME, size=size) == [
        "env", "SOURCE_DATE_EPOCH=1700000000", "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096",
        "-I", "256", "-N", "1000", "-m", "3", "-J", "size=4", "-O", "^resize_inode", "-U", UUID,
        "-E", f"hash_seed={UUID},root_owner=0:0", "-d", "/tree", "/out/root.img", "16384"]


def test_pack_commands() -> None:
    archive = PurePosixPath("/out/initrd")
    assert filesystem.pack(archive, level=19) == [
        "zstd", "--quiet", "--force", "--rm", "--threads=0", "-19", "/out/initrd"]
    assert filesystem.packed(archive) == PurePosixPath("/out/initrd.zst")


@pytest.mark.parametrize(("compressor", "level"), [
    (Compressor.ZSTD, 20), (Compressor.ZSTD, 0), (Compressor.LZ4HC, 13), (Compressor.NONE, 1)])
def test_levels_are_checked(compressor: Compressor, level: int) -> None:
    with pytest.raises(UserError, match=f"level {level} of {compressor}"):
        Compression(compressor=compressor, level=level)


def test_uuid_comes_from_the_digest() -> None:
    assert filesystem.fs_uuid("00112233445566778899aabbccddeeff" * 2) == UUID


def test_measure_counts_hard_links_once(tmp_path: Path) -> None:
    root = fill(tmp_path / "tree")
    before = filesystem.measure(root)
    (root / "usr/bin/third").hardlink_to(root / "usr/bin/tool")
    assert filesystem.measure(root) == before
    (root / "usr/bin/own").write_bytes(b"x" * 4097)
    assert filesystem.measure(root) == TreeSize(inodes=before.inodes + 1, blocks=before.blocks + 2)


@pytest.mark.skipif(shutil.which("mke2fs") is None, reason="needs mke2fs")
@pytest.mark.parametrize("kind", ["small", "many", "large"])
def test_ext4_fits_in_its_size(tmp_path: Path, kind: str) -> None:
    root, image = fill(tmp_path / "tree"), tmp_path / "image"
    if kind == "many":
        (root / "many").mkdir()
        for number in range(2_000):
            (root / f"many/{number:0100}").symlink_to("short")
    if kind == "large":
        with (root / "large").open("wb") as stream:
            for _ in range(30):
                stream.write(os.urandom(1 << 20))
    size = filesystem.ext4_need(filesystem.measure(root))
    run = filesystem.ext4(PurePosixPath(root), PurePosixPath(image), identity=UUID, time=TIME,
                          size=size)
    subprocess.run(run, check=True)
    assert image.stat().st_size == size.size
    assert fs_type(image) is FsType.EXT4
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True)
    heads = subprocess.run(["dumpe2fs", "-h", image], check=True, capture_output=True, text=True)
    numbers = dict(re.findall(r"^(.+?):\s+(\d+)$", heads.stdout, re.MULTILINE))
    free, reserved = int(numbers["Free blocks"]), int(numbers["Reserved block count"])
    assert reserved <= free
    assert size.size == filesystem.SMALLEST or free < int(numbers["Block count"]) // 4
    assert "has_journal" in heads.stdout


def make(command: list[str], image: Path, umask: int = 0o022) -> bytes:
    image.unlink(missing_ok=True)
    # mkfs.erofs must not heed this one.
    subprocess.run(command, check=True, umask=umask,
                   env={**os.environ, "SOURCE_DATE_EPOCH": str(TIME)})
    return image.read_bytes()


@pytest.mark.skipif(tool_version("mke2fs", "-V") < (1, 47, 1), reason="needs mke2fs 1.47.1")
def test_ext4_is_the_same_each_time(tmp_path: Path) -> None:
    image = tmp_path / "image"
    trees = [fill(tmp_path / "one"), fill(tmp_path / "two", reverse=True)]
    size = filesystem.ext4_need(filesystem.measure(trees[0]))
    first, second = (make(filesystem.ext4(PurePosixPath(tree), PurePosixPath(image), identity=UUID,
                                          time=TIME, size=size), image, umask)
                     for tree, umask in zip(trees, (0o022, 0o077), strict=True))
    assert first == second


@pytest.mark.skipif(tool_version("mkfs.erofs", "-V") < (1, 8), reason="needs mkfs.erofs 1.8")
@pytest.mark.parametrize("compression", [
    Compression(), Compression(compressor=Compressor.LZ4HC, level=9),
    Compression(compressor=Compressor.NONE, level=0)])
@pytest.mark.parametrize("dax", [False, True])
def test_erofs_is_the_same_each_time(tmp_path: Path, compression: Compression, dax: bool) -> None:
    image = tmp_path / "image"
    trees = [fill(tmp_path / "one"), fill(tmp_path / "two", reverse=True, touched=TIME - 1)]
    first, second = (make(filesystem.erofs(PurePosixPath(tree), PurePosixPath(image),
                                           identity=UUID, time=TIME, compression=compression,
                                           dax=dax), image, umask)
                     for tree, umask in zip(trees, (0o022, 0o077), strict=True))
    assert first == second
    assert fs_type(image) is FsType.EROFS


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
def test_packing_is_the_same_each_time(tmp_path: Path) -> None:
    results = []
    for name in ("one", "two"):
        archive = tmp_path / name
        archive.write_bytes(b"initrd" * 1_000_000)
        subprocess.run(filesystem.pack(PurePosixPath(archive), level=9), check=True)
        results.append(Path(filesystem.packed(PurePosixPath(archive))).read_bytes())
        assert not archive.exists()
    assert results[0] == results[1]
