"""Which QEMU boots the guest: the host's, the pipeline's own, or none."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest

from katagpu.boot import qemu
from katagpu.boot.qemu import PROGRAM
from katagpu.errors import KatagpuError, StepError, TookTooLong, UserError
from tests.machines import QEMU, needs_qemu

from . import standin

NOWHERE = UserError("QEMU of trixie-backports cannot be had: the package lists could not be "
                    "fetched:\nE: Unable to connect to mirror", hint="is the network there?")


def no_root() -> Path:
    """The pipeline's own QEMU, where it cannot be had."""
    raise NOWHERE


def not_asked() -> Path:
    """The pipeline's own QEMU, where it must not be asked for."""
    raise AssertionError("the host's QEMU will do")


def host(tmp_path: Path, version: str = standin.DEBIAN12,
         devices: Mapping[str, str] = standin.OLD) -> str:
    """The search path of a host that has a QEMU."""
    standin.emulator(tmp_path / "bin" / PROGRAM, version, devices)
    return str(tmp_path / "bin")


def test_the_host_s_is_taken_where_it_can_do_all(tmp_path: Path) -> None:
    path = host(tmp_path, standin.BACKPORTS, standin.NEW)
    found = qemu.find(not_asked, path=path)
    assert found.argv == (f"{path}/{PROGRAM}",)
    assert (found.version, found.vfio_user) == (standin.BACKPORTS, True)
    assert found.why == "the host's QEMU 11.1.3 has vfio-user-pci"
    assert qemu.lacks(found) == []


def test_the_device_counts_and_not_the_version(tmp_path: Path) -> None:
    without = standin.emulator(tmp_path / "new", standin.BACKPORTS, standin.OLD)
    backported = standin.emulator(tmp_path / "old", standin.DEBIAN12, standin.NEW)
    assert not qemu.look([str(without)]).vfio_user
    assert qemu.look([str(backported)]).vfio_user


def test_else_the_pipeline_s_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = standin.own(tmp_path / "root")
    found = qemu.find(lambda: root, path=host(tmp_path))
    assert found.vfio_user and found.version == standin.BACKPORTS
    assert found.argv == qemu.command(root)[0]
    assert found.why == ("QEMU 11.1.3 of the pipeline's own, since the host's QEMU 7.2.22 has no "
                         "vfio-user-pci")
    assert "!" not in capfd.readouterr().err, "nothing is missing then"


def test_a_host_without_qemu(tmp_path: Path) -> None:
    root = standin.own(tmp_path / "root")
    assert qemu.find(lambda: root, path=str(tmp_path)).why.endswith("since the host has no QEMU")
    with pytest.raises(UserError) as refused:
        qemu.find(no_root, path=str(tmp_path))
    assert "there is no QEMU that can boot the guest: the host has no QEMU" in refused.value.what
    assert "Unable to connect to mirror" in refused.value.what
    assert "install qemu-system-x86, QEMU 6.1 or newer" in str(refused.value.hint)
    assert "is the network there?" in str(refused.value.hint)


def test_without_vfio_user_anywhere_the_lesser_check_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    found = qemu.find(no_root, path=host(tmp_path))
    assert not found.vfio_user
    assert found.version == standin.DEBIAN12
    said = capfd.readouterr().err
    assert said == f"! {found.why}\n", "one line"
    assert "the host's QEMU 7.2.22 has no vfio-user-pci" in said
    assert "(QEMU of trixie-backports cannot be had: the package lists could not be fetched: " \
           "Unable to connect to mirror)" in said
    assert "the lesser check, pci-testdev stands for the GPU and no NVIDIA driver is probed" in said


