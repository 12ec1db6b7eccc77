"""KVM where a guest truly runs under it, else TCG.

`/dev/kvm` proves little: there are hosts where it opens and each instruction of the guest is
interpreted, so that Linux takes minutes to start. So a tiny guest of our own must do some work in
time. The answer holds until the next boot of the host.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from katagpu import log
from katagpu.boot.qemu import Qemu, value
from katagpu.errors import TookTooLong
from katagpu.files import writing
from katagpu.keys import digest
from katagpu.run import run, scratch, tail

DEVICE = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CPU: Mapping[str, str] = {"kvm": "host,pmu=off", "tcg": "max"}
"""The processor that goes with each: what Kata takes, and all that TCG can do."""
SECONDS = 5.0
"""How long the guest may take: under a KVM that works it is 0.3 s, under TCG 1.2 s."""
AGAIN = 3600.0
"""Seconds after which a refusal is looked into anew: the host may have been overloaded."""

# A boot sector for 16-bit real mode at 0x7c00: 2^28 rounds of a loop, four ticks of the timer
# (interrupts arrive), then a byte to the port of isa-debug-exit.
_CODE = bytes((
    0x66, 0xB9, 0x00, 0x00, 0x00, 0x10,  # mov ecx, 1 << 28
    0x66, 0x49,                          # dec ecx
    0x75, 0xFC,                          # jnz to it
    0xFB,                                # sti
    0xF4, 0xF4, 0xF4, 0xF4,              # hlt: each waits for an interrupt
    0xB0, 0x10,                          # mov al, 0x10
    0xE6, 0xF4,                          # out 0xf4, al
    0xFA, 0xF4,                          # cli; hlt
    0xEB, 0xFC,                          # jmp to it
))
SECTOR = _CODE + bytes(510 - len(_CODE)) + b"\x55\xaa"
DONE = 0x10 << 1 | 1
"""QEMU's exit status for that byte (hw/misc/debugexit.c)."""


class Kind(StrEnum):
    """What runs the guest's instructions, by QEMU's name of it."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, kw_only=True)
class Accel:
    """What runs the guest, and why that."""

    kind: Kind
    why: str

    @property
    def arguments(self) -> list[str]:
        """QEMU's arguments for it, with the processor."""
        accel = "tcg,thread=multi" if self.kind is Kind.TCG else str(self.kind)
        return ["-accel", accel, "-cpu", CPU[self.kind]]


def choose(qemu: Qemu, cache: Path, *, device: Path = DEVICE, boot_id: Path = BOOT_ID,
           seconds: float = SECONDS) -> Accel:
    """KVM if the tiny guest runs under it within `seconds`, else TCG.

    What was found is kept below `cache`, for this boot of the host and this QEMU.
    """
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return _tcg(f"this host has no {device}")
    except OSError as refusal:
        group = "; the group kvm may use it" if isinstance(refusal, PermissionError) else ""
        return _tcg(f"{device} cannot be opened: {refusal.strerror}{group}")
    asked = {"boot": boot_id.read_text().strip(), "qemu": qemu.identity, "device": str(device),
             "guest": SECTOR.hex(), "cpu": CPU[Kind.KVM], "seconds": seconds}
    boot = digest(asked["boot"])[:12]
    place = cache / f"kvm-{boot}-{digest(asked)[:32]}.json"
    known = _known(place)
    if known is None:
        with log.step("boot: does a guest run under KVM?"):
            known = probe(qemu, Kind.KVM, seconds)
        _keep(place, known, boot)
    return _tcg(known) if known else Accel(kind=Kind.KVM, why="KVM: a guest ran under it")


def _tcg(why: str) -> Accel:
    return Accel(kind=Kind.TCG, why=f"TCG, which interprets the guest: {why}")


def _known(place: Path) -> str | None:
    """What was found before: empty for a KVM that works, else why not; None: nothing that holds."""
    try:
        refusal = json.loads(place.read_bytes())["refusal"]
        age = time.time() - place.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return refusal if isinstance(refusal, str) and (not refusal or 0 <= age < AGAIN) else None


def _keep(place: Path, refusal: str, boot: str) -> None:
    with writing(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        for old in place.parent.glob("kvm-*.json"):
            if not old.name.startswith(f"kvm-{boot}-"):
                old.unlink(missing_ok=True)
        part = place.with_name(f"{place.name}.{os.getpid()}.part")
        part.write_text(json.dumps({"refusal": refusal}))
        part.replace(place)


def probe(qemu: Qemu, kind: Kind, seconds: float = SECONDS) -> str:
    """Run the tiny guest, and kill it when time is up: empty if it ended well, else why not."""
    with scratch() as place:
        disk, said = place / "disk", place / "log"
        disk.write_bytes(SECTOR + bytes(1 << 20))  # no firmware reads a disk of one sector
        argv = [*qemu.argv, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-machine", "q35", *Accel(kind=kind, why="").arguments, "-m", "32M",
                "-drive", f"if=none,id=disk,file={value(disk)},format=raw,readonly=on",
                "-device", "virtio-blk-pci,drive=disk",
                "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
        try:
            status = run(argv, env=qemu.env, log=said, check=False, timeout=seconds).status
        except TookTooLong:
            return f"{DEVICE} opens, but a tiny guest did not end under {kind} in {seconds:.0f} s"
        if status == DONE:
            return ""
        lines = [line for line in tail(said).splitlines() if not line.startswith("$ ")]
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"QEMU ended with {how}: {lines[-1] if lines else 'it says nothing'}"
