"""Checks that every program and library of the guest can be loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from katagpu.check.context import Guest
from katagpu.check.elf import MACHINE, Binary
from katagpu.check.facts import Fault, Severity
from katagpu.check.linker import CACHE, DEFAULT_DIRECTORIES, Linker

EXAMPLES = 3


def damaged(guest: Guest) -> Iterator[Fault]:
    """Every ELF file is whole, and nothing was kept from this check by its permissions."""
    _ = guest.linker.binaries
    for path in guest.root.unreadable:
        yield Fault(what="this directory may not be read, so nothing in it was checked",
                    where=path, cure="check as root of the user namespace that owns the files")
    for path, reason in guest.linker.damaged.items():
        yield Fault(what=f"this ELF file cannot be read: {reason}", where=path,
                    cure="it was cut short or damaged on its way here: drop the layer that brings "
                         "it from the store and build again")


def foreign(guest: Guest) -> Iterator[Fault]:
    """Programs for another processor or word size: dead weight, and never loaded."""
    by_machine: defaultdict[str, list[str]] = defaultdict(list)
    for binary in guest.linker.binaries.values():
        if binary.machine != MACHINE:
            by_machine[binary.machine].append(binary.path)
    for machine, paths in by_machine.items():
        yield Fault(what=f"{len(paths)} ELF files are for {machine}, not 64-bit x86: "
                         f"{_some(paths)}", where=paths[0], severity=Severity.WARNING,
                    cure="leave the 32-bit compatibility libraries out of the guest")


def interpreters(guest: Guest) -> Iterator[Fault]:
    """The dynamic linker that each program names is there and is for this machine."""
    users: defaultdict[str, list[str]] = defaultdict(list)
    for binary in guest.linker.binaries.values():
        if binary.interpreter is not None:
            users[binary.interpreter].append(binary.path)
    for interpreter, paths in users.items():
        if guest.linker.library(interpreter) is None:
            yield Fault(what=f"the interpreter {interpreter} is not in the guest, so it cannot "
                             f"start: {_some(paths)}", where=paths[0],
                        cure="install the C library these programs were linked against, or use a "
                             "statically linked build of them")


@dataclass(frozen=True, kw_only=True)
class _Missing:
    library: str
    wanted_by: Binary
    program: Binary


def libraries(guest: Guest) -> Iterator[Fault]:
    """Every NEEDED library of every program and library is found as ld.so would find it.

    Programs are loaded first, with all that they bring: a library that only works inside its
    program (by the program's RPATH) is right. The libraries left over are loaded on their own.
    """
    linker = guest.linker
    ours = [binary for binary in linker.binaries.values() if binary.machine == MACHINE]
    seen: set[str] = set()
    missing: dict[tuple[str, str], _Missing] = {}
    for binary in sorted(ours, key=lambda binary: (not binary.executable, binary.path)):
        if binary.path in seen:
            continue
        for lack in _load(linker, binary, seen):
            missing.setdefault((lack.wanted_by.path, lack.library), lack)
    for lack in missing.values():
        yield _missing_library(linker, lack)


def _load(linker: Linker, program: Binary, seen: set[str]) -> Iterator[_Missing]:
    """Load a program breadth first, as ld.so does; `seen` gets everything that was loaded."""
    loaded = {program.soname or program.path}
    waiting: list[tuple[Binary, ...]] = [(program,)]
    for chain in waiting:
        asker = chain[0]
        seen.add(asker.path)
        for name in asker.needed:
            if name in loaded:
                continue
            loaded.add(name)
            found = linker.find(name, chain)
            if found is None:
                yield _Missing(library=name, wanted_by=asker, program=program)
            else:
                waiting.append((found, *chain))


def _missing_library(linker: Linker, lack: _Missing) -> Fault:
    where = lack.wanted_by.path
    through = "" if lack.program is lack.wanted_by else f" (loaded by {lack.program.path})"
    directory = linker.uncached(lack.library)
    if directory is not None:
        return Fault(what=f"{lack.library} is needed{through}; it is in {directory}, which "
                          f"{CACHE} does not list", where=where,
                     cure="run ldconfig in the guest after the last library was added")
    return Fault(what=f"{lack.library} is needed{through} and is not in the guest", where=where,
                 cure=f"add the package or file that brings {lack.library} to the recipe, or leave "
                      f"{where} out")


def symbol_versions(guest: Guest) -> Iterator[Fault]:
    """The versions that a file wants from a library (GLIBC_2.38…) are defined there.

    An agent or a tool built on a newer distribution than the guest's has all its libraries, and
    yet does not start.
    """
    linker = guest.linker
    for binary in linker.binaries.values():
        for name, wanted in binary.versions.items():
            library = linker.find(name, (binary,))
            if library is None or not library.defines:
                continue
            lacking = [version for version in wanted if version not in library.defines]
            if lacking:
                yield Fault(what=f"it wants {', '.join(lacking)} of {name}, which {library.path} "
                                 "does not have", where=binary.path,
                            cure="it was built for a newer distribution than the guest's: build it "
                                 "against the guest's own libraries, or use a static one")


def cache(guest: Guest) -> Iterator[Fault]:
    """ld.so.cache lists what is there, and the driver's libraries are in it.

    NVIDIA's container tools find the driver through this cache, so that a library which is only
    in a default directory is found by programs and not by them.
    """
    for place, linker in guest.caches.items():
        if any((binary.interpreter or "").startswith("/lib64/ld-linux")
               for binary in linker.binaries.values()):
            yield from _cache(place, linker)


def _cache(place: str, linker: Linker) -> Iterator[Fault]:
    where = place + CACHE
    cure = "run ldconfig in the guest after the last library was added or removed"
    if not linker.cache:
        yield Fault(what="there is no readable cache of libraries", where=where, cure=cure)
        return
    for name, path in linker.cache.items():
        if linker.library(path) is None:
            yield Fault(what=f"it lists {name} at {path}, which is not there", where=where,
                        cure=cure)
    for soname, path in _cacheable(linker):
        if soname not in linker.cache:
            of_driver = soname.startswith(("libcuda", "libnvidia", "libnvcuvid"))
            yield Fault(what=f"it does not list {soname} ({path})", where=where, cure=cure,
                        severity=Severity.ERROR if of_driver else Severity.WARNING)


def _cacheable(linker: Linker) -> Iterator[tuple[str, str]]:
    """Each library in ldconfig's directories: its SONAME and its path."""
    found: dict[str, str] = {}
    for directory in dict.fromkeys([*linker.configured, *DEFAULT_DIRECTORIES]):
        for name in linker.root.names(directory):
            if not (name.startswith("lib") and ".so" in name):
                continue
            library = linker.library(f"{directory}/{name}")
            if library is not None and library.soname is not None:
                found.setdefault(library.soname, f"{directory}/{name}")
    yield from found.items()


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - EXAMPLES} more" if len(paths) > EXAMPLES else ""
    return ", ".join(paths[:EXAMPLES]) + more
