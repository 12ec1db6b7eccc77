"""Kata, and a guest, installed on a host of `tests/hosttree.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from katagpu import kataconfig
from katagpu.kataconfig import KataSettings
from tests.hosttree import Tree

DATA = Path(__file__).parent / "data" / "kata"
DEFAULTS = "opt/kata/share/defaults/kata-containers"
GO = f"{DEFAULTS}/runtimes/qemu-nvidia-gpu/configuration-qemu-nvidia-gpu.toml"
RUST = (f"{DEFAULTS}/runtime-rs/runtimes/qemu-nvidia-gpu-runtime-rs/"
        "configuration-qemu-nvidia-gpu-runtime-rs.toml")
HOME = "opt/kata/share/kata-containers/katagpu"
DROP_INS = f"/{DEFAULTS}/runtimes/qemu-nvidia-gpu/config.d"
OURS = f"{DROP_INS}/55-katagpu-host.toml"
OWN = "/etc/kata-containers/katagpu/configuration.toml"
LINE = (f"root_hash={'ab' * 32},salt={'01' * 32},data_blocks=12,data_block_size=4096,"
        "hash_block_size=4096")
KERNEL_RELEASE = "6.12.118-nvidia-gpu"


def kata(tree: Tree, version: str = "4.1.0", *, rust: bool = False) -> None:
    """Kata, as kata-deploy puts a release there."""
    number = tuple(int(part) for part in version.split("."))
    tree.file("opt/kata/VERSION", f"{version}\n")
    tree.file("opt/kata/bin/containerd-shim-kata-v2", "").chmod(0o755)
    if number >= (3, 27):
        tree.file(GO, (DATA / "go-4.1.toml").read_text())
        if rust:
            tree.file("opt/kata/runtime-rs/bin/containerd-shim-kata-v2", "").chmod(0o755)
            tree.file(RUST, (DATA / "rs-4.1.toml").read_text())
    elif number >= (3, 2):
        tree.file(f"{DEFAULTS}/configuration-qemu-nvidia-gpu.toml",
                  (DATA / "go-3.7.toml").read_text())
        tree.file(f"{DEFAULTS}/configuration-qemu.toml", (DATA / "go-3.7.toml").read_text())
    else:
        tree.file(f"{DEFAULTS}/configuration-qemu.toml", (DATA / "go-2.4.toml").read_text())
        tree.file(f"{DEFAULTS}/configuration-clh.toml", "[hypervisor.clh]\n")
        tree.link(tree.root / DEFAULTS / "configuration.toml",
                  tree.root / DEFAULTS / "configuration-qemu.toml")


def guest(tree: Tree, *, placed: bool = True, name: str = "toy-1.0.0", current: bool = True,
          **changes: Any) -> KataSettings:
    """A release of a guest, installed; `placed`: with its drop-in at Kata's runtime."""
    place = f"{HOME}/{name}"
    values: dict[str, Any] = {"kernel": f"/{place}/vmlinuz-{KERNEL_RELEASE}",
                              "image": f"/{place}/kata-toy.image", **changes}
    settings = KataSettings(**values)
    for path in (settings.kernel, settings.image or settings.initrd or "",
                 *(disk.path for disk in settings.extensions)):
        tree.file(path, "something")
    facts: dict[str, Any] = {
        "schema": 1, "recipe": "toy", "kernel_release": KERNEL_RELEASE,
        "driver": {"version": "580.95.05"}, "image": {"format": settings.rootfs_type}}
    if settings.kernel_verity_params:
        facts["kernel_verity_params"] = settings.kernel_verity_params
    tree.file(f"{place}/manifest-1.0.0.json", json.dumps(facts))
    text = kataconfig.render_drop_in(settings)
    tree.file(f"{place}/config/50-katagpu.toml", text)
    if current:
        (tree.root / HOME / "current").symlink_to(name)
    if placed:
        tree.file(f"{DROP_INS}/50-katagpu.toml", text)
    return settings


def read(tree: Tree, path: str) -> str:
    """A file of the host."""
    return (tree.root / path.lstrip("/")).read_text()
