"""A base without driver, alone and with the driver's disk mounted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from katagpu.check import Finding

from .toys import (
    DRIVER,
    EXTENSION,
    LIB,
    NVIDIA,
    RELEASE,
    UVM,
    Toy,
    library,
    program,
    split,
)
from .toys import module as assemble


@pytest.fixture
def both(toy: Toy) -> Toy:
    """The base with the disk."""
    return split(toy)


@pytest.fixture
def base(both: Toy) -> Toy:
    """The base alone."""
    shutil.rmtree(both.root / EXTENSION)
    return Toy(root=both.root, facts=replace(both.facts, driver=None, toolkit_programs=()))


def disk(toy: Toy) -> Path:
    return toy.root / EXTENSION


def about(toy: Toy, check: str) -> list[Finding]:
    return [finding for finding in toy.find() if finding.check == check]


def test_both_together_and_the_base_alone_are_sound(both: Toy) -> None:
    assert both.find() == []
    shutil.rmtree(disk(both))
    assert both.find(driver=None, toolkit_programs=()) == []


def test_without_its_disk_a_guest_with_a_driver_is_not(both: Toy) -> None:
    shutil.rmtree(disk(both))
    found = both.ids()
    assert {"driver-dlopen", "driver-programs", "driver-firmware", "modprobe-nvidia",
            "toolkit-cdi", "guest-units"} <= found


@pytest.mark.parametrize("path", [
    "usr/lib/systemd/system/kata-extension-mount@.service", "usr/libexec/kata-extension-mount.sh",
    "usr/libexec/kata-extension-umount.sh", "usr/sbin/veritysetup",
    "usr/lib/systemd/system-generators/kata-extension-mount-generator"])
def test_what_mounts_the_disk_is_missed(base: Toy, path: str) -> None:
    (base.root / path).unlink()
    assert f"/{path}" in [finding.where for finding in about(base, "extension-mount")]


def test_a_generator_that_may_not_run_is_missed(base: Toy) -> None:
    path = base.root / "usr/lib/systemd/system-generators/kata-extension-mount-generator"
    path.chmod(0o644)
    assert "extension-mount" in base.ids()


def test_the_kernel_has_to_open_it_and_the_firmware_needs_a_place(base: Toy) -> None:
    config = base.facts.kernel_config
    config.write_text(config.read_text().replace("CONFIG_DM_VERITY=y", ""))
    (base.root / "usr/lib/firmware/nvidia").rmdir()
    said = [finding.what for finding in about(base, "extension-mount")]
    assert len(said) == 2 and any("DM_VERITY" in what for what in said)


@pytest.mark.parametrize("mounted", [False, True])
def test_a_driver_in_the_base(both: Toy, mounted: bool) -> None:
    library(both.root / LIB / f"libcuda.so.{DRIVER}", "libcuda.so.1")
    firmware = both.root / "usr/lib/firmware/nvidia/1.2/gsp_ga10x.bin"
    firmware.parent.mkdir()
    firmware.write_bytes(b"")
    shutil.copy(both.root / "usr/bin/kmod", both.root / "usr/bin/nvidia-smi")
    assemble(both.root / "usr/lib/modules" / RELEASE / "nvidia.ko", NVIDIA)
    if not mounted:
        shutil.rmtree(disk(both))
        both = Toy(root=both.root, facts=replace(both.facts, driver=None, toolkit_programs=()))
    assert {finding.where for finding in about(both, "extension-base")} == {
        f"/{LIB}/libcuda.so.{DRIVER}", "/usr/lib/firmware/nvidia/1.2/gsp_ga10x.bin",
        "/usr/bin/nvidia-smi", f"/usr/lib/modules/{RELEASE}/nvidia.ko"}


def test_a_library_without_its_name_for_programs(both: Toy) -> None:
    (disk(both) / LIB / "libnvidia-cfg.so.1").unlink()
    (finding,) = about(both, "extension-libraries")
    assert "libnvidia-cfg.so.1" in finding.what and "ldconfig -n" in finding.cure
    assert "elf-cache" in both.ids()  # which lists what is gone


def test_a_library_in_another_directory_of_the_disk(both: Toy) -> None:
    place = disk(both) / LIB / "nvidia/current"
    place.mkdir(parents=True)
    library(place / "libnvidia-extra.so.1", "libnvidia-extra.so.1")
    (finding,) = about(both, "extension-libraries")
    assert finding.where == f"/{EXTENSION}/{LIB}/nvidia/current/libnvidia-extra.so.1"


def test_the_disk_s_own_cache_has_to_list_the_driver(both: Toy) -> None:
    library(disk(both) / LIB / "libnvidia-new.so.1", "libnvidia-new.so.1")
    (finding,) = about(both, "elf-cache")
    assert finding.where == f"/{EXTENSION}/etc/ld.so.cache"
    assert "libnvidia-new.so.1" in finding.what


def test_programs_of_the_disk_see_its_libraries_and_those_of_the_base_do_not(both: Toy) -> None:
    needed = disk(both) / LIB / f"libcuda.so.{DRIVER}"
    program(disk(both) / "bin/nvidia-debugdump", needed, call="f_x")
    assert "elf-needed" not in both.ids()
    program(both.root / "usr/bin/greedy", needed, call="f_x")
    (finding,) = about(both, "elf-needed")
    assert finding.where == "/usr/bin/greedy" and "libcuda.so.1" in finding.what


def test_each_module_directory_has_indexes_of_its_own(both: Toy) -> None:
    assemble(disk(both) / "lib/modules" / RELEASE / "more.ko",
             replace(UVM, name="more", depends="", uses=("_printk",)))
    (finding,) = about(both, "depmod-complete")
    assert finding.where == f"/{EXTENSION}/lib/modules/{RELEASE}/modules.dep"


def test_a_module_of_the_base_is_not_seen_from_the_disk(both: Toy) -> None:
    """modprobe with --dirname reads one directory: what the driver needs has to be in it."""
    place = both.root / "usr/lib/modules" / RELEASE
    place.mkdir(parents=True, exist_ok=True)
    (disk(both) / f"lib/modules/{RELEASE}/updates/nvidia.ko").rename(place / "nvidia.ko")
    found = both.ids()
    assert {"modprobe-nvidia", "depmod-complete", "extension-base"} <= found


def test_a_disk_of_another_kernel_s_build(both: Toy) -> None:
    record = disk(both) / f"lib/modules/{RELEASE}/kernel-build-id"
    record.write_text("feed\n")
    findings = [finding for finding in both.find(kernel_build_id="beef")
                if finding.check == "module-build-id"]
    assert [finding.where for finding in findings] == [
        f"/{EXTENSION}/lib/modules/{RELEASE}/kernel-build-id"]
    (disk(both) / f"lib/modules/{RELEASE}/driver-headers").write_text("0  settings\n")
    assert {finding.where for finding in both.find() if finding.check == "module-headers"} == {
        f"/{EXTENSION}/lib/modules/{RELEASE}/driver-headers"}
    other = disk(both) / "lib/modules/9.9-other"
    other.mkdir()
    assert "module-other-kernel" in both.ids()
