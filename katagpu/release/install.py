"""Install a release on a host that runs Kata, go back to the one before, remove all of it.

A kill at any moment leaves each of Kata's runtimes with one whole release, the old or the new one;
the next run completes what was begun, or sweeps it away.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from katagpu import log
from katagpu.errors import UserError
from katagpu.release import layout, source
from katagpu.release.host import CONFIG, DROP_INS, PLACE, Host, sync, write
from katagpu.release.layout import File
from katagpu.release.source import Source, Verified

PLACED = ".placed"  # in a release: the names of its files
_NAMED = re.compile(re.escape(PLACE) + r"/([A-Za-z0-9._+~-]+)\"")


def install(text: str, host: Host, *, key: Path | None, unverified: bool = False) -> None:
    """Install the release that `text` names, verified by a public key.

    Without one only with `unverified`. Raises `UserError`; nothing is changed then.
    """
    if key is None and not unverified:
        raise UserError(f"by whom is {text} signed? No public key is given",
                        hint="key=PUBLIC.pem (--key), from a place other than the release's; or "
                             "unverified=1 (--unverified), which trusts what comes")
    origin = source.open_source(text)
    found = source.verified(origin, None if unverified else key)
    if not found.signed:
        log.warn(f"{text}: the signature is not verified, as was asked for")
    with host.alone():
        recover(host)
        _must_be_ours(host)
        try:
            _Plan(found, host).fill(origin)
        except (UserError, OSError):
            host.sweep()
            host.remove_directories()
            raise
        switch(host, found.release.id)
    log.say(f"installed: {found.release.id} in {host.home}")


def rollback(host: Host) -> None:
    """Go back to the release before this one; done twice, it is this one again."""
    _must_have_some(host)
    with host.alone():
        recover(host)
        previous = host.target("previous")
        if previous is None or previous not in host.releases():
            raise UserError("there is no release to go back to",
                            hint="install keeps one, the release before")
        _must_be_whole(host, previous)
        switch(host, previous)
    log.say(f"rolled back to {previous}")


def uninstall(host: Host) -> None:
    """Remove all that was installed: Kata's runtimes first, files last."""
    if host.home.exists() or any(_is_of(host, name) for name in DROP_INS):
        with host.alone():
            for name in DROP_INS:
                if not _is_of(host, name):
                    if host.drop_in(name).exists():
                        log.warn(f"{host.drop_in(name)} names nothing of ours, and stays")
                    continue
                if not _is_ours(host, name):
                    log.warn(f"{host.drop_in(name)} was changed since; it is removed")
                host.remove(host.drop_in(name))
            for link in ("next", "current", "previous"):
                host.remove(host.home / link)
            for release in host.releases():
                host.drop(release)
            host.sweep()
            host.remove_directories()
        log.say(f"uninstalled from {host.prefix}")
    else:
        log.say(f"nothing is installed in {host.prefix}")


def status(host: Host) -> Iterator[str]:
    """What is installed, and whether its files still are what they were."""
    current = host.target("current")
    pending = host.target("next")
    if pending is not None:
        yield f"interrupted: the switch to {pending}; install or rollback completes it"
    if current is None:
        yield f"nothing is installed in {host.prefix}" if pending is None else "current: none"
        return
    yield f"current: {current} ({_health(host, current)})"
    previous = host.target("previous")
    if previous is not None:
        yield f"previous: {previous} ({_health(host, previous)})"
    for name in DROP_INS:
        try:
            same = host.drop_in(name).read_bytes() == _config(host, current, name)
            state = "as it was placed" if same else "not that of this release"
        except FileNotFoundError:
            state = "missing"
        yield f"drop-in: {host.drop_in(name)} ({state})"


def recover(host: Host) -> None:
    """Complete, or sweep away, what an interrupted run left."""
    host.sweep()
    pending = host.target("next")
    if pending is not None and pending in host.releases():
        log.note(f"an earlier run was interrupted: the switch to {pending} is completed")
        _complete(host, pending)
    elif pending is not None:
        host.remove(host.home / "next")


def switch(host: Host, release: str) -> None:
    """Let the runtimes use a release that is complete. Raises `UserError` before any change."""
    _must_be_ours(host)
    host.link("next", release)
    try:
        _use(host, release)
    except OSError:
        if not any(_config(host, release, name) == host.content(name) is not None
                   for name in DROP_INS):
            host.remove(host.home / "next")  # no runtime uses it: there is nothing to complete
        raise
    _complete(host, release)


def _use(host: Host, release: str) -> None:
    """Let all runtimes use a release, or leave them what they use. Raises `OSError`."""
    host.place({name: _config(host, release, name) for name in DROP_INS})


