"""The programs that mount the driver's disk, and the units that use what is on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from katagpu import guestfiles
from katagpu.guestfiles import Entry, Kind
from tests.test_guestfiles import VARIABLES
from tests.test_verity import LINE

UNITS = "/usr/lib/systemd/system"
GENERATOR = "/usr/lib/systemd/system-generators/kata-extension-mount-generator"
MOUNT = "/usr/libexec/kata-extension-mount.sh"
UMOUNT = "/usr/libexec/kata-extension-umount.sh"
PLACE = "/run/kata-extensions/gpu"
PROGRAMS = (GENERATOR, MOUNT, UMOUNT)
SINGLE = VARIABLES
SPLIT: dict[str, object] = {**SINGLE, "driver_layout": "plain", "driver_root": PLACE,
                            "driver_version": ""}


def rendered(variables: dict[str, object]) -> dict[str, Entry]:
    return {entry.path: entry for entry in guestfiles.render(variables)
            if entry.kind is not Kind.REMOVE}


def text(path: str) -> str:
    return rendered(SPLIT)[path].content.decode()


# --- units ---------------------------------------------------------------------------------------


def test_only_a_guest_with_a_disk_of_its_driver_mounts_one() -> None:
    single, split = rendered(SINGLE), rendered(SPLIT)
    added = {*PROGRAMS, f"{UNITS}/kata-extension-mount@.service",
             f"{UNITS}/usr-lib-firmware-nvidia.mount", "/lib/firmware/nvidia"}
    assert set(split) - set(single) == added
    assert not [path for path, entry in single.items() if b"kata-extensions" in entry.content]
    for path in PROGRAMS:
        assert split[path].mode == 0o755 and split[path].content.startswith(b"#!/bin/sh\n")


def test_the_base_does_not_know_which_driver_comes() -> None:
    assert rendered(SPLIT) == rendered({**SPLIT, "driver_version": "1.2"})
    other = rendered({**SINGLE, "driver_version": "1.2"})
    assert rendered(SINGLE) != other


def test_the_mount_comes_before_the_agent_and_its_failure_ends_the_sandbox() -> None:
    unit = text(f"{UNITS}/kata-extension-mount@.service").splitlines()
    assert "Before=kata-agent.service" in unit and "DefaultDependencies=no" in unit
    assert "FailureAction=poweroff" in unit[:unit.index("[Service]")]
    assert f"ExecStart={MOUNT} %i" in unit and "RemainAfterExit=yes" in unit


def test_gpu_units_take_everything_from_the_disk_and_come_after_it() -> None:
    modules = text(f"{UNITS}/nvidia-modules.service").splitlines()
    assert f"ExecStart=/usr/sbin/modprobe --dirname={PLACE} --all nvidia nvidia-uvm" in modules
    assert f"ConditionPathIsMountPoint={PLACE}" in modules
    after = next(line for line in modules if line.startswith("After="))
    assert {"kata-extension-mount@gpu.service", "usr-lib-firmware-nvidia.mount"} <= set(
        after.removeprefix("After=").split())
    daemon = text("/etc/systemd/system/nvidia-persistenced.service").splitlines()
    assert f"ExecStart={PLACE}/bin/nvidia-persistenced" in daemon
    assert f"Environment=LD_LIBRARY_PATH={PLACE}/usr/lib/x86_64-linux-gnu" in daemon
    mount = text(f"{UNITS}/usr-lib-firmware-nvidia.mount").splitlines()
    assert f"What={PLACE}/lib/firmware/nvidia" in mount
    # A unit's name is the path that it mounts on (systemd.mount(5)).
    assert "Where=/usr/lib/firmware/nvidia" in mount


def test_units_of_a_single_image_are_as_before() -> None:
    single = rendered(SINGLE)
    modules = single[f"{UNITS}/nvidia-modules.service"].content.decode()
    assert "ExecStart=/usr/sbin/modprobe --all nvidia nvidia-uvm\n" in modules
    assert "Condition" not in modules.replace("ExecCondition", "")
    daemon = single["/etc/systemd/system/nvidia-persistenced.service"].content.decode()
    assert "ExecStart=/usr/bin/nvidia-persistenced\n" in daemon and "LD_LIBRARY" not in daemon


def test_cdi_is_generated_from_the_disk(tmp_path: Path) -> None:
    program = text("/usr/libexec/katagpu/nvidia-guest")
    ctk = tmp_path / "nvidia-ctk"
    ctk.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/argv\necho "$LD_LIBRARY_PATH" '
                   f'>{tmp_path}/path\nfor a; do case $a in --output=*) '
                   'echo "kind: nvidia.com/gpu" >"${a#--output=}";; esac; done\n')
    ctk.chmod(0o755)
    script = tmp_path / "nvidia-guest"
    script.write_text(program.replace(f":{PLACE}/bin", f":{tmp_path}"))
    (tmp_path / "run").mkdir()
    subprocess.run(["sh", script, "cdi"], check=True, env={"KATAGPU_GUEST_ROOT": str(tmp_path)})
    argv = (tmp_path / "argv").read_text().split()
    assert {f"--driver-root={PLACE}", "--dev-root=/",
            f"--nvidia-cdi-hook-path={PLACE}/bin/nvidia-cdi-hook"} <= set(argv)
    assert (tmp_path / "path").read_text().strip() == f"{PLACE}/usr/lib/x86_64-linux-gnu"
    assert (tmp_path / "run/cdi/nvidia.yaml").exists()


def test_the_first_gpu_that_is_plugged_in_is_a_change(tmp_path: Path) -> None:
    """udev does not find modules that are on the disk, so no driver ever binds to that GPU."""
    script = tmp_path / "nvidia-guest"
    script.write_text(text("/usr/libexec/katagpu/nvidia-guest"))

    def changed() -> int:
        return subprocess.run(["sh", script, "changed"], check=False,
                              env={"KATAGPU_GUEST_ROOT": str(tmp_path)}).returncode

    (tmp_path / "run/katagpu").mkdir(parents=True)
    (tmp_path / "run/katagpu/gpus").touch()
    assert changed() == 1
    gpu = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "vendor").write_text("0x10de\n")
    (gpu / "class").write_text("0x030200\n")
    assert changed() == 0
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    assert changed() == 1
    rules = text("/usr/lib/udev/rules.d/90-katagpu-nvidia.rules")
    assert 'ACTION=="add", RUN+="/usr/libexec/katagpu/nvidia-guest mark"' in rules


# --- the generator -------------------------------------------------------------------------------


def generated(tmp_path: Path, line: str) -> set[str]:
    """What the generator makes of a kernel command line, below its first directory."""
    script, out = tmp_path / "generator", tmp_path / "out"
    script.write_text(text(GENERATOR))
    (tmp_path / "cmdline").write_text(line)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    subprocess.run(["sh", script, out, tmp_path / "early", tmp_path / "late"], check=True,
                   env={"KATAGPU_CMDLINE": str(tmp_path / "cmdline"), "PATH": os.defpath},
                   cwd=tmp_path)
    links = {path for path in out.rglob("*") if path.is_symlink()}
    assert {str(link.readlink()) for link in links} <= {f"{UNITS}/kata-extension-mount@.service"}
    assert not (tmp_path / "early").exists() and not (tmp_path / "late").exists()
    return {str(path.relative_to(out)) for path in links}


def both(name: str) -> set[str]:
    unit = f"kata-extension-mount@{name}.service"
    return {f"kata-containers.target.wants/{unit}", f"kata-agent.service.requires/{unit}"}


@pytest.mark.parametrize(("line", "names"), [
    ("quiet ro root=/dev/vda1\n", ()),
    (f"quiet kata.extension.gpu.verity_params={LINE} ro\n", ("gpu",)),
    ("kata.extension.gpu.verity_params=", ("gpu",)),
    ("kata.extension.gpu.verity_params", ("gpu",)),
    (f"kata.extension.gpu.verity_params={LINE} x kata.extension.my-2_x.verity_params=\n",
     ("gpu", "my-2_x")),
    ("kata.extension..verity_params=x kata.extension.a/b.verity_params= "
     "kata.extension.../../x.verity_params=1 kata.extension.gpu.other=1 "
     "xkata.extension.gpu.verity_params=1 kata.extension.* *", ()),
], ids=["none", "measured", "empty", "bare", "two", "hostile"])
def test_an_instance_for_each_extension_on_the_command_line(
    tmp_path: Path, line: str, names: tuple[str, ...],
) -> None:
    expected: set[str] = set()
    for name in names:
        expected |= both(name)
    assert generated(tmp_path, line) == expected


# --- mounting ------------------------------------------------------------------------------------


class Sandbox:
    """A fake guest: disks in sysfs and /dev, a command line, and programs that note their call."""

    def __init__(self, top: Path) -> None:
        self.top = top
        for name in ("sys/block", "dev/mapper", "proc", "bin"):
            (top / name).mkdir(parents=True)
        self.script = top / "mount.sh"
        self.script.write_text(text(MOUNT))
        for name in ("veritysetup", "mount", "sleep"):
            self.tool(name, 0)
        self.line("quiet ro")

    def tool(self, name: str, status: int) -> None:
        path = self.top / "bin" / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.top}/calls\nexit {status}\n')
        path.chmod(0o755)

    def disk(self, name: str, serial: str, *partitions: str) -> None:
        place = self.top / "sys/block" / name
        place.mkdir()
        (place / "serial").write_text(serial)  # the kernel writes no newline
        (self.top / "dev" / name).touch()
        for partition in partitions:
            (place / partition).mkdir()
            (self.top / "dev" / partition).touch()

    def line(self, words: str) -> None:
        (self.top / "proc/cmdline").write_text(f"{words}\n")

    def measured(self, value: str = LINE) -> None:
        self.line(f"quiet kata.extension.gpu.verity_params={value} ro")

    def run(self, name: str = "gpu") -> tuple[int, str, list[str]]:
        """Status, what was said, and the calls (without those of sleep)."""
        (self.top / "calls").write_text("")
        done = subprocess.run(["sh", self.script, name], capture_output=True, text=True,
                              check=False, env={"KATAGPU_GUEST_ROOT": str(self.top)})
        calls = (self.top / "calls").read_text().replace(str(self.top), "").splitlines()
        return done.returncode, done.stderr, [call for call in calls if call[:5] != "sleep"]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


MOUNTED = "mount -t erofs -o ro,nodev,nosuid {} /run/kata-extensions/gpu"
OPENED = (f"veritysetup open --no-superblock --hash=sha256 --salt={'01' * 32} --data-blocks=12 "
          "--data-block-size=4096 --hash-block-size=4096 /dev/{0}1 extension-gpu /dev/{0}2 "
          + "ab" * 32)


@pytest.mark.parametrize(("disk", "partitions"), [("vdb", "vdb"), ("nvme0n1", "nvme0n1p")])
def test_hashes_and_parameters_are_verified(
    sandbox: Sandbox, disk: str, partitions: str,
) -> None:
    sandbox.disk("vda", "root", "vda1")
    sandbox.disk(disk, "extension-gpu", f"{partitions}1", f"{partitions}2")
    sandbox.measured()
    status, said, calls = sandbox.run()
    assert (status, said) == (0, "")
    assert calls == [OPENED.format(partitions), MOUNTED.format("/dev/mapper/extension-gpu")]
    assert (sandbox.top / "run/kata-extensions/gpu").is_dir()


@pytest.mark.parametrize("value", ["", "none at all"])
def test_hashes_without_parameters_are_refused(sandbox: Sandbox, value: str) -> None:
    sandbox.disk("vdb", "extension-gpu", "vdb1", "vdb2")
    if not value:
        sandbox.measured("")
    status, said, calls = sandbox.run()
    assert status != 0 and "no parameters" in said and calls == []


@pytest.mark.parametrize("partitions", [(), ("vdb1",)])
def test_parameters_without_hashes_are_refused(
    sandbox: Sandbox, partitions: tuple[str, ...],
) -> None:
    sandbox.disk("vdb", "extension-gpu", *partitions)
    sandbox.measured()
    status, said, calls = sandbox.run()
    assert status != 0 and "the disk has none" in said and calls == []


@pytest.mark.parametrize(("partitions", "source"), [((), "/dev/vdb"), (("vdb1",), "/dev/vdb1")])
def test_neither_is_mounted_as_it_is(
    sandbox: Sandbox, partitions: tuple[str, ...], source: str,
) -> None:
    sandbox.disk("vdb", "extension-gpu", *partitions)
    sandbox.line("quiet kata.extension.gpu.verity_params ro")
    assert sandbox.run() == (0, "", [MOUNTED.format(source)])


def test_the_last_parameter_counts(sandbox: Sandbox) -> None:
    sandbox.disk("vdb", "extension-gpu", "vdb1", "vdb2")
    sandbox.line(f"kata.extension.gpu.verity_params={LINE} kata.extension.gpu.verity_params=")
    status, _said, calls = sandbox.run()
    assert status != 0 and calls == []


@pytest.mark.parametrize("value", [
    LINE.replace("root_hash=", "hash="), LINE.replace("salt=", "x_salt="), LINE + "junk;",
    LINE.replace("ab" * 32, "--help"), LINE.replace("ab" * 32, "")])
def test_parameters_that_are_none_are_refused(sandbox: Sandbox, value: str) -> None:
    sandbox.disk("vdb", "extension-gpu", "vdb1", "vdb2")
    sandbox.measured(value)
    status, said, calls = sandbox.run()
    assert status != 0 and "the parameters have no" in said and calls == []


@pytest.mark.parametrize("tool", ["veritysetup", "mount"])
def test_a_tool_that_fails_fails_the_unit(sandbox: Sandbox, tool: str) -> None:
    sandbox.disk("vdb", "extension-gpu", "vdb1", "vdb2")
    sandbox.measured()
    sandbox.tool(tool, 1)
    status, _said, calls = sandbox.run()
    assert status != 0
    assert [call.split()[0] for call in calls] == (
        ["veritysetup"] if tool == "veritysetup" else ["veritysetup", "mount"])


def test_no_disk_or_two_of_them_are_refused(sandbox: Sandbox) -> None:
    sandbox.disk("vdb", "extension-gpu2", "vdb1")
    status, said, calls = sandbox.run()
    assert status != 0 and "no disk has the serial extension-gpu" in said and calls == []
    sandbox.disk("vdc", "extension-gpu", "vdc1")
    assert sandbox.run()[0] == 0
    sandbox.disk("vdd", "extension-gpu", "vdd1")
    status, said, calls = sandbox.run()
    assert status != 0 and "two disks" in said and calls == []


@pytest.mark.parametrize("name", ["", "../x", "a b", "a;b"])
def test_a_name_that_is_none_is_refused(sandbox: Sandbox, name: str) -> None:
    status, said, calls = sandbox.run(name)
    assert status != 0 and "cannot be the name" in said and calls == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("path", PROGRAMS)
def test_programs_pass_shellcheck(tmp_path: Path, path: str) -> None:
    program = tmp_path / "program"
    program.write_text(text(path))
    subprocess.run(["shellcheck", program], check=True)
