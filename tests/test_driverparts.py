"""Which files ship for which capabilities, by manifests like NVIDIA's."""

from __future__ import annotations

import json
from collections.abc import Collection

import pytest

from katagpu.drivermanifest import TYPES, Manifest, parse
from katagpu.driverparts import (
    BY_MODULE,
    BY_TYPE,
    CAPABILITIES,
    Part,
    filelist,
    parts,
    select,
)
from katagpu.errors import StepError
from katagpu.schema import Capability
from tests.nvrun.archive import Name
from tests.nvrun.lines import lines, manifest
from tests.nvrun.toys import GRID

VERSION = "550.163.01"


def package(version: str, *more: str, without: Collection[str] = (), compat32: bool = False,
            ) -> Manifest:
    """A package of NVIDIA's files, and lines in addition; `without` are starts of names."""
    entries = [line for line in (*lines(version), *more) if not line.startswith(tuple(without))]
    files = [line.split()[0] for line in entries if line.split()[1] != "0000"]
    if compat32:
        files += [f"32/{file}" for file in files if ".so." in file]
    files += ["kernel/nvidia/nv.c", "kernel/dkms.conf", "kernel-open/nvidia/nv.c"]
    return parse(manifest(Name(version=version), files, entries, modules=["nvidia"]))


def shipped(found: Manifest, *capabilities: str, filelist_json: str | None = None,
            documentation: bool = False) -> set[str]:
    """Names of files (not links) that ship."""
    chosen = select(found, capabilities, filelist_json=filelist_json, documentation=documentation)
    return {entry.file for entry in chosen.shipped if entry.target is None}


FIRMWARE = {"firmware/gsp_ga10x.bin", "firmware/gsp_tu10x.bin"}
COMPUTE = {f"{name}.{VERSION}" for name in (
    "libcuda.so", "libcudadebugger.so", "libnvidia-allocator.so", "libnvidia-gpucomp.so",
    "libnvidia-nvvm.so", "libnvidia-opencl.so", "libnvidia-pkcs11-openssl3.so",
    "libnvidia-ptxjitcompiler.so")} | {
    "libOpenCL.so.1.0.0", "nvidia.icd", "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"}
UTILITY = {f"libnvidia-cfg.so.{VERSION}", f"libnvidia-ml.so.{VERSION}", "nvidia-debugdump",
           "nvidia-persistenced", "nvidia-smi"}
VIDEO = {f"{name}.{VERSION}" for name in ("libnvcuvid.so", "libnvidia-encode.so",
                                          "libnvidia-opticalflow.so", "libvdpau_nvidia.so")}
NGX = {f"libnvidia-ngx.so.{VERSION}", "nvidia-ngx-updater", "_nvngx.dll", "nvngx.dll"}
XORG = {f"libglxserver_nvidia.so.{VERSION}", "nvidia_drv.so", "nvidia-drm-outputclass.conf"}
SCREEN = {f"{name}.{VERSION}" for name in (
    "libEGL_nvidia.so", "libGLESv1_CM_nvidia.so", "libGLESv2_nvidia.so", "libGLX_nvidia.so",
    "libnvidia-allocator.so", "libnvidia-eglcore.so", "libnvidia-fbc.so", "libnvidia-glcore.so",
    "libnvidia-glsi.so", "libnvidia-glvkspirv.so", "libnvidia-gpucomp.so", "libnvidia-tls.so")} | {
    "10_nvidia.json", "10_nvidia_wayland.json", "libEGL.so.1.1.0", "libGL.so.1.7.0",
    "libGLESv1_CM.so.1.2.0", "libGLESv2.so.2.1.0", "libGLX.so.0", "libGLdispatch.so.0",
    "libOpenGL.so.0", "nvidia_icd.json", "nvidia_layers.json",
    f"nvidia-application-profiles-{VERSION}-rc",
    f"nvidia-application-profiles-{VERSION}-key-documentation"}
