"""Trees: a directory as a deterministic tar, and back.

Entries are sorted, owners numeric, times clamped, extended attributes kept, and an overlay's own
markers become OCI whiteouts (image-spec, layer.md). The same directory gives the same bytes in any
place at any time; the SHA-256 of the uncompressed tar is the tree's identity.

Runs inside the namespace that owns the files, so it imports nothing of the product.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

EPOCH = 1735689600  # 2025-01-01T00:00:00Z: later times are clamped to it
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"

# What differs from run to run, or belongs to the host (paths below the root, fnmatch patterns).
DROPPED: tuple[str, ...] = (
    "dev/*", "proc/*", "sys/*", "run/*", "tmp/*", "var/tmp/*",
    "etc/hostname", "etc/hosts", "etc/.pwd.lock", "etc/*-", "etc/resolv.conf",
    "var/cache/ldconfig/*", "var/cache/apt/*", "var/cache/debconf/*",
    "var/lib/apt/lists/*", "var/lib/apt/extended_states", "var/lib/dpkg/*-old",
    "var/lib/dpkg/lock*", "var/lib/dpkg/triggers/Lock", "var/lib/systemd/random-seed",
    "var/log/*", "*/__pycache__", "*.pyc", "etc/apt/sources.list*", "var/lib/dpkg/available",
    "etc/apt/apt.conf.d/99mmdebstrap", "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
)
# Of these, what the guest's own files lay again.
LAID: tuple[str, ...] = ("etc/hostname", "etc/hosts", "etc/resolv.conf")
EMPTIED: tuple[str, ...] = ("etc/machine-id",)
ATTRIBUTES = ("user.", "security.capability")  # what is kept of extended attributes


class _HashingWriter:
    """A file for tarfile: hashes what passes and hands it on."""

    def __init__(self, sink: IO[bytes]) -> None:
        self.sink = sink
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.sink.write(data)

    def flush(self) -> None:
        self.sink.flush()


def _dropped(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _walk(root: Path, patterns: Sequence[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Entries below root, parents first, each directory's in byte order."""
    pending = [("", str(root))]
    while pending:
        prefix, directory = pending.pop()
        with os.scandir(directory) as scan:
            entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        deeper = []
        for entry in entries:
            path = prefix + entry.name
            if _dropped(path, patterns):
                continue
            yield path, entry
            if entry.is_dir(follow_symlinks=False):
                deeper.append((path + "/", entry.path))
        pending.extend(reversed(deeper))


@contextlib.contextmanager
def _none_kept() -> Iterator[None]:
    """Pass over a file system without extended attributes, or an attribute that is not set."""
    try:
        yield
    except OSError as refusal:
        if refusal.errno not in (errno.EOPNOTSUPP, errno.ENODATA):
            raise


