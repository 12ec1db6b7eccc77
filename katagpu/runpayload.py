"""The tar in a `.run`: decompressed, looked through, unpacked. Nothing in it is trusted.

All members are judged before the first one is written, and again while they are written: a name
that leads out of the directory, or a member that is no plain file, directory or link inside it, is
refused with its name. Owners are not kept, and of modes only the permissions.

Genuine packages pass: that of 440.44 (as a public repository holds it) has 516 files, of which none
is a link and no two differ in upper case only.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, cast

from katagpu.errors import UserError
from katagpu.log import size as readable

CHUNK = 1 << 20
BLOCK = 4096  # what a small file takes on disk
KEPT = (".manifest",)
KEPT_LIMIT = 16 << 20
AGAIN = "fetch the file again from NVIDIA, and compare its SHA-256 with theirs"
SPACE = "./doitw cache:gc, or set KATAGPU_STORE to a larger file system"


class Compression(StrEnum):
    """Compressors of a payload, by NVIDIA's names."""

    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"


MAGICS = {b"\x1f\x8b": Compression.GZIP, b"\xfd7zXZ\0": Compression.XZ,
          b"\x28\xb5\x2f\xfd": Compression.ZSTD}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in an archive: sizes of its files in bytes, and the text of those of `KEPT`."""

    sizes: dict[str, int]
    texts: dict[str, str]
    members: int

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Where the tar is: its offset in the `.run`, in bytes, and how it is compressed."""

    path: Path
    offset: int
    compression: Compression


@contextlib.contextmanager
def _opened(payload: Payload) -> Iterator[tarfile.TarFile]:
    """The tar as a stream. Damage in it becomes a `UserError`."""
    import zstandard

    damage = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile,
              zstandard.ZstdError)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(payload.path.open("rb"))
        raw.seek(payload.offset)
        source: IO[bytes]
        if payload.compression is Compression.GZIP:
            source = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=raw)))
        elif payload.compression is Compression.XZ:
            source = cast(IO[bytes], stack.enter_context(lzma.LZMAFile(raw)))
        else:
            source = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        try:
            yield stack.enter_context(tarfile.open(fileobj=source, mode="r|", bufsize=CHUNK))
        except damage as bad:
            raise UserError(f"the archive in {payload.path.name} is damaged: "
                            f"{bad or type(bad).__name__}", hint=AGAIN) from bad


class Guard:
    """Judges members one by one, and remembers those that it let pass."""

    def __init__(self, archive: str) -> None:
        self.archive = archive
        self.seen: dict[str, tuple[str, bytes]] = {}  # folded name → name, type

    def admit(self, member: tarfile.TarInfo) -> str:
        """The member's name below the top ("" is the top itself). Raises `UserError`."""
        name = self.plain(member.name, member)
        self._kind(member)
        if not name:
            if not member.isdir():
                raise self._refused(member, "it takes the place of the directory itself")
            return name
        self._place(name, member)
        if member.issym():
            self._symlink(name, member)
        elif member.islnk():
            target = self.plain(member.linkname, member)
            if self.seen.get(target.casefold()) != (target, tarfile.REGTYPE):
                raise self._refused(member, "it is a hard link to what is no file before it")
        kind = tarfile.DIRTYPE if member.isdir() else (
            tarfile.SYMTYPE if member.issym() else tarfile.REGTYPE)
        self.seen[name.casefold()] = (name, kind)
        return name

    def _refused(self, member: tarfile.TarInfo, why: str) -> UserError:
        return UserError(f"{self.archive} is refused, nothing of it is unpacked: its member "
                         f"{member.name!r}: {why}",
                         hint="no package of NVIDIA has such a member: do not use this file; "
                              "fetch it from NVIDIA")

    def plain(self, name: str, member: tarfile.TarInfo) -> str:
        """A path of the archive without `.` and empty parts. Raises `UserError` for a bad one."""
        if name.startswith("/"):
            raise self._refused(member, f"the path {name!r} is absolute")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise self._refused(member, f"the path {name!r} leads out of the directory")
        if any(ord(letter) < 32 or letter == "\x7f" for letter in name):
            raise self._refused(member, "its name has control characters")
        return "/".join(parts)

    def _kind(self, member: tarfile.TarInfo) -> None:
        kinds = {tarfile.CHRTYPE: "a device node", tarfile.BLKTYPE: "a device node",
                 tarfile.FIFOTYPE: "a FIFO"}
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            raise self._refused(member, f"it is {kinds.get(member.type, 'of an unknown type')}")
        # Directories may have inherited set-group-id where the package was made. The manifest gives
        # nvidia-modprobe 04755; were it so in the tar too, the bit would be dropped here.
        if member.isreg() and member.mode & 0o6000 and member.name != "./nvidia-modprobe":
            raise self._refused(member, "it has the set-user-id or set-group-id bit")

    def _place(self, name: str, member: tarfile.TarInfo) -> None:
        parents = name.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = "/".join(parents[:depth])
            known, kind = self.seen.setdefault(parent.casefold(), (parent, tarfile.DIRTYPE))
            if known != parent:
                raise self._refused(member, f"it differs from {known!r} in upper case only")
            if kind != tarfile.DIRTYPE:
                what = "a link" if kind == tarfile.SYMTYPE else "a file"
                raise self._refused(member, f"it lies below {parent!r}, which is {what}")
        known, kind = self.seen.get(name.casefold(), (name, tarfile.DIRTYPE))
        if known != name:
            raise self._refused(member, f"it differs from {known!r} in upper case only")
        if name.casefold() in self.seen and not (member.isdir() and kind == tarfile.DIRTYPE):
            raise self._refused(member, "it is there twice")

    def _symlink(self, name: str, member: tarfile.TarInfo) -> None:
        """A link's parents are real directories, so `..` at its start is exact; later ones are not,
        since the path may lead through another link."""
        target = member.linkname
        parts = [part for part in target.split("/") if part not in ("", ".")]
        up = next((at for at, part in enumerate(parts) if part != ".."), len(parts))
        if target.startswith("/") or not target:
            raise self._refused(member, f"it is a link to the absolute path {target!r}")
        if up > name.count("/") or ".." in parts[up:]:
            raise self._refused(member, f"it is a link that points outside: {target!r}")


