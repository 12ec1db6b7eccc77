"""Checks that modules, user space and firmware are of the one driver that the recipe asks for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from katagpu.check.context import Guest
from katagpu.check.facts import Capability, Fault, Flavour, Severity

# Three digits and more before the first dot: libnvidia-container.so.1.17.8 and
# libnvidia-egl-wayland.so.1.1.13 have versions of their own.
VERSIONED = re.compile(r"/lib(?:cuda|cudadebugger|nvcuvid|nvoptix|(?:GLX|EGL|GLES\w*)_nvidia|"
                       r"vdpau_nvidia|nvidia-[\w-]+)\.so\.(\d{3,}\.\d+(?:\.\d+)*)$")
LICENSES = {Flavour.OPEN: "Dual MIT/GPL", Flavour.CLOSED: "NVIDIA"}
FIRMWARE = ("gsp_ga10x.bin", "gsp_tu10x.bin")
RIVALS = {"nouveau": "DRM_NOUVEAU", "nova_core": "NOVA_CORE", "nvidiafb": "FB_NVIDIA"}


def versions(guest: Guest) -> Iterator[Fault]:
    """Modules and user space have the recipe's version: the driver refuses any other pair."""
    driver = guest.facts.driver
    if driver is None:
        return
    for module in guest.driver_modules:
        if module.fact("version") != driver.version:
            yield Fault(what=f"is of driver {module.fact('version') or '(none)'}, the recipe's is "
                             f"{driver.version}", where=module.path,
                        cure=f"build the modules from the source of {driver.version}")
    others: defaultdict[str, list[str]] = defaultdict(list)
    for path in guest.root.files:
        match = VERSIONED.search(path)
        # CUDA's forward compatibility libraries are of a newer driver on purpose.
        if match is not None and match[1] != driver.version and "/compat/" not in path:
            others[match[1]].append(path)
    for version, paths in others.items():
        yield Fault(what=f"{len(paths)} libraries are of driver {version}, the recipe's is "
                         f"{driver.version}", where=paths[0],
                    cure=f"take all of user space from driver {driver.version}")


def flavour(guest: Guest) -> Iterator[Fault]:
    """The modules are of the flavour that the recipe asks for, told by their license."""
    driver = guest.facts.driver
    module = guest.by_name.get("nvidia")
    if driver is not None and module is not None:
        wanted = LICENSES[driver.flavour]
        if module.fact("license") != wanted:
            yield Fault(what=f"has the license '{module.fact('license')}'; the {driver.flavour} "
                             f"flavour has '{wanted}'", where=module.path,
                        cure=f"build the {driver.flavour} flavour")


def firmware(guest: Guest) -> Iterator[Fault]:
    """The GSP firmware of this driver version is there.

    The open modules start no GPU without it. The closed ones ask for it only where the GPU's
    system processor is used, which depends on the GPU that is passed through one day: there a
    missing one is a warning.
    """
    driver = guest.facts.driver
    if driver is None:
        return
    place = guest.driver_path("/lib/firmware/nvidia")
    directory = f"{place}/{driver.version}"
    severity = Severity.ERROR if driver.flavour is Flavour.OPEN else Severity.WARNING
    for name in FIRMWARE:
        if not guest.root.is_file(f"{directory}/{name}"):
            others = [version for version in guest.root.names(place)
                      if version != driver.version and guest.root.is_file(
                          f"{place}/{version}/{name}")]
            cure = (f"the firmware there is of {', '.join(others)}: take that of {driver.version}"
                    if others else "add the driver's GSP firmware (Debian: firmware-nvidia-gsp)")
            yield Fault(what=f"the {driver.flavour} modules want this firmware",
                        where=f"{directory}/{name}", cure=cure, severity=severity)


def rivals(guest: Guest) -> Iterator[Fault]:
    """No other driver can take the GPU first: nouveau and its kin are not there at all."""
    if guest.facts.driver is None:
        return
    for name, symbol in RIVALS.items():
        cure = f"disable CONFIG_{symbol} in the kernel's fragments"
        module = guest.by_name.get(name)
        if module is not None:
            yield Fault(what=f"the module {name} would take the GPU", where=module.path, cure=cure)
        if name in guest.builtin:
            yield Fault(what=f"{name} is built into the kernel and would take the GPU",
                        where=f"{guest.module_directory}/modules.builtin", cure=cure)
        elif guest.config.get(symbol) == "y":
            yield Fault(what=f"the kernel's configuration has CONFIG_{symbol}=y, which would take "
                             "the GPU", where="kernel config", cure=cure)


def graphics_module(guest: Guest) -> Iterator[Fault]:
    """The capability 'graphics' has nvidia-modeset, through which its libraries reach the GPU."""
    driver = guest.facts.driver
    if driver is not None and Capability.GRAPHICS in driver.capabilities \
            and "nvidia_modeset" not in guest.by_name:
        yield Fault(what="the module nvidia_modeset is not there", where=guest.module_directory,
                    cure="build the driver with nvidia-modeset, or drop the capability 'graphics'")
