"""Writing files so that a reader sees all or nothing, and what a user can do when that fails."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from katagpu.errors import KatagpuError, UserError

NO_PLACE = (errno.ENOENT, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
"""What making a directory ends with where there can be none. ENOENT: below /proc."""
FULL = 16 << 20  # bytes free below which a failed step is put down to the disk


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn the system's refusals while writing below `root` into what a user can mend."""
    try:
        yield
    except OSError as refusal:
        if refusal.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(root).free if root.exists() else 0
            raise UserError(
                f"no space left in the store {root} ({free // 1_000_000} MB free)",
                hint="./doitw cache:gc, or set KATAGPU_STORE to a larger file system") from None
        if refusal.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
            raise UserError(f"cannot write to {refusal.filename or root}: {refusal.strerror}",
                            hint="set KATAGPU_STORE to a directory that you may write") from None
        raise


def make_directories(root: Path, names: Iterable[str]) -> None:
    """Make directories below `root`, and that too. Raises `UserError` where there can be none."""
    with writing(root):
        try:
            for name in names:
                (root / name).mkdir(parents=True, exist_ok=True)
        except OSError as refusal:
            if refusal.errno not in NO_PLACE:
                raise
            loose = next((path for path in (root, *root.parents)
                          if path.is_symlink() and not path.exists()), None) \
                if refusal.errno == errno.EEXIST else None
            why = f"{loose} is a link to what is not there" if loose else refusal.strerror
            raise UserError(f"there can be no store at {root}: {why}",
                            hint="set KATAGPU_STORE to a directory that you may write") from None


def full_disk(root: Path, failure: KatagpuError) -> None:
    """Programs fail in many words when the disk is full: raise `UserError` where that is why.

    `root` is the store's. Go says it in small letters, and of the sandbox's /tmp too.
    """
    free = shutil.disk_usage(root).free
    if free < FULL or "No space left on device" in failure.what or (
            free < 4 * FULL and "no space left on device" in failure.what):
        raise UserError(f"{failure.what}\nno space is left in the store {root} "
                        f"({free // 1_000_000} MB free)", hint="./doitw cache:gc, or set "
                        "KATAGPU_STORE to a directory on a larger file system") from failure


def tree_size(top: Path) -> int:
    """Bytes of all files below a directory; one with several names counts once.

    What this user may not look into (rootless trees have such directories) does not count.
    """
    sizes: dict[tuple[int, int], int] = {}
    for directory, _names, files in os.walk(top):
        for name in files:
            with contextlib.suppress(OSError):
                found = Path(directory, name).lstat()
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def sync(path: Path) -> None:
    """fsync a file or directory by path."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clone_or_copy(source: Path, target: int) -> None:
    """Copy a file into a descriptor, by reflink where there are such. Raises `OSError`."""
    ficlone = 0x40049409  # FICLONE, ioctl_ficlone(2)
    with source.open("rb") as reader:
        handle = reader.fileno()
        with contextlib.suppress(OSError):
            fcntl.ioctl(target, ficlone, handle)
            return
        left = os.fstat(handle).st_size
        while left > 0:
            done = os.sendfile(target, handle, None, left)
            if done == 0:
                raise OSError(errno.EIO, "the file ended early", str(source))
            left -= done
