"""The default guest with the driver on a disk of its own: built, read back, verified."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import disk, filelist, guest, verity
from katagpu.context import Context
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.stages import consistency, disks, layers
from katagpu.stages.api import Build
from tests.splitguest import NAME, Split


def test_both_disks_have_katas_layout(split: Split) -> None:
    (root,) = disk.partitions(split.blob("image"))
    assert root.offset == 1 << 20
    image = split.blob("extension")
    data, hashes = disk.partitions(image)
    assert (data.offset, data.boot) == (1 << 20, True)
    assert data.offset + data.size == hashes.offset
    assert hashes.offset + hashes.size == image.stat().st_size
    for path, part in ((split.blob("image"), root), (image, data)):
        assert disk.fs_type(path, part.offset) is disk.FsType.EROFS
    # The driver's disk is what grows with the driver; the base is for all of them.
    assert split.blob("image").stat().st_size < 80_000_000
    assert image.stat().st_size < 130_000_000


def test_the_driver_s_disk_is_verified_by_the_tool_and_a_flipped_bit_is_found(
        split: Split) -> None:
    known = verity.read(split.blob("extension", "verity").read_text())
    data, hashes = split.part("extension", 1), split.part("extension", 2)
    assert known.data_blocks * verity.BLOCK == data.stat().st_size
    argv = verity.check(disks.OUT / "data", disks.OUT / "hashes", known)

    def status(changed: Path) -> int:
        return split.tool(*argv, check=False, binds=(
            Bind(source=changed, target=str(disks.OUT / "data")),
            Bind(source=hashes, target=str(disks.OUT / "hashes"))))

    assert status(data) == 0
    damaged = split.place / "damaged"
    shutil.copyfile(data, damaged)
    with damaged.open("r+b") as stream:
        stream.seek(data.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    assert status(damaged) != 0


def test_each_file_is_on_its_own_disk(split: Split) -> None:
    base, driver = split.files("image"), split.files("extension")
    kernel = split.plan.action("kernel")
    assert kernel is not None
    release = kernel.record["release"]
    version = split.recipe.driver.version
    on_disk = {str(path.relative_to(driver)) for path in driver.rglob("*")}
    library = "usr/lib/x86_64-linux-gnu"
    assert {"bin/nvidia-smi", "bin/nvidia-persistenced", "bin/nvidia-ctk", "bin/nvidia-cdi-hook",
            f"{library}/libcuda.so.{version}", f"{library}/libcuda.so.1",
            f"{library}/libnvidia-ml.so.1", "etc/ld.so.cache",
            f"lib/firmware/nvidia/{version}/gsp_ga10x.bin",
            f"lib/modules/{release}/kernel/drivers/video/nvidia.ko",
            f"lib/modules/{release}/modules.dep.bin",
            f"lib/modules/{release}/kernel-build-id",
            f"lib/modules/{release}/driver-headers"} <= on_disk
    assert not [name for name in on_disk if re.search(r"libc\.so|systemd|dpkg", name)]
    in_base = {str(path.relative_to(base)) for path in base.rglob("*")}
    assert {"usr/sbin/veritysetup", "usr/libexec/kata-extension-mount.sh",
            "usr/lib/firmware/nvidia", f"usr/lib/modules/{release}/modules.builtin"} <= in_base
    assert not [name for name in in_base
                if re.search(r"libcuda|libnvidia|nvidia(-uvm)?\.ko|gsp_|nvidia-(smi|ctk)", name)]
    status = (base / "var/lib/dpkg/status").read_text()
    assert "Package: cryptsetup-bin" in status and "Package: libcuda1" not in status


@pytest.mark.parametrize("mounted", [False, True], ids=["base", "both"])
def test_what_was_read_back_passes_the_checks(split: Split, mounted: bool) -> None:
    """Libraries, modules, versions and units of the two file systems, and not of their layers."""
    stage = split.plan.stages["extension_root"]
    inputs = {role: split.output(ref.stage, ref.output) for role, ref in stage.inputs.items()
              if role in consistency.INPUTS}
    build = Build(stage, split.plan.store, inputs, split.build.directory(f"check-{mounted}"),
                  split.build.log)
    roots = [Root(lower=(split.files("image"),), upper=build.directory("upper"), special=False)]
    if mounted:
        roots.append(Root(lower=(split.files("extension"),), target=layers.EXTENSION_ROOT,
                          special=False))
    found = consistency.check(
        build, roots, driver=stage.options["driver"] if mounted else None,
        toolkit=stage.options["toolkit"], agent=False, vgpu=False, root_format="erofs",
        compressor="zstd", extension=layers.EXTENSION_ROOT)
    assert found == []


def test_the_programs_start_where_they_are_mounted(split: Split) -> None:
    build = split.build
    root = Root(lower=(split.files("image"),), upper=build.directory("booted"))
    mounted = Root(lower=(split.files("extension"),), target=layers.EXTENSION_ROOT, special=False)
    place = layers.EXTENSION_ROOT
    env = {"LD_LIBRARY_PATH": f"{place}/usr/lib/x86_64-linux-gnu"}

    def run(*argv: str) -> str:
        return build.enter(argv, [root, mounted], env=env, capture=True).stdout.decode()

    version = (split.recipe.toolkit.version or "").removeprefix("v")
    assert version in run(f"{place}/bin/nvidia-ctk", "--version")
    assert "not found" not in run("ldd", f"{place}/bin/nvidia-smi")
    assert run(f"{place}/bin/nvidia-persistenced", "--version")
    kernel = split.plan.action("kernel")
    assert kernel is not None
    release = kernel.record["release"]
    said = run("modprobe", "--dirname", place, "--set-version", release, "--show-depends",
               "nvidia-uvm")
    assert f"{place}/lib/modules/{release}/kernel/drivers/video/nvidia.ko" in said
    # The options of the base's modprobe.d count for modules on the disk.
    assert "NVreg_DeviceFileMode=0666" in said


# Management mode finds the same files as nvml mode, and asks no GPU; nodes are all that it wants.
GENERATE = """
for node in nvidia0 nvidiactl nvidia-uvm; do
    touch /dev/$node; mount --bind /dev/null /dev/$node
