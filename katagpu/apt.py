"""apt on the host, with a configuration of its own.

It has its own lists, and sees as installed nothing, or the groups below, so the host's packages do
not matter. The archive's signature is checked here, and later steps trust digests.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from katagpu import log
from katagpu.aptview import View
from katagpu.errors import UserError
from katagpu.lock import Archive, Deb
from katagpu.run import run
from katagpu.store import writing

# What apt must know of an installed package (deb-control(5)); it takes one of the same version for
# another where the size or a relation is not that of its lists.
_RELATIONS = ("Package", "Version", "Architecture", "Multi-Arch", "Essential", "Installed-Size",
              "Pre-Depends", "Depends", "Provides", "Conflicts", "Breaks", "Replaces")
_URI = re.compile(r"^'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})$", re.MULTILINE)
_PROXY = re.compile(r'^Acquire::(https?)::Proxy(?:::(\S+))? "([^"]+)";$',
                    re.IGNORECASE | re.MULTILINE)


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
    # Without what Release files say, apt answers from its sources alone, whether it has lists or
    # not (containers have none).
    asked = run(["apt-get", "indextargets", "--no-release-info", "--format",
                 "$(COMPONENT) $(RELEASE) $(REPO_URI)", "Created-By: Packages"],
                capture=True, check=False)
    if asked.status != 0:
        log.warn(f"the host's apt sources: {asked.stderr.decode(errors='replace').strip()}")
    found: dict[str, str] = {}
    useless: dict[str, str] = {}
    for line in asked.stdout.decode().splitlines():
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[0] == "main" and words[1].startswith(codename):
            suffix = words[1].removeprefix(codename)
            address = _address(words[2].rstrip("/"))
            if address is None:
                useless.setdefault(suffix, words[2].rstrip("/"))
            else:
                found.setdefault(suffix, address)
    for suffix, uri in useless.items():
        if suffix not in found:
            log.warn(f"the host's apt has {codename}{suffix} at {uri}, which gives no address of "
                     "HTTP, HTTPS or a file")
    return found


def _address(uri: str) -> str | None:
    """Where a source of apt leads, if files can be fetched from there.

    Of a mirror list (apt-transport-mirror(1)) that is the first HTTP or HTTPS address of those
    with the lowest priority; one that has some files only (`arch:`, `type:` …) does not count.
    """
    if uri.startswith(("http://", "https://", "file:")):
        return uri
    if not uri.startswith("mirror+file:"):
        return None
    listed: list[tuple[float, str]] = []
    with contextlib.suppress(OSError):
        for line in Path(unquote(uri.removeprefix("mirror+file:"))).read_text(
                errors="replace").splitlines():
            address, *limits = line.split() or [""]
            if address.startswith(("http://", "https://")) \
                    and all(limit.startswith("priority:") for limit in limits):
                ranks = [int(rank) for limit in limits if (rank := limit[9:]).isdecimal()]
                listed.append((min(ranks, default=math.inf), address.rstrip("/")))
    return min(listed, key=lambda item: item[0], default=(0, None))[1]


def proxies() -> dict[str, str]:
    """The proxies of the host's apt configuration, as `fetch_all` takes them.

    One for a host goes before that of all, and https has those of http where it has none
    (apt-transport-http(1), apt-transport-https(1)). DIRECT, or `false`, is none.
    """
    found: dict[str, dict[str, str]] = {"http": {}, "https": {}}
    for scheme, host, proxy in _PROXY.findall(_network()):
        value = "" if proxy.lower() in ("direct", "false") else proxy
        found[scheme.lower()]["://" + host if host else ""] = value
    found["https"] = {**found["http"], **found["https"]}
    return {scheme + host: proxy for scheme, each in found.items() for host, proxy in each.items()}


def _network() -> str:
    """How the host's apt reaches the network, as apt.conf has it."""
    return run(["apt-config", "dump", "--format", '%F "%v";%n', "Acquire::http", "Acquire::https"],
               capture=True, check=False).stdout.decode()


class Apt:
    """apt with a configuration of its own, below one directory.

    The host's apt.conf.d is not read: it is parsed after APT_CONFIG and would win (a container's
    `docker-clean`, for one, turns apt's cache off, and every call builds it anew). Only how the
    host reaches the network (`Acquire::http`, `Acquire::https`) is taken over.
    """

    def __init__(self, directory: Path, archives: Sequence[Archive], architecture: str) -> None:
        for archive in archives:
            if re.search(r"[\s\[\]]", archive.keyring):
                raise UserError(f"apt cannot use a keyring at {archive.keyring}: its path has a "
                                "blank or a bracket", hint="set KATAGPU_STORE, or move the "
                                "repository, to a path without")
        self.directory = directory
        self.architecture = architecture
        self.lists = directory / "lists"
        self.views: tuple[View, ...] = ()
        self._sources = "".join(
            f"deb [arch={architecture} signed-by={archive.keyring}] {archive.uri} {suite} "
            f"{' '.join(archive.components)}\n"
            for archive in archives for suite in archive.suites)
        # 990 is what a Default-Release has (apt_preferences(5)); backports alone have 100.
        self._preferences = "".join(
            f"Package: *\nPin: release n={suite}\nPin-Priority: 990\n\n"
            for archive in archives if archive.preferred for suite in archive.suites)
        self._write(self._sources, self._preferences)

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
        other._write(self._sources + local, self._preferences + preferences)
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
    return f'{own}APT::Architectures {{ "{architecture}"; }};\n{_network()}'


def _cure(said: str) -> str:
    if "EXPKEYSIG" in said or "KEYEXPIRED" in said or "is not live" in said:
        return "the key that signs this archive has expired: get its successor, and write its " \
               "fingerprint where the recipe has one"
    if any(word in said for word in ("NO_PUBKEY", "Missing key", "not signed",
                                     "no longer signed")) \
            or "signatures were invalid" in said:
        return "the recipe's keyring does not sign this archive: install the distribution's " \
               "keyring, or name the repository's own key"
    if "is expired" in said or "not valid yet" in said:
        return "the archive's Release file is out of date: use another mirror, or mend the clock"
    if "does not have a Release file" in said:
        return "the mirror does not have this suite: name one that has it, or is the suite right?"
    if "Hash Sum mismatch" in said or "unexpected size" in said:
        return "the mirror is being updated, or something on the way alters files: try again later"
    return "is the network there? the host's apt configuration and proxies are used"


def _stanza(text: str) -> dict[str, str]:
    """The fields of a control stanza; folded lines are joined."""
    lines = re.sub(r"\n[ \t]+", " ", text.strip()).splitlines()
    return {name: value.strip() for name, mark, value in
            (line.partition(":") for line in lines) if mark}
