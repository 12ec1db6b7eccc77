"""What the default guest must be, looked at from outside with the real tools."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from katagpu import disk, keys
from katagpu.context import Context
from katagpu.sandbox import Bind, Root
from katagpu.stages.api import Build

Guest = tuple[Build, Root]
LARGEST = 300_000_000  # bytes; the aim is 250 MB


def artifact(context: Context, pattern: str) -> Path:
    found = [path for path in context.directory.glob(pattern) if not path.is_symlink()]
    assert len(found) == 1, (pattern, found)
    return found[0]


def inside(guest: Guest, *argv: str) -> str:
    build, root = guest
    return build.enter(argv, [root], capture=True).stdout.decode()


def test_every_artifact_is_what_the_manifest_says(context: Context) -> None:
    manifest = json.loads(artifact(context, "manifest.json").read_text())
    names = {"image": "kata-*.image", "vmlinuz": "vmlinuz-*", "vmlinux": "vmlinux-*",
             "headers": "linux-headers-*", "kernel_config": "config-*",
             "kata_config": "50-katagpu.toml",
             "kata_config_rs": "50-katagpu-runtime-rs.toml",
             "sizes": "sizes.json", "files": "files.mtree", "sbom_spdx": "sbom.spdx.json",
             "sbom_cyclonedx": "sbom.cdx.json", "licences": "licences.txt"}
    assert set(names) == set(manifest["parts"])
    for part, pattern in names.items():
        path = artifact(context, pattern)
        assert keys.file_digest(path) == manifest["parts"][part]["sha256"], part
        assert path.stat().st_size == manifest["parts"][part]["size"], part


def test_image_has_katas_layout_and_is_small(context: Context) -> None:
    image = artifact(context, "kata-*.image")
    (partition,) = disk.partitions(image)
    assert partition.offset == 1 << 20
    assert partition.offset + partition.size == image.stat().st_size
    assert disk.fs_type(image, partition.offset) is disk.FsType.EROFS
    assert image.stat().st_size <= LARGEST


def test_the_packed_file_system_is_sound(context: Context, guest: Guest) -> None:
    build, _root = guest
    image = artifact(context, "kata-*.image")
    tools = Root(lower=(build.tree("tools"),), upper=build.directory("fsck"))
    build.enter(["fsck.erofs", "--offset=1048576", "/katagpu/image"], [tools],
                binds=[Bind(source=image, target="/katagpu/image")])


def test_modprobe_nvidia_finds_our_modules(context: Context, guest: Guest) -> None:
    kernel = context.plan.action("kernel")
    assert kernel is not None
    release = kernel.record["release"]
    for name in ("nvidia", "nvidia-uvm"):
        said = inside(guest, "modprobe", "--set-version", release, "--show-depends", name)
        assert f"/lib/modules/{release}/kernel/drivers/video/nvidia.ko" in said
        assert "nvidia-current" not in said


def test_modules_are_for_this_kernel_and_this_driver(context: Context, guest: Guest) -> None:
    kernel = context.plan.action("kernel")
    assert kernel is not None
    release = kernel.record["release"]
    module = f"/usr/lib/modules/{release}/kernel/drivers/video/nvidia.ko"
    assert inside(guest, "modinfo", "--field=version", module).strip() == "550.163.01"
    assert inside(guest, "modinfo", "--field=vermagic", module).split()[0] == release
    assert inside(guest, "modinfo", "--field=license", module).strip() == "Dual MIT/GPL"


@pytest.mark.parametrize("program", [
    ("nvidia-ctk", "--version"), ("nvidia-cdi-hook", "--version"), ("nvidia-smi", "--version"),
    ("nvidia-persistenced", "--version"), ("mkfs.ext4", "-V"), ("iptables", "--version"),
])
def test_programs_of_the_guest_start(guest: Guest, program: tuple[str, ...]) -> None:
    build, root = guest
    result = build.enter(program, [root], check=False, capture=True)
    # nvidia-smi says its version and fails for want of a driver; none may fail to load.
    assert result.status not in (126, 127), build.log.read_text()[-500:]


def test_toolkit_says_the_recipes_version(context: Context, guest: Guest) -> None:
    version = (context.recipe.toolkit.version or "").removeprefix("v")
    assert version in inside(guest, "nvidia-ctk", "--version")


def test_no_program_of_the_guest_lacks_a_library(guest: Guest) -> None:
    for name in ("libcuda.so.1", "libnvidia-ml.so.1", "libnvidia-nvvm.so.4",
                 "libnvidia-ptxjitcompiler.so.1"):
        said = inside(guest, "ldd", f"/usr/lib/x86_64-linux-gnu/{name}")
        assert "not found" not in said


def test_kata_drop_in_is_toml_and_names_our_links(context: Context) -> None:
    drop_in = tomllib.loads(artifact(context, "50-katagpu.toml").read_text())
    settings = drop_in["hypervisor"]["qemu"]
    for key in ("kernel", "image"):
        assert (context.directory / Path(settings[key]).name).exists()
    assert settings["rootfs_type"] == "erofs"


def test_nothing_to_do_is_seen_as_such(context: Context) -> None:
    # A boot check, by another test too, has put its manifest there.
    assert Context(context.root, {}, environment={}).complete("build_image")
    for stage in context.plan.closure("manifest"):
        assert context.plan.reason(stage) == "hit"
