"""Initramfs archives: a tree's tar as cpio in the "newc" format, and files read out of one.

The format is the kernel's Documentation/driver-api/early-userspace/buffer-format.rst: a header of
"070701" and 13 fields of 8 hexadecimal digits, the name, the data, each padded to 4 bytes. It is
written here and not by cpio(1), which records the link count of directories (another one on overlay
than on ext4), needs the owners' namespace, and cannot add `/init` without changing the tree.
"""

from __future__ import annotations

import shutil
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import IO

from katagpu.errors import UserError

MAGIC = b"070701"
MAGICS = (MAGIC, b"070702")  # 070702 only adds checksums, which nobody reads
HEADER = 110
TRAILER = "TRAILER!!!"
LARGEST = 0xFFFFFFFF  # a file's size has 8 hexadecimal digits

# Kata's own target: one link level, since /init must lead to systemd by its own name (osbuilder).
SYSTEMD = "/lib/systemd/systemd"

KINDS = {
    tarfile.REGTYPE: stat.S_IFREG, tarfile.AREGTYPE: stat.S_IFREG, tarfile.LNKTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK,
}


@dataclass(frozen=True, kw_only=True)
class Head:
    """The header of one archive member; `time` in seconds since 1970."""

    name: str
    mode: int
    size: int = 0
    inode: int = 0
    uid: int = 0
    gid: int = 0
    links: int = 1
    time: int = 0
    device: tuple[int, int] = (0, 0)


class _Writer:
    def __init__(self, sink: IO[bytes]) -> None:
        self.sink = sink

    def head(self, head: Head) -> None:
        name = head.name.encode("utf-8", "surrogateescape") + b"\0"
        fields = (head.inode, head.mode, head.uid, head.gid, head.links, head.time, head.size, 0, 0,
                  *head.device, len(name), 0)
        self.sink.write(_padded(MAGIC + b"".join(b"%08X" % value for value in fields) + name))

    def data(self, data: bytes) -> None:
        self.sink.write(_padded(data))

    def copy(self, source: IO[bytes], size: int) -> None:
        shutil.copyfileobj(source, self.sink, 1 << 20)
        self.sink.write(bytes(-size % 4))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _name(info: tarfile.TarInfo) -> str:
    return info.name.removeprefix("./").rstrip("/") or "."


def write(tree: Callable[[], IO[bytes]], target: IO[bytes], *, time: int,
          init: str = SYSTEMD) -> list[str]:
    """Write the tree's uncompressed tar as a newc archive; `tree` opens it, and is called twice.

    `/init`, which the kernel executes, becomes a link to `init` where the tree has none. Owners are
    kept and times are at most `time`. newc has no extended attributes: the paths of files that lose
    capabilities by that are returned, sorted.
    """
    links: Counter[str] = Counter()
    names = set()
    with tree() as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
        for info in tar:
            names.add(_name(info))
            if info.islnk():
                links[info.linkname.removeprefix("./")] += 1
    writer = _Writer(target)
    if "." not in names:
        writer.head(Head(name=".", mode=stat.S_IFDIR | 0o755, inode=1, links=2, time=time))
    if "init" not in names:
        writer.head(Head(name="init", mode=stat.S_IFLNK | 0o777, inode=2, size=len(init),
                         time=time))
        writer.data(init.encode())
    with tree() as raw, tarfile.open(fileobj=raw, mode="r|") as tar:
        lost = _members(writer, tar, links, time)
    writer.head(Head(name=TRAILER, mode=0))
    return sorted(lost)


def _members(writer: _Writer, tar: tarfile.TarFile, links: Counter[str], time: int) -> list[str]:
    """All members in the tar's order; a hard link shares its inode number, the data come first."""
    inodes: dict[str, int] = {}
    lost = []
    for inode, info in enumerate(tar, 3):
        name = _name(info)
        first = info.linkname.removeprefix("./") if info.islnk() else name
        inodes.setdefault(first, inode)
        if "SCHILY.xattr.security.capability" in info.pax_headers:
            lost.append(name)
        link = info.linkname.encode("utf-8", "surrogateescape") if info.issym() else b""
        size = len(link) if info.issym() else info.size if info.isreg() else 0
        if size > LARGEST:
            raise UserError(f"/{name} is too large for an initrd ({size} bytes)",
                            hint="make an image of this recipe, not an initrd")
        writer.head(Head(
            name=name, mode=KINDS[info.type] | stat.S_IMODE(info.mode), size=size,
            inode=inodes[first], uid=info.uid, gid=info.gid,
            links=2 if info.isdir() else 1 + links[first], time=min(int(info.mtime), time),
            device=(info.devmajor, info.devminor) if info.isdev() and not info.isfifo() else (0, 0),
        ))
        if link:
            writer.data(link)
        elif size:
            source = tar.extractfile(info)
            assert source is not None
            writer.copy(source, size)
    return lost


def read(archive: IO[bytes], wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """The regular files of `wanted` (paths without a leading slash) that have data, in its order.

    Raises `UserError` when the stream is not a newc archive, or ends too early.
    """
    while True:
        name, mode, size = _head(archive)
        if name == TRAILER:
            return
        name = name.removeprefix("./").lstrip("/")
        if size and stat.S_ISREG(mode) and name in wanted:
            yield name, _exactly(archive, size)
            _skip(archive, -size % 4)
        else:
            _skip(archive, size + -size % 4)


def _head(archive: IO[bytes]) -> tuple[str, int, int]:
    """Name, mode and size of the next member."""
    header = _exactly(archive, HEADER)
    try:
        if header[:6] not in MAGICS:
            raise ValueError
        fields = [int(header[at:at + 8], 16) for at in range(6, HEADER, 8)]
    except ValueError:
        raise UserError("not a newc cpio archive") from None
    length = fields[11]
    name = _exactly(archive, length + -(HEADER + length) % 4)[:length].rstrip(b"\0")
    return name.decode("utf-8", "surrogateescape"), fields[1], fields[6]


def _exactly(archive: IO[bytes], count: int) -> bytes:
    data = archive.read(count)
    if len(data) < count:
        raise UserError("the cpio archive is truncated")
    return data


def _skip(archive: IO[bytes], count: int) -> None:
    while count:
        count -= len(_exactly(archive, min(count, 1 << 20)))
