"""Hosts as their kernel shows them, written below a directory, and a kernel that reacts to writes.

Made from the kernel's Documentation/ABI/testing: sysfs-bus-pci, sysfs-bus-vfio-mdev,
sysfs-kernel-iommu_groups; `/proc` from proc(5). Ids, BARs and types are those of the real cards.
"""

from __future__ import annotations

import errno
import gzip
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MIB, GIB = 1 << 20, 1 << 30
PLAIN, WIDE, UNSET = 0x40200, 0x14220C, 0x20000000
RELEASE = "6.1.0-18-amd64"
CONFIG = """\
CONFIG_VFIO=m
CONFIG_VFIO_IOMMU_TYPE1=m
CONFIG_VFIO_MDEV=m
CONFIG_VFIO_PCI=m
CONFIG_VHOST_VSOCK=m
CONFIG_INTEL_IOMMU=y
# CONFIG_INTEL_IOMMU_DEFAULT_ON is not set
CONFIG_AMD_IOMMU=y
"""
INTERRUPTS = """\
           CPU0       CPU1
   9:          0          5  IR-IO-APIC    9-fasteoi   acpi
 126:          0        730  IR-PCI-MSI-0000:17:00.0    0-edge      pciehp
"""
GPU, AUDIO, USB, BRIDGE, NIC = "030200", "040300", "0c0330", "060400", "020000"
MATCHES = {"nvidia": ("10de", "03"), "nouveau": ("10de", "03"), "snd_hda_intel": ("", "0403"),
           "xhci_hcd": ("", "0c03"), "ixgbe": ("8086", "0200")}

VFIO = ("vfio-pci", "nvgrace_gpu_vfio_pci")

MODPROBE = """\
d=$KATAGPU_HOST_ROOT/sys/bus/pci/drivers
case $1 in
-r) rm -r "$d/$2" ;;
*) mkdir -p "$d/$1" && touch "$d/$1/bind" "$d/$1/unbind" ;;
esac"""

Space = tuple[int, int, int, int]
"""A BAR: its number, start, size and flags."""


@dataclass
class Device:
    """A function; `above` is the bridge that it is behind."""

    address: str
    ids: str = "10de:20b5"
    kind: str = GPU
    bars: Sequence[Space] = ()
    driver: str | None = None
    group: int | None = None
    numa: int = 0
    above: str | None = None
    resets: str | None = "bus"
    total_vfs: int = 0
    files: Mapping[str, str] = field(default_factory=dict)


