"""Checks that each kernel module in the guest can be loaded by this kernel, and by no guess."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from katagpu import provenance
from katagpu.check.context import Guest
from katagpu.check.facts import Fault, Severity
from katagpu.check.kmod import Module, canonical

REBUILD = "build the module against the headers of this kernel's own build"
EXAMPLES = 4
# Written into the module directory by the stage that installs the modules.
BUILD_ID_RECORD = "kernel-build-id"


def readable(guest: Guest) -> Iterator[Fault]:
    """Every module file is a relocatable ELF object for x86-64 with a .modinfo."""
    _ = guest.modules
    for path, reason in guest.damaged_modules.items():
        yield Fault(what=f"this kernel module cannot be read: {reason}", where=path,
                    cure="build or fetch this module again")
    if not guest.modules and guest.config.get("MODULES") == "y" and guest.facts.driver is not None:
        yield Fault(what="there is no kernel module at all", where=guest.module_directory,
                    cure=f"lay the modules of {guest.facts.kernel_release} into the guest")


def other_kernels(guest: Guest) -> Iterator[Fault]:
    """Only this kernel's modules are in the guest: others are dead weight, or a mix-up."""
    for directory in guest.module_directories:
        parent = directory.rpartition("/")[0]
        for name in guest.root.names(parent):
            if name != guest.facts.kernel_release:
                yield Fault(what=f"modules of another kernel; the guest boots "
                                 f"{guest.facts.kernel_release}", where=f"{parent}/{name}",
                            cure="leave this directory out of the guest",
                            severity=Severity.WARNING)


def vermagic(guest: Guest) -> Iterator[Fault]:
    """The release and the build options in each module's vermagic are this kernel's."""
    wanted = _vermagic_words(guest)
    seeds: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for module in guest.modules:
        release, *words = module.fact("vermagic").split() or [""]
        seeds[tuple(word for word in words if word.startswith("RANDSTRUCT_"))].append(module.path)
        words = [word for word in words if not word.startswith("RANDSTRUCT_")]
        if release != guest.facts.kernel_release:
            yield Fault(what=f"built for kernel {release or '(none)'}, the guest boots "
                             f"{guest.facts.kernel_release}", where=module.path, cure=REBUILD)
        elif words != wanted:
            yield Fault(what=f"vermagic says '{' '.join(words)}', this kernel's configuration "
                             f"gives '{' '.join(wanted)}'", where=module.path, cure=REBUILD)
    if len(seeds) > 1:
        odd = min(seeds.values(), key=len)
        yield Fault(what="this module was laid out with another RANDSTRUCT seed than the rest",
                    where=odd[0], cure=REBUILD)


def _vermagic_words(guest: Guest) -> list[str]:
    """VERMAGIC_STRING of include/linux/vermagic.h without release and RANDSTRUCT seed, for x86."""
    rows = (("SMP", "SMP"), ("PREEMPT_RT", "preempt_rt"), ("PREEMPT_BUILD", "preempt"),
            ("MODULE_UNLOAD", "mod_unload"), ("MODVERSIONS", "modversions"))
    words = [word for symbol, word in rows if guest.config.get(symbol) == "y"]
    return [word for word in words if not (word == "preempt" and "preempt_rt" in words)]


def symbol_versions(guest: Guest) -> Iterator[Fault]:
    """Each CRC a module carries is that of this kernel or of the module that exports the symbol.

    The release alone does not tell: any change of a fragment keeps it.
    """
    if guest.config.get("MODVERSIONS") != "y":
        return
    for module in guest.modules:
        if module.versions is None:
            yield Fault(what="it has no symbol versions, and this kernel (MODVERSIONS) refuses it",
                        where=module.path, cure=REBUILD)
            continue
        wrong = [name for name, crc in module.versions.items()
                 if (export := guest.exports.get(name)) is not None
                 and export.crc is not None and export.crc != crc]
        if wrong:
            yield Fault(what=f"disagrees with this kernel about {_some(wrong)}: it was built "
                             "against another build or configuration", where=module.path,
                        cure=REBUILD)
        unversioned = module.undefined - module.versions.keys()
        if unversioned:
            yield Fault(what=f"has no version for {_some(sorted(unversioned))}",
                        where=module.path, cure=REBUILD)


