"""Checks of the booted system: kernel, root, init, libraries, log."""

from __future__ import annotations

import re

from katagpu import kconfig
from katagpu.boot.channel import Line
from katagpu.boot.diagnosis import EROFS
from katagpu.boot.facts import Failed, Skipped
from katagpu.boot.session import Session

TARGET = "kata-containers.target"
LOADER = "/lib64/ld-linux-x86-64.so.2"
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
# What a kernel says when something is broken in it (kernel/panic.c, lib/bug.c, kernel/module).
TROUBLE = re.compile(
    r"\bOops\b|\bBUG:|\bWARNING: |Kernel panic|general protection fault|Call Trace|"
    r"Unknown symbol|disagrees about version of symbol|version magic|Invalid relocation|"
    r"invalid module format|Key was rejected|soft lockup|rcu_\w+ detected stalls|"
    r"hung_task|blocked for more than|Out of memory|segfault at|I/O error|"
    rf"(?:meta)?data block \d+ is corrupted|{EROFS}|EXT4-fs error")
# Units that cannot work with a GPU that has no firmware of its own.
NEED_A_GPU = {"nvidia-persistenced.service", "nvidia-cdi.service", "nvidia-dcgm.service",
              "nvidia-fabricmanager.service", "nvidia-gridd.service", "nvidia-topologyd.service"}
KATA_DM = "dm-verity"  # the image's device, by Kata's dm-mod.create
ENFORCED = "/sys/module/module/parameters/sig_enforce"
REFUSED = 77  # of the script, where insmod says so
# The module as it was before it was signed would be refused too; what matters is the kernel's mark.
UNSIGNED = """module=$(find {directory} -name '*.ko' | head -n 1)
[ -n "$module" ] || exit 3
head -c -28 "$module" > /run/unsigned.ko
insmod /run/unsigned.ko 2>&1 && exit 4
rm /run/unsigned.ko
exit 77"""
NO_MATCH = "the image and the kernel are not of one build"
REBUILD = "./doitw build_image, and install all of its files together"


def ready(session: Session) -> list[str]:
    """The guest boots, and systemd reaches Kata's target."""
    guest = session.guest
    said: dict[str, str] = {}

    def reached() -> bool:
        shown = guest.run(["systemctl", "show", "--property=ActiveState",
                           "--property=ActiveEnterTimestampMonotonic", TARGET]).stdout
        said.update({name: value for name, _equals, value in
                     (line.partition("=") for line in shown.splitlines())})
        return said.get("ActiveState") == "active"

    # Each question keeps systemd from its work: under an emulator it counts.
    if not guest.until(reached, session.patience, step=1.0):
        jobs = guest.run(["systemctl", "list-jobs", "--no-legend"]).said
        waited = session.patience * guest.slow
        raise Failed(f"{TARGET} was not reached within {waited:.0f} s", jobs,
                     cause="a unit waits for something that this guest does not have",
                     cure="look at the waiting jobs above; mask the unit (rootfs/layout.yaml) or "
                          "add what it needs")
    session.ready_at = int(said["ActiveEnterTimestampMonotonic"]) / 1e6
    return [f"{TARGET} reached {session.ready_at:.1f} s after the kernel's start"]


def release(session: Session) -> list[str]:
    """The running kernel has the release that modules and headers were made for."""
    found = session.guest.run(["uname", "-r"]).stdout.strip()
    if found != session.facts.release:
        raise Failed(f"the kernel is {found}, the build's is {session.facts.release}",
                     cause=NO_MATCH, cure=REBUILD)
    return [found]


def build_id(session: Session) -> list[str]:
    """The running kernel is the very one of this build, by its build id."""
    if session.facts.build_id is None:
        raise Skipped("this kernel has no build id")
    data = session.guest.read("/sys/kernel/notes")
    if bytes.fromhex(session.facts.build_id) not in data:
        raise Failed("the running kernel has another build id", [f"expected: "
                     f"{session.facts.build_id}"], cause="a kernel of the same release, but of "
                     "another configuration or build", cure=REBUILD)
    return [session.facts.build_id]


