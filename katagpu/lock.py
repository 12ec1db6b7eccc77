"""The lock: exactly which bytes a recipe's packages are, resolved by apt and signed by its keyring.

apt runs on the host with a configuration of its own (empty dpkg status, own lists), so the host's
packages do not matter; the archive's signature is checked here, and later steps trust digests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

import msgspec

from katagpu import aptview, keyring
from katagpu.aptview import Pin, View
from katagpu.errors import UserError
from katagpu.run import run
from katagpu.store import writing

FORMAT = 1
GUEST = "guest"  # the archives of the guest's distribution
_URI = re.compile(r"^'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})$", re.MULTILINE)


class Deb(msgspec.Struct, frozen=True, kw_only=True):
    """One binary package; `size` in bytes."""

    package: str
    version: str
    architecture: str
    url: str
    size: int
    sha256: str


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved recipe. `request` is the digest of what was asked for."""

    recipe: str
    request: str
    groups: dict[str, tuple[Deb, ...]]
    format: int = FORMAT

    def group(self, name: str) -> tuple[Deb, ...]:
        """The packages of a group, sorted by name; empty for one that the recipe lacks."""
        return self.groups.get(name, ())

    def version(self, group: str, package: str) -> str | None:
        """The version of one package of a group."""
        return next((deb.version for deb in self.group(group) if deb.package == package), None)


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """An apt archive: suites and components below one address, and the keyring that signs it.

    A suite that ends in a slash is a flat archive's (sources.list(5)), without components.
    """

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    keyring: str


class Repository(msgspec.Struct, frozen=True, kw_only=True):
    """An archive beside the distribution's; its `keyring` is a path or URL of a key.

    `fingerprint` is that of the key, which a URL needs.
    """

    archive: Archive
    fingerprint: str | None = None


class LocalDeb(msgspec.Struct, frozen=True, kw_only=True):
    """A package given as a file."""

    path: str
    sha256: str


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A set of packages to resolve with all that they depend on.

    `files` are packages that are at hand: what they depend on is locked, they are not.
    `on` names a group that is installed already: only what comes in addition is locked. `alone`
    locks the named packages without their dependencies (sources shipped as packages). `archives`
    names the set of archives that it comes from, the same as what it is `on`. What `pins` name
    comes from `repository`, by its name in the request, and from nowhere else.
    """

    archives: str = GUEST
    packages: tuple[str, ...] = ()
    files: tuple[LocalDeb, ...] = ()
    on: str | None = None
    alone: bool = False
    repository: str | None = None
    pins: tuple[Pin, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """All that a lock answers. `archives` are sets by name, one for each kind of root."""

    recipe: str
    identity: str
    architecture: str
    archives: dict[str, tuple[Archive, ...]]
    groups: dict[str, Group]
    repositories: dict[str, Repository] = {}


def read(path: Path) -> Lock | None:
    """The lock in a file, or None where there is none (or one of an older format)."""
    try:
        lock = msgspec.json.decode(path.read_bytes(), type=Lock)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as bad:
        raise UserError(f"{path} is not a lock: {bad}", hint="remove it, and run ./doitw lock") \
            from None
    return lock if lock.format == FORMAT else None


def write(lock: Lock, path: Path) -> None:
    """Write a lock as text that can be reviewed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(lock), indent=1) + b"\n")
    part.replace(path)


def host_archive(distribution: str) -> dict[str, str]:
    """Where the host's own apt gets its distribution: suite suffix (``, `-security`) → address.

    Empty when the host is of another distribution.
    """
    release = {}
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        release[name] = value.strip('"')
    if release.get("ID") != distribution:
        return {}
    codename = release.get("VERSION_CODENAME", "")
    lines = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
                 "Created-By: Packages"], capture=True, check=False).stdout.decode()
    found: dict[str, str] = {}
    for line in lines.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "main" and words[1].startswith(codename):
            found.setdefault(words[1].removeprefix(codename), words[0].rstrip("/"))
    return found


