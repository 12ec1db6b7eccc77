"""The machine: QEMU's arguments for each kind of guest, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from katagpu.boot import kata, vm, vsocklink
from katagpu.boot.accel import Accel, Kind
from katagpu.boot.gpu import Gpu, RootPort, root_port
from katagpu.boot.vm import HotPlug, Machine
from katagpu.kataconfig import Extension, KataSettings, render_drop_in
from katagpu.verity import Verity

PARAMS = str(Verity(root_hash="ab" * 32, salt="cd" * 32, data_blocks=92041))
TCG = Accel(kind=Kind.TCG, why="")
KVM = Accel(kind=Kind.KVM, why="")
COMMAND_LINE_SIZE = 2048  # arch/x86/include/asm/setup.h

FIRST = """\
-nodefaults -no-user-config -display none -no-reboot
-machine {machine}
-accel tcg,thread=multi -cpu max
-smp 2,cores=1,threads=1,sockets=2
-m 1024M,slots=10,maxmem=3072M
-object memory-backend-memfd,id=dimm1,size=1024M,share=on -numa node,memdev=dimm1
-rtc base=utc,driftfix=slew,clock=host
-global kvm-pit.lost_tick_policy=discard
-kernel /kernel
"""
SECOND = """\
-serial file:{run}/serial.log
-device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,\
io-reserve=4k,mem-reserve=1m,pref64-reserve=1m
-device virtio-serial-pci,id=serial0,max_ports=4
-chardev socket,id=channel,path={run}/probe,server=on,wait=off
-device virtserialport,bus=serial0.0,chardev=channel,name=katagpu,nr=2
"""
DISK = """\
-drive id={name},file={path},aio=threads,format=raw,if=none,readonly=on
-device virtio-blk-pci,disable-modern=false,drive={name},config-wce=off,share-rw=on,serial={name}
"""
LAST = """\
-device virtio-scsi-pci,id=scsi0
-object rng-random,id=rng0,filename=/dev/urandom
-device virtio-rng-pci,rng=rng0
"""
PROBE = DISK.format(name="katagpu-probe", path="/probe")


def configuration(**settings: Any) -> kata.Configuration:
    known: dict[str, Any] = {"kernel": "/kernel", "image": "/image", **settings}
    return kata.read(render_drop_in(KataSettings(**known)))


def machine(tmp_path: Path, known: kata.Configuration, **other: Any) -> Machine:
    root = tmp_path / "root"
    root.write_bytes(bytes(4096))
    words: dict[str, Any] = {
        "configuration": known, "kernel": Path("/kernel"), "root": root, "probe": Path("/probe"),
        "directory": tmp_path, "accel": TCG, "memory": 1024, **other}
    return Machine(**words)


def split(line: list[str]) -> tuple[list[str], str]:
    """The arguments without the kernel's command line, and that."""
    at = line.index("-append")
    return [*line[:at], *line[at + 2:]], line[at + 1]


def golden(tmp_path: Path, *parts: str, machine_type: str = "q35") -> list[str]:
    return "".join(parts).format(run=tmp_path, machine=machine_type).split()


def test_an_image_on_virtio_blk(tmp_path: Path) -> None:
    found = machine(tmp_path, configuration())
    rest, line = split(vm.arguments(found))
    image = DISK.format(name="image", path=found.root)
    assert rest == golden(tmp_path, FIRST, SECOND, image, PROBE, LAST)
    wanted = " ".join(kata.command_line(found.configuration, vcpus=2))
    assert line == (f'{wanted} init=/bin/sh -- -c "cat /dev/vdb >/dev/katagpu-probe; chmod 700 '
                    '/dev/katagpu-probe; /dev/katagpu-probe & exec /sbin/init"')
    assert (found.channel, found.log) == (tmp_path / "probe", tmp_path / "serial.log")


def test_an_image_with_its_hash_tree_and_the_driver_s_disk(tmp_path: Path) -> None:
    """Both verified; the order of disks is that of their names in the guest."""
    known = configuration(kernel_verity_params=PARAMS, extensions=(
        Extension(name="gpu", path="/elsewhere", verity_params=PARAMS),))
    found = machine(tmp_path, known, extensions=[("gpu", Path("/gpu"))])
    rest, line = split(vm.arguments(found))
    assert rest == golden(
        tmp_path, FIRST, SECOND, DISK.format(name="image", path=found.root),
        DISK.format(name="extension-gpu", path="/gpu"), PROBE, LAST)
    assert "verity 1 /dev/vda1 /dev/vda2" in line and "cat /dev/vdc >" in line
    assert line.startswith(" ".join(kata.command_line(known, vcpus=2)))
    assert len(line) < COMMAND_LINE_SIZE


