"""What NVIDIA's installer is asked to do, in the options that this very installer has.

Option names differ between branches, and an unknown one ends the installer at once. So the
installer is asked first (`--advanced-options`), and nothing that it does not list is ever passed.

Facts: `option_table.h`, `nvidia-installer.c`, `install-from-cwd.c`, `files.c` (`get_compat32_path`)
and `kernel.c` of NVIDIA's nvidia-installer at the tags 470.42.01 to 590.48.01, and runs of 550.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

from katagpu import nvbranches
from katagpu.drivermanifest import XORG, Layout
from katagpu.errors import StepError, UserError
from katagpu.schema import KernelModule

PROGRAM = "./nvidia-installer"
HELP = (PROGRAM, "--advanced-options")
"""Prints every option; works without root and without special file systems."""

LOG = "/var/log/nvidia-installer.log"
MOST_JOBS = 32  # nvidia-installer's own bound
# Options stand two columns in, descriptions six (common-utils.h, TAB and BIGTAB). On a terminal
# long lines are broken at spaces, and go on two columns in.
_OPTION_LINE = re.compile(r"^ {2}(-\S.*)$", re.MULTILINE)
_OPTION = re.compile(r"(--?[A-Za-z0-9][A-Za-z0-9-]*)(?:[ =]\S+)?")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run of the installer is for.

    `release` is the guest kernel's, `flavours` what the package's manifest has, `builds` whether
    the installer compiles the modules itself. `opengl`, `display` (modules of the X server),
    `wine` and `compat32`: files of this kind ship. `host_release` is the running kernel's.
    """

    version: str
    release: str
    flavour: KernelModule
    flavours: frozenset[str]
    builds: bool = False
    drm: bool = False
    opengl: bool = False
    display: bool = False
    wine: bool = False
    compat32: bool = False
    jobs: int = 1
    log: str = LOG
    host_release: str | None = None


def _always(_: Request) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Want:
    """One thing that is wanted of the installer: the first spelling that it lists is passed.

    `reason` says what happens without the wish, `since` when the spellings came. `without` is why
    an installer that has none of them does no harm; None: it does, and the run is refused.
    """

    spellings: tuple[str, ...]
    reason: str
    since: str
    without: str | None = None
    when: Callable[[Request], bool] = _always


OLD = "all of 470 to 590"
WANTED: tuple[Want, ...] = (
    Want(spellings=("--silent",), since=OLD,
         reason="no questions: each takes its default answer, and the log names it"),
    Want(spellings=("--kernel-name={release}",), since=OLD,
         reason="else it works for the build host's kernel; it also switches off precompiled "
                "interfaces, and loading of the modules unless the host runs this release"),
    Want(spellings=("--log-file-name={log}",), since=OLD,
         reason="the log is the only proof of what was done"),
    Want(spellings=("--no-kernel-modules", "--no-kernel-module"), when=lambda r: not r.builds,
         since="470; with -s at the end since 515, the old one is hidden then",
         reason="the modules are built before, by make itself; it also skips the search for "
                "loaded modules, with its rmmod on the build host"),
    Want(spellings=("--kernel-module-type=open", "--kernel-module-build-directory=kernel-open"),
         when=lambda r: r.builds and r.flavour is KernelModule.OPEN, since="555.42; 470.42",
         reason="a machine without a GPU gets the closed modules by default"),
    Want(spellings=("--kernel-module-type={type}",), since="555.42",
         when=lambda r: not r.builds or r.flavour is KernelModule.CLOSED,
         reason="else the flavour depends on the build host's GPUs, and a package with one "
                "flavour may be called unfit",
         without="before 555 the flavour matters only where it builds modules, and closed is "
                 "its default"),
    Want(spellings=("--concurrency-level={jobs}",), since=OLD, when=lambda r: r.builds,
         reason="as many jobs as this build may use",
         without="it takes the number of processors, at most 32"),
    Want(spellings=("--skip-module-load",), since="550.40", when=lambda r: r.builds,
         reason="the modules are for another machine",
         without="a kernel name other than the running one means the same"),
    Want(spellings=("--no-drm",), since=OLD, when=lambda r: r.builds and not r.drm,
         reason="nvidia-drm needs the kernel's DRM, which a headless guest has not",
         without="it is built where the kernel allows"),
    Want(spellings=("--no-peermem",), since="470.86", when=lambda r: r.builds,
         reason="nvidia-peermem needs InfiniBand's core", without="the package has no such module"),
    Want(spellings=("--no-opengl-files",), since=OLD, when=lambda r: not r.opengl,
         reason="about 300 MB that no capability of the recipe asks for",
         without="what is not asked for is left behind in the harvest"),
    Want(spellings=("--x-module-path={xorg}",), since=OLD, when=lambda r: r.display,
         reason="without an X server in the root it guesses /usr/lib64/xorg/modules"),
    Want(spellings=("--no-wine-files",), since=OLD, when=lambda r: not r.wine,
         reason="Windows libraries for Proton",
         without="what is not asked for is left behind in the harvest"),
    Want(spellings=("--no-install-compat32-libs",), since=OLD, when=lambda r: not r.compat32,
         reason="32-bit libraries",
         without="what is not asked for is left behind in the harvest"),
    Want(spellings=("--install-compat32-libs",), since=OLD, when=lambda r: r.compat32,
         reason="unasked, it leaves the answer to a question"),
    Want(spellings=("--compat32-libdir={libdir32}",), since=OLD, when=lambda r: r.compat32,
         reason="relative to /usr; even asked for them, it leaves them out of a root that has no "
                "directory of 32-bit libraries yet, and that is only a warning"),
    Want(spellings=("--no-install-libglvnd",), since=OLD, when=lambda r: not r.opengl,
         reason="a guest with a part of libglvnd in it is a question whose default is to abort",
         without="the question comes only with OpenGL's files"),
    Want(spellings=("--install-libglvnd",), since=OLD, when=lambda r: r.opengl,
         reason="it always links /usr/lib/libGL.so.1 to libglvnd's library; where that is not "
                "installed, ldconfig removes the link and the installer's own check fails",
         without="it installs what is missing"),
    Want(spellings=("--no-x-check",), since=OLD, without="the sandbox has a /tmp of its own",
         reason="a lock file of the build host's X server in /tmp would abort it"),
    Want(spellings=("--no-nouveau-check",), since=OLD, without="the sandbox hides /sys/bus/pci",
         reason="nouveau on the build host makes it write to /etc/modprobe.d, then abort"),
    Want(spellings=("--no-check-for-alternate-installs",), since=OLD,
         reason="a file of Debian's or Ubuntu's driver packages in the root would abort it",
         without="no driver package is in the root"),
    Want(spellings=("--no-distro-scripts",), since=OLD, without="the root has no such scripts",
         reason="it would run /usr/lib/nvidia/pre-install and its kin"),
    Want(spellings=("--force-selinux=no",), since=OLD, without="the root has no SELinux tools",
         reason="SELinux on the build host would make it relabel the guest's files"),
    Want(spellings=("--no-backup",), since=OLD, without="backups are left behind in the harvest",
         reason="copies of the files that it replaces would stay in /var/lib/nvidia"),
    Want(spellings=("--no-rpms",), since=OLD, without="the root has no rpm",
         reason="it would ask rpm for older drivers"),
    Want(spellings=("--no-dkms",), since="520.56",
         reason="a dkms in the root would compile everything once more",
         without="before 520 it does so only when told to"),
    Want(spellings=("--no-systemd",), since="465.19", without="the ERROR is reported",
         reason="`systemctl daemon-reload` fails where systemd does not run, and that is an ERROR; "
                "the guest has its own units"),
    Want(spellings=("--no-rebuild-initramfs",), since="545.23",
         reason="the guest boots without an initramfs of the distribution",
         without="before 545 it never touches it"),
    Want(spellings=("--no-nvidia-modprobe",), since=OLD, without="it is left behind in the harvest",
         reason="a set-user-id program that the guest's own units replace"),
    Want(spellings=("--no-kernel-module-source",), since=OLD,
         without="it is left behind in the harvest",
         reason="70 MB in /usr/src that a read-only guest cannot use"),
    Want(spellings=("--skip-depmod",), since="418.30", without="depmod runs twice",
         reason="depmod runs once, when all modules are in place"),
)


