"""NVIDIA's `.run` read as an archive: header, checksums, contents. Nothing of it is executed.

The format is that of NVIDIA's makeself 1.6.0-nv: a shell script that starts with `name=value`
lines, then maybe a decompressor, then a compressed tar to the end of the file. `skip` counts lines,
and so does the start of what the checksums cover: line 4. Sources: makeself.sh in the packages
390.157 (nv2), 440.44 and 460.67 (nv4), all of which write the same header; figures of a package of
nv9, 610.57.04 (skip=1022, payload at byte 160,635, zstd); the list of a vGPU host's package,
550.144.02.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from katagpu import nvbranches, runpayload
from katagpu.drivermanifest import FILE, Manifest, parse
from katagpu.errors import UserError
from katagpu.runpayload import AGAIN, CHUNK, Compression, Contents, Payload
from katagpu.schema import KernelModule

HEAD = 8192  # bytes in which the header lines must be
LONGEST = 64 << 20  # bytes of stub and decompressor; NVIDIA's have 160 kB
DOWNLOAD = "the driver's file is named NVIDIA-Linux-<architecture>-<version>.run"
HOST_MARK = "is_vgpu_host_package.txt"  # nvidia-installer asks for this file itself (misc.c)
_NAMED = re.compile(r"NVIDIA-Linux-(?P<arch>x86_64|x86|aarch64|armv7l|ppc64le)-"
                    r"(?P<version>\d{3}\.\d+(?:\.\d+)?)(?P<variant>\S*)")
_BIT_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the first lines of a `.run` say.

    `variant` is what follows the version in `targetdir`, such as `-grid`. `body` and `payload` are
    offsets in bytes: of line 4, and of the compressed tar. `crc` (cksum(1)) and `md5` are None
    where the file carries none.
    """

    label: str
    version: str
    variant: str
    targetdir: str
    os: str
    architecture: str
    script: str
    crc: int | None
    md5: str | None
    body: int
    payload: int
    compression: Compression

    @property
    def host(self) -> bool:
        """Does its name say that it is a vGPU host's (`-vgpu-kvm`, `-vgpu-xen`, …)?"""
        return "-vgpu" in self.variant or re.search(r"-vgpu-\w", self.label) is not None


class RunFile:
    """A `.run`. Raises `UserError` when the file is not one of NVIDIA's driver."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)

    def verify(self) -> None:
        """Compare both checksums, in one pass. Raises `UserError`."""
        crc, md5 = _checksums(self.path, self.header.body)
        wrong = [name for name, said, found in (("CRC", self.header.crc, crc),
                                                ("MD5", self.header.md5, md5))
                 if said not in (None, found)]
        if self.header.crc is None and self.header.md5 is None:
            raise UserError(f"{self.path} carries no checksum", hint=AGAIN)
        if wrong:
            what = f"{' and '.join(wrong)} are not what its first lines say"
            if runpayload.ends_early(self.payload):
                raise _cut_off(self.path, what)
            raise UserError(f"{self.path} is altered or damaged: {what}",
                            hint=f"remove it, and {AGAIN}")

    @property
    def payload(self) -> Payload:
        """The compressed tar."""
        return Payload(path=self.path, offset=self.header.payload,
                       compression=self.header.compression)

    @cached_property
    def contents(self) -> Contents:
        """What is in it; every member is judged. Decompresses all. Raises `UserError`."""
        return runpayload.look(self.payload)

    @cached_property
    def manifest(self) -> Manifest:
        """Its manifest. Raises `UserError` where it has none or a broken one."""
        if FILE not in self.contents.texts:
            raise UserError(f"{self.path} has no {FILE} in it", hint=AGAIN)
        return parse(self.contents.texts[FILE])

    def extract(self, target: Path) -> None:
        """Unpack into a new directory. Call `verify` before.

        No member is written unless all are admitted; after a failure the directory is not there.
        Raises `UserError`, for a full disk too.
        """
        runpayload.unpack(self.payload, self.contents, target)


def fits(file: RunFile, *, version: str | None, architecture: str = "x86_64",
         flavour: KernelModule | None = None, capabilities: Collection[str] = ()) -> None:
    """Refuse a package that is not for a guest of this recipe. Raises `UserError`.

    `version` None takes the package's own. `flavour` None asks for no kernel modules. Decompresses
    the archive, to see what it is by its contents and not by its name alone.
    """
    header, manifest, name = file.header, file.manifest, file.path.name
    if header.os != "Linux" or header.architecture != architecture:
        raise UserError(f"{name} is for {header.os} on {header.architecture}, the guest is Linux "
                        f"on {architecture}",
                        hint=f"take NVIDIA-Linux-{architecture}-{header.version}.run")
    sign = _host_sign(file)
    if sign is not None:
        raise UserError(f"{name} is a package for vGPU hosts ({sign}), the guest needs a guest's",
                        hint=f"take NVIDIA-Linux-{architecture}-<version>-grid.run of the same "
                             "vGPU release")
    if manifest.version != header.version:
        raise UserError(f"{name} says version {header.version}, its {FILE} says "
                        f"{manifest.version}", hint=AGAIN)
    if version not in (None, manifest.version):
        raise UserError(f"{name} is driver {manifest.version}, the recipe asks for {version}",
                        hint=f"give driver {version}'s file, or 'version: \"{manifest.version}\"'")
    _has(file, flavour, capabilities)


def _has(file: RunFile, flavour: KernelModule | None, capabilities: Collection[str]) -> None:
    manifest, name = file.manifest, file.path.name
    if flavour is not None:
        nvbranches.check_flavour(manifest.version, flavour, manifest.flavours)
    if "compat32" in capabilities and not any(entry.compat32 for entry in manifest.entries):
        raise UserError(f"{name} has no 32-bit libraries, and the recipe asks for compat32",
                        hint="take the package without -no-compat32 in its name")
    # All 577 entries of 440.44 are. Where one is not, the installer complains and exits with 0.
    missing = [entry.file for entry in manifest.entries
               if entry.target is None and entry.file not in file.contents.sizes]
    if missing:
        raise UserError(f"{name} lacks {len(missing)} of the files in its {FILE}, for example "
                        f"{missing[0]}", hint=AGAIN)


def _host_sign(file: RunFile) -> str | None:
    """By what a package is seen to be a vGPU host's."""
    if file.header.host:
        return file.header.targetdir
    if HOST_MARK in file.contents.sizes:
        return HOST_MARK
    if "nvidia-vgpu-vfio" in file.manifest.modules:
        return "module nvidia-vgpu-vfio"
    programs = {"nvidia-vgpud", "nvidia-vgpu-mgr"}
    return next((entry.name for entry in file.manifest.entries
                 if entry.name in programs or entry.type.startswith("VGX_LIB")), None)