RAYS = {f"libnvidia-rtcore.so.{VERSION}", f"libnvoptix.so.{VERSION}", "nvoptix.bin",
        "libnvidia-api.so.1"}
DOCUMENTS = {"LICENSE", "NVIDIA_Changelog", "README.txt", "nvidia-cuda-mps-control.1.gz",
             "nvidia-persistenced.1.gz", "nvidia-settings.1.gz",
             "nvidia-persistenced-init.tar.bz2", "nvidia-smi.1.gz"}


@pytest.mark.parametrize(("capability", "wanted"), [
    ("compute", COMPUTE), ("utility", UTILITY), ("video", VIDEO), ("graphics", SCREEN | RAYS),
    ("display", SCREEN | XORG), ("ngx", NGX), ("compat32", set()),
])
def test_each_capability(capability: str, wanted: set[str]) -> None:
    assert shipped(package(VERSION), capability) == wanted | FIRMWARE


def test_capabilities_add_up_and_firmware_is_always_there() -> None:
    found = package(VERSION)
    assert shipped(found) == FIRMWARE
    assert shipped(found, "compute", "utility") == COMPUTE | UTILITY | FIRMWARE
    everything = shipped(found, *CAPABILITIES)
    assert everything == COMPUTE | UTILITY | VIDEO | SCREEN | RAYS | XORG | NGX | FIRMWARE
    assert shipped(found, *CAPABILITIES, documentation=True) == everything | DOCUMENTS


def test_the_recipe_s_capabilities_are_known() -> None:
    assert set(Capability) <= CAPABILITIES
    assert shipped(package(VERSION), *Capability)


def test_what_never_ships() -> None:
    chosen = select(package(VERSION), CAPABILITIES, documentation=True)
    left = {entry.file for entry in chosen.left}
    assert {"nvidia-installer", "nvidia-uninstall", "nvidia-modprobe", "nvidia-modprobe.1.gz",
            "nvidia-bug-report.sh",
            "nvidia-settings", "nvidia-settings.desktop", f"libnvidia-gtk3.so.{VERSION}",
            "nvidia-powerd", "nvidia-dbus.conf", "systemd/nvidia-sleep.sh",
            "systemd/system-sleep/nvidia", "systemd/system/nvidia-suspend.service",
            "nvidia-suspend.service", "libglvnd_install_checker/glvnd_check",
            "kernel/nvidia/nv.c", "kernel-open/nvidia/nv.c", "kernel/dkms.conf"} <= left
    assert not left & {entry.file for entry in chosen.shipped}


def test_units_never_ship_whoever_they_are_of() -> None:
    """The installer is told to leave units out, so that none may be missed."""
    new = package(VERSION, "systemd/system/nvidia-new.service 0644 SYSTEMD_UNIT MODULE:unheard-of")
    assert "systemd/system/nvidia-new.service" not in shipped(new, *CAPABILITIES)


def test_links_go_with_their_libraries() -> None:
    chosen = select(package(VERSION), ("compute",))
    files = {entry.file for entry in chosen.shipped if entry.target is None}
    links = {entry.file: entry.target for entry in chosen.shipped if entry.target is not None}
    assert links["libcuda.so.1"] == f"libcuda.so.{VERSION}"
    assert links["libcuda.so"] == "libcuda.so.1"
    assert links["libnvidia-nvvm.so.4"] == f"libnvidia-nvvm.so.{VERSION}"
    assert "libnvidia-ml.so.1" not in links
    for name, target in links.items():
        assert target in files | set(links), name


def test_32_bit_files_ship_for_compat32_and_their_own_capability() -> None:
    found = package(VERSION, compat32=True)
    without = shipped(found, *(CAPABILITIES - {"compat32"}))
    assert not any(file.startswith("32/") for file in without)
    both = shipped(found, "compute", "compat32")
    assert {file for file in both if file.startswith("32/")} == {
        f"32/{file}" for file in COMPUTE if ".so." in file}
    links = [entry for entry in select(found, ("compute", "compat32")).shipped
             if entry.file == "libcuda.so.1"]
    assert {entry.compat32 for entry in links} == {False, True}


