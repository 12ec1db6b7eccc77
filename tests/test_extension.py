"""The root of the driver's disk: what is picked out of the driver's layers, and what stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from katagpu import extension
from katagpu.errors import StepError
from tests.check.toys import DRIVER, LIB, MODULES, NVIDIA, RELEASE, UVM, library, module, program

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
CURRENT = f"{LIB}/nvidia/current"  # Debian's directory, over which alternatives lead


class Layers:
    """Debian's form of the driver, in layers over a base, and the merged root."""

    def __init__(self, top: Path) -> None:
        self.base, self.driver = top / "base", top / "driver"
        self.toolkit, self.modules = top / "toolkit", top / "modules"
        self.root, self.out = top / "root", top / "out"
        self._base()
        self._driver()
        program(self.toolkit / "usr/bin/nvidia-ctk")
        program(self.toolkit / "usr/bin/nvidia-cdi-hook")
        program(self.toolkit / "usr/bin/nvidia-container-runtime-hook")
        module(self.modules / MODULES / "kernel/drivers/video/nvidia.ko", NVIDIA)
        module(self.modules / MODULES / "kernel/drivers/video/nvidia-uvm.ko", UVM)
        (self.modules / MODULES / "driver-headers").write_text("what they were compiled against\n")

    def _base(self) -> None:
        for name in ("bin", "sbin", "lib", "lib64"):
            self.base.mkdir(exist_ok=True)
            (self.base / name).symlink_to(f"usr/{name}")
        library(self.base / LIB / "libc.so.6", "libc.so.6")
        (self.base / MODULES).mkdir(parents=True)
        for name in ("modules.builtin", "modules.order", "kernel-build-id"):
            (self.base / MODULES / name).write_text(f"{name}\n")
        (self.base / "usr/share/doc/libc6").mkdir(parents=True)
        (self.base / "usr/share/doc/libc6/copyright").write_text("of the base")

    def _driver(self) -> None:
        of_base = self.base / LIB / "libc.so.6"
        library(self.driver / LIB / "libhelper.so.3.1", "libhelper.so.3", of_base)
        library(self.driver / LIB / "libunneeded.so.1", "libunneeded.so.1")
        (self.driver / LIB / "libhelper.so.3").symlink_to("libhelper.so.3.1")
        helper = self.driver / LIB / "libhelper.so.3.1"
        library(self.driver / CURRENT / f"libcuda.so.{DRIVER}", "libcuda.so.1", of_base)
        library(self.driver / CURRENT / f"libnvidia-ml.so.{DRIVER}", "libnvidia-ml.so.1")
        library(self.driver / LIB / "vdpau" / f"libvdpau_nvidia.so.{DRIVER}",
                "libvdpau_nvidia.so.1")
        alternatives = self.driver / "etc/alternatives"
        alternatives.mkdir(parents=True)
        (alternatives / "nvidia-smi").symlink_to("/usr/lib/nvidia/current/nvidia-smi")
        program(self.driver / "usr/lib/nvidia/current/nvidia-smi", helper, call="f_x")
        (self.driver / "usr/bin").mkdir()
        (self.driver / "usr/bin/nvidia-smi").symlink_to("/etc/alternatives/nvidia-smi")
        program(self.driver / "usr/bin/lspci")
        vendors = self.driver / "etc/OpenCL/vendors"
        vendors.mkdir(parents=True)
        (alternatives / "nvidia.icd").symlink_to("/usr/lib/nvidia/current/nvidia.icd")
        (self.driver / "usr/lib/nvidia/current/nvidia.icd").write_text("libcuda.so.1\n")
        (vendors / "nvidia.icd").symlink_to("/etc/alternatives/nvidia.icd")
        firmware = self.driver / "usr/lib/firmware/nvidia" / DRIVER
        firmware.mkdir(parents=True)
        (firmware / "gsp_ga10x.bin").write_bytes(b"\x7fELF of another processor")
        (self.driver / "usr/share/doc/libcuda1").mkdir(parents=True)
        (self.driver / "usr/share/doc/libcuda1/copyright").write_text("NVIDIA's")

    def harvest(self, *whole: Path) -> dict[str, int]:
        """What the stage does, with the layers merged by copying."""
        for layer in (self.base, self.toolkit, self.driver, self.modules):
            shutil.copytree(layer, self.root, symlinks=True, dirs_exist_ok=True)
        self.out.mkdir()
        return extension.harvest(
            self.root, layers=[str(layer) for layer in (self.toolkit, self.driver, self.modules)],
            whole=[str(layer) for layer in whole], out=str(self.out), release=RELEASE)

    def made(self) -> set[str]:
        """Every file and link of the result."""
        return {str(path.relative_to(self.out)) for path in self.out.rglob("*")
                if path.is_symlink() or path.is_file()}


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path)


