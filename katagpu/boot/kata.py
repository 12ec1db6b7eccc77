"""What Kata's runtime makes of a configuration: the guest's kernel command line.

The check reads the drop-in that ships and goes the way of the Go runtime, so a drop-in that does
not fit its image fails here. Source: Kata Containers 4.1.0, src/runtime/virtcontainers,
hypervisor.go (root parameters, verity), qemu_arch_base.go and qemu_amd64.go (kernel parameters),
pkg/katautils/create.go (systemd's).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from enum import StrEnum

from katagpu import verity
from katagpu.errors import StepError
from katagpu.kataconfig import Extension

AMD64 = (
    "tsc=reliable", "no_timer_check", "rcupdate.rcu_expedited=1", "i8042.direct=1",
    "i8042.dumbkbd=1", "i8042.nopnp=1", "i8042.noaux=1", "noreplace-smp", "reboot=k",
    "cryptomgr.notests", "net.ifnames=0", "pci=lastbus=0")
SYSTEMD = ("systemd.unit=kata-containers.target", "systemd.mask=systemd-networkd.service",
           "systemd.mask=systemd-networkd.socket")
# Instead of Kata's `console=hvc0 console=hvc1 quiet`: a guest that does not come up shall say why.
# A serial line is there before any driver of virtio is.
LOG = ("console=ttyS0", "loglevel=7")
QUIET = "systemd.show_status=false"  # an image's only
# By the file below the drop-in, configuration-qemu-nvidia-gpu.toml: block_device_driver is
# "virtio-scsi", launch_process_timeout 15.
BELOW = ("scsi_mod.scan=none", "agent.launch_process_timeout=15")


class Disk(StrEnum):
    """How the image reaches the guest, by its device there."""

    VIRTIO = "vda"
    NVDIMM = "pmem0p"


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What the drop-in says that matters for a boot. Exactly one of image and initrd is named."""

    machine_type: str
    rootfs_type: str
    kernel_params: tuple[str, ...]
    initrd: bool
    nvdimm: bool
    kernel_verity_params: str
    vcpus: int
    extensions: tuple[Extension, ...]


def read(text: str) -> Configuration:
    """The configuration of a drop-in for the Go runtime. Raises `StepError`."""
    try:
        table = tomllib.loads(text)["hypervisor"]["qemu"]
        found = Configuration(
            machine_type=table["machine_type"], rootfs_type=table["rootfs_type"],
            kernel_params=tuple(table["kernel_params"].split()), initrd=bool(table["initrd"]),
            nvdimm=not table["disable_image_nvdimm"], vcpus=table["default_vcpus"],
            kernel_verity_params=table["kernel_verity_params"],
            extensions=tuple(Extension(**each) for each in table.get("guest_extension_images", [])))
        if found.initrd == bool(table["image"]):
            raise StepError("the Kata drop-in names not exactly one of image and initrd")
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as bad:
        raise StepError(f"the Kata drop-in cannot be read: {bad!r}") from None
    return found


def command_line(known: Configuration, *, vcpus: int) -> list[str]:
    """The kernel's parameters, in the order of the runtime."""
    image = not known.initrd
    found = [*AMD64, *(_root(known) if image else ()), *LOG, *([QUIET] if image else ()),
             "panic=1", f"nr_cpus={vcpus}", "selinux=0", *(SYSTEMD if image else ()), *BELOW,
             *known.kernel_params]
    for each in known.extensions:
        # Without a value, too: it is what makes the guest mount the disk.
        value = f"={each.verity_params}" if each.verity_params else ""
        found.append(f"kata.extension.{each.name}.verity_params{value}")
    return found


def _root(known: Configuration) -> list[str]:
    device = f"/dev/{Disk.NVDIMM if known.nvdimm else Disk.VIRTIO}"
    flags = "data=ordered,errors=remount-ro ro" if known.rootfs_type == "ext4" else "ro"
    if known.nvdimm and not known.kernel_verity_params:
        flags = f"dax,{flags}" if known.rootfs_type == "ext4" else f"dax {flags}"
    # The blank makes `ro` a parameter of its own: the root is always read-only.
    tail = [*f"rootflags={flags}".split(), f"rootfstype={known.rootfs_type}"]
    if not known.kernel_verity_params:
        return [f"root={device}1", *tail]
    tree = verity.read(known.kernel_verity_params)
    sectors = tree.data_block_size // 512 * tree.data_blocks
    table = (f"dm-verity,,,ro,0 {sectors} verity 1 {device}1 {device}2 {tree.data_block_size} "
             f"{tree.hash_block_size} {tree.data_blocks} 0 {verity.HASH} {tree.root_hash} "
             f"{tree.salt}")
    return [f'dm-mod.create="{table}"', "root=/dev/dm-0", *tail]