# Excerpts by branch


def test_510_has_one_firmware_no_open_modules_and_its_own_libraries() -> None:
    """The branch of the guide: one gsp.bin, libnvidia-compiler, no cudadebugger or gpucomp."""
    found = parse("""NVIDIA Accelerated Graphics Driver for Linux-x86_64
510.54
\x20
nvidia nvidia-uvm nvidia-modeset nvidia-drm nvidia-peermem\x20
\x20
\x20
./kernel/
./kernel/precompiled/
kernel/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman
firmware/gsp.bin 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:gsp
libcuda.so.510.54 0755 CUDA_LIB NATIVE / MODULE:gpgpu
libcuda.so.1 0000 CUDA_SYMLINK NATIVE / libcuda.so.510.54 MODULE:gpgpu
libnvidia-compiler.so.510.54 0755 CUDA_LIB NATIVE / MODULE:compiler
libnvidia-ptxjitcompiler.so.510.54 0755 CUDA_LIB NATIVE / MODULE:gpgpucomp
libnvidia-cfg.so.510.54 0755 UTILITY_LIB NATIVE MODULE:xutils
libnvidia-ml.so.510.54 0755 CUDA_LIB NATIVE / MODULE:nvml
nvidia-smi 0755 UTILITY_BINARY MODULE:nvml
nvidia-settings 0755 UTILITY_BINARY MODULE:xutils
libnvidia-vulkan-producer.so.510.54 0755 OPENGL_LIB NATIVE MODULE:egl
libnvidia-egl-gbm.so.1.1.0 0755 OPENGL_LIB NATIVE MODULE:egl
15_nvidia_gbm.json 0644 EGL_EXTERNAL_PLATFORM_JSON MODULE:egl
libnvidia-allocator.so.510.54 0755 UTILITY_LIB NATIVE MODULE:nvalloc
nvidia-drm_gbm.so 0000 GBM_BACKEND_LIB_SYMLINK NATIVE libnvidia-allocator.so.510.54 MODULE:nvalloc
""")
    assert found.flavours == {"closed"}
    assert shipped(found, "compute", "utility") == {
        "firmware/gsp.bin", "libcuda.so.510.54", "libnvidia-compiler.so.510.54",
        "libnvidia-ptxjitcompiler.so.510.54", "libnvidia-cfg.so.510.54", "libnvidia-ml.so.510.54",
        "nvidia-smi", "libnvidia-allocator.so.510.54"}
    assert "nvidia-drm_gbm.so" not in {
        entry.file for entry in select(found, ("compute", "utility")).shipped}
    assert {"libnvidia-vulkan-producer.so.510.54", "libnvidia-egl-gbm.so.1.1.0",
            "15_nvidia_gbm.json"} <= shipped(found, "graphics")


def test_440_has_libnvidia_cfg_in_the_installer_s_module() -> None:
    found = parse("x\n440.44\n \nnvidia\n \n \n./kernel/\n./kernel/precompiled/\n"
                  "libnvidia-cfg.so.440.44 0755 UTILITY_LIB NATIVE MODULE:installer\n"
                  "nvidia-bug-report.sh 0755 UTILITY_BINARY MODULE:installer\n")
    assert shipped(found, "utility") == {"libnvidia-cfg.so.440.44"}


def test_535_has_no_gpucomp() -> None:
    found = package("535.261.03", without=("libnvidia-gpucomp",))
    files = {file.replace("535.261.03", VERSION) for file in shipped(found, "compute", "utility")}
    assert files == (COMPUTE | UTILITY | FIRMWARE) - {f"libnvidia-gpucomp.so.{VERSION}"}


