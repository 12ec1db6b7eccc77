"""A guest root directory, read from outside: links are resolved inside it and nothing is run.

Paths in the guest are strings that begin with `/`; `pathlib` would mix them up with the host's.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path

MAX_LINKS = 40
# Mount points in a running guest: what lies there in a mounted root is not part of the image.
NOT_THE_IMAGE = frozenset({"/proc", "/sys", "/dev"})


class Root:
    """Read access to an unpacked root. Never follows a symlink out of it."""

    def __init__(self, top: Path) -> None:
        self.top = os.fspath(top).rstrip("/")
        self.resolve = cache(self._resolve)

    def host(self, path: str) -> Path:
        """Where a guest path lies on the host. Only safe for a resolved path."""
        return Path(self.top + path)

    def _resolve(self, path: str) -> str | None:
        """The guest path with every link followed, or None where it does not exist."""
        todo = [part for part in reversed(path.split("/")) if part and part != "."]
        done: list[str] = []
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                done = done[:-1]
                continue
            here = "/" + "/".join([*done, part])
            try:
                mode = os.lstat(self.top + here).st_mode
                target = str(Path(self.top + here).readlink()) if stat.S_ISLNK(mode) else None
            except OSError:
                return None
            if target is None:
                done.append(part)
                continue
            links += 1
            if links > MAX_LINKS:
                return None
            if target.startswith("/"):
                done = []
            todo += [step for step in reversed(target.split("/")) if step and step != "."]
        return "/" + "/".join(done)

    def mode(self, path: str) -> int:
        """The mode behind all links of a guest path, 0 where there is nothing."""
        real = self.resolve(path)
        return 0 if real is None else os.lstat(self.top + real).st_mode

    def is_file(self, path: str) -> bool:
        """Whether it is a regular file, possibly behind links."""
        return stat.S_ISREG(self.mode(path))

    def is_dir(self, path: str) -> bool:
        """Whether it is a directory, possibly behind links."""
        return stat.S_ISDIR(self.mode(path))

    def is_program(self, path: str) -> bool:
        """Whether it is a regular file that someone may execute, possibly behind links."""
        mode = self.mode(path)
        return stat.S_ISREG(mode) and mode & 0o111 != 0

    def link_target(self, path: str) -> str | None:
        """The text of the symlink that this path itself is (behind others), or None."""
        parent, _, name = path.rpartition("/")
        real = self.resolve(parent or "/")
        try:
            return None if real is None else str((self.host(real) / name).readlink())
        except OSError:
            return None

    def read(self, path: str) -> bytes | None:
        """A file's bytes, or None where there is no such regular file or it cannot be read."""
        real = self.resolve(path)
        if real is None or not self.is_file(real):
            return None
        try:
            return self.host(real).read_bytes()
        except OSError:
            return None

    def text(self, path: str) -> str:
        """A file's text; empty where there is no such file."""
        return (self.read(path) or b"").decode(errors="replace")

    def names(self, path: str) -> list[str]:
        """The sorted names in a directory; empty where there is none."""
        real = self.resolve(path)
        if real is None or not self.is_dir(real):
            return []
        try:
            return sorted(entry.name for entry in self.host(real).iterdir())
        except OSError:
            return []

    def below(self, path: str) -> Iterator[str]:
        """Every regular file below a directory, by its real path, sorted."""
        real = self.resolve(path)
        prefix = (real or "").rstrip("/") + "/"
        return (name for name in self.files if real is not None and name.startswith(prefix))

    @cached_property
    def _entries(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        files: list[str] = []
        unreadable: list[str] = []
        links: list[str] = []
        todo = [""]
        while todo:
            directory = todo.pop()
            try:
                entries = list(os.scandir(self.top + directory + "/"))
            except OSError:
                unreadable.append(directory)
                continue
            for entry in entries:
                path = f"{directory}/{entry.name}"
                if entry.is_symlink():
                    links.append(path)
                elif entry.is_dir(follow_symlinks=False):
                    if path not in NOT_THE_IMAGE:
                        todo.append(path)
                elif entry.is_file(follow_symlinks=False):
                    files.append(path)
        return tuple(sorted(files)), tuple(sorted(links)), tuple(sorted(unreadable))

    @property
    def files(self) -> tuple[str, ...]:
        """Every regular file, by its real path, sorted."""
        return self._entries[0]

    @property
    def links(self) -> tuple[str, ...]:
        """Every symlink, sorted."""
        return self._entries[1]

    @property
    def unreadable(self) -> tuple[str, ...]:
        """The directories that we may not list."""
        return self._entries[2]