def look(payload: Payload) -> Contents:
    """Go through all members, write nothing. Raises `UserError` for a refused or damaged one."""
    guard = Guard(payload.path.name)
    sizes: dict[str, int] = {}
    texts: dict[str, str] = {}
    members = 0
    with _opened(payload) as tar:
        for member in tar:
            members += 1
            name = guard.admit(member)
            if member.isreg():
                sizes[name] = member.size
            if name in KEPT and member.isreg() and member.size <= KEPT_LIMIT:
                stream = tar.extractfile(member)
                assert stream is not None
                texts[name] = stream.read().decode("utf-8", "replace")
    return Contents(sizes=sizes, texts=texts, members=members)


def ends_early(payload: Payload) -> bool:
    """Does the data stop before the tar's end?"""
    try:
        look(payload)
    except UserError as failure:
        cause = failure.__cause__
        return isinstance(cause, EOFError) or str(cause) in ("unexpected end of data", "empty file")
    return False


def unpack(payload: Payload, contents: Contents, target: Path) -> None:
    """Write all members below a new directory; `contents` is what `look` said.

    After a failure the directory is not there. Raises `UserError` for a full disk.
    """
    needed = contents.size + BLOCK * contents.members
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise _no_space(payload, target, needed, free)
    target.mkdir(mode=0o755)
    try:
        _write(payload, target)
    except BaseException as failure:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            raise _no_space(payload, target, needed, free) from None
        raise


def _no_space(payload: Payload, target: Path, needed: int, free: int) -> UserError:
    return UserError(f"no space to unpack {payload.path.name}: it needs {readable(needed)}, "
                     f"{target.parent} has {readable(free)}", hint=SPACE)


def _write(payload: Payload, target: Path) -> None:
    guard = Guard(payload.path.name)
    directories: list[tuple[Path, tarfile.TarInfo]] = []
    with _opened(payload) as tar:
        for member in tar:
            path = target / guard.admit(member)
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if member.isdir():
                path.mkdir(mode=0o755, exist_ok=True)
                directories.append((path, member))
            elif member.issym():
                path.symlink_to(member.linkname)
            elif member.islnk():
                os.link(target / guard.plain(member.linkname, member), path)
            else:
                _write_file(tar, member, path)
    for path, member in reversed(directories):  # their times change while files come
        path.chmod(member.mode & 0o777 | 0o700)
        os.utime(path, (member.mtime, member.mtime))


def _write_file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    stream = tar.extractfile(member)
    assert stream is not None
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with io.FileIO(os.open(path, flags, 0o600), "wb") as out:
        shutil.copyfileobj(stream, out, CHUNK)
        os.fchmod(out.fileno(), member.mode & 0o777)
    os.utime(path, (member.mtime, member.mtime))
