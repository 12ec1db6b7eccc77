"""Why a run of NVIDIA's installer failed: what its log says, and what that means for a recipe.

Texts are those of nvidia-installer 470 to 590 (its source), of the kernel's build and of gcc. A
table, searched from the top: what explains most stands first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """Classes of outcome."""

    INSTALLED = "installed"
    ERRORS = "errors"
    UNPROVEN = "unproven"
    OPTION = "unknown option"
    FLAVOUR = "flavour missing"
    PRIVILEGE = "not root"
    TOOL = "tool missing"
    HEADERS = "headers"
    TOOLCHAIN = "toolchain"
    SPACE = "no space"
    MEMORY = "no memory"
    KERNEL = "kernel too new"
    CONFIG = "kernel configuration"
    COMPILE = "compiler"
    LOADED = "module loaded"
    LOAD = "module not loadable"
    NOUVEAU = "nouveau"
    X_SERVER = "X server"
    ALTERNATE = "other driver"
    DKMS = "dkms"
    MODPROBE = "modprobe path"
    GLVND = "libglvnd"
    SYSTEMD = "systemd"
    READ_ONLY = "cannot write"
    PACKAGE = "package"
    ARCHIVE = "archive damaged"
    UNPACK = "not unpacked"
    SIGNAL = "signal"
    HANG = "hang"
    START = "not started"
    ABORTED = "aborted"
    UNKNOWN = "unknown"


PACKAGES = {"cc": "gcc", "make": "make", "ld": "binutils", "tr": "coreutils", "sed": "sed",
            "ldconfig": "libc-bin", "grep": "grep", "dmesg": "util-linux", "tail": "coreutils",
            "modprobe": "kmod", "rmmod": "kmod", "lsmod": "kmod", "depmod": "kmod"}
"""The Debian package of each program that nvidia-installer looks for."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A pattern of the log, and what it means.

    `what` and `cure` may name groups of the pattern, and {driver}, {kernel} and {flavour}. `mends`
    is true where the user can mend it without a change of driver or kernel. `first`: the pattern is
    for the compiler's first error alone, which makes the later ones.
    """

    kind: Kind
    pattern: re.Pattern[str]
    what: str
    cure: str
    mends: bool = True
    first: bool = False


def build_package(package: str) -> str:
    """How a recipe gets a package into the root in which the driver is built."""
    return (f"add {package} to rootfs.extra_packages in the recipe, or build with "
            f'EXTRA_PKGS="{package}"')


def _cause(kind: Kind, pattern: str, what: str, cure: str, *, mends: bool = True,
           first: bool = False) -> Cause:
    return Cause(kind=kind, pattern=re.compile(pattern, re.MULTILINE), what=what, cure=cure,
                 mends=mends, first=first)


HEADERS_CURE = ("the headers of the guest's kernel belong into /usr/src/linux-headers-{kernel}, "
                "with /lib/modules/{kernel}/build as a link to them: build the kernel again "
                "(./doitw build_kernel)")
NEWER = ("take a newer driver, an older kernel, or put a patch into patches/driver-{flavour}; "
         "docs/driver.md lists which branch builds for which kernel")
OURS = "that is a fault of katagpu: please report it with the log"
SPACE_CURE = ("free space where the store is (./doitw cache:gc), or set KATAGPU_STORE to a larger "
              "file system")

COMPILER_ERROR = re.compile(r"^.*?:\d+(?::\d+)?: (?:fatal )?error: .*$", re.MULTILINE)

CAUSES: tuple[Cause, ...] = (
    _cause(Kind.OPTION, r'unrecognized option: "(?P<option>[^"]*)"',
           "the installer does not know the option {option}", OURS, mends=False),
    _cause(Kind.FLAVOUR, r"kernel modules are not present in this installer package"
           r"|kernel module build directory '[^']*' is not present"
           r"|requires a kernel module type which is not present",
           "the package of driver {driver} has no {flavour} kernel modules",
           "set driver.kernel_module to the other flavour, or take another package"),
    _cause(Kind.PRIVILEGE, r"must be run as root", "the installer was not run as root", OURS,
           mends=False),
    _cause(Kind.PACKAGE, r"No package found for installation",
           "there is no .manifest beside the installer: the package was not unpacked whole",
           "remove the unpacked package and build again"),
    _cause(Kind.PACKAGE, r"Invalid \.manifest file; error on line (?P<line>\d+)",
           "line {line} of the package's .manifest is of a kind that its installer does not know",
           "the archive is damaged or was put together by hand: take the file from NVIDIA again"),
    _cause(Kind.TOOL, r"Unable to find the (?P<sort>development|module|system) "
           r"(?:tool|utility) `(?P<tool>[^`']+)[`']",
           "the program {tool} is not in the root in which the driver is installed",
           "{package}"),
    _cause(Kind.TOOL, r"You do not appear to have libc header files",
           "the C library's headers are not in the root in which the driver is built",
           build_package("libc6-dev")),
    _cause(Kind.HEADERS, r"Unable to find the kernel source tree",
           "there are no headers of kernel {kernel} in the root", HEADERS_CURE),
    _cause(Kind.HEADERS, r"The kernel (?P<sort>source|output) path '(?P<path>[^']*)' "
           r"(?:does not exist|is invalid)",
           "the kernel's {sort} directory {path} is not in the root", HEADERS_CURE),
    _cause(Kind.HEADERS, r"The kernel header file\s+'(?P<path>[^']*)' does not\s+exist",
           "the headers of kernel {kernel} are incomplete: {path} is missing", HEADERS_CURE),
    _cause(Kind.HEADERS, r"^ERROR: Neither the '[^']*' nor the '(?P<path>[^']*)'",
           "the headers of kernel {kernel} are of a tree that was never configured: {path} is "
           "missing", HEADERS_CURE),
    _cause(Kind.SPACE, r"(?P<path>\S+): No space left on device"
           r"|[Nn]o space left on device",
           "there was no space left, on the disk or in /tmp of the root (which is memory)",
           SPACE_CURE + "; or give the machine more memory"),
    _cause(Kind.MEMORY, r"Killed signal terminated program|virtual memory exhausted"
           r"|Cannot allocate memory|out of memory allocating",
           "the machine had no memory left while the modules were built",
           "give it more memory, or fewer jobs at once"),
    _cause(Kind.TOOLCHAIN, r"cannot open (?P<path>\S*conftest\.sh)"
           r"|(?P<path2>\S*conftest\.sh): No such file",
           "the directory of the {flavour} kernel modules is not in the package",
           "the package lacks this flavour, or was not unpacked whole"),
    _cause(Kind.TOOLCHAIN, r"missing binary operator before token",
           "the compiler's tests broke: /dev/null in the root is not the device", OURS,
           mends=False),
    _cause(Kind.CONFIG, r"The (?P<check>PREEMPT_RT|Xen|Dom0|vgpu_kvm) sanity check failed",
           "the driver refuses the kernel's configuration ({check})",
           "change the kernel's fragments (recipe: kernel.fragments)"),
    _cause(Kind.TOOLCHAIN, r"The (?:CC|Compiler) sanity check failed",
           "the compiler in the root does not work",
           "gcc needs libc6-dev and binutils: add them to rootfs.extra_packages"),
    _cause(Kind.TOOLCHAIN, r"(?:unrecognized|unknown) (?:command[- ]line option|argument)"
           r"\W+(?P<flag>-[\w=,+-]+)",
           "the compiler does not know {flag}, with which the kernel was built: it is another "
           "or an older one than the kernel's",
           "build with the compiler of the guest's own suite, as the kernel is: take other "
           "compilers out of EXTRA_PKGS"),
    _cause(Kind.KERNEL, r"(?P<line>^.*error: .*pci_resize_resource.*$)",
           "driver {driver} is too old for kernel {kernel}: pci_resize_resource() has another "
           "argument since 6.19, and in later releases of older series", NEWER, mends=False),
    _cause(Kind.KERNEL, r"GPL-incompatible module (?P<module>\S+) uses GPL-only symbol "
           r"'(?P<symbol>[^']+)'",
           "the closed {module} would use {symbol}, which kernel {kernel} gives to GPL modules "
           "only", "take driver.kernel_module: open, or " + NEWER, mends=False),
    _cause(Kind.CONFIG, r'(?:ERROR: modpost: |ERROR: )"?(?P<symbol>\w+)"? \[.*\] undefined!',
           "kernel {kernel} does not export {symbol}, which the driver needs",
           "turn on what exports it in the kernel's fragments (graphics and display need the "
           "feature drm)"),
    _cause(Kind.HEADERS, r"fatal error: (?P<header>\S+): No such file or directory",
           "the driver wants {header}, and the headers of kernel {kernel} have it not",
           "a headers package that is incomplete: build the kernel again (./doitw build_kernel); "
           "or a driver for older kernels: " + NEWER, mends=False, first=True),
    _cause(Kind.KERNEL, r"(?P<line>.*error: (?:too (?:few|many) arguments to function"
           r"|implicit declaration of function|.*has no member named|.*undeclared"
           r"|incompatible types|passing argument|initialization of|unknown type name"
           r"|redefinition of|conflicting types|assignment |expected ).*)",
           "driver {driver} does not compile against kernel {kernel}: {line}",
           NEWER, mends=False, first=True),
    _cause(Kind.COMPILE, r"(?P<line>.*error: .*)", "the compiler failed: {line}", NEWER,
           mends=False, first=True),
    _cause(Kind.COMPILE, r"^ERROR: The (?P<module>\S+) kernel module was not created",
           "the kernel module {module} was not built, and no compiler error says why", NEWER,
           mends=False),
    _cause(Kind.LOAD, r"Unable to load the kernel module '(?P<module>[^']+)'",
           "the installer tried to load {module} into the build host's kernel",
           "it does so where the host runs a kernel of the guest's release: leave the modules to "
           "katagpu (no modules_by: installer), or take a driver of branch 550 or later"),
    _cause(Kind.LOADED, r"An NVIDIA kernel module '(?P<module>[^']+)' appears to (?:be already|"
           r"already be) loaded",
           "the installer sees {module} loaded in the build host's kernel, and tried to unload it",
           "the sandbox hides /proc/modules, so " + OURS, mends=False),
    _cause(Kind.NOUVEAU, r"The Nouveau kernel driver is currently in use",
           "the installer sees nouveau on a GPU of the build host",
           "the sandbox hides /sys/bus/pci, so " + OURS, mends=False),
    _cause(Kind.X_SERVER, r"You appear to be running an X server",
           "the installer sees a lock file of an X server in /tmp of the root",
           "the sandbox has a /tmp of its own, so " + OURS, mends=False),
    _cause(Kind.ALTERNATE, r"The installation was canceled due to the availability",
           "another driver is in the root: /usr/lib/nvidia/alternate-install-present",
           "take the distribution's NVIDIA packages out of rootfs.packages and extra_packages"),
    _cause(Kind.DKMS, r"DKMS kernel modules with version (?P<version>\S+) are already installed",
           "dkms in the root has this driver already",
           "take dkms and nvidia-*-dkms out of rootfs.extra_packages"),
    _cause(Kind.MODPROBE, r"The path to the `modprobe` utility reported by '[^']*', "
           r"`(?P<path>[^`]*)`[^\n]*does not appear|`/sbin/modprobe` does not appear",
           "the build host's kernel.modprobe names a program that is not in the root",
           "set it to a path that exists in both: sudo sysctl kernel.modprobe=/sbin/modprobe"),
    _cause(Kind.GLVND, r"An incomplete installation of libglvnd was found",
           "the root has a part of libglvnd",
           "put all of it into rootfs.packages (libglvnd0, libglx0, libegl1, libgl1, libgles2), "
           "or none"),
    _cause(Kind.PACKAGE, r"Unable to open '(?P<file>[^']+)' for copying",
           "the package lacks {file}, which its manifest lists",
           "remove the unpacked package and build again; else take the file from NVIDIA again"),
    _cause(Kind.SYSTEMD, r"Failed to execute `[^`]*systemctl daemon-reload`",
           "systemd does not run in the root, and the installer called it",
           "the option --no-systemd is not listed by this installer: " + OURS, mends=False),
    _cause(Kind.READ_ONLY, r"(?P<reason>Unable to create '[^']*' for copying \([^)]*\))"
           r"|Cannot install (?P<path>\S+)",
           "the installer could not write into the root", "is the disk full or read-only?"),
)


def find(text: str, facts: dict[str, str]) -> tuple[Cause, str, str] | None:
    """The first cause that the text shows, with its sentence and cure filled in."""
    compiler = COMPILER_ERROR.search(text)
    for cause in CAUSES:
        match = cause.pattern.search((compiler[0] if compiler else "") if cause.first else text)
        if match is not None:
            words = {**facts, **{name: (value or "").strip()
                                 for name, value in match.groupdict().items()}}
            words["package"] = _package(words)
            return cause, cause.what.format(**words), cause.cure.format(**words)
    return None


def _package(words: dict[str, str]) -> str:
    tool = words.get("tool", "")
    package = PACKAGES.get(tool, tool)
    if words.get("sort") == "development":
        return build_package(package)
    return (f"the base root has {package} in every recipe of katagpu; "
            f"{build_package(package)} where it was left out")
