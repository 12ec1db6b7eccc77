"""What Kata sees, compared with what a guest needs: each difference with its cure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from katagpu.host.katafiles import Effective, Target, effective
from katagpu.host.machine import Machine
from katagpu.kataconfig import HYPERVISOR, KataSettings, tables
from katagpu.kataversions import reads_drop_ins

# What a runtime does without the key (config.go: a Go value that nothing sets is its zero).
UNSET: Mapping[str, Any] = {"rootfs_type": "ext4", "vfio_mode": "guest-kernel",
                            "cold_plug_vfio": "no-port", "hot_plug_vfio": "no-port"}
AT_LEAST = frozenset(("default_memory", "default_vcpus", "pcie_root_port", "pcie_switch_port",
                      "dial_timeout", "reconnect_timeout_ms", "create_container_timeout"))
FILES = frozenset(("kernel", "image", "initrd"))
PLUGS = ("cold_plug_vfio", "hot_plug_vfio")
WHY: Mapping[str, str] = {
    "kernel": "another kernel has none of the image's modules",
    "image": "another image has no driver, or not for this kernel",
    "initrd": "an initrd beside an image is refused",
    "rootfs_type": "the kernel mounts the root as this",
    "kernel_verity_params": "the root hash is that of another image",
    "kernel_params": "what is lacking is what a GPU guest needs, or what another file sets; a "
                     "drop-in replaces all of it",
    "machine_type": "it has no PCI Express ports",
    "disable_image_nvdimm": "the image has no DAX header, or has one",
    "cold_plug_vfio": "the GPU is plugged into no port",
    "hot_plug_vfio": "one of cold and hot plugging, and not both",
    "hotplug_vfio_on_root_bus": "large BARs want a root port; small ones a bridge",
    "pcie_root_port": "there are more functions than ports",
    "pcie_switch_port": "there are more functions than ports",
    "guest_hook_path": "hooks in the guest where its toolkit wants them, and only there",
    "guest_extension_images": "the driver is on a disk of its own, or is not",
    "vm_rootfs_driver": "the kernel finds its root on this",
    "vfio_mode": "in mode vfio the container gets the raw device and the driver none",
    "default_memory": "the driver and CUDA want more",
    "dial_timeout": "a guest with a GPU starts slowly",
    "reconnect_timeout_ms": "a guest with a GPU starts slowly",
    "create_container_timeout": "the first pull of a CUDA image takes longer",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A value that is not what the guest needs; `wants` None: the thing itself is wrong."""

    what: str
    cure: str
    table: str = ""
    key: str = ""
    has: Any = None
    wants: Any = None
    origin: str = ""

    @property
    def lines(self) -> list[str]:
        """What is wrong, and the cure."""
        return [self.what, f"    cure: {self.cure}"]


def differences(machine: Machine, target: Target, settings: KataSettings) -> list[Difference]:
    """All of them, with problems of the files first. Raises `UserError` for files that are none."""
    found = effective(machine, target)
    return [*(Difference(what, cure) for what, cure in found.problems),
            *_others(found, target), *_values(machine, target, settings, found),
            *_missing(machine, settings)]


def _others(found: Effective, target: Target) -> Iterator[Difference]:
    names = sorted(name for name in found.values.get("hypervisor", {}) if name != "qemu")
    if names:
        yield Difference(f"{target.config} is for another hypervisor ({', '.join(names)}): a GPU "
                         "needs QEMU", "--config FILE with the configuration of QEMU")


def _values(machine: Machine, target: Target, settings: KataSettings,
            found: Effective) -> Iterator[Difference]:
    wanted: dict[str, dict[str, Any]] = {name: dict(keys) for name, keys in
                                         tables(settings).items()}
    if settings.extensions:
        wanted[HYPERVISOR]["guest_extension_images"] = [
            dataclasses.asdict(disk) for disk in settings.extensions]
    for table, keys in wanted.items():
        have = found.table(table)
        for key, wants in keys.items():
            has = have.get(key, _unset(key, wants))
            if _good(machine, settings, key, has, wants, have):
                continue
            origin = found.origin.get((table, key), "")
            at = f"{origin or 'nothing'} sets {key}" if origin else f"{key} is set nowhere"
            yield Difference(f"[{table}] {at}{f' = {has!r}' if origin else ''}; this guest needs "
                             f"{wants!r}: {WHY.get(key, 'the guest depends on it')}",
                             _cure(target, origin), table, key, has, wants, origin)


def _unset(key: str, wants: Any) -> Any:
    return UNSET.get(key, type(wants)())


def _good(machine: Machine, settings: KataSettings, key: str, has: Any, wants: Any,
          table: Mapping[str, Any]) -> bool:
    if type(has) is not type(wants):
        return False
    if key in AT_LEAST and wants:
        return bool(has >= wants)
    if key == "kernel_params":
        return set(str(wants).split()) <= set(str(has).split())
    if key in FILES and has and wants:
        return bool(has == wants) or machine.real(str(has)) == machine.real(str(wants))
    if key == "kernel_verity_params":
        return sorted(str(has).split(",")) == sorted(str(wants).split(","))
    if key in PLUGS and has != wants:  # the other of the two serves as well
        return {str(table.get(name, "no-port")) for name in PLUGS} == {"no-port",
                                                                       str(settings.port)}
    return bool(has == wants)


def _cure(target: Target, origin: str) -> str:
    write = "katagpu host configure"
    if origin and origin != target.config and reads_drop_ins(target.shim, target.version):
        return f"remove the line from {origin}, or {write}"
    return write


def _missing(machine: Machine, settings: KataSettings) -> Iterator[Difference]:
    """Files of the guest that are not there."""
    disks = [disk.path for disk in settings.extensions]
    for path in (settings.kernel, settings.image or settings.initrd or "", *disks):
        if not machine.exists(path):
            yield Difference(f"{path} is not there", "install the release (katagpu-install.pyz), "
                             "or copy the file to that place")