def config(session: Session) -> list[str]:
    """The kernel's own record of its configuration is the build's."""
    if not session.guest.exists("/proc/config.gz"):
        raise Skipped("this kernel does not show its configuration (IKCONFIG_PROC)")
    import gzip

    shown = session.directory / "config"
    shown.write_bytes(gzip.decompress(session.guest.read("/proc/config.gz")))
    running = kconfig.read_config(shown)
    built = kconfig.read_config(session.facts.config)
    differs = sorted(name for name in {*running, *built}
                     if running.get(name) != built.get(name))
    if differs:
        raise Failed(f"{len(differs)} symbols of /proc/config.gz differ from the build's", [
            f"{name}: {running.get(name)} running, {built.get(name)} built" for name in differs],
            cause="a kernel of another configuration", cure=REBUILD)
    return [f"{len(built)} symbols, all equal"]


def root(session: Session) -> list[str]:
    """The root is read-only, and of the file system that was packed."""
    if session.facts.root_format == "initrd":
        raise Skipped("an initrd is its own root")
    row = next(row for row in _mounts(session) if row[4] == "/")
    tail = row[row.index("-") + 1:]
    if tail[0] != session.facts.root_format or "ro" not in tail[2].split(","):
        raise Failed("the root is not mounted as it should be", [" ".join(row)],
                     cause="rootfs_type or the root flags of the Kata drop-in do not fit the image",
                     cure="./doitw build_image makes image and drop-in together")
    return [" ".join(row)]