class Tree:
    """A host below `root`."""

    def __init__(self, root: Path, *, release: str = RELEASE, config: str | None = CONFIG,
                 cmdline: str = "root=/dev/sda1 intel_iommu=on", iommu: str | None = "dmar0",
                 vendor: str = "GenuineIntel") -> None:
        self.root = root
        self.paths: dict[str, Path] = {}
        for name in ("sys/bus/pci/devices", "sys/bus/pci/drivers", "sys/kernel/iommu_groups",
                     "sys/class/iommu", "sys/module", "dev/vfio", "proc", "boot", "etc"):
            (root / name).mkdir(parents=True)
        self.file("sys/bus/pci/drivers_probe", "")
        self.file("proc/sys/kernel/osrelease", f"{release}\n")
        self.file("proc/cmdline", f"BOOT_IMAGE=/vmlinuz {cmdline}\n")
        self.file("proc/cpuinfo", f"processor\t: 0\nvendor_id\t: {vendor}\n")
        self.file("dev/vhost-vsock", "")
        self.file("dev/vfio/vfio", "")
        if config is not None:
            self.file(f"boot/config-{release}", config)
        if iommu:
            self.file("proc/interrupts", INTERRUPTS)
            (root / "sys/class/iommu" / iommu).mkdir()

    def file(self, name: str, text: str | bytes) -> Path:
        """Write a file."""
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def link(self, path: Path, target: Path) -> None:
        """A link as sysfs has them, relative."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(target, path.parent))

    def driver(self, name: str) -> Path:
        """A driver that is loaded."""
        path = self.root / "sys/bus/pci/drivers" / name
        if not path.exists():
            for attribute in ("bind", "unbind", "new_id"):
                self.file(f"sys/bus/pci/drivers/{name}/{attribute}", "")
        return path

    def add(self, device: Device) -> Device:
        """Put a function there."""
        bus = self.root / "sys/devices" / f"pci{device.address[:7]}"
        path = (self.paths[device.above] if device.above else bus) / device.address
        self.paths[device.address] = path
        path.mkdir(parents=True)
        vendor, _, number = device.ids.partition(":")
        files = {"vendor": f"0x{vendor}\n", "device": f"0x{number}\n",
                 "class": f"0x{device.kind}\n", "numa_node": f"{device.numa}\n",
                 "driver_override": "(null)\n", "resource": _resource(device.bars),
                 "sriov_totalvfs": f"{device.total_vfs}\n" if device.total_vfs else None,
                 "sriov_numvfs": "0\n" if device.total_vfs else None,
                 "reset_method": None if device.resets is None else f"{device.resets}\n",
                 "reset": None if device.resets is None else "", **device.files}
        for name, text in files.items():
            if text is not None:
                file = path / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        (path / "config").write_bytes(_header(device, int(vendor, 16), int(number, 16)))
        self.link(self.root / "sys/bus/pci/devices" / device.address, path)
        if device.group is not None:
            group = self.root / "sys/kernel/iommu_groups" / str(device.group)
            (group / "devices").mkdir(parents=True, exist_ok=True)
            self.link(path / "iommu_group", group)
            self.link(group / "devices" / device.address, path)
        if device.driver:
            self.link(path / "driver", self.driver(device.driver))
        return device

    def functions(self, physical: str, first: int, count: int, *, group: int,
                  files: Mapping[str, str]) -> list[str]:
        """Virtual functions of one, with links to and fro."""
        path, made = self.paths[physical], []
        above = path.parent.name if path.parent.name in self.paths else None
        for number in range(count):
            place = first + number
            address = f"{physical[:8]}{place // 8:02x}.{place % 8}"
            self.add(Device(address, self.ids(physical), group=group + number, above=above,
                            driver="nvidia", resets="flr", files=files))
            self.link(self.paths[address] / "physfn", path)
            self.link(path / f"virtfn{number}", self.paths[address])
            made.append(address)
        (path / "sriov_numvfs").write_text(f"{count}\n")
        return made

    def ids(self, address: str) -> str:
        """The ids of a function that is there."""
        return ":".join((self.paths[address] / name).read_text().strip()[2:]
                        for name in ("vendor", "device"))

    def bound(self, address: str) -> str | None:
        """The driver of a function."""
        path = self.paths[address] / "driver"
        return path.readlink().name if path.is_symlink() else None

    def override(self, address: str) -> str:
        """Its driver_override."""
        return (self.paths[address] / "driver_override").read_text().strip()

    def process(self, pid: int, name: str, *files: str) -> None:
        """A process that has files open."""
        self.file(f"proc/{pid}/comm", f"{name}\n")
        for number, file in enumerate(files):
            path = self.root / f"proc/{pid}/fd/{number + 3}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(file)

    def programs(self, **scripts: str) -> str:
        """A directory with programs of the host, to be its PATH. modprobe loads nothing real."""
        place = self.root.parent / "programs"
        place.mkdir(exist_ok=True)
        scripts = {"modprobe": MODPROBE, **scripts}
        for name, text in scripts.items():
            path = place / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        return str(place)

    def snapshot(self) -> dict[str, str]:
        """All files and links, to see whether something changed."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_symlink():
                found[name] = f"-> {path.readlink()}"
            elif path.is_file():
                found[name] = path.read_bytes().decode(errors="replace")
        return found


def _resource(bars: Sequence[Space]) -> str:
    lines = ["0x0000000000000000 0x0000000000000000 0x0000000000000000"] * 7
    for number, start, size, flags in bars:
        lines[number] = f"0x{start:016x} 0x{start + size - 1:016x} 0x{flags:016x}"
    return "\n".join(lines) + "\n"


def _header(device: Device, vendor: int, number: int) -> bytes:
    data = bytearray(64)
    data[0:2], data[2:4] = vendor.to_bytes(2, "little"), number.to_bytes(2, "little")
    data[9:12] = int(device.kind, 16).to_bytes(3, "little")
    data[0xE] = 1 if device.kind == BRIDGE else 0
    for bar, start, _, flags in device.bars:
        wide = bool(flags & 0x100000)
        value = (start & ~0xF) | (0b100 if wide else 0) | (8 if flags & 0x2000 else 0)
        data[0x10 + 4 * bar:0x10 + 4 * bar + (8 if wide else 4)] = \
            value.to_bytes(8, "little")[:8 if wide else 4]
    return bytes(data)


