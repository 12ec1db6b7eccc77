"""KVM is taken where a guest truly runs under it; else TCG, and why is said."""

from __future__ import annotations

import errno
import json
import os
import shlex
import tempfile
import time
from pathlib import Path

import pytest

from katagpu.boot import accel, qemu
from katagpu.boot.accel import Accel, Kind
from katagpu.boot.qemu import Qemu
from katagpu.errors import UserError
from tests.machines import QEMU, needs_qemu

from . import standin

WORKS = f"exit {accel.DONE}"
# QEMU 7.2 under a KVM that lacks a register of the processor.
BROKEN = ("echo 'qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69' >&2\n"
          "echo \"qemu-system-x86_64: ../../target/i386/kvm/kvm.c:3183: kvm_buf_set_msrs: "
          "Assertion \\`ret == cpu->kvm_msr_buf->nmsrs' failed.\" >&2; kill -ABRT $$")


class Host:
    """A host with a device file that opens, and a QEMU that does `otherwise` with a guest."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.device = place / "kvm"
        self.device.touch()
        self.boot_id = place / "boot_id"
        self.boot_id.write_text("3fa1\n")
        self.cache = place / "cache"
        self.runs = place / "runs"

    def qemu(self, otherwise: str = WORKS) -> Qemu:
        """The QEMU; each guest that it starts is counted."""
        program = standin.emulator(self.place / "qemu",
                                   otherwise=f"echo \"$*\" >>{self.runs}\n{otherwise}")
        os.utime(program, (1, 1))
        return qemu.look([str(program)])

    def choose(self, found: Qemu, seconds: float = 5.0) -> Accel:
        """What is chosen here."""
        return accel.choose(found, self.cache, device=self.device, boot_id=self.boot_id,
                            seconds=seconds)

    @property
    def started(self) -> list[str]:
        """The words with which each guest was started."""
        return self.runs.read_text().splitlines() if self.runs.exists() else []

    @property
    def known(self) -> list[Path]:
        """What is kept."""
        return sorted(self.cache.iterdir())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with a device."""
    return Host(tmp_path)


def test_kvm_where_a_guest_runs_under_it(host: Host) -> None:
    found = host.choose(host.qemu())
    assert (found.kind, found.why) == (Kind.KVM, "KVM: a guest ran under it")
    assert found.arguments == ["-accel", "kvm", "-cpu", "host,pmu=off"]
    words = host.started[0]
    assert "-accel kvm -cpu host,pmu=off" in words and "isa-debug-exit,iobase=0xf4" in words


def test_no_device(host: Host) -> None:
    host.device.unlink()
    found = host.choose(host.qemu())
    assert found.kind is Kind.TCG
    assert found.why == f"TCG, which interprets the guest: this host has no {host.device}"
    assert found.arguments == ["-accel", "tcg,thread=multi", "-cpu", "max"]
    assert not host.started


@pytest.mark.parametrize(("number", "said"), [
    (errno.EACCES, "cannot be opened: Permission denied; the group kvm may use it"),
    (errno.EPERM, "cannot be opened: Operation not permitted; the group kvm may use it"),
    (errno.ENXIO, "cannot be opened: No such device or address"),  # the module is not loaded
    (errno.EBUSY, "cannot be opened: Device or resource busy"),
])
def test_a_device_that_cannot_be_opened(
    host: Host, monkeypatch: pytest.MonkeyPatch, number: int, said: str,
) -> None:
    found = host.qemu()

    def refused(*_words: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:  # root may open everything, so the kernel is not asked
        patched.setattr(os, "open", refused)
        assert host.choose(found).why.endswith(said)
    assert not host.started


def test_a_device_that_opens_and_a_guest_that_hangs(host: Host) -> None:
    place = host.place / "pids"
    found = host.qemu(f"echo $$ >>{place}; sleep 100 & echo $! >>{place}; wait")
    begun = time.monotonic()
    chosen = host.choose(found, 1.0)
    assert time.monotonic() - begun < 4
    assert chosen.kind is Kind.TCG
    assert "/dev/kvm opens, but a tiny guest did not end under kvm in 1 s" in chosen.why
    assert all(standin.gone(pid) for pid in standin.pids(place, 2))


@pytest.mark.parametrize(("otherwise", "said"), [
    (BROKEN, "QEMU ended with signal 6: qemu-system-x86_64: ../../target/i386/kvm/kvm.c:3183"),
    ("echo 'qemu-system-x86_64: failed to initialize kvm: Device or resource busy' >&2; exit 1",
     "QEMU ended with status 1: qemu-system-x86_64: failed to initialize kvm: Device or resource"),
    ("exit 0", "QEMU ended with status 0: it says nothing"),  # it came round to a reset
    ("exit 35", "QEMU ended with status 35: it says nothing"),
], ids=["a register", "busy", "a reset", "another byte"])
def test_a_device_that_opens_and_does_not_work(host: Host, otherwise: str, said: str) -> None:
    chosen = host.choose(host.qemu(otherwise))
    assert chosen.kind is Kind.TCG
    assert said in chosen.why


def test_the_answer_is_kept_for_this_boot_and_this_qemu(host: Host) -> None:
    found = host.qemu()
    assert host.choose(found) == host.choose(found)
    assert len(host.started) == 1 and len(host.known) == 1
    host.choose(found, 4.0)
    assert len(host.started) == 2, "asked otherwise"
    host.choose(host.qemu(f"true; {WORKS}"))
    assert len(host.started) == 3, "another program"
    host.boot_id.write_text("77e0\n")
    host.choose(found)
    assert len(host.started) == 4, "another boot"
    assert len(host.known) == 1, "what was known of other boots is of no use"


def test_a_refusal_holds_for_an_hour(host: Host) -> None:
    found = host.qemu("exit 1")
    first = host.choose(found)
    assert host.choose(found) == first and len(host.started) == 1
    old = time.time() - accel.AGAIN - 1
    os.utime(host.known[0], (old, old))
    assert host.choose(found) == first and len(host.started) == 2
    ahead = time.time() + 3600  # a clock that was set back
    os.utime(host.known[0], (ahead, ahead))
    assert host.choose(found) == first and len(host.started) == 3


def test_a_kvm_that_works_holds_for_longer(host: Host) -> None:
    found = host.qemu()
    host.choose(found)
    os.utime(host.known[0], (1, 1))
    assert host.choose(found).kind is Kind.KVM and len(host.started) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"refusal": 1}', b"\xff", b"null"])
def test_a_damaged_record_is_found_anew(host: Host, content: bytes) -> None:
    found = host.qemu()
    host.choose(found)
    host.known[0].write_bytes(content)
    assert host.choose(found).kind is Kind.KVM
    assert len(host.started) == 2
    assert json.loads(host.known[0].read_bytes()) == {"refusal": ""}


def test_a_cache_that_cannot_be_written(host: Host) -> None:
    (host.place / "file").touch()
    host.cache = host.place / "file/probes"
    with pytest.raises(UserError, match="cannot write to"):
        host.choose(host.qemu())


def test_the_guest_is_a_sector_that_firmware_boots() -> None:
    assert len(accel.SECTOR) == 512 and accel.SECTOR.endswith(b"\x55\xaa")


@needs_qemu
def test_the_guest_runs_in_a_real_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a,b").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a,b"))
    found = qemu.look(shlex.split(QEMU))
    assert accel.probe(found, Kind.TCG, 30.0) == ""
    assert "did not end under tcg in 0 s" in accel.probe(found, Kind.TCG, 0.05)