def _mounts(session: Session) -> list[list[str]]:
    """The fields of each line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    return [line.split() for line in session.guest.text("/proc/self/mountinfo").splitlines()]


def verity(session: Session) -> list[str]:
    """What has a hash tree is mounted through it."""
    facts = session.facts
    if not (facts.verity or facts.measured):
        raise Skipped("neither the image nor a disk of the driver has a hash tree here")
    guest = session.guest
    names = guest.shell("cat /sys/block/dm-*/dm/name /sys/block/dm-*/dm/uuid").said
    status = guest.shell("for dm in /sys/block/dm-*; do echo $dm $(cat $dm/ro); done").said
    opened = any("VERITY" in line for line in names) if facts.verity else True
    if facts.measured:
        # The kernel's own, from its command line: by that name, without a UUID.
        device = next(row[2] for row in _mounts(session) if row[4] == "/")
        devices = guest.shell("cat /sys/block/dm-*/dev").said
        status = [*status, f"/ is {device} of {' '.join(devices)}"]
        opened = opened and KATA_DM in names and device in devices
    if not opened or not all(line.endswith(" 1") for line in status if line.startswith("/sys/")):
        raise Failed("no device of dm-verity is in use", [*names, *status, *session.tail()],
                     cause="the guest mounts the disk without its hash tree, or the kernel lacks "
                           "DM_VERITY", cure="kernel-configs: keep DM_VERITY and DM_INIT; the Kata "
                           "drop-in must carry the verity parameters")
    return [*names, *status]


def extension(session: Session) -> list[str]:
    """The driver's disk is mounted where the guest's units and the agent look for it."""
    place = session.facts.extension
    if place is None:
        raise Skipped("the driver is in the image, not on a disk of its own")
    rows = [line for line in session.guest.text("/proc/self/mountinfo").splitlines()
            if line.split()[4] == place]
    if not rows:
        unit = session.guest.run(["journalctl", "--no-pager", "--quiet", "-o", "cat", "-n", "10",
                                  "-u", "kata-extension-mount@gpu.service"]).said
        raise Failed(f"nothing is mounted on {place}", [*unit, *session.tail()],
                     cause="the disk has another serial than extension-gpu, or its hash tree and "
                           "the parameters of the drop-in do not fit",
                     cure="install the drop-in and the disk of one build")
    return rows


def units(session: Session) -> list[str]:
    """No unit failed, but those that need a GPU that works."""
    guest = session.guest
    found = guest.run(["systemctl", "--failed", "--no-legend", "--plain"]).stdout.splitlines()
    failed = [line.split()[0] for line in found if line.split()]
    wrong = [name for name in failed if name not in NEED_A_GPU]
    if wrong:
        lines = [line for name in wrong for line in guest.run(
            ["journalctl", "--no-pager", "--quiet", "-o", "cat", "-n", "6", "-u", name]).said]
        raise Failed(f"failed: {', '.join(wrong)}", lines,
                     cause="the unit's program or what it needs is not in this guest",
                     cure="mask the unit in rootfs/layout.yaml, or add what it needs")
    return [f"failed, as expected without a real GPU: {', '.join(failed)}" if failed
            else "no unit failed"]


def libraries(session: Session) -> list[str]:
    """Every program and shared library of the guest finds all that it is linked to.

    The guest's own loader lists each program, and libraries many at a time, as a program that has
    them all. By itself a private library need not find what its program brings.
    """
    place = session.facts.extension
    env = f"export LD_LIBRARY_PATH={place}{LIBRARIES}; " if place else ""
    find = f"find / {place or ''} -xdev -type f"
    many = f"sh -c '{LOADER} --list --preload \"$*\" /bin/true' sh"
    found = session.guest.shell(
        f"{env}{{ {find} -perm -100 ! -name '*.so*' -print0 | xargs -0 -n 1 -P 2 {LOADER} --list; "
        f"{find} -name '*.so*' -print0 | xargs -0 -n 120 {many}; }} 2>&1 | "
        "awk '/linux-vdso/ {programs++} $2 == \"=>\" {seen[$3]} $1 ~ /^\\// && /0x/ {seen[$1]} "
        "/not found|cannot open shared object/ {print} "
        "END {for (one in seen) count++; print \"count\", programs + 0, count + 0}'",
        timeout=120).stdout.splitlines()
    wrong = [line.strip() for line in found if not line.startswith("count ")]
    if wrong:
        lacking = {line.split(": ")[2] for line in wrong if line.count(": ") > 2}
        alone = session.guest.shell(
            f"{env}{find} -name '*.so*' -print0 | xargs -0 -n 1 -P 2 {LOADER} --list 2>&1 | "
            "grep 'cannot open shared object'", timeout=120).said
        raise Failed("programs and libraries do not find what they are linked to",
                     [*wrong, *(line for line in alone if lacking & set(line.split(": ")))],
                     cause="a package or a file of the driver is missing, or ld.so.cache is old",
                     cure="add the package that has the library to rootfs.packages, or the "
                          "capability to driver.capabilities")
    counts = found[-1].split()[1:] if found else ["0", "0"]
    if "0" in counts:
        raise Failed("no program of the guest could be looked at", found[:5],
                     cause="the guest's dynamic loader does not run", cure=REBUILD)
    return [f"{counts[0]} lists of the loader, {counts[1]} libraries in them, all resolved"]


def signatures(session: Session) -> list[str]:
    """Where modules must be signed, the kernel refuses one whose signature was cut off."""
    if kconfig.read_config(session.facts.config).get("MODULE_SIG_FORCE") != "y":
        raise Skipped("this kernel takes modules without a signature")
    guest, place = session.guest, session.facts.extension or ""
    enforced = guest.text(ENFORCED).strip()
    tried = guest.shell(UNSIGNED.format(directory=f"{place}/lib/modules/{session.facts.release}"))
    if enforced != "Y" or tried.status != REFUSED:
        raise Failed("the kernel takes a module that is not signed", [
            f"{ENFORCED}: {enforced}", *tried.said], cause="a kernel of another configuration",
            cure="`sign: {force: true}` in the recipe; no fragment may take MODULE_SIG_FORCE away")
    return [f"{ENFORCED}: {enforced}", *tried.said]


def kernel_log(session: Session) -> list[str]:
    """The kernel's log has no oops, no warning, no unknown symbol."""
    # `libraries` has the loader list static programs too, which it falls over.
    found = [line for line in session.guest.lines() if line.kernel and TROUBLE.search(line.text)
             and not line.text.startswith("ld-linux-x86-64[")]
    if found:
        raise Failed(f"{len(found)} lines of trouble in the kernel's log",
                     _around(session.guest.lines(), found[0]),
                     cause="see the first line; modules of another kernel give 'Unknown symbol', a "
                           "damaged image I/O or file system errors",
                     cure="build kernel, modules and image of one recipe; if it is the kernel's "
                          "own fault, another version of it")
    return [f"{len(session.guest.lines())} lines"]


def _around(lines: list[Line], first: Line) -> list[Line]:
    at = lines.index(first)
    return lines[max(0, at - 1):at + 10]
