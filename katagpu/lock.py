"""The lock: exactly which bytes a recipe's packages are, resolved by apt and signed by its keyring.

apt runs on the host with a configuration of its own (own lists; as installed it sees nothing, or
the groups below), so the host's packages do not matter; the archive's signature is checked here,
and later steps trust digests.

What was resolved is kept by what was asked for (`Known`), so that the locks of a recipe's drivers
share all that they ask for alike, however far apart they are made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import msgspec

from katagpu import log
from katagpu.errors import UserError
from katagpu.run import run
from katagpu.store import writing

FORMAT = 1
# What apt must know of an installed package (deb-control(5)); it takes one of the same version for
# another where the size or a relation is not that of its lists.
_RELATIONS = ("Package", "Version", "Architecture", "Multi-Arch", "Essential", "Installed-Size",
              "Pre-Depends", "Depends", "Provides", "Conflicts", "Breaks", "Replaces")
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


class Known(msgspec.Struct, frozen=True, kw_only=True):
    """A group that was resolved.

    `installed` is what dpkg's status says of each package once it is there, for groups on this one.
    """

    debs: tuple[Deb, ...]
    installed: dict[str, str] = {}


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """All that was resolved for a recipe, by the digest of what was asked for."""

    groups: dict[str, Known]
    format: int = FORMAT


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """An apt archive: suites and components below one address, and the keyring that signs it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    keyring: str


class LocalDeb(msgspec.Struct, frozen=True, kw_only=True):
    """A package given as a file."""

    path: str
    sha256: str


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A set of packages to resolve with all that they depend on.

    `files` are packages that are at hand: what they depend on is locked, they are not.
    `on` names a group that is installed already: only what comes in addition is locked. `alone`
    locks the named packages without their dependencies (sources shipped as packages).
    """

    packages: tuple[str, ...] = ()
    files: tuple[LocalDeb, ...] = ()
    on: str | None = None
    alone: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """All that a lock answers. `digests` say of each group what it and those below ask for."""

    recipe: str
    identity: str
    architecture: str
    archives: tuple[Archive, ...]
    groups: dict[str, Group]
    digests: dict[str, str] = {}


Form = TypeVar("Form", Lock, Resolved)


def read(path: Path) -> Lock | None:
    """The lock in a file, or None where there is none (or one of an older format)."""
    return _read(path, Lock)


def read_resolved(path: Path) -> Resolved | None:
    """What was resolved for a recipe, or None where nothing was (or in an older format)."""
    return _read(path, Resolved)


def _read(path: Path, kind: type[Form]) -> Form | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as bad:
        raise UserError(f"{path} is not a lock: {bad}", hint="remove it, and run ./doitw lock") \
            from None
    return found if found.format == FORMAT else None


def write(lock: Lock | Resolved, path: Path) -> None:
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
        with writing(directory):
            for name in ("lists/partial", "cache/archives/partial", "etc"):
                (directory / name).mkdir(parents=True, exist_ok=True)
            (directory / "status").touch()
            (directory / "etc/sources.list").write_text("".join(
                f"deb [arch={architecture} signed-by={archive.keyring}] {archive.uri} {suite} "
                f"{' '.join(archive.components)}\n"
                for archive in archives for suite in archive.suites))
            (directory / "apt.conf").write_text(_configuration(directory, architecture))

    def _run(self, *words: str) -> tuple[int, str, str]:
        log = self.directory / "log"
        log.unlink(missing_ok=True)
        proxies = {name: value for name, value in os.environ.items()
                   if name.lower() in ("http_proxy", "https_proxy", "no_proxy")}
        result = run(list(words), capture=True, check=False, log=log,
                     env={"APT_CONFIG": str(self.directory / "apt.conf"), **proxies})
        said = "\n".join(line for line in log.read_text().splitlines() if not line.startswith("$ "))
        return result.status, result.stdout.decode(), said

    def update(self) -> None:
        """Fetch the package lists. Raises `UserError` when they cannot be had or are not signed."""
        status, _out, said = self._run("apt-get", "update", "-q", "-o",
                                       "APT::Update::Error-Mode=any")
        if status != 0:
            raise UserError(f"the package lists could not be fetched:\n{said}", hint=_cure(said))

    def closure(self, packages: Iterable[str],
                installed: Mapping[str, str] | None = None) -> dict[str, Deb]:
        """What installing these packages fetches, by file name.

        `installed` are stanzas of dpkg's status by package: what is there already, and stays as it
        is unless another package needs it newer; without, nothing is.
        """
        status = self.directory / "installed"
        status.write_text("\n".join((installed or {}).values()))
        # apt's cache of it goes by times in whole seconds, and is not kept.
        on = (["-o", f"Dir::State::status={status}", "-o", "Dir::Cache::pkgcache="]
              if installed else [])
        return self._debs(*on, "install", "-y", "--no-upgrade", *packages)

    def installed(self, debs: Sequence[Deb]) -> dict[str, str]:
        """Stanzas of dpkg's status for these packages, as if they were installed."""
        if not debs:
            return {}
        _status, out, _said = self._run("apt-cache", "show", *(deb.package for deb in debs))
        listed = {(stanza["Package"], stanza["Version"]): stanza for stanza in map(
            _stanza, out.split("\n\n")) if {"Package", "Version"} <= set(stanza)}
        gone = [deb.package for deb in debs if (deb.package, deb.version) not in listed]
        if gone:
            log.note(f"lock: the archive has other versions now of {', '.join(gone[:5])}"
                     f"{' …' if len(gone) > 5 else ''}; what they provide is not known")
        found = {}
        for deb in debs:
            stanza = listed.get((deb.package, deb.version)) or {
                "Package": deb.package, "Version": deb.version, "Architecture": deb.architecture}
            found[deb.package] = "Status: install ok installed\n" + "".join(
                f"{name}: {stanza[name]}\n" for name in _RELATIONS if name in stanza)
        return found

    def candidates(self, packages: Iterable[str]) -> dict[str, Deb]:
        """These packages alone, by file name."""
        return self._debs("download", *packages)

    def _debs(self, *words: str) -> dict[str, Deb]:
        status, out, said = self._run("apt-get", "-q", "--print-uris", *words)
        if status != 0:
            why = out.partition("have unmet dependencies:\n")[2]
            raise UserError(f"the packages cannot be resolved:\n{why}{said}", hint=self._hint(said))
        return {match[2]: _deb(match) for match in _URI.finditer(out)}

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