@dataclass
class Kernel:
    """What the kernel does with writes to attributes. `refuses` has errno by what is written.

    A key of it is the end of a path, and what is written there: `("unbind", "0000:41:00.0")`.
    `unwilling` has (driver, address) whose probe fails. Not `nodes`: udev makes none for groups.
    """

    tree: Tree
    refuses: dict[tuple[str, str], int] = field(default_factory=dict)
    unwilling: set[tuple[str, str]] = field(default_factory=set)
    nodes: bool = True
    written: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, path: Path, data: bytes) -> None:
        """A write(2)."""
        path, text = path.parent.resolve() / path.name, data.decode().strip()
        self.written.append((str(path.relative_to(self.tree.root)), text))
        for (end, what), number in self.refuses.items():
            if str(path).endswith(end) and what == text:
                raise OSError(number, os.strerror(number), str(path))
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if path.name == "driver_override":
            path.write_text(f"{text}\n" if text else "(null)\n")
        elif path.name == "unbind":
            self._unbind(path.parent.name, text)
        elif path.name == "bind":
            self._bind(path.parent.name, text)
        elif path.name == "drivers_probe":
            self._probe(text)
        else:
            path.write_bytes(data)

    def _device(self, address: str) -> Path:
        if address not in self.tree.paths:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return self.tree.paths[address]

    def _unbind(self, driver: str, address: str) -> None:
        path = self._device(address)
        if self.tree.bound(address) != driver:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        (path / "driver").unlink()
        if driver in VFIO:
            for entry in (path / "vfio-dev").iterdir():
                (self.tree.root / "dev/vfio/devices" / entry.name).unlink()
            shutil.rmtree(path / "vfio-dev")
            group = (path / "iommu_group").resolve()
            if not any(self.tree.bound(entry.name) in VFIO
                       for entry in (group / "devices").iterdir()):
                (self.tree.root / "dev/vfio" / group.name).unlink(missing_ok=True)

    def _matches(self, driver: str, address: str) -> bool:
        override = self.tree.override(address)
        if override != "(null)":
            return override == driver
        vendor, kind = MATCHES.get(driver, ("none", "none"))
        path = self._device(address)
        return vendor in self.tree.ids(address) and \
            (path / "class").read_text()[2:].startswith(kind)

    def _bind(self, driver: str, address: str) -> None:
        path = self._device(address)
        if self.tree.bound(address) or not self._matches(driver, address):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if (driver, address) in self.unwilling:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.tree.link(path / "driver", self.tree.root / "sys/bus/pci/drivers" / driver)
        if driver in VFIO:
            group, name = (path / "iommu_group").resolve().name, f"vfio{int(address[5:7], 16)}"
            (path / "vfio-dev" / f"{name}{address[-1]}").mkdir(parents=True)
            if self.nodes:
                self.tree.file(f"dev/vfio/{group}", "")
            self.tree.file(f"dev/vfio/devices/{name}{address[-1]}", "")

    def _probe(self, address: str) -> None:
        self._device(address)
        if self.tree.bound(address):
            return
        loaded = (self.tree.root / "sys/bus/pci/drivers").iterdir()
        for driver in sorted(path.name for path in loaded):
            if self._matches(driver, address) and (driver, address) not in self.unwilling:
                self._bind(driver, address)
                return