class Apt:
    """apt with a configuration of its own, below one directory.

    The host's apt.conf.d is not read: it is parsed after APT_CONFIG and would win (a container's
    `docker-clean`, for one, turns apt's cache off, and every call builds it anew). Only how the
    host reaches the network (`Acquire::http`, `Acquire::https`) is taken over.
    """

    def __init__(self, directory: Path, archives: Sequence[Archive], architecture: str) -> None:
        self.directory = directory
        self.architecture = architecture
        self.lists = directory / "lists"
        self.views: tuple[View, ...] = ()
        self._sources = "".join(
            f"deb [arch={architecture} signed-by={archive.keyring}] {archive.uri} {suite} "
            f"{' '.join(archive.components)}\n"
            for archive in archives for suite in archive.suites)
        self._write(self._sources, "")

    def _write(self, sources: str, preferences: str) -> None:
        with writing(self.directory):
            for path in (self.lists / "partial", self.directory / "cache/archives/partial",
                         self.directory / "etc"):
                path.mkdir(parents=True, exist_ok=True)
            (self.directory / "status").touch()
            (self.directory / "etc/sources.list").write_text(sources)
            (self.directory / "etc/preferences").write_text(preferences)
            (self.directory / "apt.conf").write_text(
                _configuration(self.directory, self.lists, self.architecture))

    def beside(self, views: Sequence[View], preferences: str) -> Apt:
        """This apt's archives with views of repositories, under preferences.

        The package lists are this one's, so they are not fetched once more.
        """
        name = "-".join(["with", *(view.place.name for view in views)])
        other = Apt(self.directory / name, (), self.architecture)
        other.lists = self.lists
        other.views = tuple(views)
        local = "".join(f"deb [arch={self.architecture} trusted=yes] {view.source} ./\n"
                        for view in views)
        other._write(local, preferences)
        other.update(keep=True)
        other._write(self._sources + local, preferences)
        return other

    def indexes(self) -> list[str]:
        """The texts of all package indexes, as their signatures were verified."""
        _status, out, _said = self._run("apt-get", "indextargets", "--format", "$(FILENAME)",
                                        "Created-By: Packages")
        return [Path(line).read_text() for line in out.splitlines()]

    def _run(self, *words: str) -> tuple[int, str, str]:
        log = self.directory / "log"
        log.unlink(missing_ok=True)
        proxies = {name: value for name, value in os.environ.items()
                   if name.lower() in ("http_proxy", "https_proxy", "no_proxy")}
        result = run(list(words), capture=True, check=False, log=log,
                     env={"APT_CONFIG": str(self.directory / "apt.conf"), **proxies})
        said = "\n".join(line for line in log.read_text().splitlines() if not line.startswith("$ "))
        return result.status, result.stdout.decode(), said

    def update(self, *, keep: bool = False) -> None:
        """Fetch the package lists; `keep` those of other archives.

        Any strong digest will do for them: NVIDIA's Release files have SHA-512 alone. Raises
        `UserError` when they cannot be had or are not signed.
        """
        cleanup = f"APT::Get::List-Cleanup={'false' if keep else 'true'}"
        status, _out, said = self._run("apt-get", "update", "-q", "-o",
                                       "APT::Update::Error-Mode=any", "-o", cleanup,
                                       "-o", "Acquire::ForceHash=")
        if status != 0:
            raise UserError(f"the package lists could not be fetched:\n{said}", hint=_cure(said))

    def closure(self, packages: Iterable[str]) -> dict[str, Deb]:
        """What installing these packages on nothing fetches, by file name."""
        return self._debs("install", "-y", *packages)

    def candidates(self, packages: Iterable[str]) -> dict[str, Deb]:
        """These packages alone, by file name."""
        return self._debs("download", *packages)

    def _debs(self, *words: str) -> dict[str, Deb]:
        status, out, said = self._run("apt-get", "-q", "--print-uris", *words)
        if status != 0:
            why = out.partition("have unmet dependencies:\n")[2]
            raise UserError(f"the packages cannot be resolved:\n{why}{said}", hint=self._hint(said))
        return {match[2]: self._deb(match) for match in _URI.finditer(out)}

    def _deb(self, match: re.Match[str]) -> Deb:
        url, file, size, sha256 = match.groups()
        for view in self.views:
            url = view.url(url)
        package, version, architecture = unquote(file).removesuffix(".deb").split("_")
        return Deb(package=package, version=version, architecture=architecture, url=url,
                   size=int(size), sha256=sha256)

    def _hint(self, said: str) -> str:
        version = re.search(r"Version '.*' for '(.+)' was not found", said)
        if version:
            _status, out, _said = self._run("apt-cache", "madison", version[1])
            found = dict.fromkeys(line.split("|")[1].strip() for line in out.splitlines())
            return f"the archive has {version[1]} in: {', '.join(found) or 'no version'}"
        unknown = re.search(r"Unable to locate package (\S+)", said)
        if unknown:
            _status, out, _said = self._run("apt-cache", "pkgnames", unknown[1][:2])
            from difflib import get_close_matches

            near = get_close_matches(unknown[1], out.split(), n=1)
            return f"did you mean {near[0]}?" if near else "is the name right, and the component?"
        return "compare the recipe's package names and driver version with the archive"


