"""A host that runs Kata, below a prefix: where a release's files are, and steps that a kill splits.

    opt/kata/share/kata-containers/katagpu/
        <recipe>-<version>/   a release: complete as soon as it has this name
        current, previous     links to releases
        next                  a link to the release that is being switched to: the journal
        .part-*, .gone-*      what is being made, or removed; swept by the next run
    opt/kata/share/defaults/kata-containers/…/config.d/50-katagpu.toml

The drop-in is what switches a runtime: it names kernel, image and root hash of one release by
versioned paths, and is replaced by one rename(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from katagpu.errors import UserError

PLACE = "/opt/kata/share/kata-containers"
NAME = "katagpu"
DROP_IN = "50-katagpu.toml"
RUNTIMES = "opt/kata/share/defaults/kata-containers"
# The drop-ins of a release by their names below out/, and the runtimes' directories.
DROP_INS: Mapping[str, str] = {
    "50-katagpu.toml": f"{RUNTIMES}/runtimes/qemu-nvidia-gpu",
    "50-katagpu-runtime-rs.toml":
        f"{RUNTIMES}/runtime-rs/runtimes/qemu-nvidia-gpu-runtime-rs"}
CONFIG = "config"  # in a release: the drop-ins as they are placed
MARGIN = 1 << 20  # bytes of space beyond the files' own


class Host:
    """The places below a prefix. Every change is one rename(2) or unlink(2), synced."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.home = prefix / PLACE.lstrip("/") / NAME

    def drop_in(self, source: str) -> Path:
        """Where a drop-in is placed."""
        return self.prefix / DROP_INS[source] / "config.d" / DROP_IN

    def target(self, link: str) -> str | None:
        """The release that a link of ours names."""
        try:
            return str((self.home / link).readlink())
        except OSError:
            return None

    def releases(self) -> list[str]:
        """The releases that are there."""
        try:
            return sorted(path.name for path in self.home.iterdir()
                          if path.is_dir() and not path.is_symlink()
                          and not path.name.startswith("."))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one that changes this host. Raises `UserError` where that is not allowed.

        The lock is on a directory: nothing is left of it.
        """
        self._must_be_inside()
        try:
            self.home.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.home.parent, os.O_RDONLY)
        except OSError as refusal:
            raise self.refused(refusal) from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run is changing {self.home}",
                                hint="wait for it") from None
            try:
                yield
            except OSError as refusal:
                raise self.refused(refusal) from None
        finally:
            os.close(handle)

    def _must_be_inside(self) -> None:
        """Raise `UserError` where a link below the prefix leads out of it, as an absolute one does.
        """
        top = self.prefix.resolve()
        for path in (self.home, *(self.drop_in(source).parent for source in DROP_INS)):
            try:
                found = path.resolve()
            except (OSError, RuntimeError) as bad:  # of links in a circle, until Python 3.12
                raise UserError(f"{path} cannot be reached: {bad}") from None
            if not found.is_relative_to(top):
                raise UserError(f"{path} is {found}, outside {self.prefix}: a link leads there",
                                hint="let the link be relative and stay below it, or give "
                                     "prefix= the place that it names")

    def refused(self, refusal: OSError) -> UserError:
        """What a refusal of the system means."""
        return UserError(f"cannot write below {self.prefix}: {refusal.strerror or refusal} "
                         f"({refusal.filename or self.home})",
                         hint="what was there before is still in use; run it again once that is "
                              "mended, as root where it has to be")

    # steps

    def link(self, name: str, target: str) -> None:
        """Let a link name a release, in one step."""
        part = self.home / f".part-{name}"
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        part.symlink_to(target)
        part.replace(self.home / name)
        sync(self.home)

    def place(self, wanted: Mapping[str, bytes | None]) -> None:
        """Put drop-ins there, each in one step, or remove them (None).

        All are written and synced before the first gets its name, so that no more than a rename is
        between two runtimes. Where one is refused, those before it become what they were: raises
        `OSError`, and all runtimes use what they used. Kata parses every file beside a drop-in, so
        one that is not in use yet lies a directory higher.
        """
        before = {source: self.content(source) for source in wanted}
        changed = {source: data for source, data in wanted.items() if data != before[source]}
        for source, data in changed.items():
            self._prepare(source, data)
        done: list[str] = []
        try:
            for source, data in changed.items():
                self._switch(source, data)
                done.append(source)
        except OSError:
            for source in reversed(done):
                self._prepare(source, before[source])
                self._switch(source, before[source])
            for source in changed:
                self.remove(self._part(source))
            raise
        for source in changed:
            sync(self.drop_in(source).parent)

    def content(self, source: str) -> bytes | None:
        """What a drop-in is now; None: it is not there."""
        try:
            return self.drop_in(source).read_bytes()
        except FileNotFoundError:
            return None

    def _prepare(self, source: str, data: bytes | None) -> None:
        if data is not None:
            self.drop_in(source).parent.mkdir(parents=True, exist_ok=True)
            write(self._part(source), data)

    def _switch(self, source: str, data: bytes | None) -> None:
        if data is None:
            self.drop_in(source).unlink()
        else:
            self._part(source).replace(self.drop_in(source))

    def _part(self, source: str) -> Path:
        return self.prefix / DROP_INS[source] / f".{DROP_IN}.part"

    def remove(self, path: Path) -> None:
        """Remove a file or link that may not be there."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            sync(path.parent)

    def drop(self, release: str) -> None:
        """Remove a release: in one step as such, then its files."""
        gone = self.home / f".gone-{release}"
        if gone.exists():
            shutil.rmtree(gone)
        (self.home / release).rename(gone)
        sync(self.home)
        shutil.rmtree(gone)

    def sweep(self) -> None:
        """Remove what an interrupted run left half-made."""
        if self.home.is_dir():
            for path in self.home.iterdir():
                if path.name.startswith((".part-", ".gone-")):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    else:
                        path.unlink()
        for release in self.releases():
            for place in (self.home / release, self.home / release / CONFIG):
                for path in place.glob(".*.part"):  # of a repair
                    self.remove(path)
        for source in DROP_INS:
            self.remove(self._part(source))

    def remove_directories(self) -> None:
        """Remove the directories that are empty now, below opt/."""
        tops = [self.home, *(self.drop_in(source).parent for source in DROP_INS)]
        stop = self.prefix / "opt"
        for path in tops:
            while path not in (stop, self.prefix):
                try:
                    path.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    break
                path = path.parent

    def must_fit(self, needed: int) -> None:
        """Raise `UserError` where a release has not enough space."""
        place = self.home
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed + MARGIN > free:
            raise UserError(f"not enough space in {place}: the release needs "
                            f"{needed // 1_000_000 + 1} MB, and {free // 1_000_000} MB are free",
                            hint="nothing was written; make space, or give another prefix")


def write(path: Path, data: bytes) -> None:
    """Write a file that others may read, synced."""
    with path.open("wb") as stream:
        os.fchmod(stream.fileno(), 0o644)
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(directory: Path) -> None:
    """fsync a directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