def test_an_image_as_persistent_memory(tmp_path: Path) -> None:
    found = machine(tmp_path, configuration(dax_header=True, rootfs_type="ext4"))
    rest, line = split(vm.arguments(found))
    assert rest == golden(
        tmp_path, FIRST, SECOND,
        f"-object memory-backend-file,id=mem0,mem-path={found.root},size=4096,readonly=on "
        "-device nvdimm,id=nv0,memdev=mem0,unarmed=on ", PROBE, LAST,
        machine_type="q35,nvdimm=on")
    assert "root=/dev/pmem0p1 rootflags=dax," in line and "cat /dev/vda >" in line


def test_an_initrd(tmp_path: Path) -> None:
    """There is no /dev yet, and the kernel's word for its init is another."""
    found = machine(tmp_path, configuration(image=None, initrd="/initrd"))
    rest, line = split(vm.arguments(found))
    assert rest == golden(tmp_path, FIRST, SECOND, f"-initrd {found.root} ", PROBE, LAST)
    assert line.endswith(
        ' rdinit=/bin/sh -- -c "mount -t devtmpfs dev /dev; cat /dev/vda >/katagpu-probe; umount '
        '/dev; mknod /dev/null c 1 3; chmod 700 /katagpu-probe; /katagpu-probe & exec /init"')
    assert "root=" not in line


def test_our_words_end_kata_s_line(tmp_path: Path) -> None:
    """What follows `--` is init's; the kernel takes a quoted word as one, without equals signs."""
    for known in (configuration(), configuration(image=None, initrd="/initrd")):
        line = split(vm.arguments(machine(tmp_path, known, append=["extra=1"])))[1]
        mine, _dashes, others = line.partition(" -- ")
        assert mine.endswith(f" extra=1 {'rd' if known.initrd else ''}init=/bin/sh")
        assert others.startswith('-c "') and others.endswith('"')
        assert others.count('"') == 2 and "=" not in others


@pytest.mark.parametrize(("accel", "bits", "cpu"), [
    (TCG, 0, "max"), (TCG, 46, "max,phys-bits=46"), (KVM, 0, "host,pmu=off")])
def test_the_processor(tmp_path: Path, accel: Accel, bits: int, cpu: str) -> None:
    line = vm.arguments(machine(tmp_path, configuration(), accel=accel, phys_bits=bits))
    assert line[line.index("-cpu") + 1] == cpu
    assert line[line.index("-accel") + 1].split(",")[0] == accel.kind


def test_root_ports_have_kata_s_names_and_room_for_the_gpu(tmp_path: Path) -> None:
    port = root_port(Gpu().function)
    other = RootPort(pref64=1 << 30, mem=1 << 21)
    line = vm.arguments(machine(tmp_path, configuration(), ports=[port, other],
                                devices=["vfio-user-pci,bus=rp0"], more=["-some", "thing"]))
    assert line[-8:] == [
        "-device", f"pcie-root-port,id=rp0,bus=pcie.0,chassis=1,slot=1,{port.options}",
        "-device", f"pcie-root-port,id=rp1,bus=pcie.0,chassis=2,slot=2,{other.options}",
        "-device", "vfio-user-pci,bus=rp0", "-some", "thing"]
    assert port.options == f"pref64-reserve={64 << 30},mem-reserve={32 << 20}"


@pytest.mark.parametrize("hot_plug", list(HotPlug))
def test_who_handles_hot_plug(tmp_path: Path, hot_plug: HotPlug) -> None:
    line = vm.arguments(machine(tmp_path, configuration(), hot_plug=hot_plug))
    option = "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"
    assert (option in line) is (hot_plug is HotPlug.NATIVE)
    if option in line:
        assert line[line.index(option) - 1] == "-global"


@pytest.mark.parametrize("settings", [{}, {"dax_header": True}, {"image": None, "initrd": "/i"}])
def test_memory_is_shared(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A vsock device beside QEMU (vhost-user) and the emulated GPU read it."""
    line = vm.arguments(machine(tmp_path, configuration(**settings), memory=512))
    ram = line[line.index("-numa") + 1].removeprefix("node,memdev=")
    backend = next(word for word in line if f"id={ram}," in f"{word},")
    assert backend.split(",")[0] == "memory-backend-memfd" and "share=on" in backend.split(",")
    assert f"size={line[line.index('-m') + 1].split(',')[0]}" in backend.split(",")


def test_what_the_link_adds_takes_none_of_our_names(tmp_path: Path) -> None:
    with vsocklink.link(tmp_path, device=tmp_path / "none") as link:
        words = [*vm.arguments(machine(tmp_path, configuration(), terminal=True)),
                 *link.arguments]
    names = [part[3:] for word in words for part in word.split(",") if part.startswith("id=")]
    assert len(names) == len(set(names))
    assert "-numa" in words and words.count("-numa") == 1


def test_a_terminal_is_the_second_console(tmp_path: Path) -> None:
    line = vm.arguments(machine(tmp_path, configuration(), terminal=True))
    assert "stdio,id=terminal,signal=off" in line
    assert "virtconsole,bus=serial0.0,chardev=terminal,nr=1" in line
    assert vm.TERMINAL == "/dev/hvc1"
    assert "stdio" not in " ".join(vm.arguments(machine(tmp_path, configuration())))