def _configuration(directory: Path, architecture: str) -> str:
    settings = {
        "Dir::Etc::main": "/dev/null", "Dir::Etc::parts": "/dev/null",
        "Dir::State": directory, "Dir::State::Lists": directory / "lists",
        "Dir::State::status": directory / "status", "Dir::Cache": directory / "cache",
        "Dir::Cache::srcpkgcache": "",
        "Dir::Etc::sourcelist": directory / "etc/sources.list",
        "Dir::Etc::sourceparts": "/dev/null", "Dir::Etc::preferences": "/dev/null",
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


def _deb(match: re.Match[str]) -> Deb:
    url, file, size, sha256 = match.groups()
    package, version, architecture = unquote(file).removesuffix(".deb").split("_")
    return Deb(package=package, version=version, architecture=architecture, url=url,
               size=int(size), sha256=sha256)


def _cure(said: str) -> str:
    if any(word in said for word in ("NO_PUBKEY", "not signed", "no longer signed",
                                     "signatures were invalid")):
        return "the recipe's keyring does not sign this archive: install the distribution's keyring"
    if "is expired" in said or "not valid yet" in said:
        return "the archive's Release file is out of date: use another mirror, or mend the clock"
    if "Hash Sum mismatch" in said or "unexpected size" in said:
        return "the mirror is being updated, or something on the way alters files: try again later"
    return "is the network there? the host's apt configuration and proxies are used"


def _stanza(text: str) -> dict[str, str]:
    """The fields of a control stanza; folded lines are joined."""
    lines = re.sub(r"\n[ \t]+", " ", text.strip()).splitlines()
    return {name: value.strip() for name, mark, value in
            (line.partition(":") for line in lines) if mark}


def resolve(request: Request, directory: Path, known: dict[str, Known] | None = None) -> Lock:
    """Resolve a request with apt below `directory`. Needs the network where not all is known.

    `known` is what was resolved before, by digest: it is taken as it is, what is missing is
    resolved on top of it and added.
    """
    known = {} if known is None else known
    keys = {name: request.digests.get(name, name) for name in request.groups}
    missing = [name for name, key in keys.items() if key not in known]
    apt = Apt(directory, request.archives, request.architecture)
    if missing:
        apt.update()
    stood_on = {other for name in missing for other in _below(request, request.groups[name])}
    for name, group in request.groups.items():
        if name in missing:
            below = {package: stanza for other in reversed(_below(request, group))
                     for package, stanza in known[keys[other]].installed.items()}
            known[keys[name]] = Known(debs=_group(apt, request, group, below))
        found = known[keys[name]]
        # Of every group that is resolved now: another run may ask for something on it.
        if (name in missing or name in stood_on) and not (group.alone or found.installed):
            known[keys[name]] = Known(debs=found.debs, installed=apt.installed(found.debs))
    return Lock(recipe=request.recipe, request=request.identity,
                groups={name: known[key].debs for name, key in keys.items()})


def _group(apt: Apt, request: Request, group: Group, below: Mapping[str, str]) -> tuple[Deb, ...]:
    """The packages of one group, sorted by name; `below` are those of the groups that it is on."""
    if group.alone:
        debs = apt.candidates(group.packages)
    else:
        # Packages at hand are not in the status: what is on them is installed with them.
        stack = (group, *(request.groups[other] for other in _below(request, group)))
        local = [deb.path for one in stack for deb in one.files]
        debs = {file: deb for file, deb in apt.closure([*group.packages, *local], below).items()
                if deb.url.removeprefix("file:") not in local}
    return tuple(sorted(debs.values(), key=lambda deb: deb.package))


def _below(request: Request, group: Group) -> list[str]:
    names: list[str] = []
    while group.on is not None:
        names.append(group.on)
        group = request.groups[group.on]
    return names
