"""Which QEMU boots the guest: the host's, where it can do all, else the pipeline's own.

An emulated GPU needs the device `vfio-user-pci` (QEMU 10.1 and newer, where it was compiled in), so
the program itself is asked. The pipeline's own QEMU is a root made of packages. It runs where that
lies, without root rights or chroot, through the root's own loader: the host's C library may be
older.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from katagpu import log
from katagpu.errors import KatagpuError, StepError, UserError
from katagpu.keys import digest
from katagpu.run import PATH, Result, run

PROGRAM = "qemu-system-x86_64"
GPU = "vfio-user-pci"
LESSER = "pci-testdev"
PATIENCE = 20.0  # seconds for a question, which takes 0.1
LIBRARIES = "usr/lib/x86_64-linux-gnu"

NEEDS: Mapping[str, str] = {
    # windows behind root ports for large BARs (QEMU 2.11)
    "pcie-root-port": "pref64-reserve",
    # a BAR of any size (QEMU 3.1)
    "pci-testdev": "membar",
    # hot-plug by pciehp or by ACPI, as one asks (QEMU 6.1)
    "ICH9-LPC": "acpi-pci-hotplug-with-bridge-support",
}
"""What any QEMU must have: properties by device."""
OLDEST = "6.1"  # the first that has all of them


@dataclass(frozen=True, kw_only=True)
class Qemu:
    """A QEMU that runs here.

    Arguments go after `argv`. `why` says for the report why it is this one. `identity` differs
    between programs that may behave differently. Ask it for one device by name: a list of all
    devices (`-device help`, qom-list-types) makes it load every module, and for those that its own
    root lacks it finds the host's, of another build, and aborts.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    version: str
    vfio_user: bool
    why: str
    identity: str

    def ask(self, *words: str) -> Result:
        """Run it for an answer (stdout, stderr), whatever its status. Raises `TookTooLong`."""
        return _ask(self.argv, self.env, *words)


def _ask(argv: Sequence[str], env: Mapping[str, str], *words: str) -> Result:
    return run([*argv, *words], env=env, capture=True, check=False, timeout=PATIENCE)


def _has(argv: Sequence[str], env: Mapping[str, str], device: str, option: str) -> bool:
    said = _ask(argv, env, "-device", f"{device},help")
    return said.status == 0 and re.search(
        rf"^\s*{re.escape(option)}[ =]", said.stdout.decode(errors="replace"),
        re.MULTILINE) is not None


def lacks(qemu: Qemu) -> list[str]:
    """What a guest needs and this QEMU does not have, as `device.property`."""
    return [f"{device}.{option}" for device, option in NEEDS.items()
            if not _has(qemu.argv, qemu.env, device, option)]


def look(argv: Sequence[str], env: Mapping[str, str] | None = None, *, why: str = "") -> Qemu:
    """What the QEMU is that `argv` starts. Raises `StepError` when it is none, or does not run."""
    env = dict(env or {})
    said = _ask(argv, env, "--version")
    match = re.search(r"QEMU emulator version (.+)", said.stdout.decode(errors="replace"))
    if said.status != 0 or match is None:
        words = said.stderr.decode(errors="replace").strip().splitlines()
        raise StepError(f"{argv[0]} does not run: "
                        f"{words[-1] if words else f'status {said.status}'}")
    return Qemu(argv=tuple(argv), env=env, version=match[1].strip(),
                vfio_user=_has(argv, env, GPU, "socket"), why=why,
                identity=digest([list(argv), match[1], *_stat(argv[0])]))


def _stat(program: str) -> list[int]:
    path = Path(shutil.which(program, path=PATH) or program)
    if not path.exists():
        return []
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def value(path: Path) -> str:
    """A path as the value of an option that goes on after a comma."""
    return str(path).replace(",", ",,")


def command(root: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """How QEMU of a root starts from outside: the command and its environment.

    Modules and firmware are the root's too. `--inhibit-cache`: the cache lists the host's
    libraries.
    """
    if re.search("[:;$]", str(root)):  # ld.so(8): between and in the paths of a search list
        raise UserError(f"QEMU cannot run from {root}: its path has a colon, semicolon or dollar",
                        hint="set KATAGPU_STORE to a path without")
    libraries = root / LIBRARIES
    return ((str(libraries / "ld-linux-x86-64.so.2"), "--inhibit-cache",
             "--library-path", str(libraries), str(root / "usr/bin" / PROGRAM),
             "-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios")),
            {"QEMU_MODULE_DIR": str(libraries / "qemu")})


def of_root(root: Path, *, why: str = "") -> Qemu:
    """QEMU of a root made of packages. Raises `StepError` when it does not run here."""
    argv, env = command(root)
    return look(argv, env, why=why)


def _of_host(path: str) -> tuple[Qemu | None, str]:
    """The host's QEMU, and what to say of it in a sentence."""
    program = shutil.which(PROGRAM, path=path)
    if program is None:
        return None, "the host has no QEMU"
    try:
        found = look([program])
    except KatagpuError as failure:
        return None, f"the host's {failure.what}"
    number = found.version.split()[0]
    return found, f"the host's QEMU {number} has {'' if found.vfio_user else 'no '}{GPU}"


def find(own: Callable[[], Path], *, path: str = PATH) -> Qemu:
    """The QEMU for a boot check.

    `own` gives the root of the pipeline's own QEMU (`Context.emulator`); it is asked only where the
    host's cannot do all, and raises `UserError` where there is none to be had. Then the host's does
    what it can, without `vfio_user`, and a warning says so. Raises `UserError` where nothing will
    do, `StepError` where the pipeline's own is there and does not run.
    """
    host, said = _of_host(path)
    if host is not None and host.vfio_user:
        return _because(host, said)
    try:
        found = of_root(own())
    except UserError as refusal:
        return _lesser(host, said, refusal)
    number = found.version.split()[0]
    if found.vfio_user:
        return _because(found, f"QEMU {number} of the pipeline's own, since {said}")
    return _lesser(host or found, said, UserError(
        f"QEMU {number} of the pipeline's own has no {GPU} either", hint=(
            "the recipe's `tools:` names another suite than Debian trixie")))


def _because(qemu: Qemu, why: str) -> Qemu:
    return Qemu(argv=qemu.argv, env=qemu.env, version=qemu.version, vfio_user=qemu.vfio_user,
                identity=qemu.identity, why=why)


def _lesser(host: Qemu | None, said: str, refusal: UserError) -> Qemu:
    """The host's QEMU without vfio-user, where it has what the lesser check needs."""
    gone = [] if host is None else lacks(host)
    if host is None or gone:
        old = f" and no {', '.join(gone)}: older than QEMU {OLDEST}" if gone else ""
        raise UserError(
            f"there is no QEMU that can boot the guest: {said}{old}\n{refusal.what}",
            hint=f"install qemu-system-x86, QEMU {OLDEST} or newer (10.1 for an emulated GPU), or "
                 "give the recipe's `tools:` a mirror that has trixie-backports"
                 + (f"; {refusal.hint}" if refusal.hint else ""))
    why = (f"{said}, and the pipeline's own cannot be had ({_short(refusal.what)}): the lesser "
           f"check, {LESSER} stands for the GPU and no NVIDIA driver is probed")
    log.warn(why)
    return _because(host, why)


def _short(said: str) -> str:
    """An error's first line, with apt's own reason where there is one."""
    lines = said.splitlines()
    reasons = [line.removeprefix("E: ") for line in lines if line.startswith("E: ")]
    return ": ".join([lines[0].rstrip(":"), *reasons[:1]])