SANDBOX = ("libnvidia-sandboxutils.so.{v} 0755 UTILITY_LIB NATIVE MODULE:nvsandboxutils",
           "libnvidia-sandboxutils.so.1 0000 UTILITY_LIB_SYMLINK NATIVE "
           "libnvidia-sandboxutils.so.{v} MODULE:nvsandboxutils",
           "sandboxutils-filelist.json 0644 SANDBOXUTILS_FILELIST_JSON / MODULE:nvsandboxutils",
           "libnvidia-present.so.{v} 0755 OPENGL_LIB NATIVE MODULE:nvpresent",
           "libnvidia-vksc-core.so.{v} 0755 OPENGL_LIB NATIVE MODULE:vulkansc",
           "nvidia_icd_vksc.json 0644 VULKANSC_ICD_JSON icd.d/ MODULE:vulkansc",
           "nvidia-pcc 0755 UTILITY_BINARY MODULE:pcc",
           "libnvidia-tileiras.so.{v} 0755 CUDA_LIB NATIVE / MODULE:tile")


def newer(*more: str) -> Manifest:
    """A package of 580."""
    return package("580.95.05", *(line.replace("{v}", "580.95.05") for line in (*SANDBOX, *more)))


def test_580_brings_sandboxutils_and_libraries_of_modules_that_are_new() -> None:
    found = newer()
    assert {"libnvidia-sandboxutils.so.580.95.05",
            "sandboxutils-filelist.json"} <= shipped(found, "utility")
    assert {"libnvidia-present.so.580.95.05", "libnvidia-vksc-core.so.580.95.05",
            "nvidia_icd_vksc.json"} <= shipped(found, "graphics")
    assert not any("pcc" in file or "vksc" in file for file in shipped(found, "compute", "utility"))
    # Nothing is known of the module, the type says enough.
    assert "libnvidia-tileiras.so.580.95.05" in shipped(found, "compute")
    assert "libnvidia-tileiras.so.580.95.05" not in shipped(found, "utility", "graphics")


def test_nvidia_s_own_list_adds_capabilities() -> None:
    listed = json.dumps([
        {"name": "libcuda.so.580.95.05", "type": "LIB", "category": ["cuda", "optix", "vulkan"]},
        {"name": "libnvidia-tileiras.so.580.95.05", "type": "LIB", "category": ["nvml"]},
        {"name": "nvidia-settings", "type": "BINARY", "category": ["utils"]},
        {"name": "firmware/gsp_ga10x.bin", "type": "FIRMWARE", "category": ["firmware"]},
        {"name": "nvidia-modprobe", "type": "MODPROBE", "category": ["modprobe", "utils"]},
        {"name": "nvidia-installer", "type": "BINARY", "category": ["utils"], "optional": True},
    ])
    found = newer()
    plain, told = shipped(found, "graphics"), shipped(found, "graphics", filelist_json=listed)
    assert told - plain == {"libcuda.so.580.95.05"} and not plain - told
    plain, told = shipped(found, "utility"), shipped(found, "utility", filelist_json=listed)
    assert told - plain == {"libnvidia-tileiras.so.580.95.05", "nvidia-settings"}
    assert "libcuda.so.580.95.05" in shipped(found, "compute", filelist_json=listed)
    assert select(found, ("compute",), filelist_json=listed).notes == ()


def test_categories_that_are_new_are_reported() -> None:
    listed = json.dumps([{"name": "libcuda.so.580.95.05", "category": ["quantum"]},
                         {"name": "nvidia-smi", "category": "telepathy"}])
    chosen = select(newer(), ("compute",), filelist_json=listed)
    assert "has categories that are not known: quantum, telepathy" in " ".join(chosen.notes)
    assert "libcuda.so.580.95.05" in {entry.file for entry in chosen.shipped}


def test_a_file_that_is_listed_twice_has_both_categories() -> None:
    text = json.dumps([{"name": "a", "category": ["cuda"]}, {"name": "x/a", "category": ["nvml"]}])
    assert filelist(text) == {"a": frozenset({"cuda", "nvml"})}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '[{"name": "a"}]', "<html>", "null",
                                  '[{"name": 1, "category": []}]'])
