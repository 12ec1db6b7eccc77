"""The lock: exactly which bytes a recipe's packages are, resolved by apt and signed by its keyring.

apt runs on the host with a configuration of its own (empty dpkg status, own lists), so the host's
packages do not matter; the archive's signature is checked here, and later steps trust digests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from katagpu.errors import StepError, UserError
from katagpu.run import run

FORMAT = 1
_URI = re.compile(r"^'([^']+)' (\S+) (\d+) ")


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
    """An apt archive: suites and components below one address, and the keyring that signs it."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    keyring: str


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A set of packages to resolve with all that they depend on.

    `on` names a group that is installed already: only what comes in addition is locked. `alone`
    locks the named packages without their dependencies (sources shipped as packages).
    """

    packages: tuple[str, ...]
    on: str | None = None
    alone: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """All that a lock answers."""

    recipe: str
    identity: str
    architecture: str
    archives: tuple[Archive, ...]
    groups: dict[str, Group]


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
    """apt with a configuration of its own, below one directory."""

    def __init__(self, directory: Path, archives: Sequence[Archive], architecture: str) -> None:
        self.directory = directory
        for name in ("lists/partial", "cache/archives/partial", "etc"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        (directory / "status").touch()
        sources = "".join(
            f"deb [arch={architecture} signed-by={archive.keyring}] {archive.uri} {suite} "
            f"{' '.join(archive.components)}\n"
            for archive in archives for suite in archive.suites)
        (directory / "etc/sources.list").write_text(sources)
        settings = {
            "Dir::State": directory, "Dir::State::Lists": directory / "lists",
            "Dir::State::status": directory / "status", "Dir::Cache": directory / "cache",
            "Dir::Etc::sourcelist": directory / "etc/sources.list", "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "-", "Dir::Etc::preferencesparts": "-",
            "APT::Architecture": architecture, "APT::Sandbox::User": "",
            "Acquire::Languages": "none", "APT::Install-Recommends": "false",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled": "false",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "Acquire::Retries": "3",
        }
        text = "".join(f'{name} "{value}";\n' for name, value in settings.items())
        (directory / "apt.conf").write_text(f"{text}#clear APT::Architectures;\n"
                                            f'APT::Architectures {{ "{architecture}"; }};\n')

    def _environment(self) -> Mapping[str, str]:
        proxies = {name: value for name, value in os.environ.items()
                   if name.lower() in ("http_proxy", "https_proxy", "no_proxy")}
        return {"APT_CONFIG": str(self.directory / "apt.conf"), **proxies}

    def _run(self, *words: str) -> tuple[int, str, str]:
        log = self.directory / "log"
        log.unlink(missing_ok=True)
        result = run(list(words), env=self._environment(), capture=True, check=False, log=log)
        said = "\n".join(line for line in log.read_text().splitlines() if not line.startswith("$ "))
        return result.status, result.stdout.decode(), said

    def update(self) -> None:
        """Fetch the package lists. Raises `UserError` when they cannot be had or are not signed."""
        status, _out, said = self._run("apt-get", "update", "-q", "-o",
                                       "APT::Update::Error-Mode=any")
        if status != 0:
            raise UserError(f"the package lists could not be fetched:\n{said}", hint=_cure(said))

    def closure(self, packages: Iterable[str]) -> dict[str, str]:
        """What installing these packages on nothing fetches: file name → URL."""
        status, out, said = self._run("apt-get", "install", "-qq", "-y", "--print-uris",
                                      "-o", "Debug::NoLocking=true", *packages)
        if status != 0:
            raise UserError(f"the packages cannot be resolved:\n{out}{said}",
                            hint="compare the recipe's package names and driver version with the "
                                 "archive: apt-cache policy")
        return {name: url for url, name, _size in _uris(out)}

    def candidate(self, package: str) -> dict[str, str]:
        """File name → URL of one package alone."""
        status, out, said = self._run("apt-get", "download", "-qq", "--print-uris", package)
        if status != 0:
            raise UserError(f"the package {package} cannot be found:\n{said}",
                            hint=self._versions(package))
        return {name: url for url, name, _size in _uris(out)}

    def _versions(self, package: str) -> str:
        name = package.split("=")[0]
        _status, out, _said = self._run("apt-cache", "madison", name)
        versions = [line.split("|")[1].strip() for line in out.splitlines() if "|" in line]
        return f"the archive has {name} in: {', '.join(versions) or 'no version'}"

    def describe(self, files: Mapping[str, str]) -> tuple[Deb, ...]:
        """The packages behind file names, with digests, sorted by name."""
        from urllib.parse import unquote

        from debian.deb822 import Packages

        names = ["{}={}".format(*file.replace("%3a", ":").split("_")[:2]) for file in files]
        status, out, said = self._run("apt-cache", "show", *names)
        if status != 0:
            raise StepError(f"apt-cache does not know what apt-get resolved:\n{said}")
        debs = {}
        for entry in Packages.iter_paragraphs(out.splitlines(keepends=True), use_apt_pkg=False):
            version = entry["Version"].replace(":", "%3a")
            file = f"{entry['Package']}_{version}_{entry['Architecture']}.deb"
            url = files.get(file)
            if url is not None and unquote(url).endswith(entry["Filename"]):
                debs[file] = Deb(package=entry["Package"], version=entry["Version"],
                                 architecture=entry["Architecture"], url=url,
                                 size=int(entry["Size"]), sha256=entry["SHA256"])
        missing = sorted(set(files) - set(debs))
        if missing:
            raise StepError(f"no digest for {', '.join(missing)}")
        return tuple(sorted(debs.values(), key=lambda deb: (deb.package, deb.version)))


def _uris(text: str) -> list[tuple[str, str, str]]:
    return [match for line in text.splitlines() for match in _URI.findall(line)]


def _cure(said: str) -> str:
    if "NO_PUBKEY" in said or "not signed" in said:
        return "the recipe's keyring does not sign this archive: install the distribution's keyring"
    if "Release" in said and "expired" in said:
        return "the archive's Release file is out of date: use another mirror"
    return "is the network there? the host's apt configuration and proxies are used"


def resolve(request: Request, directory: Path) -> Lock:
    """Resolve a request with apt below `directory`. Needs the network."""
    apt = Apt(directory, request.archives, request.architecture)
    apt.update()
    files: dict[str, dict[str, str]] = {}
    for name, group in request.groups.items():
        if group.alone:
            files[name] = {file: url for package in group.packages
                           for file, url in apt.candidate(package).items()}
            continue
        below, wanted = group.on, list(group.packages)
        while below is not None:
            wanted += request.groups[below].packages
            below = request.groups[below].on
        found = apt.closure(wanted)
        below = group.on
        while below is not None:
            found = {file: url for file, url in found.items() if file not in files[below]}
            below = request.groups[below].on
        files[name] = found
    everything = {file: url for found in files.values() for file, url in found.items()}
    debs = {f"{deb.package}_{deb.version.replace(':', '%3a')}_{deb.architecture}.deb": deb
            for deb in apt.describe(everything)}
    groups = {name: tuple(sorted((debs[file] for file in found), key=lambda deb: deb.package))
              for name, found in files.items()}
    return Lock(recipe=request.recipe, request=request.identity, groups=groups)
