"""Packs files into NVIDIA's `.run` form: header, stub, maybe a decompressor, compressed tar.

The header is line for line that of NVIDIA's makeself (packages 390 to 460, the same in each); the
stub is our own. The same files give the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import zstandard

HERE = Path(__file__).parent
EPOCH = 1735689600  # 2025-01-01, as a packaging date
CHUNK = 1 << 20
UNCOMPRESS = {"gzip": "gzip -cd", "xz": "xz -d", "zstd": "zstd -d"}


@dataclass(frozen=True, kw_only=True)
class Name:
    """What a package is called. `variant` follows the version, as `-grid` does."""

    version: str
    variant: str = ""
    architecture: str = "x86_64"

    @property
    def directory(self) -> str:
        """Its `targetdir`, and the file's name without `.run`."""
        return f"NVIDIA-Linux-{self.architecture}-{self.version}{self.variant}"

    @property
    def label(self) -> str:
        """What NVIDIA calls it; a variant is not in it."""
        return (f"NVIDIA Accelerated Graphics Driver for Linux-{self.architecture} "
                f"{self.version}")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One member of the tar: a file with its bytes or from a path, or whatever `kind` says."""

    name: str
    content: bytes | Path = b""
    mode: int = 0o644
    kind: bytes = tarfile.REGTYPE
    link: str = ""

    def info(self) -> tarfile.TarInfo:
        """Its header, with fixed time and owner."""
        info = tarfile.TarInfo(self.name)
        info.type, info.mode, info.mtime, info.linkname = self.kind, self.mode, EPOCH, self.link
        if self.kind == tarfile.REGTYPE:
            info.size = (self.content.stat().st_size if isinstance(self.content, Path)
                         else len(self.content))
        return info


def tree(files: Mapping[str, Member]) -> list[Member]:
    """Files by name as members named `./…`, sorted, each after its directory."""
    found: dict[str, Member] = {}
    for name in sorted(files):
        parts = name.split("/")
        for depth in range(1, len(parts)):
            directory = "./" + "/".join(parts[:depth])
            found.setdefault(directory, Member(name=directory, mode=0o755, kind=tarfile.DIRTYPE))
        found["./" + name] = files[name]
    return list(found.values())


def pack(target: Path, name: Name, members: Iterable[Member], *, compression: str = "zstd",
         decompressor: bytes = b"") -> Path:
    """Write a `.run`; `decompressor` is a program that the stub uses where the host has none."""
    part = target.with_name(target.name + ".payload")
    with part.open("wb") as raw:
        size = _payload(raw, members, compression)
    embedded = decompressor + b"\n" if decompressor else b""
    stub = (HERE / "stub.sh").read_text()
    for field, value in {"LABEL": name.label, "UNCOMPRESS": UNCOMPRESS[compression],
                         "KILOBYTES": str(size // 1024),
                         "DATE": "Wed Jan  1 00:00:00 UTC 2025"}.items():
        stub = stub.replace(f"@{field}@", value)
    head = _header(name, 0, 0, 0) + stub
    start = head.count("\n") + 1
    count = embedded.count(b"\n")
    text = (_header(name, start + count, start, count) + stub).encode()
    body = text.split(b"\n", 3)[3] + embedded
    crc, md5 = _sums(body, part)
    text = text.replace(b"CRCsum=0000000000", b"CRCsum=%s" % crc, 1)
    text = text.replace(b"MD5=" + b"0" * 32, b"MD5=" + md5, 1)
    with target.open("wb") as out, part.open("rb") as payload:
        out.write(text + embedded)
        while chunk := payload.read(CHUNK):
            out.write(chunk)
    part.unlink()
    target.chmod(0o755)
    return target


def _payload(raw: IO[bytes], members: Iterable[Member], compression: str) -> int:
    """Write the compressed tar; the bytes of all files."""
    if compression == "gzip":
        packer = cast(IO[bytes], gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0,
                                               compresslevel=4))
    elif compression == "xz":  # no integrity check, as NVIDIA has it for its small decompressor
        packer = cast(IO[bytes], lzma.LZMAFile(  # noqa: SIM115 (the with below closes it)
            raw, "wb", check=lzma.CHECK_NONE, preset=0))
    else:
        packer = zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False)
    size = 0
    with packer, tarfile.open(fileobj=packer, mode="w|", format=tarfile.GNU_FORMAT,
                              bufsize=CHUNK) as tar:
        for member in members:
            info = member.info()
            size += info.size
            if isinstance(member.content, Path) and info.isreg():
                with member.content.open("rb") as stream:
                    tar.addfile(info, stream)
            else:
                tar.addfile(info, io.BytesIO(cast(bytes, member.content)))
    return size


def _header(name: Name, skip: int, start: int, count: int) -> str:
    return "".join(line + "\n" for line in (
        "#! /bin/sh", "CRCsum=0000000000", "MD5=" + "0" * 32, f"skip={skip}",
        f"skip_decompress={start}", f"size_decompress={count}", f'label="{name.label}"',
        f"version_string={name.version}", "pkg_version=0", "script=./nvidia-installer",
        f"targetdir={name.directory}", 'scriptargs=""', "keep=n", "add_this_kernel=n",
        "apply_patch=n", "TMPROOT=${TMPDIR:=/tmp}", 'TARGET_OS="Linux"',
        f'TARGET_ARCH="{name.architecture}"'))


def _sums(body: bytes, payload: Path) -> tuple[bytes, bytes]:
    """cksum(1) and MD5 of what comes after line 3; cksum by the program itself."""
    md5 = hashlib.md5(body)
    with subprocess.Popen(["cksum"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cksum, \
            payload.open("rb") as stream:
        assert cksum.stdin is not None and cksum.stdout is not None
        cksum.stdin.write(body)
        while chunk := stream.read(CHUNK):
            md5.update(chunk)
            cksum.stdin.write(chunk)
        cksum.stdin.close()
        crc = cksum.stdout.read().split()[0]
    return crc, md5.hexdigest().encode()
