"""The virtual machine as Kata's runtime builds it, with what the check adds to it.

Kata's own parts (src/runtime/virtcontainers/qemu.go, govmm): machine type, PCI bridge, disk, virtio
serial, SCSI, random numbers, root ports, memory as one shared object. The check's: a disk with the
probe, a port to talk to it, QMP, and the log on a serial line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from katagpu.boot import kata
from katagpu.boot.accel import Accel
from katagpu.boot.gpu import RootPort
from katagpu.boot.qemu import value

PROBE = "/dev/katagpu-probe"  # in memory: the guest's root is read-only
PORT = "katagpu"  # the probe's, as it looks for it
TERMINAL = "/dev/hvc1"


class HotPlug(StrEnum):
    """Who in the guest's kernel handles a device that is plugged in.

    QEMU's q35 gives ACPI's handler all slots; `pciehp` is PCI Express's own, on root ports alone.
    """

    ACPI = "acpiphp"
    NATIVE = "pciehp"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A virtual machine. Memory is in MiB; `phys_bits` 0 leaves the processor's own.

    `extensions` are disks by Kata's name for them, `ports` root ports for GPUs. `devices` are
    arguments of further `-device` options, `more` whole options. With `terminal` a second console
    is on QEMU's own terminal.
    """

    configuration: kata.Configuration
    kernel: Path
    root: Path
    probe: Path
    directory: Path
    accel: Accel
    extensions: Sequence[tuple[str, Path]] = ()
    ports: Sequence[RootPort] = ()
    hot_plug: HotPlug = HotPlug.ACPI
    devices: Sequence[str] = ()
    more: Sequence[str] = ()
    memory: int = 2048
    vcpus: int = 2
    phys_bits: int = 0
    terminal: bool = False
    append: Sequence[str] = field(default_factory=tuple)

    @property
    def channel(self) -> Path:
        """The socket that leads to the probe."""
        return self.directory / "probe"

    @property
    def log(self) -> Path:
        """What the guest says on its serial line."""
        return self.directory / "serial.log"


def port_name(number: int) -> str:
    """A root port's name for QEMU; Kata's."""
    return f"rp{number}"


def start(machine: Machine) -> list[str]:
    """The last words of the command line: the probe, then the guest's own init.

    The kernel mounts the root as it always does; then a shell of the guest copies the probe from
    its disk into memory, starts it, and becomes init. In an initrd there is no /dev yet, and a
    shell starts nothing in the background without /dev/null.
    """
    number = (0 if machine.configuration.initrd or machine.configuration.nvdimm else 1) \
        + len(machine.extensions)
    disk = f"/dev/vd{chr(ord('a') + number)}"
    if machine.configuration.initrd:
        place = "/katagpu-probe"
        script = (f"mount -t devtmpfs dev /dev; cat {disk} >{place}; umount /dev; "
                  f"mknod /dev/null c 1 3; chmod 700 {place}; {place} & exec /init")
        return ["rdinit=/bin/sh", "--", "-c", f'"{script}"']
    script = f"cat {disk} >{PROBE}; chmod 700 {PROBE}; {PROBE} & exec /sbin/init"
    return ["init=/bin/sh", "--", "-c", f'"{script}"']


def arguments(machine: Machine) -> list[str]:
    """QEMU's arguments."""
    known = machine.configuration
    line = [*kata.command_line(known, vcpus=machine.vcpus), *machine.append, *start(machine)]
    # TCG has 40 bits by itself, and `host` those of the processor.
    bits = f",phys-bits={machine.phys_bits}" if machine.phys_bits else ""
    return [
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", f"{known.machine_type}{',nvdimm=on' if known.nvdimm else ''}",
        *machine.accel.arguments[:-1], f"{machine.accel.arguments[-1]}{bits}",
        "-smp", f"{machine.vcpus},cores=1,threads=1,sockets={machine.vcpus}",
        "-m", _memory(machine),
        "-object", f"memory-backend-memfd,id=dimm1,size={machine.memory}M,share=on",
        "-numa", "node,memdev=dimm1",
        "-rtc", "base=utc,driftfix=slew,clock=host",
        "-global", "kvm-pit.lost_tick_policy=discard",
        *(["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]
          if machine.hot_plug is HotPlug.NATIVE else []),
        "-kernel", str(machine.kernel), "-append", " ".join(line),
        "-serial", f"file:{value(machine.log)}",
        *_devices(_listed(machine)), *machine.more]


def _memory(machine: Machine) -> str:
    # Room to plug memory into, as Kata has it; a pmem disk takes address space of it.
    return f"{machine.memory}M,slots=10,maxmem={machine.memory + 2048}M"


def _devices(devices: Iterable[str]) -> list[str]:
    return [word for device in devices for word in device.split(" ", 1)]


def _listed(machine: Machine) -> Iterable[str]:
    """The devices, in the order in which the guest finds them: disks get their names by it."""
    yield ("-device pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,"
           "io-reserve=4k,mem-reserve=1m,pref64-reserve=1m")
    yield "-device virtio-serial-pci,id=serial0,max_ports=4"
    yield f"-chardev socket,id=channel,path={value(machine.channel)},server=on,wait=off"
    yield f"-device virtserialport,bus=serial0.0,chardev=channel,name={PORT},nr=2"
    if machine.terminal:
        yield "-chardev null,id=console0"
        yield "-device virtconsole,bus=serial0.0,chardev=console0,nr=0"
        yield "-chardev stdio,id=terminal,signal=off"
        yield "-device virtconsole,bus=serial0.0,chardev=terminal,nr=1"
    yield from _root(machine)
    for name, path in machine.extensions:
        yield from _disk(f"extension-{name}", path)
    yield from _disk("katagpu-probe", machine.probe)
    yield "-device virtio-scsi-pci,id=scsi0"
    yield "-object rng-random,id=rng0,filename=/dev/urandom"
    yield "-device virtio-rng-pci,rng=rng0"
    for number, port in enumerate(machine.ports):
        yield (f"-device pcie-root-port,id={port_name(number)},bus=pcie.0,chassis={number + 1},"
               f"slot={number + 1},{port.options}")
    for device in machine.devices:
        yield f"-device {device}"


def _root(machine: Machine) -> Iterable[str]:
    if machine.configuration.initrd:
        yield f"-initrd {machine.root}"
    elif machine.configuration.nvdimm:
        size = machine.root.stat().st_size
        yield (f"-object memory-backend-file,id=mem0,mem-path={value(machine.root)},size={size},"
               "readonly=on")
        yield "-device nvdimm,id=nv0,memdev=mem0,unarmed=on"
    else:
        yield from _disk("image", machine.root)


def _disk(name: str, path: Path) -> Iterable[str]:
    """A read-only disk; its serial is its name."""
    yield f"-drive id={name},file={value(path)},aio=threads,format=raw,if=none,readonly=on"
    yield (f"-device virtio-blk-pci,disable-modern=false,drive={name},config-wce=off,"
           f"share-rw=on,serial={name}")