def test_what_is_on_the_disk_is_exactly_this(layers: Layers) -> None:
    counts = layers.harvest()
    modules = f"lib/modules/{RELEASE}"
    assert layers.made() == {
        "bin/nvidia-smi", "bin/nvidia-ctk", "bin/nvidia-cdi-hook",
        f"{LIB}/libcuda.so.{DRIVER}", f"{LIB}/libnvidia-ml.so.{DRIVER}",
        f"{LIB}/vdpau/libvdpau_nvidia.so.{DRIVER}", f"{LIB}/libhelper.so.3.1",
        f"{modules}/kernel/drivers/video/nvidia.ko",
        f"{modules}/kernel/drivers/video/nvidia-uvm.ko",
        f"{modules}/modules.builtin", f"{modules}/modules.order", f"{modules}/kernel-build-id",
        f"{modules}/driver-headers",
        f"lib/firmware/nvidia/{DRIVER}/gsp_ga10x.bin",
        "etc/OpenCL/vendors/nvidia.icd", "usr/share/doc/libcuda1/copyright",
        "var/run/nvidia-persistenced"}
    assert counts == {"programs and libraries": 7, "firmware": 1, "modules": 2, "data": 2}
    socket = layers.out / "var/run/nvidia-persistenced"
    assert socket.readlink() == Path("/run/nvidia-persistenced")
    assert (layers.out / "etc/OpenCL/vendors/nvidia.icd").read_text() == "libcuda.so.1\n"
    assert not (layers.out / "bin/nvidia-smi").is_symlink()
    assert (layers.out / "bin/nvidia-smi").stat().st_mode & 0o777 == 0o755


def test_a_library_of_the_base_is_not_taken_even_if_needed(layers: Layers) -> None:
    layers.harvest()
    assert not [name for name in layers.made() if "libc.so" in name]


def test_layers_without_a_driver_are_an_error(layers: Layers) -> None:
    shutil.rmtree(layers.driver)
    layers.driver.mkdir()
    with pytest.raises(StepError, match="neither libcuda nor nvidia-smi"):
        layers.harvest()


def test_two_drivers_at_once_are_an_error(layers: Layers) -> None:
    library(layers.driver / LIB / f"libcuda.so.{DRIVER}", "libcuda.so.1")
    with pytest.raises(StepError, match="two files"):
        layers.harvest()


def test_a_dangling_alternative_is_passed_over_and_harms_nothing(layers: Layers) -> None:
    (layers.driver / "usr/bin/nvidia-debugdump").symlink_to("/nowhere")
    layers.harvest()
    assert "bin/nvidia-debugdump" not in layers.made()


def test_of_a_run_file_all_that_its_manifest_chose_is_on_the_disk(layers: Layers) -> None:
    """`driver_user` has it and nothing else, so no list of names is asked."""
    shutil.rmtree(layers.driver)
    version = f"so.{DRIVER}"
    for name, soname in ((f"libcuda.{version}", "libcuda.so.1"),
                         (f"libnvidia-ngx.{version}", "libnvidia-ngx.so.1"),
                         ("libOpenCL.so.1.0.0", "libOpenCL.so.1"),
                         (f"libnew-of-nvidia.{version}", "libnew-of-nvidia.so.1")):
        library(layers.driver / LIB / name, soname)
    (layers.driver / LIB / "libcuda.so.1").symlink_to(f"libcuda.{version}")
    (layers.driver / LIB / "libcuda.so").symlink_to("libcuda.so.1")
    for name in ("nvidia-smi", "nvidia-ngx-updater", "nvidia-new"):
        program(layers.driver / "usr/bin" / name)
    files = (f"{LIB}/nvidia/wine/_nvngx.dll", f"{LIB}/nvidia/wine/nvngx.dll", "usr/bin/script.sh",
             "etc/OpenCL/vendors/nvidia.icd", f"usr/lib/firmware/nvidia/{DRIVER}/gsp_ga10x.bin",
             "usr/share/doc/NVIDIA_GLX-1.0/LICENSE")
    for file in files:
        (layers.driver / file).parent.mkdir(parents=True, exist_ok=True)
        (layers.driver / file).write_text(file)
    counts = layers.harvest(layers.driver)
    kernel = {name for name in layers.made() if name.startswith("lib/modules/")}
    assert layers.made() - kernel == {
        "bin/nvidia-smi", "bin/nvidia-ngx-updater", "bin/nvidia-new", "bin/script.sh",
        "bin/nvidia-ctk", "bin/nvidia-cdi-hook",
        *(f"{LIB}/{name}" for name in (
            f"libcuda.{version}", "libcuda.so.1", "libcuda.so", f"libnvidia-ngx.{version}",
            "libOpenCL.so.1.0.0", f"libnew-of-nvidia.{version}", "nvidia/wine/_nvngx.dll",
            "nvidia/wine/nvngx.dll")),
        "etc/OpenCL/vendors/nvidia.icd", f"lib/firmware/nvidia/{DRIVER}/gsp_ga10x.bin",
        "usr/share/doc/NVIDIA_GLX-1.0/LICENSE", "var/run/nvidia-persistenced"}
    assert counts == {"programs and libraries": 9, "firmware": 1, "modules": 2, "data": 5}
