"""dm-verity: the hash tree of a disk's data partition, and the line that Kata's runtime is given.

Command lines for veritysetup(8) on plain files, which needs neither root nor device-mapper.
Sources: the kernel's Documentation/admin-guide/device-mapper/verity.rst; Kata's image_builder.sh,
which makes the tree without superblock; ParseKernelVerityParams() in src/runtime, which reads the
line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from katagpu.errors import StepError, UserError

BLOCK = 4096
HASH = "sha256"  # the runtime writes this name into the device's table
DIGEST_SIZE = 32
# Names in what veritysetup says, for the fields of the line.
SAID = {"root_hash": "Root hash", "salt": "Salt", "data_blocks": "Data blocks",
        "data_block_size": "Data block size", "hash_block_size": "Hash block size"}
HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Verity:
    """A hash tree: what has to be known to open its device. Block sizes are bytes."""

    root_hash: str
    salt: str
    data_blocks: int
    data_block_size: int = BLOCK
    hash_block_size: int = BLOCK

    def __str__(self) -> str:
        """The line, as `kernel_verity_params` and an extension's `verity_params` take it."""
        return ",".join(f"{name}={getattr(self, name)}" for name in SAID)


def read(line: str) -> Verity:
    """The tree that a line describes. Raises `UserError` where Kata's runtime would refuse it."""
    pairs = [field.partition("=") for field in line.strip().split(",")]
    fields = {name: value for name, _sign, value in pairs}
    if set(fields) != set(SAID) or len(pairs) != len(SAID):
        raise UserError(f"not a line of verity parameters: {line!r}",
                        hint=f"it has these fields, once each: {', '.join(SAID)}")
    return _verity(fields, line)


def parse(said: str) -> Verity:
    """The tree that `veritysetup format` says it has made. Raises `StepError` on other words."""
    pairs = [line.partition(":") for line in said.splitlines()]
    found = {name.strip(): value.split() for name, _sign, value in pairs}
    lacking = [words for words in SAID.values() if not found.get(words)]
    if lacking:
        raise StepError(f"veritysetup did not say its {lacking[0]}: {said.strip()!r}")
    return _verity({name: found[words][0] for name, words in SAID.items()}, said)


def _verity(fields: Mapping[str, str], source: str) -> Verity:
    numbers = [fields[name] for name in ("data_blocks", "data_block_size", "hash_block_size")]
    if not HEX.fullmatch(fields["root_hash"]) or not HEX.fullmatch(fields["salt"]) \
            or not all(number.isdecimal() and int(number) for number in numbers) \
            or any(int(number) % 512 for number in numbers[1:]):
        raise UserError(f"verity parameters that no device can have: {source.strip()!r}",
                        hint="hash and salt are 64 hexadecimal digits, sizes multiples of 512")
    blocks, data, tree = map(int, numbers)
    return Verity(root_hash=fields["root_hash"], salt=fields["salt"], data_blocks=blocks,
                  data_block_size=data, hash_block_size=tree)


def salt(identity: str) -> str:
    """A salt for the content of this identity: the same bytes in, the same tree out.

    A salt keeps a tree from being computed before the content is known. Chance would do no better:
    who can choose the content can read the salt.
    """
    return hashlib.sha256(f"katagpu verity {identity}".encode()).hexdigest()


def tree_size(data_blocks: int) -> int:
    """Bytes of the hash tree of so many blocks, without superblock."""
    per_block = BLOCK // DIGEST_SIZE
    total, level = 0, data_blocks
    while level > 1:
        level = -(-level // per_block)
        total += level
    return total * BLOCK


def make(data: PurePosixPath, tree: PurePosixPath, *, salt: str, data_blocks: int) -> list[str]:
    """veritysetup(8), which says what it has made (`parse`)."""
    return ["veritysetup", "format", "--no-superblock", *_options(salt, data_blocks), str(data),
            str(tree)]


def check(data: PurePosixPath, tree: PurePosixPath, known: Verity) -> list[str]:
    """veritysetup(8): fails when one byte of the data or of the tree is another."""
    return ["veritysetup", "verify", "--no-superblock",
            *_options(known.salt, known.data_blocks), str(data), str(tree), known.root_hash]


def _options(salt: str, data_blocks: int) -> list[str]:
    return [f"--hash={HASH}", f"--data-block-size={BLOCK}", f"--hash-block-size={BLOCK}",
            f"--data-blocks={data_blocks}", f"--salt={salt}"]
