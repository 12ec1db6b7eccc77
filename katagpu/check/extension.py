"""Checks of a guest whose driver is on a disk of its own (`image: {model: extension}`).

Names and paths are those of Kata's agent: src/agent/kata-extension-mount.sh, its unit and its
generator.
"""

from __future__ import annotations

from collections.abc import Iterator

from katagpu.check.context import Guest
from katagpu.check.driver import VERSIONED
from katagpu.check.facts import Fault

UNITS = "/usr/lib/systemd/system"
UNIT = f"{UNITS}/kata-extension-mount@.service"
PROGRAMS = {
    "/usr/lib/systemd/system-generators/kata-extension-mount-generator": "lay it into the base",
    "/usr/libexec/kata-extension-mount.sh": "lay it into the base",
    "/usr/libexec/kata-extension-umount.sh": "lay it into the base",
    "/usr/sbin/veritysetup": "add the package cryptsetup-bin",
}
FIRMWARE = "/lib/firmware/nvidia"
SYMBOLS = ("BLK_DEV_DM", "DM_VERITY", "EROFS_FS")
OF_DRIVER = ("nvidia-smi", "nvidia-persistenced", "nvidia-ctk", "nvidia-cdi-hook")


def mounting(guest: Guest) -> Iterator[Fault]:
    """The base mounts the driver's disk: Kata's unit, what it runs, and the kernel's part."""
    if guest.facts.extension is None:
        return
    if not guest.root.is_file(UNIT):
        yield Fault(what="the unit that mounts extensions is not there", where=UNIT,
                    cure="lay it into the base")
    for path, cure in PROGRAMS.items():
        if not guest.root.is_program(path):
            yield Fault(what="extensions are mounted with this program, and it is not there",
                        where=path, cure=cure)
    if not guest.root.is_dir(FIRMWARE):
        yield Fault(what="the mount point for the driver's firmware is not there", where=FIRMWARE,
                    cure="make this directory: the root is read-only when it boots")
    for symbol in SYMBOLS:
        if guest.config.get(symbol) != "y":
            yield Fault(what=f"CONFIG_{symbol} is {guest.config.get(symbol, 'not set')}: the "
                             "driver's disk cannot be opened", where="kernel config",
                        cure=f"ask for CONFIG_{symbol}=y in a fragment")


def no_driver(guest: Guest) -> Iterator[Fault]:
    """Nothing of a driver is in the base, which serves all drivers."""
    if guest.facts.extension is None:
        return
    inside = f"{guest.facts.extension}/"
    found = [module.path for module in guest.driver_modules]
    found += [path for path in guest.root.files if VERSIONED.search(path)]
    found += guest.root.below(FIRMWARE)
    found += [f"/usr/bin/{name}" for name in OF_DRIVER if guest.root.is_program(f"/usr/bin/{name}")]
    for path in dict.fromkeys(found):
        if not path.startswith(inside):
            yield Fault(what="this belongs to a driver, and the base is for all drivers",
                        where=path, cure="leave it to the extension")


def libraries(guest: Guest) -> Iterator[Fault]:
    """Every library of the driver's disk lies in its one directory, under its SONAME too.

    nvidia-ctk takes what lies beside libcuda.so, and repeats links without making any: where
    libcuda.so.1 is not there, a container loads an older one of its own, and CUDA says that the
    driver's version is insufficient.
    """
    if guest.extension is None:
        return
    (place,) = guest.linker.library_path()
    for path, binary in guest.linker.binaries.items():
        if binary.soname is None or not path.startswith(f"{guest.extension}/"):
            continue
        directory = path.rpartition("/")[0]
        if directory not in (place, f"{place}/vdpau"):
            yield Fault(what=f"it is not in {place}, so containers do not get it", where=path,
                        cure="put it there")
        elif guest.root.resolve(f"{directory}/{binary.soname}") is None:
            yield Fault(what=f"its name for programs, {binary.soname}, is not there", where=path,
                        cure="run ldconfig -n on its directory")
