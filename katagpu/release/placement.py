"""Where the files of a release go: those that its drop-ins name, and the drop-ins."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from katagpu.errors import UserError
from katagpu.release import layout, placed
from katagpu.release.host import CONFIG, DROP_INS, PLACE, Host, sync, write
from katagpu.release.layout import File
from katagpu.release.placed import RECORD, Placed
from katagpu.release.source import Source, Verified

_NAMED = re.compile(re.escape(PLACE) + r"/([A-Za-z0-9._+~-]+)\"")


class Placement:
    """What of a release goes where. `drop_ins` are as they will be placed, by name."""

    def __init__(self, found: Verified, host: Host, origin: Source) -> None:
        self.found = found
        self.host = host
        self.origin = origin
        self.directory = host.home / found.release.id
        texts = self._drop_ins()
        self.files = self._named(texts)
        self.drop_ins = {name: self._rendered(text) for name, text in texts.items()}

    def fill(self) -> None:
        """Place the files, under a name of their own until all are there. Raises `UserError`."""
        files = self.files
        present = self.directory.is_dir()
        if present:
            self._must_be_the_same()
        lacking = [file for file in files if not present or not self._has(file)]
        self.host.must_fit(sum(file.size for file in lacking))
        self.host.home.mkdir(exist_ok=True)
        self.host.home.chmod(0o755)
        place = self.directory if present else \
            self.host.home / f".part-{self.found.release.id}"
        (place / CONFIG).mkdir(parents=True, exist_ok=True)
        for directory in (place, place / CONFIG):
            directory.chmod(0o755)  # whatever the umask: QEMU may run as another user
        for file in lacking:
            self._copy(file, place)
        for link, target in self._links().items():
            _link(place / link, target)
        for name, data in self.drop_ins.items():
            _replace(place / CONFIG / name, data)
        for name, data in self.found.kept.items():
            _replace(place / name, data)
        _replace(place / RECORD, placed.render(Placed(self._digests(), self._links())))
        sync(place / CONFIG)
        sync(place)
        if not present:
            place.rename(self.directory)
            sync(self.host.home)

    def _links(self) -> dict[str, str]:
        """Kata's names, and ours."""
        return {file.link: file.name for file in self.files if file.link is not None}

    def _digests(self) -> Mapping[str, str]:
        """The SHA-256 of all that is placed."""
        small = {**{f"{CONFIG}/{name}": data for name, data in self.drop_ins.items()},
                 **self.found.kept}
        return {**{file.name: file.sha256 for file in self.files},
                **{name: hashlib.sha256(data).hexdigest() for name, data in small.items()}}

    def _must_be_the_same(self) -> None:
        try:
            known = (self.directory / layout.SUMS).read_bytes()
        except OSError:
            known = b""
        if known and known != self.found.kept[layout.SUMS]:
            raise UserError(f"{self.found.release.id} is installed already, with other content",
                            hint="a release is never changed: which of the two is the right one? "
                                 "To take this one, uninstall first")

    def _has(self, file: File) -> bool:
        path = self.directory / file.name
        return not path.is_symlink() and path.is_file() and layout.digest(path) == file.sha256

    def _drop_ins(self) -> dict[str, str]:
        found = {}
        for name in DROP_INS:
            file = self.found.release.file(name)
            if file is not None:
                found[name] = _checked(self.origin, file).decode()
        if not found:
            raise UserError(f"{self.origin.where} has no drop-in for Kata")
        return found

    def _named(self, drop_ins: dict[str, str]) -> list[File]:
        """The files that the drop-ins name. Raises `UserError` where the release lacks one."""
        found: dict[str, File] = {}
        for name, text in drop_ins.items():
            for word in _NAMED.findall(text):
                file = self._by_path(word)
                if file is None:
                    raise UserError(f"{name} names {word}, and the release does not have it")
                found[file.name] = file
        return list(found.values())

    def _by_path(self, word: str) -> File | None:
        return next((file for file in self.found.release.files
                     if word in (file.link, file.source)), None)

    def _rendered(self, text: str) -> bytes:
        """A drop-in with this release's own paths."""
        def path(match: re.Match[str]) -> str:
            file = self._by_path(match[1])
            assert file is not None and file in self.files
            return f'{PLACE}/{self.host.home.name}/{self.found.release.id}/{file.name}"'

        return _NAMED.sub(path, text).encode()

    def _copy(self, file: File, place: Path) -> None:
        """Copy a file under another name; its own is given to it once it is what was signed.

        Until then nobody else may read it: where it is from may be a directory of anybody's.
        """
        part = place / f".{file.name}.part"
        with part.open("w+b") as sink:
            os.fchmod(sink.fileno(), 0o600)
            self.origin.copy(file, sink)
            sink.flush()
            os.fsync(sink.fileno())
        if layout.digest(part) != file.sha256:
            part.unlink()
            raise UserError(f"{self.origin.where}: {file.name} is not the file that was signed",
                            hint="do not use it; take the release again")
        part.chmod(0o644)
        part.replace(place / file.name)


def _link(path: Path, target: str) -> None:
    """Let a link be there, in one step."""
    if not path.is_symlink() or str(path.readlink()) != target:
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        part.symlink_to(target)
        part.replace(path)


def _replace(path: Path, data: bytes) -> None:
    """Write a file in one step."""
    part = path.with_name(f".{path.name}.part")
    write(part, data)
    part.replace(path)


def _checked(origin: Source, file: File) -> bytes:
    """The bytes of a small file, hashed."""
    data = origin.read(file.name)
    if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
        raise UserError(f"{origin.where}: {file.name} is not the file that was signed",
                        hint="do not use it; take the release again")
    return data