def supported(help_text: str) -> frozenset[str]:
    """The options that `HELP` lists, as `--kernel-name` and `-k`. Raises `StepError` for none."""
    found: set[str] = set()
    for line in _OPTION_LINE.findall(help_text):
        for word in line.rstrip(",").split(", "):
            match = _OPTION.fullmatch(word.strip())
            if match is not None:
                found.add(match[1])
    if "--advanced-options" not in found:
        raise StepError(f"'{' '.join(HELP)}' listed no options: {help_text.strip()[:200]!r}",
                        hint="is the driver's package complete, and of this architecture?")
    return frozenset(found)


def command(supported: Set[str], request: Request) -> list[str]:
    """The command line for a request.

    Raises `UserError` when the package lacks the flavour, or its installer something essential.
    """
    nvbranches.check_flavour(request.version, request.flavour, request.flavours)
    if request.builds and request.release == request.host_release \
            and "--skip-module-load" not in supported:
        raise UserError(
            f"the installer of driver {request.version} would load the guest's modules into the "
            f"build host's kernel, which has the same release ({request.release})",
            hint="leave the modules to katagpu (no modules_by: installer), or take a driver of "
                 "branch 550 or later")
    argv = [PROGRAM]
    for want, spelling in _choices(supported, request):
        if spelling is not None:
            argv.append(spelling)
        elif want.without is None:
            raise UserError(
                f"the installer of driver {request.version} does not list {_names(want)}, which is "
                f"essential: {want.reason}",
                hint="take another release of the driver; docs/driver.md has the tested ones")
    return argv


def left_out(supported: Set[str], request: Request) -> list[str]:
    """What was wanted and is not listed, each with why that does no harm."""
    return [f"{_names(want)} is not listed: {want.without}"
            for want, spelling in _choices(supported, request)
            if spelling is None and want.without is not None]


def _choices(supported: Set[str], request: Request) -> Iterator[tuple[Want, str | None]]:
    """Each applicable wish with the spelling that is listed, if any."""
    values = {"release": request.release, "log": request.log, "xorg": XORG,
              "libdir32": Layout.libdir32.removeprefix("/usr/"),
              "jobs": min(max(request.jobs, 1), MOST_JOBS),
              "type": "open" if request.flavour is KernelModule.OPEN else "proprietary"}
    for want in WANTED:
        if want.when(request):
            yield want, next((spelling.format(**values) for spelling in want.spellings
                              if spelling.partition("=")[0] in supported), None)


def _names(want: Want) -> str:
    return " or ".join(spelling.partition("=")[0] for spelling in want.spellings)