def read_header(path: Path) -> Header:
    """The header of a `.run`. Raises `UserError` that says what the file is instead."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD)
            values = _values(head)
            skip = values.get("skip", "")
            named = _NAMED.match(values.get("targetdir", ""))
            if named is None or not skip.isdecimal() or int(skip) < 4:
                raise _not_one(path, head, values)
            body = _line(head, 4)
            payload = _offset(stream, int(skip), path)
            stream.seek(payload)
            magic = stream.read(6)
    except OSError as refusal:
        raise UserError(f"{path} cannot be read: {refusal.strerror}",
                        hint="is the path right?") from None
    compression = next((kind for start, kind in runpayload.MAGICS.items()
                        if magic.startswith(start)), None)
    if not magic:
        raise _cut_off(path, "there is nothing after its first lines")
    if compression is None:
        raise UserError(f"{path.name}: what follows line {int(skip) - 1} is compressed in a way "
                        f"that is not known (it starts with {magic.hex()})",
                        hint=f"known are {', '.join(Compression)}; {AGAIN}")
    architecture = values.get("TARGET_ARCH", "Unknown")
    md5, crc = values.get("MD5", ""), values.get("CRCsum", "")
    return Header(
        label=values.get("label", ""), version=named["version"], variant=named["variant"],
        targetdir=values["targetdir"], os=values.get("TARGET_OS", "Linux"),
        architecture=named["arch"] if architecture == "Unknown" else architecture,
        script=values.get("script", ""), body=body, payload=payload, compression=compression,
        crc=int(crc) if crc.isdecimal() and int(crc) else None,
        md5=md5 if md5.strip("0") else None)


def _values(head: bytes) -> dict[str, str]:
    """The assignments at the top, up to the first empty line."""
    found: dict[str, str] = {}
    for line in head.decode("utf-8", "replace").split("\n")[1:60]:
        name, is_one, value = line.partition("=")
        if not line.strip():
            break
        if is_one and name.isidentifier():
            found.setdefault(name, value.strip().strip("\"'"))
    return found


def _not_one(path: Path, head: bytes, values: dict[str, str]) -> UserError:
    text = head.decode("utf-8", "replace").lower()
    if re.search(r"<!doctype|<html|<head", text[:1024]):
        return UserError(f"{path} is a web page, not a .run file: the server answered with a page",
                         hint="open the address in a browser; some downloads want a click or a "
                              "login first")
    if not head:
        return UserError(f"{path} is empty", hint=f"remove it, and {AGAIN}")
    if "cuda" in text and "makeself" in text:
        return UserError(f"{path} is CUDA's toolkit, not the driver", hint=DOWNLOAD)
    if "makeself" in text or "targetdir" in values:
        what = values.get("targetdir") or values.get("label") or "no name"
        return UserError(f"{path} is a self-extracting archive, but not one of NVIDIA's driver "
                         f"({what})", hint=DOWNLOAD)
    return UserError(f"{path} is not a .run file of NVIDIA (it starts with {head[:16]!r})",
                     hint=DOWNLOAD)


def _line(head: bytes, number: int) -> int:
    """The offset of a line, counted from 1."""
    at = 0
    for _ in range(number - 1):
        at = head.index(b"\n", at) + 1
    return at


def _offset(stream: IO[bytes], skip: int, path: Path) -> int:
    """The offset of line `skip`, as `tail -n +skip` counts."""
    stream.seek(0)
    left, at = skip - 1, 0
    while at < LONGEST and (chunk := stream.read(CHUNK)):
        lines = chunk.count(b"\n")
        if lines >= left:
            inside = 0
            for _ in range(left):
                inside = chunk.index(b"\n", inside) + 1
            return at + inside
        left -= lines
        at += len(chunk)
    raise _cut_off(path, f"it has fewer than the {skip} lines before its archive")


def _cut_off(path: Path, why: str) -> UserError:
    return UserError(f"{path} is cut off: {why}", hint=f"remove it, and {AGAIN}")


def _checksums(path: Path, start: int) -> tuple[int, str]:
    """cksum(1) and MD5 of a file from an offset on.

    cksum's CRC takes each byte from its other end, and the length last (POSIX, cksum). zlib has the
    same polynomial; it complements its state before and after, which is undone here.
    """
    crc, length = 0xFFFFFFFF, 0
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        stream.seek(start)
        while chunk := stream.read(CHUNK):
            md5.update(chunk)
            crc = zlib.crc32(chunk.translate(_BIT_REVERSED), crc)
            length += len(chunk)
    size = length.to_bytes((length.bit_length() + 7) // 8, "little")
    crc = zlib.crc32(size.translate(_BIT_REVERSED), crc)
    return int(f"{crc:032b}"[::-1], 2), md5.hexdigest()

