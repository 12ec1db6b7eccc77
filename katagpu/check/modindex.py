"""Checks of depmod's files and of modprobe's configuration: does `modprobe nvidia` find nvidia?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from katagpu.check.context import Guest
from katagpu.check.elf import Damaged
from katagpu.check.facts import Fault
from katagpu.check.kmod import canonical, index_keys

DEPMOD = "run depmod on the guest root after the last module was added or removed"
# modprobe.d(5): a file hides those of the same name in the directories after it.
MODPROBE_DIRECTORIES = ("/etc/modprobe.d", "/run/modprobe.d", "/usr/local/lib/modprobe.d",
                        "/usr/lib/modprobe.d", "/lib/modprobe.d")
# nvidia-modeset and nvidia-drm may be missing or blacklisted: only a guest with graphics uses them.
LOADED_BY_NAME = ("nvidia", "nvidia_uvm")


def _each(guest: Guest, find: Callable[[Guest, str], Iterator[Fault]]) -> Iterator[Fault]:
    """The faults of every module directory with modules in it: modprobe reads one, and no other."""
    for directory in guest.module_directories:
        if guest.files_of(directory):
            yield from find(guest, directory)


def _modules_dep(guest: Guest, directory: str) -> Mapping[str, frozenset[str]]:
    """modules.dep: path below the module directory to all that must be loaded with it."""
    pairs = (line.partition(":") for line in
             guest.root.text(f"{directory}/modules.dep").splitlines())
    return {path: frozenset(needs.split()) for path, colon, needs in pairs if colon}


def complete(guest: Guest) -> Iterator[Fault]:
    """modules.dep lists every module file, and every file it lists is there."""
    yield from _each(guest, _complete)


def _complete(guest: Guest, directory: str) -> Iterator[Fault]:
    where = f"{directory}/modules.dep"
    if guest.root.read(where) is None:
        yield Fault(what="depmod's list of modules is not there", where=where, cure=DEPMOD)
        return
    real = guest.root.resolve(directory)
    there = {path.removeprefix(f"{real}/") for path in guest.files_of(directory)}
    listed = set(_modules_dep(guest, directory))
    for path in sorted(there - listed):
        yield Fault(what=f"{path} is not listed, so modprobe does not find it", where=where,
                    cure=DEPMOD)
    for path in sorted(listed - there):
        yield Fault(what=f"{path} is listed and not there", where=where, cure=DEPMOD)
    if guest.root.read(f"{directory}/modules.builtin") is None:
        yield Fault(what="modprobe reports an error for what is built into the kernel",
                    where=f"{directory}/modules.builtin",
                    cure="copy modules.builtin from the kernel's modules_install")


def closure(guest: Guest) -> Iterator[Fault]:
    """What modules.dep loads with a module is what the modules themselves depend on."""
    for directory in guest.module_directories:
        yield from _closure(guest, directory)


def _closure(guest: Guest, directory: str) -> Iterator[Fault]:
    for path, listed in _modules_dep(guest, directory).items():
        wanted = _all_depends(guest, canonical(path))
        found = {canonical(name) for name in listed}
        if canonical(path) in guest.by_name and wanted != found:
            lacking, extra = sorted(wanted - found), sorted(found - wanted)
            yield Fault(what=f"{path}: " + "; ".join(
                            f"{word} {', '.join(names)}" for word, names in
                            (("lacks", lacking), ("does not need", extra)) if names),
                        where=f"{directory}/modules.dep", cure=DEPMOD)


def _all_depends(guest: Guest, name: str) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        module = guest.by_name.get(todo.pop())
        fresh = set() if module is None else module.depends - found - guest.builtin
        found |= fresh
        todo += fresh
    return found


def indexes(guest: Guest) -> Iterator[Fault]:
    """The binary indexes, which are all that modprobe reads, say what the text files say."""
    yield from _each(guest, _indexes)


def _indexes(guest: Guest, directory: str) -> Iterator[Fault]:
    dep = {canonical(path) for path in _modules_dep(guest, directory)}
    aliases = set(_alias_names(guest, directory))
    for name, wanted in (("modules.dep.bin", dep), ("modules.alias.bin", aliases)):
        where = f"{directory}/{name}"
        data = guest.root.read(where)
        if data is None:
            yield Fault(what="modprobe's index is not there", where=where, cure=DEPMOD)
            continue
        try:
            found = {key.replace("-", "_") for key in index_keys(data)}
        except Damaged as broken:
            yield Fault(what=str(broken), where=where, cure=DEPMOD)
            continue
        different = sorted(wanted ^ found)
        if different:
            yield Fault(what=f"it disagrees with {name.removesuffix('.bin')} about "
                             f"{len(different)} names, {different[0]} among them", where=where,
                        cure=DEPMOD)


def _alias_names(guest: Guest, directory: str) -> Iterator[str]:
    for line in guest.root.text(f"{directory}/modules.alias").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "alias":
            yield words[1].replace("-", "_")


def aliases(guest: Guest) -> Iterator[Fault]:
    """modules.alias has every alias of every module: by them udev loads the driver for a GPU."""
    yield from _each(guest, _aliases)


def _aliases(guest: Guest, directory: str) -> Iterator[Fault]:
    listed = set(_alias_names(guest, directory))
    inside = set(guest.files_of(directory))
    for module in guest.modules:
        lacking = [alias for alias in module.info.get("alias", ())
                   if alias.replace("-", "_") not in listed]
        if lacking and module.path in inside:
            yield Fault(what=f"lacks {len(lacking)} aliases of {module.name}, {lacking[0]} among "
                             "them", where=f"{directory}/modules.alias", cure=DEPMOD)


def _modprobe_lines(guest: Guest) -> Iterator[tuple[str, list[str]]]:
    """Each command of modprobe's configuration, with its file."""
    seen: set[str] = set()
    for directory in MODPROBE_DIRECTORIES:
        for name in guest.root.names(directory):
            if name in seen or not name.endswith((".conf", ".alias")):
                continue
            seen.add(name)
            text = guest.root.text(f"{directory}/{name}").replace("\\\n", " ")
            for line in text.splitlines():
                words = line.split()
                if words and not words[0].startswith("#"):
                    yield f"{directory}/{name}", words


def modprobe(guest: Guest) -> Iterator[Fault]:
    """`modprobe nvidia` and `modprobe nvidia-uvm` load the files of those names.

    Debian's nvidia-kernel-support maps nvidia to nvidia-current, which only its own packages have.
    A blacklisted module is loaded by name and not by udev for a GPU that appears later.
    """
    if guest.facts.driver is None:
        return
    there = {canonical(path) for path in guest.files_of(guest.module_directory)}
    for name in LOADED_BY_NAME:
        if name not in there:
            yield Fault(what=f"the module {name} is not there", where=guest.module_directory,
                        cure="lay the driver's modules into the guest and run depmod")
    for path, words in _modprobe_lines(guest):
        command, subject = words[0], canonical(words[1]) if len(words) > 1 else ""
        if subject not in LOADED_BY_NAME:
            continue
        target = canonical(words[2]) if len(words) > 2 else ""
        if command == "alias" and target != subject:
            yield Fault(what=f"modprobe {words[1]} is mapped to {target}", where=path,
                        cure="remove this file (Debian's package nvidia-kernel-support brings it)")
        if command == "blacklist":
            yield Fault(what=f"{words[1]} is blacklisted: udev does not load it for a GPU",
                        where=path, cure="remove this line")
        if command == "install":
            yield Fault(what=f"modprobe {words[1]} runs a command instead: {' '.join(words[2:])}",
                        where=path, cure="remove this line")
