"""One driver in modules, user space and firmware, with the libraries that are only dlopened."""

from __future__ import annotations

from dataclasses import replace

import pytest

from katagpu.check import Capability, Driver, Finding, Flavour, Severity

from .toys import DRIVER, LIB, MODULES, NVIDIA, UVM, Toy, cache_entries, depmod, ldconfig, library
from .toys import module as assemble


def about(toy: Toy, check: str, **facts: object) -> list[Finding]:
    return [finding for finding in toy.find(**facts) if finding.check == check]


@pytest.mark.parametrize("name", [
    "libcuda.so.1", "libnvidia-nvvm.so.4", "libnvidia-ptxjitcompiler.so.1", "libnvidia-ml.so.1",
    f"libnvidia-pkcs11-openssl3.so.{DRIVER}", "libnvidia-cfg.so.1"])
def test_a_missing_dlopened_library(toy: Toy, name: str) -> None:
    (toy.root / LIB / name).unlink()
    ldconfig(toy.root, cache_entries(toy.root))
    findings = about(toy, "driver-dlopen")
    assert [name in finding.what for finding in findings] == [True]


def test_only_the_capabilities_asked_for(toy: Toy) -> None:
    (toy.root / LIB / "libnvidia-nvvm.so.4").unlink()
    ldconfig(toy.root, cache_entries(toy.root))

    def lacks(*capabilities: Capability, version: str = DRIVER) -> set[str]:
        driver = Driver(version=version, flavour=Flavour.OPEN,
                        capabilities=frozenset(capabilities))
        return {finding.where.rpartition("/")[2] for finding in
                about(toy, "driver-dlopen", driver=driver)}

    assert lacks(Capability.UTILITY) == set()
    assert lacks(Capability.COMPUTE) == {"libnvidia-nvvm.so.4"}
    assert "libnvcuvid.so.1" in lacks(Capability.VIDEO)
    assert "libnvidia-nvvm.so.4" not in lacks(Capability.COMPUTE, version="460.1")
    assert "driver-graphics" in toy.ids(driver=Driver(
        version=DRIVER, flavour=Flavour.OPEN, capabilities=frozenset({Capability.GRAPHICS})))


def test_persistenced_is_what_wants_cfg(toy: Toy) -> None:
    (toy.root / LIB / "libnvidia-cfg.so.1").unlink()
    (toy.root / "usr/bin/nvidia-persistenced").unlink()
    ldconfig(toy.root, cache_entries(toy.root))
    assert "driver-dlopen" not in toy.ids()


def test_a_link_to_another_library_or_driver(toy: Toy) -> None:
    link = toy.root / LIB / "libnvidia-ml.so.1"
    link.unlink()
    link.symlink_to(f"libcuda.so.{DRIVER}")
    [finding] = about(toy, "driver-dlopen")
    assert "calls itself libcuda.so.1" in finding.what
    library(toy.root / LIB / "libnvidia-ml.so.550.90.07", "libnvidia-ml.so.1")
    link.unlink()
    link.symlink_to("libnvidia-ml.so.550.90.07")
    assert {"driver-dlopen", "driver-version"} <= toy.ids()


def test_two_drivers_in_user_space(toy: Toy) -> None:
    library(toy.root / LIB / "libnvidia-opencl.so.595.71.05", None)
    [finding] = about(toy, "driver-version")
    assert "595.71.05" in finding.what


@pytest.mark.parametrize("path", [
    f"{LIB}/libnvidia-container.so.1.17.8", f"{LIB}/libnvidia-egl-wayland.so.1.1.13",
    "usr/local/cuda/compat/libcuda.so.595.71.05", f"{LIB}/libnvidia-fbc.so.{DRIVER}"])
def test_libraries_with_versions_of_their_own(toy: Toy, path: str) -> None:
    library(toy.root / path, None)
    assert toy.ids() == set()


def test_a_module_of_another_driver(toy: Toy) -> None:
    toy.module(replace(NVIDIA, version="595.58.03"))
    [finding] = about(toy, "driver-version")
    assert "595.58.03" in finding.what
    assert toy.ids(driver=Driver(version="595.58.03", flavour=Flavour.OPEN)) >= {"driver-version"}


def test_a_module_of_the_other_flavour(toy: Toy) -> None:
    toy.module(replace(NVIDIA, license="NVIDIA"))
    assert toy.ids() == {"driver-flavour"}
    assert toy.ids(driver=Driver(version=DRIVER, flavour=Flavour.CLOSED)) == set()


def test_firmware(toy: Toy) -> None:
    directory = toy.root / "usr/lib/firmware/nvidia"
    (directory / DRIVER).rename(directory / "550.90.07")
    findings = about(toy, "driver-firmware")
    assert len(findings) == 2 and "550.90.07" in findings[0].cure
    assert {finding.severity for finding in findings} == {Severity.ERROR}
    toy.module(replace(NVIDIA, license="NVIDIA"))
    closed = Driver(version=DRIVER, flavour=Flavour.CLOSED)
    assert {finding.severity for finding in toy.find(driver=closed)} == {Severity.WARNING}


def test_rivals(toy: Toy) -> None:
    assemble(toy.root / MODULES / "kernel/nouveau.ko", replace(UVM, name="nouveau", version=None))
    assert "driver-rivals" in toy.ids()
    (toy.root / MODULES / "kernel/nouveau.ko").unlink()
    depmod(toy.root)
    builtin = toy.root / MODULES / "modules.builtin"
    text = builtin.read_text()
    builtin.write_text(text + "kernel/drivers/gpu/drm/nouveau/nouveau.ko\n")
    assert toy.ids() == {"driver-rivals"}
    builtin.write_text(text)
    toy.configure("CONFIG_NOVA_CORE=y")
    assert toy.ids() == {"driver-rivals"}


def test_programs(toy: Toy) -> None:
    (toy.root / "usr/bin/nvidia-smi").chmod(0o644)
    assert toy.ids() == {"driver-programs"}


def test_vendor_files(toy: Toy) -> None:
    opencl = toy.root / "etc/OpenCL/vendors/nvidia.icd"
    opencl.parent.mkdir(parents=True)
    opencl.write_text("libcuda.so.1\n")
    vulkan = toy.root / "usr/share/vulkan/icd.d/nvidia_icd.json"
    vulkan.parent.mkdir(parents=True)
    vulkan.write_text('{"ICD": {"library_path": "libcuda.so.1"}}')
    assert toy.ids() == set()
    opencl.write_text("libnvidia-opencl.so.1\n")
    vulkan.write_text('{"ICD": {}}')
    assert len(about(toy, "driver-vendor-files")) == 2


def test_a_guest_without_driver(toy: Toy) -> None:
    for path in (toy.root / LIB).glob("lib*n*v*"):
        path.unlink()
    ldconfig(toy.root, {"libc.so.6": "/lib/x86_64-linux-gnu/libc.so.6"})
    for path in (toy.root / MODULES / "updates").iterdir():
        path.unlink()
    depmod(toy.root)
    (toy.root / MODULES / "modules.alias").write_text("")
    assert toy.ids(driver=None) & {"driver-dlopen", "driver-firmware", "modprobe-nvidia",
                                   "driver-programs", "module-readable"} == set()
