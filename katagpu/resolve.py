"""What a recipe asks for, made into a lock by apt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from katagpu import aptview, keyring
from katagpu.apt import Apt
from katagpu.aptview import View
from katagpu.lock import Deb, Group, Known, Lock, Request


def resolve(request: Request, directory: Path, known: dict[str, Known] | None = None) -> Lock:
    """Resolve a request with apt below `directory`. Needs the network where not all is known.

    `known` is what was resolved before, by digest: it is taken as it is, what is missing is
    resolved on top of it and added.
    """
    known = {} if known is None else known
    keys = {name: request.digests.get(name, name) for name in request.groups}
    missing = [name for name, key in keys.items() if key not in known]
    apts = _Apts(request, directory)
    stood_on = {other for name in missing for other in _below(request, request.groups[name])}
    for name, group in request.groups.items():
        if name in missing:
            below = {package: stanza for other in reversed(_below(request, group))
                     for package, stanza in known[keys[other]].installed.items()}
            known[keys[name]] = Known(debs=_group(apts.of(group), request, group, below))
        found = known[keys[name]]
        # Of every group that is resolved now: another run may ask for something on it.
        if (name in missing or name in stood_on) and not (group.alone or found.installed):
            installed = apts.of(group).installed(found.debs)
            known[keys[name]] = Known(debs=found.debs, installed=installed)
    return Lock(recipe=request.recipe, request=request.identity,
                groups={name: known[key].debs for name, key in keys.items()})


class _Apts:
    """An apt for each set of archives, and for each set of repositories beside them."""

    def __init__(self, request: Request, directory: Path) -> None:
        self.request = request
        self.directory = directory
        self._plain: dict[str, Apt] = {}
        self._views: dict[str, View] = {}
        self._beside: dict[tuple[str, tuple[Group, ...]], Apt] = {}

    def of(self, group: Group) -> Apt:
        """The apt that sees what a group and those below it may take, with fresh lists."""
        if group.archives not in self._plain:
            apt = Apt(self.directory / group.archives, self.request.archives[group.archives],
                      self.request.architecture)
            apt.update()
            self._plain[group.archives] = apt
        stack = (group, *(self.request.groups[other] for other in _below(self.request, group)))
        pinned = tuple(one for one in reversed(stack) if one.repository is not None)
        if group.alone or not pinned:
            return self._plain[group.archives]
        key = (group.archives, pinned)
        if key not in self._beside:
            for one in pinned:
                name = one.repository or ""
                if name not in self._views:
                    self._views[name] = _view(self.request, name,
                                              self.directory / "repositories" / name)
            self._beside[key] = _beside(self._plain[group.archives], pinned, self._views)
        return self._beside[key]


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
