"""Hash trees: the line of parameters, veritysetup's words, and the real tool's own tree."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from katagpu import disk, verity
from katagpu.errors import StepError, UserError
from katagpu.verity import BLOCK, Verity

KNOWN = Verity(root_hash="ab" * 32, salt="01" * 32, data_blocks=12)
LINE = (f"root_hash={'ab' * 32},salt={'01' * 32},data_blocks=12,data_block_size=4096,"
        "hash_block_size=4096")
SAID = f"""VERITY header information for /katagpu/out/hashes
UUID:            \t
Hash type:       \t1
Data blocks:     \t12
Data block size: \t4096
Hash blocks:     \t1
Hash block size: \t4096
Hash algorithm:  \tsha256
Salt:            \t{'01' * 32}
Root hash:      \t{'ab' * 32}
"""
needs_tool = pytest.mark.skipif(shutil.which("veritysetup") is None, reason="needs veritysetup")


def tree(data: bytes, salt: bytes) -> tuple[str, bytes]:
    """Root hash and tree by the kernel's verity.rst: each block of a level hashed, salt first."""
    levels, level = [], data
    while True:
        hashes = b"".join(hashlib.sha256(salt + level[at:at + BLOCK]).digest()
                          for at in range(0, len(level), BLOCK))
        if len(level) == BLOCK:
            break
        level = hashes.ljust(-(-len(hashes) // BLOCK) * BLOCK, b"\0")
        levels.append(level)
    return hashes.hex(), b"".join(reversed(levels))


def test_the_line_is_kata_s_and_is_read_again() -> None:
    assert str(KNOWN) == LINE
    assert verity.read(LINE) == KNOWN
    assert verity.read(",".join(reversed(LINE.split(","))) + "\n") == KNOWN
    other = LINE.replace("hash_block_size=4096", "hash_block_size=1024")
    assert verity.read(other).hash_block_size == 1024


@pytest.mark.parametrize("line", [
    "", "root_hash=ab", LINE + ",more=1", LINE + f",salt={'01' * 32}",
    LINE.replace("data_blocks=12", "data_blocks=0"), LINE.replace("=4096", "=1000"),
    LINE.replace("12", "twelve"), LINE.replace("ab" * 32, "xy" * 32), LINE.replace("ab", "", 1)])
def test_lines_that_the_runtime_refuses(line: str) -> None:
    with pytest.raises(UserError):
        verity.read(line)


def test_what_veritysetup_says_is_understood_and_nothing_else_is() -> None:
    assert verity.parse(SAID) == KNOWN
    for words in ("Root hash", "Salt", "Data blocks"):
        less = "\n".join(line for line in SAID.splitlines() if not line.startswith(words))
        with pytest.raises(StepError, match=words):
            verity.parse(less)
    with pytest.raises(StepError):
        verity.parse("")


def test_the_salt_is_the_content_s() -> None:
    assert verity.salt("a") == verity.salt("a") != verity.salt("b")
    assert len(bytes.fromhex(verity.salt("a"))) == 32


def test_command_lines() -> None:
    data, hashes = PurePosixPath("/out/fs"), PurePosixPath("/out/hashes")
    common = ["--no-superblock", "--hash=sha256", "--data-block-size=4096",
              "--hash-block-size=4096", "--data-blocks=12", f"--salt={KNOWN.salt}", "/out/fs",
              "/out/hashes"]
    assert verity.make(data, hashes, salt=KNOWN.salt, data_blocks=12) == [
        "veritysetup", "format", *common]
    assert verity.check(data, hashes, KNOWN) == ["veritysetup", "verify", *common, KNOWN.root_hash]


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 128 * 128, 128 * 128 + 1])
def test_size_of_the_tree(blocks: int) -> None:
    assert verity.tree_size(blocks) == len(tree(bytes(blocks * BLOCK), b"")[1])


@pytest.mark.parametrize("mebibytes", [1, 50, 97, 98, 99, 100, 101, 199, 200, 250, 999, 4000])
@pytest.mark.parametrize("dax", [False, True])
def test_the_tree_fits_into_kata_s_geometry(mebibytes: int, dax: bool) -> None:
    size = disk.erofs_size(mebibytes * disk.MIB, dax=dax, hashed=True)
    data, hashes = disk.layout(size, dax=dax, hashed=True).partitions
    assert data.size >= mebibytes * disk.MIB and data.size % BLOCK == 0
    assert verity.tree_size(data.size // BLOCK) <= hashes.size


@needs_tool
def test_the_real_tool_makes_this_tree_and_finds_a_flipped_bit(tmp_path: Path) -> None:
    data, hashes = tmp_path / "data", tmp_path / "hashes"
    content = b"".join(hashlib.sha256(bytes([number])).digest() * 128 for number in range(200))
    data.write_bytes(content)
    hashes.touch()
    salt = verity.salt("x")
    said = subprocess.run(verity.make(PurePosixPath(data), PurePosixPath(hashes), salt=salt,
                                      data_blocks=200), check=True, capture_output=True, text=True)
    known = verity.parse(said.stdout)
    root_hash, expected = tree(content, bytes.fromhex(salt))
    assert known == Verity(root_hash=root_hash, salt=salt, data_blocks=200)
    assert hashes.read_bytes() == expected
    check = verity.check(PurePosixPath(data), PurePosixPath(hashes), known)
    assert subprocess.run(check).returncode == 0
    data.write_bytes(b"\x01" + content[1:])
    assert subprocess.run(check, capture_output=True).returncode != 0