def build_id(guest: Guest) -> Iterator[Fault]:
    """The build id recorded beside the kernel's own modules is that of this kernel.

    Without MODVERSIONS it is the only thing that binds them to one build of the kernel.
    """
    for directory in guest.module_directories:
        yield from _build_id(guest, directory)


def _build_id(guest: Guest, directory: str) -> Iterator[Fault]:
    record = f"{directory}/{BUILD_ID_RECORD}"
    recorded = guest.root.text(record).strip()
    if guest.facts.kernel_build_id is not None and recorded:
        if recorded != guest.facts.kernel_build_id:
            yield Fault(what=f"the modules are of the kernel with build id {recorded}, the guest "
                             f"boots {guest.facts.kernel_build_id}", where=record,
                        cure="take kernel and modules from the same build")
    elif guest.config.get("MODVERSIONS") != "y" and guest.files_of(directory):
        lack = "the modules carry no build id" if not recorded else "vmlinux has no build id"
        yield Fault(what=f"{lack} and this kernel has no MODVERSIONS, so nothing shows that they "
                         "belong together", where=record,
                    cure="enable MODVERSIONS, or record vmlinux's build id when the modules are "
                         "installed")


def headers(guest: Guest) -> Iterator[Fault]:
    """The driver's modules were compiled against the configuration and exports of this kernel.

    The build id comes with the kernel's own modules, and would be the same beside any driver.
    """
    if not guest.driver_modules:
        return
    where = f"{guest.module_directory}/{provenance.RECORD}"
    recorded = provenance.read(guest.root.text(where))
    wanted = provenance.read(provenance.of(guest.facts.kernel_config, guest.facts.symvers))
    if not recorded and guest.config.get("MODVERSIONS") != "y":
        yield Fault(what="nothing says which headers the driver's modules were compiled against, "
                         "and this kernel has no MODVERSIONS to tell", where=where,
                    cure="record the digests of the headers' settings and Module.symvers when the "
                         "modules are installed")
    for name, what in ((provenance.SETTINGS, "configuration"),
                       (provenance.SYMVERS, provenance.SYMVERS)):
        if recorded and recorded.get(name) != wanted[name]:
            yield Fault(what=f"the driver's modules were compiled against another {what} than "
                             "this kernel's", where=where, cure=REBUILD)


def symbols(guest: Guest) -> Iterator[Fault]:
    """Every symbol a module uses is exported by the kernel or a module in the guest, and to it."""
    for module in guest.modules:
        lacking = sorted(module.undefined - guest.exports.keys())
        owners = sorted({guest.symvers[name].owner for name in lacking if name in guest.symvers})
        if lacking:
            cure = (f"bring the kernel's module {', '.join(owners)} into the guest, or build it "
                    "into the kernel" if owners else REBUILD)
            yield Fault(what=f"uses {_some(lacking)}, which nothing in the guest exports",
                        where=module.path, cure=cure)
        if not module.fact("license"):
            yield Fault(what="states no license", where=module.path, cure=REBUILD)
        elif not _gpl_compatible(module):
            barred = sorted(name for name in module.undefined
                            if name in guest.exports and guest.exports[name].gpl_only)
            if barred:
                yield Fault(what=f"has the license '{module.fact('license')}' and uses "
                                 f"{_some(barred)}, exported to GPL modules only",
                            where=module.path,
                            cure="use the open flavour, or a driver that fits this kernel")


def _gpl_compatible(module: Module) -> bool:
    # license_is_gpl_compatible() of include/linux/license.h
    return module.fact("license") in ("GPL", "GPL v2", "GPL and additional rights",
                                      "Dual BSD/GPL", "Dual MIT/GPL", "Dual MPL/GPL")


def names(guest: Guest) -> Iterator[Fault]:
    """A module's own name is its file's, and no two files have the same one."""
    paths: defaultdict[str, list[str]] = defaultdict(list)
    for module in guest.modules:
        paths[module.name].append(module.path)
        own = module.fact("name")
        if own and canonical(own) != module.name:
            yield Fault(what=f"calls itself {own}: modprobe knows it by its file's name, the "
                             "kernel by its own", where=module.path,
                        cure=f"install it as {own}.ko")
    for name, files in paths.items():
        if len(files) > 1:
            yield Fault(what=f"the module {name} is there {len(files)} times; depmod picks one: "
                             f"{', '.join(files[1:])}", where=files[0],
                        cure="keep one of them and run depmod again")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more
