"""The kernel's command line, against what Kata's Go runtime 4.1.0 puts together.

Expected lines are written out here from its sources, in the order in which it adds them: the
architecture's (qemu_amd64.go), root (hypervisor.go), console and quiet (qemu_arch_base.go), panic,
nr_cpus and selinux (qemu.go), systemd's, scsi_mod and the agent's (katautils), the configuration's,
extensions'. Only `console=ttyS0 loglevel=7` is ours, where Kata has its console and `quiet`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from katagpu import kataconfig
from katagpu.boot import kata
from katagpu.errors import StepError, UserError
from katagpu.kataconfig import Extension, KataSettings, render_drop_in
from katagpu.verity import Verity

HASH, SALT = "ab" * 32, "cd" * 32
PARAMS = str(Verity(root_hash=HASH, salt=SALT, data_blocks=92041))
ARCHITECTURE = (
    "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 i8042.dumbkbd=1 "
    "i8042.nopnp=1 i8042.noaux=1 noreplace-smp reboot=k cryptomgr.notests net.ifnames=0 "
    "pci=lastbus=0 ")
CONSOLE = "console=ttyS0 loglevel=7 "
DEFAULTS = "panic=1 nr_cpus=3 selinux=0 "
SYSTEMD = ("systemd.unit=kata-containers.target systemd.mask=systemd-networkd.service "
           "systemd.mask=systemd-networkd.socket ")
BELOW = "scsi_mod.scan=none agent.launch_process_timeout=15 "
NVIDIA = "cgroup_no_v1=all pci=realloc pci=nocrs pci=assign-busses"
IMAGE = f"{CONSOLE}systemd.show_status=false {DEFAULTS}{SYSTEMD}{BELOW}{NVIDIA}"


def configuration(**settings: Any) -> kata.Configuration:
    """What is read from a drop-in of ours."""
    known: dict[str, Any] = {"kernel": "/k", "image": "/i", **settings}
    return kata.read(render_drop_in(KataSettings(**known)))


def verity(device: str) -> str:
    """The device's table, by Documentation/admin-guide/device-mapper/dm-init.rst; 92041 blocks of
    4096 bytes are 736328 sectors."""
    return (f'dm-mod.create="dm-verity,,,ro,0 736328 verity 1 {device}1 {device}2 4096 4096 92041 '
            f'0 sha256 {HASH} {SALT}" root=/dev/dm-0 ')


EXT4 = "data=ordered,errors=remount-ro ro rootfstype=ext4 "


@pytest.mark.parametrize(("settings", "root"), [
    ({}, "root=/dev/vda1 rootflags=ro rootfstype=erofs "),
    ({"rootfs_type": "ext4"}, f"root=/dev/vda1 rootflags={EXT4}"),
    ({"dax_header": True}, "root=/dev/pmem0p1 rootflags=dax ro rootfstype=erofs "),
    ({"dax_header": True, "rootfs_type": "ext4"}, f"root=/dev/pmem0p1 rootflags=dax,{EXT4}"),
    ({"kernel_verity_params": PARAMS},
     f"{verity('/dev/vda')}rootflags=ro rootfstype=erofs "),
    # kernelVerityRootFlags() has no dax: device-mapper's verity cannot do it.
    ({"kernel_verity_params": PARAMS, "dax_header": True},
     f"{verity('/dev/pmem0p')}rootflags=ro rootfstype=erofs "),
    ({"kernel_verity_params": PARAMS, "dax_header": True, "rootfs_type": "ext4"},
     f"{verity('/dev/pmem0p')}rootflags={EXT4}"),
], ids=["erofs", "ext4", "dax", "ext4 dax", "verity", "verity dax", "verity ext4 dax"])
def test_the_line_of_an_image(settings: dict[str, Any], root: str) -> None:
    line = kata.command_line(configuration(**settings), vcpus=3)
    assert " ".join(line) == ARCHITECTURE + root + IMAGE


def test_the_line_of_an_initrd_has_nothing_of_root_or_systemd() -> None:
    known = configuration(image=None, initrd="/initrd")
    assert known.initrd
    assert " ".join(kata.command_line(known, vcpus=3)) == (
        ARCHITECTURE + CONSOLE + DEFAULTS + BELOW + NVIDIA)


def test_the_line_with_extensions() -> None:
    known = configuration(extensions=(
        Extension(name="gpu", path="/x", verity_params=PARAMS), Extension(name="raw", path="/y")))
    line = kata.command_line(known, vcpus=3)
    # Without parameters it is a word alone (SerializeParams), and still makes the guest mount it.
    assert line[-2:] == [f"kata.extension.gpu.verity_params={PARAMS}",
                         "kata.extension.raw.verity_params"]
    assert " ".join(line[:-2]) == (
        f"{ARCHITECTURE}root=/dev/vda1 rootflags=ro rootfstype=erofs {IMAGE}")


def test_what_a_user_adds_comes_last_and_wins() -> None:
    line = kata.command_line(configuration(extra_kernel_params=("panic=5", "selinux=1")), vcpus=1)
    assert line[-2:] == ["panic=5", "selinux=1"]


def test_the_words_of_the_drop_in_are_read() -> None:
    known = configuration(machine_type="q35", default_vcpus=4, kernel_verity_params=PARAMS)
    assert known == kata.Configuration(
        machine_type="q35", rootfs_type="erofs", initrd=False, nvdimm=False, vcpus=4,
        kernel_params=kataconfig.KERNEL_PARAMS, kernel_verity_params=PARAMS, extensions=())


@pytest.mark.parametrize("text", [
    "", "[hypervisor.qemu]", "[hypervisor", "hypervisor = 3", "[hypervisor]\nqemu = []"])
def test_what_is_no_drop_in(text: str) -> None:
    with pytest.raises(StepError, match="cannot be read"):
        kata.read(text)


@pytest.mark.parametrize(("image", "initrd"), [("", ""), ("/i", "/j")])
def test_one_of_image_and_initrd(image: str, initrd: str) -> None:
    text = render_drop_in(KataSettings(kernel="/k", image="/i"))
    text = text.replace('image = "/i"', f'image = "{image}"').replace(
        'initrd = ""', f'initrd = "{initrd}"')
    with pytest.raises(StepError, match="not exactly one"):
        kata.read(text)


def test_verity_parameters_that_kata_refuses() -> None:
    known = replace(configuration(), kernel_verity_params="root_hash=12")
    with pytest.raises(UserError, match="verity parameters"):
        kata.command_line(known, vcpus=1)