def _complete(host: Host, release: str) -> None:
    """The switch, from any state that a kill may leave it in."""
    _use(host, release)
    current = host.target("current")
    if current != release:
        if current is not None:
            host.link("previous", current)
        host.link("current", release)
    host.remove(host.home / "next")
    kept = {release, host.target("previous")}
    for other in host.releases():
        if other not in kept:
            host.drop(other)


def _config(host: Host, release: str, name: str) -> bytes | None:
    try:
        return (host.home / release / CONFIG / name).read_bytes()
    except FileNotFoundError:
        return None


def _is_ours(host: Host, name: str) -> bool:
    """Is a drop-in that of a release that is here?"""
    found = host.drop_in(name).read_bytes()
    return any(found == _config(host, release, name) for release in host.releases())


def _is_of(host: Host, name: str) -> bool:
    """Does a drop-in name releases that are installed here, whoever changed it?"""
    path = host.drop_in(name)
    return path.exists() and f"{PLACE}/{host.home.name}/".encode() in path.read_bytes()


def _must_be_ours(host: Host) -> None:
    """Raise `UserError` where a drop-in is not one that was placed here."""
    for name in DROP_INS:
        if host.drop_in(name).exists() and not _is_ours(host, name):
            raise UserError(f"{host.drop_in(name)} is not as it was placed here",
                            hint="move it away; settings of your own belong into a file beside it, "
                                 "60-mine.toml, which Kata reads after it")


def _must_have_some(host: Host) -> None:
    if not host.home.is_dir():
        raise UserError(f"nothing is installed in {host.prefix}")


def _health(host: Host, release: str) -> str:
    wrong = list(_damaged(host.home / release))
    return f"damaged: {', '.join(wrong)}" if wrong else "intact"


def _damaged(directory: Path) -> Iterator[str]:
    """The files of an installed release that are not what its list says."""
    try:
        sums = layout.parse_sums((directory / layout.SUMS).read_bytes(), str(directory))
    except (OSError, UserError):
        yield layout.SUMS
        return
    try:
        names = (directory / PLACED).read_text().split()
    except OSError:
        yield PLACED
        return
    for name in names:
        path = directory / name
        if not path.is_file() or layout.digest(path) != sums.get(name):
            yield name


def _must_be_whole(host: Host, release: str) -> None:
    wrong = list(_damaged(host.home / release))
    if wrong:
        raise UserError(f"{release} is damaged: {', '.join(wrong)}", hint="install it again")


class _Plan:
    """What of a release goes where: the files that its drop-ins name, and the drop-ins."""

    def __init__(self, found: Verified, host: Host) -> None:
        self.found = found
        self.host = host
        self.directory = host.home / found.release.id

    def fill(self, origin: Source) -> None:
        """Place the files, under a name of their own until all are there."""
        drop_ins = self._drop_ins(origin)
        files = self._named(drop_ins)
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
            self._copy(origin, file, place)
        for file in files:
            link = place / (file.link or file.name)
            if not os.path.lexists(link):
                link.symlink_to(file.name)
        for name, text in drop_ins.items():
            _replace(place / CONFIG / name, self._rendered(text, files))
        for name, data in self.found.kept.items():
            _replace(place / name, data)
        listed = [*(file.name for file in files), *self.found.kept]
        _replace(place / PLACED, "".join(f"{name}\n" for name in listed
                                          if name not in (layout.SUMS, layout.SIGNATURE)).encode())
        sync(place / CONFIG)
        sync(place)
        if not present:
            place.rename(self.directory)
            sync(self.host.home)

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
        return path.is_file() and layout.digest(path) == file.sha256

    def _drop_ins(self, origin: Source) -> dict[str, str]:
        found = {}
        for name in DROP_INS:
            file = self.found.release.file(name)
            if file is not None:
                found[name] = _checked(origin, file).decode()
        if not found:
            raise UserError(f"{origin.where} has no drop-in for Kata")
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

    def _rendered(self, text: str, files: list[File]) -> bytes:
        """A drop-in with this release's own paths."""
        def path(match: re.Match[str]) -> str:
            file = self._by_path(match[1])
            assert file is not None and file in files
            return f'{PLACE}/{self.host.home.name}/{self.found.release.id}/{file.name}"'

        return _NAMED.sub(path, text).encode()

    def _copy(self, origin: Source, file: File, place: Path) -> None:
        """Copy a file under another name; its own is given to it once it is what was signed."""
        part = place / f".{file.name}.part"
        with part.open("w+b") as sink:
            os.fchmod(sink.fileno(), 0o644)
            origin.copy(file, sink)
            sink.flush()
            os.fsync(sink.fileno())
        if layout.digest(part) != file.sha256:
            part.unlink()
            raise UserError(f"{origin.where}: {file.name} is not the file that was signed",
                            hint="do not use it; take the release again")
        part.replace(place / file.name)


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