done
mkdir -p /run/nvidia-persistenced; touch /run/nvidia-persistenced/socket
sed s/--mode=nvml/--mode=management/ /usr/libexec/katagpu/nvidia-guest >/tmp/guest
sh /tmp/guest cdi && cat /run/cdi/nvidia.yaml
"""


def test_containers_get_the_driver_at_the_usual_paths(split: Split) -> None:
    import yaml

    build, place = split.build, layers.EXTENSION_ROOT
    roots = [Root(lower=(split.files("image"),), upper=build.directory("cdi")),
             Root(lower=(split.files("extension"),), target=place, special=False)]
    said = build.enter(["sh", "-c", GENERATE], roots, capture=True).stdout
    edits = yaml.safe_load(said)["containerEdits"]
    mounts = {mount["containerPath"]: mount["hostPath"] for mount in edits["mounts"]}
    version, library = split.recipe.driver.version, "/usr/lib/x86_64-linux-gnu"
    wanted = {f"{library}/lib{name}.so.{version}" for name in (
        "cuda", "nvidia-ml", "nvidia-nvvm", "nvidia-ptxjitcompiler", "nvidia-pkcs11-openssl3")}
    wanted |= {"/bin/nvidia-smi", f"/lib/firmware/nvidia/{version}/gsp_ga10x.bin",
               "/var/run/nvidia-persistenced/socket"}
    assert wanted <= set(mounts)
    assert {inside: f"{place}{inside}" for inside in mounts} == mounts
    hooks = {hook["args"][1]: hook for hook in edits["hooks"]}
    assert {hook["path"] for hook in hooks.values()} == {f"{place}/bin/nvidia-cdi-hook"}
    assert f"libcuda.so.1::{library}/libcuda.so" in hooks["create-symlinks"]["args"]
    assert "/sbin/ldconfig" in hooks["update-ldcache"]["args"]


def test_another_driver_leaves_the_base_a_hit(split: Split, context: Context) -> None:
    split.plan.ensure("image")
    other = replace(split.recipe, driver=replace(split.recipe.driver, version="550.200"))
    groups = {**split.lock.groups}
    for name in ("driver_user", "driver_source"):
        groups[name] = tuple(replace(deb, version="550.200-1", sha256="0" * 64)
                             for deb in groups[name])
    plan = Plan(guest.stages(other, replace(split.lock, groups=groups), context.root),
                context.store, split.plan.logs)
    assert [name for name in plan.closure("image") if plan.reason(name) != "hit"] == []
    assert plan.action("image") == split.plan.action("image")
    assert plan.reason("driver_modules") != "hit" and plan.reason("extension") != "hit"


def test_drop_ins_and_manifest_name_both_disks(split: Split) -> None:
    line = split.blob("extension", "verity").read_text().strip()
    for name in ("config", "config_rs"):
        table = tomllib.loads(split.blob("kata_config", name).read_text())["hypervisor"]["qemu"]
        (listed,) = table["guest_extension_images"]
        assert (listed["name"], listed["verity_params"]) == ("gpu", line)
        assert Path(listed["path"]).name == f"kata-{NAME}-nvidia-gpu-extension-550.163.01.image"
        assert Path(table["image"]).name == "kata-containers-nvidia.img"
    manifest = json.loads(split.blob("manifest", "manifest").read_text())
    assert manifest["verity_params"] == line
    for part, stage, output in (
            ("image", "image", "image"), ("extension", "extension", "image"),
            ("extension_files", "extension", "files"), ("extension_sizes", "extension", "sizes")):
        assert manifest["parts"][part]["sha256"] == split.output(stage, output).identity
    listed = {entry.path for entry in filelist.parse(split.blob("extension", "files").read_bytes())}
    assert listed == {"", *(str(path.relative_to(split.files("extension")))
                            for path in split.files("extension").rglob("*"))}
    assert "cryptsetup-bin" in manifest["packages"]
    assert manifest["checks"] == ["every check passed"] * 2


def test_the_documents_are_of_both_disks(split: Split) -> None:
    bom = json.loads(split.blob("sbom", "cyclonedx").read_text())
    named = {prop["name"]: prop["value"] for prop in bom["metadata"]["component"]["properties"]}
    assert set(named.values()) == {f"sha256:{split.output(stage, 'image').identity}"
                                   for stage in ("image", "extension")}
    names = {each["name"] for each in bom["components"]}
    # A package of the base, its reader of verity, one of the driver's disk, and one of neither.
    assert {"systemd", "cryptsetup-bin", "libcuda1"} <= names and "nvidia-support" not in names
    (driver,) = [each for each in bom["components"] if each["name"] == "nvidia-driver"]
    assert all(file["name"].startswith(f"{layers.EXTENSION_ROOT}/")
               for file in driver["components"])
    assert driver["licenses"][0]["license"]["name"] == "NVIDIA-graphics-drivers"
    assert "github.com/NVIDIA/nvidia-container-toolkit" in names