def test_an_own_without_vfio_user_is_no_better_than_the_host_s(
    tmp_path: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    root = standin.own(tmp_path / "root", "10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)", standin.OLD)
    path = host(tmp_path)
    assert qemu.find(lambda: root, path=path).argv == (f"{path}/{PROGRAM}",)
    assert "QEMU 10.0.13 of the pipeline's own has no vfio-user-pci either" \
        in capfd.readouterr().err
    assert qemu.find(lambda: root, path=str(tmp_path)).argv == qemu.command(root)[0]
    assert "the host has no QEMU" in capfd.readouterr().err


@pytest.mark.parametrize(("device", "option"), qemu.NEEDS.items())
def test_one_too_old_even_for_the_lesser_check(tmp_path: Path, device: str, option: str) -> None:
    lines = standin.OLD[device].splitlines(keepends=True)
    devices = {**standin.OLD, device: "".join(line for line in lines if option not in line)}
    path = host(tmp_path, "5.2.0 (Debian 1:5.2+dfsg-11+deb11u3)", devices)
    with pytest.raises(UserError) as refused:
        qemu.find(no_root, path=path)
    assert f"QEMU 5.2.0 has no vfio-user-pci and no {device}.{option}: older than QEMU 6.1" \
        in refused.value.what
    assert "6.1 or newer (10.1 for an emulated GPU)" in str(refused.value.hint)


def test_a_property_s_name_is_not_found_in_another_s(tmp_path: Path) -> None:
    devices = {**standin.OLD, "pci-testdev": "pci-testdev options:\n"
               "  membar-backed=<bool>   - on/off (default: off)\n"
               "  x=<int32>              - see membar=<size>\n"}
    found = qemu.look([str(standin.emulator(tmp_path / "qemu", devices=devices))])
    assert qemu.lacks(found) == ["pci-testdev.membar"]


@pytest.mark.parametrize(("body", "said"), [
    ("echo 'qemu-system-x86_64: error while loading shared libraries: libfdt.so.1: cannot open "
     "shared object file: No such file or directory' >&2; exit 127", "libfdt.so.1: cannot open"),
    ("exit 3", "does not run: status 3"),
    ("kill -SEGV $$", "does not run: status -11"),
    ("echo 'BusyBox v1.35.0'", "does not run: status 0"),
], ids=["a library is missing", "says nothing", "crashes", "is something else"])
def test_a_qemu_that_does_not_run_is_passed_over(tmp_path: Path, body: str, said: str) -> None:
    program = standin.program(tmp_path / "bin" / PROGRAM, body)
    with pytest.raises(StepError, match=said):
        qemu.look([str(program)])
    root = standin.own(tmp_path / "root")
    found = qemu.find(lambda: root, path=str(program.parent))
    assert found.vfio_user
    assert "since the host's" in found.why and said in found.why


def test_a_qemu_that_hangs_is_passed_over_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qemu, "PATIENCE", 0.5)
    program = standin.program(tmp_path / "bin" / PROGRAM,
                              f"echo $$ >>{tmp_path}/pids; sleep 100 & echo $! >>{tmp_path}/pids\n"
                              "wait")
    with pytest.raises(TookTooLong):
        qemu.look([str(program)])
    assert all(standin.gone(pid) for pid in standin.pids(tmp_path / "pids", 2))
    root = standin.own(tmp_path / "root")
    assert "did not end within" in qemu.find(lambda: root, path=str(program.parent)).why


def test_an_own_that_does_not_run_is_an_error_and_no_reason_for_less(tmp_path: Path) -> None:
    root = standin.own(tmp_path / "root")
    standin.program(root / qemu.LIBRARIES / "ld-linux-x86-64.so.2", "exit 1")
    with pytest.raises(StepError, match=r"ld-linux-x86-64.so.2 does not run: status 1"):
        qemu.find(lambda: root, path=host(tmp_path))


def test_the_own_starts_through_its_own_loader_with_its_own_modules(tmp_path: Path) -> None:
    argv, env = qemu.command(tmp_path)
    libraries = f"{tmp_path}/usr/lib/x86_64-linux-gnu"
    assert argv[:5] == (f"{libraries}/ld-linux-x86-64.so.2", "--inhibit-cache", "--library-path",
                        libraries, f"{tmp_path}/usr/bin/{PROGRAM}")
    assert argv[5:] == ("-L", f"{tmp_path}/usr/share/qemu", "-L", f"{tmp_path}/usr/share/seabios")
    assert env == {"QEMU_MODULE_DIR": f"{libraries}/qemu"}


@pytest.mark.parametrize("name", ["a:b", "a;b", "a$b"])
def test_a_path_that_the_loader_would_split(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="colon, semicolon or dollar") as refused:
        qemu.of_root(tmp_path / name)
    assert "KATAGPU_STORE" in str(refused.value.hint)


def test_its_environment_is_given_and_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QEMU_AUDIO_DRV", "alsa")
    program = standin.emulator(tmp_path / "qemu", otherwise="env")
    said = qemu.look([str(program)], {"QEMU_MODULE_DIR": "/m"}).ask("x").stdout.decode()
    assert "QEMU_MODULE_DIR=/m\n" in said and "AUDIO" not in said


def test_the_identity_is_another_for_another_program(tmp_path: Path) -> None:
    program = standin.emulator(tmp_path / "qemu")
    first = qemu.look([str(program)], why="a").identity
    assert qemu.look([str(program)], why="b").identity == first
    assert qemu.look([str(program), "-L", "/elsewhere"]).identity != first
    os.utime(program, (1, 1))
    rebuilt = qemu.look([str(program)]).identity
    assert rebuilt != first
    standin.emulator(program, standin.BACKPORTS)
    os.utime(program, (1, 1))
    assert qemu.look([str(program)]).identity not in {first, rebuilt}


@needs_qemu
def test_a_real_one() -> None:
    found = qemu.look(shlex.split(QEMU))
    assert found.vfio_user
    assert qemu.lacks(found) == []
    answer = found.ask("-device", "no-such-device,help")
    assert b"no-such-device" in answer.stderr and not answer.stdout
    with pytest.raises(KatagpuError):
        qemu.look([shlex.split(QEMU)[0], "-no-such-option"])
