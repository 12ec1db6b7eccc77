"""Checks of depmod's files and of modprobe's configuration: does `modprobe nvidia` find nvidia?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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


def _modules_dep(guest: Guest) -> Mapping[str, frozenset[str]]:
    """modules.dep: path below the module directory to all that must be loaded with it."""
    pairs = (line.partition(":") for line in
             guest.root.text(f"{guest.module_directory}/modules.dep").splitlines())
    return {path: frozenset(needs.split()) for path, colon, needs in pairs if colon}


def complete(guest: Guest) -> Iterator[Fault]:
    """modules.dep lists every module file, and every file it lists is there."""
    directory = guest.module_directory
    where = f"{directory}/modules.dep"
    if not guest.module_files:
        return
    if guest.root.read(where) is None:
        yield Fault(what="depmod's list of modules is not there", where=where, cure=DEPMOD)
        return
    real = guest.root.resolve(directory)
    there = {path.removeprefix(f"{real}/") for path in guest.module_files}
    listed = set(_modules_dep(guest))
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
    where = f"{guest.module_directory}/modules.dep"
    for path, listed in _modules_dep(guest).items():
        wanted = _all_depends(guest, canonical(path))
        found = {canonical(name) for name in listed}
        if canonical(path) in guest.by_name and wanted != found:
            lacking, extra = sorted(wanted - found), sorted(found - wanted)
            yield Fault(what=f"{path}: " + "; ".join(
                            f"{word} {', '.join(names)}" for word, names in
                            (("lacks", lacking), ("does not need", extra)) if names),
                        where=where, cure=DEPMOD)


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
    if not guest.module_files:
        return
    dep = {canonical(path) for path in _modules_dep(guest)}
    aliases = set(_alias_names(guest))
    for name, wanted in (("modules.dep.bin", dep), ("modules.alias.bin", aliases)):
        where = f"{guest.module_directory}/{name}"
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


def _alias_names(guest: Guest) -> Iterator[str]:
    for line in guest.root.text(f"{guest.module_directory}/modules.alias").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "alias":
            yield words[1].replace("-", "_")


def aliases(guest: Guest) -> Iterator[Fault]:
    """modules.alias has every alias of every module: by them udev loads the driver for a GPU."""
    if not guest.module_files:
        return
    listed = set(_alias_names(guest))
    for module in guest.modules:
        lacking = [alias for alias in module.info.get("alias", ())
                   if alias.replace("-", "_") not in listed]
        if lacking:
            yield Fault(what=f"lacks {len(lacking)} aliases of {module.name}, {lacking[0]} among "
                             "them", where=f"{guest.module_directory}/modules.alias", cure=DEPMOD)


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
    for name in LOADED_BY_NAME:
        if name not in guest.by_name:
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