def _attributes(path: str) -> dict[str, str]:
    """Extended attributes as pax records: the user's and capabilities.

    An overlay's own are left out, and what depends on the host's kernel or policy (trusted.*,
    security.selinux, security.ima).
    """
    records = {}
    with _none_kept():
        for name in sorted(os.listxattr(path, follow_symlinks=False)):
            if name.startswith("user.overlay.") or not name.startswith(ATTRIBUTES):
                continue
            value = os.getxattr(path, name, follow_symlinks=False)
            records[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
    return records


def _is_opaque(path: str) -> bool:
    for name in ("user.overlay.opaque", "trusted.overlay.opaque"):
        with _none_kept():
            if os.getxattr(path, name) == b"y":
                return True
    return False


def _info(path: str, found: os.stat_result) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mode = stat.S_IMODE(found.st_mode)
    info.uid, info.gid = found.st_uid, found.st_gid
    info.mtime = min(found.st_mtime_ns // 1_000_000_000, EPOCH)
    return info


def _marker(path: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mode, info.mtime = 0o644, EPOCH
    return info


class Capture:
    """Writes one directory as a tar."""

    def __init__(self, root: Path, *, overlay: bool, drop: Sequence[str] = DROPPED) -> None:
        self.root = root
        self.overlay = overlay
        self.drop = drop
        self._links: dict[tuple[int, int], str] = {}

    def write(self, sink: IO[bytes]) -> str:
        """Write the tar to `sink`; its SHA-256 in hex."""
        writer = _HashingWriter(sink)
        with tarfile.TarFile.open(fileobj=writer, mode="w|",  # type: ignore[call-overload]
                                  format=tarfile.PAX_FORMAT, bufsize=1 << 20,
                                  encoding="utf-8", errors="surrogateescape") as tar:
            for path, entry in _walk(self.root, self.drop):
                self._add(tar, path, entry)
        return writer.hash.hexdigest()

    def _add(self, tar: tarfile.TarFile, path: str, entry: os.DirEntry[str]) -> None:
        found = entry.stat(follow_symlinks=False)
        if stat.S_ISCHR(found.st_mode) and found.st_rdev == 0 and self.overlay:
            parent, _, name = path.rpartition("/")
            tar.addfile(_marker(f"{parent}/{WHITEOUT}{name}" if parent else WHITEOUT + name))
            return
        if stat.S_ISSOCK(found.st_mode):
            return
        if entry.name.startswith(WHITEOUT):
            raise OSError(errno.EINVAL, "a layer cannot hold a file of this name", entry.path)
        info = _info(path, found)
        info.pax_headers = _attributes(entry.path)
        if stat.S_ISREG(found.st_mode):
            self._add_file(tar, info, entry.path, found)
        elif stat.S_ISDIR(found.st_mode):
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
            if self.overlay and _is_opaque(entry.path):
                tar.addfile(_marker(f"{path}/{OPAQUE}"))
        elif stat.S_ISLNK(found.st_mode):
            info.type = tarfile.SYMTYPE
            info.linkname = os.readlink(entry.path)  # noqa: PTH115 (a Path would tidy it)
            tar.addfile(info)
        else:
            info.type = tarfile.FIFOTYPE if stat.S_ISFIFO(found.st_mode) else (
                tarfile.CHRTYPE if stat.S_ISCHR(found.st_mode) else tarfile.BLKTYPE)
            info.devmajor, info.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
            tar.addfile(info)

    def _add_file(self, tar: tarfile.TarFile, info: tarfile.TarInfo, source: str,
                  found: os.stat_result) -> None:
        if found.st_nlink > 1:
            first = self._links.setdefault((found.st_dev, found.st_ino), info.name)
            if first != info.name:
                info.type, info.linkname = tarfile.LNKTYPE, first
                tar.addfile(info)
                return
        if info.name in EMPTIED:
            tar.addfile(info)
            return
        info.size = found.st_size
        with Path(source).open("rb") as stream:
            tar.addfile(info, stream)


def capture(root: Path, target: Path, *, overlay: bool, final: bool = False,
            threads: int = 2) -> str:
    """Write a directory as a zstd-compressed tar to `target`; the tree's identity.

    `overlay` says that the directory is an overlay's upper one, whose markers become whiteouts;
    `final` that it holds what the guest gets at the paths of `LAID`.
    """
    import zstandard

    drop = tuple(path for path in DROPPED if not (final and path in LAID))
    compressor = zstandard.ZstdCompressor(level=3, threads=threads)
    with target.open("wb") as raw, compressor.stream_writer(raw, closefd=False) as packed:
        return Capture(root, overlay=overlay, drop=drop).write(packed)


def unpack(blob: Path, target: Path, *, overlay: bool) -> str:
    """Unpack a compressed tree into a new directory; the identity of what was in the blob.

    With `overlay`, whiteouts become an overlay's own markers, so that the directory can be a lower
    one. The caller compares the identity, and throws the directory away if it is another.
    """
    import zstandard

    target.mkdir()
    target.chmod(0o755)  # the tar has no entry for it, and it becomes the guest's /
    argv = ["tar", "--extract", "--file=-", f"--directory={target}", "--numeric-owner",
            "--same-permissions", "--same-owner", "--xattrs", "--xattrs-include=*",
            "--delay-directory-restore",  # our order leaves a directory before its children come
            "--warning=no-unknown-keyword"]
    hasher = hashlib.sha256()
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment) as tar:
        assert tar.stdin is not None
        with blob.open("rb") as raw:
            reader = zstandard.ZstdDecompressor().stream_reader(raw)
            try:
                while chunk := reader.read(1 << 20):
                    hasher.update(chunk)
                    tar.stdin.write(chunk)
            except (zstandard.ZstdError, BrokenPipeError):
                hasher.update(b"damaged")
        with contextlib.suppress(BrokenPipeError):
            tar.stdin.close()
    if tar.returncode != 0:
        space = shutil.disk_usage(target.parent).free
        if space < 16 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return "damaged"
    if overlay:
        _to_overlay(target)
    return hasher.hexdigest()


def _to_overlay(root: Path) -> None:
    for directory, _names, files in os.walk(root):
        markers = [name for name in files if name.startswith(WHITEOUT)]
        before = Path(directory).stat()
        for name in markers:
            Path(directory, name).unlink()
            if name == OPAQUE:
                os.setxattr(directory, "user.overlay.opaque", b"y")
            else:
                os.mknod(Path(directory, name.removeprefix(WHITEOUT)),
                         stat.S_IFCHR, os.makedev(0, 0))
        if markers:
            os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))