def test_a_list_that_is_none(text: str) -> None:
    with pytest.raises(StepError, match="is not a list of files with categories"):
        filelist(text)


def test_a_file_of_which_nothing_is_known_ships_and_is_reported() -> None:
    found = newer("oracle 0755 ORACLE_BINARY MODULE:oracle",
                  "seer 0755 ORACLE_BINARY MODULE:oracle",
                  "lonely 0644 EXPLICIT_PATH /usr/share/nvidia")
    chosen = select(found, ("utility",))
    assert {"oracle", "seer", "lonely"} <= {entry.file for entry in chosen.shipped}
    said = "\n".join(chosen.notes)
    assert "has the unknown type ORACLE_BINARY (oracle)" in said
    assert "(type ORACLE_BINARY, module oracle): oracle, seer" in said
    assert "(type EXPLICIT_PATH, module (none)): lonely" in said


def test_a_vgpu_guest_has_its_license_daemon_in_any_case() -> None:
    found = package(VERSION, *(line.replace("{v}", VERSION) for line in GRID))
    daemon = {line.split()[0] for line in GRID}
    assert shipped(found, "compute") == COMPUTE | FIRMWARE | daemon
    assert shipped(found) == FIRMWARE | daemon


@pytest.mark.parametrize(("capabilities", "said"), [
    (("video", "utility"), "video without compute: libnvcuvid opens libcuda.so.1"),
    (("graphics",), "graphics without compute: libnvidia-rtcore"),
    (("compute", "compat32"), "has no 32-bit files for compat32"),
])
def test_what_a_user_should_know(capabilities: tuple[str, ...], said: str) -> None:
    assert said in "\n".join(select(package(VERSION), capabilities).notes)
    assert select(package(VERSION, compat32=True), CAPABILITIES).notes == ()


def test_only_known_capabilities_can_be_asked_for() -> None:
    with pytest.raises(AssertionError):
        select(package(VERSION), ("sound",))


# sizes


def test_sizes_by_part() -> None:
    found = package(VERSION, compat32=True)
    sizes = {entry.file: 10 for entry in found.entries if entry.target is None}
    sizes[f"libcuda.so.{VERSION}"] = 1_000_000
    report = {part.name: part for part in parts(found.entries, sizes)}
    assert report["GSP firmware"] == Part(name="GSP firmware", files=2, size=20)
    assert report["kernel module source"].files == 3
    assert report["compute, display, graphics"].size == 20
    assert report["documentation"].files == len(DOCUMENTS)
    assert {"compute", "compute (32-bit)", "utility", "video", "ngx", "display", "graphics",
            "display, graphics", "installer and desktop tools"} <= set(report)
    assert parts(found.entries, sizes)[0].name == "compute"
    total = sum(part.size for part in report.values())
    assert total == sum(sizes[entry.file] for entry in found.entries if entry.target is None)


def test_the_report_of_what_ships_is_smaller_than_that_of_all() -> None:
    found = package(VERSION)
    sizes = {entry.file: 10 for entry in found.entries}
    some = parts(select(found, ("compute", "utility")).shipped, sizes)
    assert {part.name for part in some} == {"compute", "utility", "GSP firmware",
                                            "compute, display, graphics"}
    assert sum(part.size for part in some) < sum(part.size for part in parts(found.entries, sizes))


def test_a_vgpu_guest_s_part_and_unknown_ones_have_names() -> None:
    found = newer("nvidia-gridd 0755 UTILITY_BINARY MODULE:vgpu", "odd 0755 ODD_DATA")
    names = {part.name for part in parts(found.entries, {})}
    assert {"vGPU licensing", "not known"} <= names


def test_the_tables_know_types_of_the_installer() -> None:
    assert set(BY_TYPE) <= set(TYPES)
    for purposes in (*BY_MODULE.values(), *BY_TYPE.values()):
        assert all(word in CAPABILITIES or word.startswith("(") for word in purposes)