def mdev_types(names: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """Attributes of types: by directory, the name and how many more can be made."""
    found: dict[str, str] = {}
    for directory, (name, available) in names.items():
        place = f"mdev_supported_types/{directory}"
        found |= {f"{place}/name": f"{name}\n", f"{place}/available_instances": f"{available}\n",
                  f"{place}/device_api": "vfio-pci\n", f"{place}/create": "",
                  f"{place}/description": "num_heads=1, frl_config=60, framebuffer=4096M\n"}
    return found


def bars(start: int, large: int, *, low: int = 0xE7000000) -> list[Space]:
    """The three BARs of a GPU, the second with `large` bytes."""
    return [(0, low, 16 * MIB, PLAIN), (1, start, large, WIDE),
            (3, start + 2 * large, 32 * MIB, WIDE)]


def a100(root: Path) -> Tree:
    """An A100 with SR-IOV on, and time-sliced types on its virtual functions."""
    tree = Tree(root)
    tree.add(Device("0000:40:01.0", "8086:347a", BRIDGE, driver="pcieport", group=26))
    tree.add(Device("0000:41:00.0", "10de:20b5", bars=bars(0x222800000000, 128 * GIB),
                    driver="nvidia", group=27, numa=1, above="0000:40:01.0", resets="flr bus",
                    total_vfs=20))
    tree.functions("0000:41:00.0", 4, 4, group=30, files=mdev_types({
        "nvidia-692": ("GRID A100D-4C", 1), "nvidia-698": ("GRID A100D-80C", 0)}))
    tree.file("dev/nvidia0", "")
    tree.file("proc/driver/nvidia/gpus/0000:41:00.0/information",
              "Model: \t\t NVIDIA A100 80GB PCIe\nDevice Minor: \t 0\n")
    uuid = "aa618089-8b16-4d01-a136-25a0f3c73123"
    tree.link(tree.root / "sys/bus/mdev/devices" / uuid, tree.paths["0000:41:00.5"] / uuid)
    (tree.paths["0000:41:00.5"] / uuid).mkdir()
    return tree


def a30(root: Path) -> Tree:
    """An A30 whose MIG is on, with two instances; no nvidia-smi says so."""
    tree = Tree(root, iommu="ivhd0", vendor="AuthenticAMD", cmdline="root=/dev/sda1")
    tree.add(Device("0000:d0:00.0", "10de:20b7", bars=bars(0x222800000000, 32 * GIB),
                    driver="nvidia", group=192, total_vfs=4))
    tree.file("proc/driver/nvidia/gpus/0000:d0:00.0/information", "Device Minor: \t 3\n")
    for instance in ("gi1", "gi2"):
        tree.file(f"proc/driver/nvidia/capabilities/gpu3/mig/{instance}/access", "")
    return tree


def t4(root: Path) -> Tree:
    """A T4: small BARs, alone in its group, taken by nouveau; the configuration is in /proc."""
    tree = Tree(root, config=None)
    tree.file("proc/config.gz", gzip.compress(CONFIG.encode()))
    tree.add(Device("0000:3b:00.0", "10de:1eb8", driver="nouveau", group=14, bars=[
        (0, 0xD1000000, 16 * MIB, PLAIN), (1, 0x381FE0000000, 256 * MIB, WIDE),
        (3, 0x381FF0000000, 32 * MIB, WIDE)]))
    return tree


def switch(root: Path) -> Tree:
    """Two GPUs behind one switch without ACS: one group, with the audio function of one."""
    tree = Tree(root)
    tree.add(Device("0000:16:02.0", "8086:347a", BRIDGE, driver="pcieport", group=7))
    tree.add(Device("0000:17:00.0", "10b5:8747", BRIDGE, driver="pcieport", group=7,
                    above="0000:16:02.0"))
    for number, address in enumerate(("0000:18:00.0", "0000:19:00.0")):
        tree.add(Device(address, "10de:2236", group=7, driver="nvidia", above="0000:17:00.0",
                        bars=bars(0x380000000000 + number * 256 * GIB, 32 * GIB)))
        tree.file(f"proc/driver/nvidia/gpus/{address}/information", f"Device Minor: \t {number}\n")
    tree.add(Device("0000:18:00.1", "10de:1aef", AUDIO, driver="snd_hda_intel", group=7,
                    above="0000:17:00.0", bars=[(0, 0xE8000000, 16 << 10, PLAIN)]))
    return tree


def gh200(root: Path) -> Tree:
    """A Grace Hopper superchip: an Arm host, whose GPU has a VFIO driver of its own."""
    tree = Tree(root, vendor="", iommu="smmu3.0x0000000011000000", config=(
        f"{CONFIG}CONFIG_NVGRACE_GPU_VFIO_PCI=m\n"))
    tree.add(Device("0009:01:00.0", "10de:2342", driver="nvidia", group=17,
                    bars=bars(0x661000000000, 128 * GIB)))
    tree.file("proc/driver/nvidia/gpus/0009:01:00.0/information", "Device Minor: \t 0\n")
    return tree


def no_iommu(root: Path) -> Tree:
    """A host whose IOMMU is off, whose kernel lacks VFIO, and whose large BAR has no address."""
    tree = Tree(root, iommu=None, cmdline="root=/dev/sda1",
                config="# CONFIG_VFIO is not set\nCONFIG_INTEL_IOMMU=y\n")
    tree.add(Device("0000:65:00.0", "10de:15f8", driver=None, group=None, resets=None, bars=[
        (0, 0xD6000000, 16 * MIB, PLAIN), (1, 0, 16 * GIB, WIDE | UNSET),
        (3, 0, 32 * MIB, WIDE | UNSET)]))
    (tree.root / "dev/vhost-vsock").unlink()
    return tree