def _configuration(directory: Path, lists: Path, architecture: str) -> str:
    settings = {
        "Dir::Etc::main": "/dev/null", "Dir::Etc::parts": "/dev/null",
        "Dir::State": directory, "Dir::State::Lists": lists,
        "Dir::State::status": directory / "status", "Dir::Cache": directory / "cache",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Etc::sourcelist": directory / "etc/sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": directory / "etc/preferences",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Architecture": architecture, "APT::Sandbox::User": "",
        "APT::Install-Recommends": "false", "Debug::NoLocking": "true",
        "Acquire::Languages": "none", "Acquire::Retries": "3", "Acquire::ForceHash": "SHA256",
        "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
    }
    own = "".join(f'{name} "{value}";\n' for name, value in settings.items())
    host = run(["apt-config", "dump", "--format", '%F "%v";%n', "Acquire::http", "Acquire::https"],
               capture=True, check=False).stdout.decode()
    return f'{own}APT::Architectures {{ "{architecture}"; }};\n{host}'


def _cure(said: str) -> str:
    if "EXPKEYSIG" in said or "KEYEXPIRED" in said or "is not live" in said:
        return "the key that signs this archive has expired: get its successor, and write its " \
               "fingerprint where the recipe has one"
    if "NO_PUBKEY" in said or "Missing key" in said or "not signed" in said \
            or "signatures were invalid" in said:
        return "the recipe's keyring does not sign this archive: install the distribution's " \
               "keyring, or name the repository's own key"
    if "is expired" in said or "not valid yet" in said:
        return "the archive's Release file is out of date: use another mirror, or mend the clock"
    if "Hash Sum mismatch" in said or "unexpected size" in said:
        return "the mirror is being updated, or something on the way alters files: try again later"
    return "is the network there? the host's apt configuration and proxies are used"


def resolve(request: Request, directory: Path) -> Lock:
    """Resolve a request with one apt below `directory` for each set. Needs the network."""
    apts: dict[str, Apt] = {}
    views = {name: _view(request, name, directory / "repositories" / name)
             for name in request.repositories}
    beside: dict[tuple[str, tuple[Group, ...]], Apt] = {}
    found: dict[str, dict[str, Deb]] = {}
    for name, group in request.groups.items():
        if group.archives not in apts:
            apts[group.archives] = Apt(directory / group.archives,
                                       request.archives[group.archives], request.architecture)
            apts[group.archives].update()
        apt = apts[group.archives]
        if group.alone:
            found[name] = apt.candidates(group.packages)
            continue
        below = _below(request, group)
        stack = (group, *(request.groups[other] for other in below))
        local = [deb.path for one in stack for deb in one.files]
        wanted = [*(package for one in stack for package in one.packages), *local]
        there = {file for other in below for file in found[other]}
        pinned = tuple(one for one in reversed(stack) if one.repository is not None)
        if pinned and (group.archives, pinned) not in beside:
            beside[group.archives, pinned] = _beside(apt, pinned, views)
        apt = beside.get((group.archives, pinned), apt)
        found[name] = {file: deb for file, deb in apt.closure(wanted).items()
                       if file not in there and deb.url.removeprefix("file:") not in local}
    groups = {name: tuple(sorted(debs.values(), key=lambda deb: deb.package))
              for name, debs in found.items()}
    return Lock(recipe=request.recipe, request=request.identity, groups=groups)


def _view(request: Request, name: str, directory: Path) -> View:
    """What the groups take from a repository, which is verified with its own key alone."""
    wanted = request.repositories[name]
    key = keyring.place(wanted.archive.keyring, wanted.fingerprint, directory / "keyring.gpg")
    archive = msgspec.structs.replace(wanted.archive, keyring=str(key))
    apt = Apt(directory / "apt", [archive], request.architecture)
    apt.update()
    pins = [pin for group in request.groups.values() if group.repository == name
            for pin in group.pins]
    return aptview.lay(apt.indexes(), pins, archive.uri, directory / "view" / name)


def _beside(apt: Apt, groups: Sequence[Group], views: Mapping[str, View]) -> Apt:
    """The apt that sees what these groups take from their repositories."""
    names = dict.fromkeys(group.repository for group in groups if group.repository is not None)
    return apt.beside([views[name] for name in names], "".join(
        views[group.repository].preferences(group.pins) for group in groups
        if group.repository is not None))


def _below(request: Request, group: Group) -> list[str]:
    names: list[str] = []
    while group.on is not None:
        names.append(group.on)
        group = request.groups[group.on]
    return names
