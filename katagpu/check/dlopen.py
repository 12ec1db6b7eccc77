"""Checks for libraries that nothing needs by name in its ELF header: they are only dlopened.

Each row was read from the strings of the library that loads it (driver 550.163.01), the
capability it belongs to from libnvidia-container's nvc_info.c. A missing one is noticed by a
container, at run time: a PTX kernel that does not compile, an nvidia-smi that finds no NVML.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from katagpu.check.context import Guest
from katagpu.check.facts import Capability, Driver, Fault


@dataclass(frozen=True, kw_only=True)
class Dlopened:
    """A library by the name under which it is dlopened, who does that, and since which branch.

    `loader` is a guest path where the row holds only if that program is there.
    """

    name: str
    capability: Capability
    by: str
    since: int = 0
    loader: str | None = None


COMPUTE, UTILITY = Capability.COMPUTE, Capability.UTILITY
VIDEO, GRAPHICS = Capability.VIDEO, Capability.GRAPHICS

DLOPENED = (
    Dlopened(name="libcuda.so.1", capability=COMPUTE, by="every CUDA program"),
    Dlopened(name="libnvidia-nvvm.so.4", capability=COMPUTE, by="libcuda.so.1", since=470),
    Dlopened(name="libnvidia-ptxjitcompiler.so.1", capability=COMPUTE, by="libcuda.so.1"),
    Dlopened(name="libnvidia-pkcs11-openssl3.so.{version}", capability=COMPUTE, by="libcuda.so.1",
             since=535),
    Dlopened(name="libnvidia-ml.so.1", capability=UTILITY, by="nvidia-smi and nvidia-ctk"),
    Dlopened(name="libnvidia-cfg.so.1", capability=UTILITY, by="nvidia-persistenced",
             loader="/usr/bin/nvidia-persistenced"),
    Dlopened(name="libnvcuvid.so.1", capability=VIDEO, by="video decoders"),
    Dlopened(name="libnvidia-encode.so.1", capability=VIDEO, by="video encoders"),
    Dlopened(name="libnvidia-opticalflow.so.1", capability=VIDEO, by="programs for optical flow"),
    Dlopened(name="libGLX_nvidia.so.0", capability=GRAPHICS, by="libGLX and the Vulkan loader"),
    Dlopened(name="libEGL_nvidia.so.0", capability=GRAPHICS, by="libEGL"),
    Dlopened(name="libnvidia-eglcore.so.{version}", capability=GRAPHICS, by="libEGL_nvidia.so.0"),
    Dlopened(name="libnvidia-glvkspirv.so.{version}", capability=GRAPHICS,
             by="libnvidia-glcore and libnvidia-eglcore"),
    Dlopened(name="libnvidia-rtcore.so.{version}", capability=GRAPHICS,
             by="libnvidia-glcore and libnvidia-eglcore"),
)
PROGRAMS = ((UTILITY, "/usr/bin/nvidia-smi"),)


def driver_libraries(guest: Guest) -> Iterator[Fault]:
    """Each dlopened library of the recipe's capabilities is there, and is the driver's own."""
    driver = guest.facts.driver
    if driver is None:
        return
    for row in DLOPENED:
        branch = int(driver.version.partition(".")[0])
        skipped = row.loader is not None and \
            guest.root.resolve(guest.driver_path(row.loader)) is None
        if row.capability in driver.capabilities and branch >= row.since and not skipped:
            yield from _dlopened(guest, driver, row)


def _dlopened(guest: Guest, driver: Driver, row: Dlopened) -> Iterator[Fault]:
    name = row.name.format(version=driver.version)
    library = guest.linker.find(name)
    where = guest.driver_path(f"/usr/lib/x86_64-linux-gnu/{name}")
    if library is None:
        directory = guest.linker.uncached(name)
        cure = (f"it is in {directory}: run ldconfig in the guest" if directory is not None else
                f"add it to the driver's packages or harvest it from the .run; {row.by} loads it "
                "without any package saying so")
        yield Fault(what=f"{name} is missing; {row.by} opens it for the capability "
                         f"'{row.capability}'", where=where, cure=cure)
        return
    if library.soname != name:
        yield Fault(what=f"it is opened as {name}, and calls itself {library.soname}",
                    where=library.path,
                    cure="a wrong link stands under this name: let it point to the library of "
                         f"driver {driver.version}")
    if not library.path.endswith(f".so.{driver.version}"):
        yield Fault(what=f"{name} leads to {library.path}, which is not of driver "
                         f"{driver.version}", where=library.path,
                    cure=f"let {name} point to the file of driver {driver.version}, and remove the "
                         "other one")


def programs(guest: Guest) -> Iterator[Fault]:
    """The programs of the recipe's capabilities are there and may be executed."""
    if guest.facts.driver is None:
        return
    for capability, program in PROGRAMS:
        path = guest.driver_path(program)
        if capability in guest.facts.driver.capabilities and not guest.root.is_program(path):
            yield Fault(what=f"the capability '{capability}' wants this program", where=path,
                        cure="add it to the driver's packages or harvest it from the .run")


def vendor_files(guest: Guest) -> Iterator[Fault]:
    """Each library that an OpenCL, EGL or Vulkan vendor file names is there."""
    for path in guest.root.below(guest.driver_path("/etc/OpenCL/vendors")):
        yield from _named(guest, path, guest.root.text(path).strip())
    for directory in ("/usr/share/glvnd/egl_vendor.d", "/usr/share/vulkan/icd.d",
                      "/etc/vulkan/icd.d"):
        for path in guest.root.below(guest.driver_path(directory)):
            try:
                name = json.loads(guest.root.text(path))["ICD"]["library_path"]
            except (ValueError, KeyError, TypeError):
                yield Fault(what="this vendor file names no library", where=path,
                            cure="take the file from the driver's package again")
                continue
            yield from _named(guest, path, str(name))


def _named(guest: Guest, path: str, library: str) -> Iterator[Fault]:
    if library and guest.linker.find(library) is None:
        yield Fault(what=f"it names {library}, which is not in the guest", where=path,
                    cure=f"add the library {library}, or leave this vendor file out")
