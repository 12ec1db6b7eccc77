"""The driver's manifest: its grammar, and where the installer puts each entry."""

from __future__ import annotations

import pytest

from katagpu.drivermanifest import TYPES, Arch, Entry, Layout, destination, parse
from katagpu.errors import UserError
from tests.nvrun.archive import Name
from tests.nvrun.lines import lines, manifest

HEAD = """NVIDIA Accelerated Graphics Driver for Linux-x86_64
550.163.01
\x20
nvidia nvidia-uvm nvidia-modeset nvidia-drm nvidia-peermem\x20
\x20
\x20
./kernel/
./kernel/precompiled/
"""


def one(line: str) -> Entry:
    """The entry of a line."""
    (entry,) = parse(HEAD + line + "\n").entries
    return entry


def test_the_header() -> None:
    found = parse(HEAD)
    assert found.description == "NVIDIA Accelerated Graphics Driver for Linux-x86_64"
    assert found.version == "550.163.01"
    assert found.modules == ("nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm",
                             "nvidia-peermem")
    assert found.entries == () and found.notes == ()


@pytest.mark.parametrize("text", ["", "a\n550.1\n", HEAD.replace("550.163.01", "a driver"),
                                  "<html>\n" * 20])
def test_what_is_no_manifest(text: str) -> None:
    with pytest.raises(UserError, match="does not start with 8 lines"):
        parse(text)


def test_empty_lines_do_not_count() -> None:
    """As for NVIDIA's installer, which sees neither an end nor a line in them."""
    text = f"{HEAD}nvidia-smi 0755 UTILITY_BINARY MODULE:nvml\n\nrest 0755 UTILITY_BINARY\n\n"
    assert [entry.file for entry in parse(text).entries] == ["nvidia-smi", "rest"]
    with pytest.raises(UserError, match="line 12 "):
        parse(f"{text.rstrip()}\nnonsense\n")


# Lines of the manifests of 390.157, 440.44 and 460.67 as they are.
@pytest.mark.parametrize(("line", "wanted"), [
    ("kernel/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman",
     Entry(file="kernel/nvidia/nv.c", mode=0o644, type="KERNEL_MODULE_SRC", path="nvidia",
           module="resman")),
    ("kernel/Makefile 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman",
     Entry(file="kernel/Makefile", mode=0o644, type="KERNEL_MODULE_SRC", module="resman")),
    ("libcuda.so.460.67 0755 CUDA_LIB NATIVE / MODULE:gpgpu",
     Entry(file="libcuda.so.460.67", mode=0o755, type="CUDA_LIB", arch=Arch.NATIVE, path="/",
           module="gpgpu")),
    ("./32/libcuda.so.460.67 0755 CUDA_LIB COMPAT32 / MODULE:gpgpu",
     Entry(file="32/libcuda.so.460.67", mode=0o755, type="CUDA_LIB", arch=Arch.COMPAT32, path="/",
           module="gpgpu")),
    ("libcuda.so.1 0000 CUDA_SYMLINK NATIVE / libcuda.so.460.67 MODULE:gpgpu",
     Entry(file="libcuda.so.1", mode=0, type="CUDA_SYMLINK", arch=Arch.NATIVE, path="/",
           target="libcuda.so.460.67", module="gpgpu")),
    ("libvdpau_nvidia.so 0000 VDPAU_SYMLINK NATIVE / vdpau/libvdpau_nvidia.so.460.67 MODULE:vdpau",
     Entry(file="libvdpau_nvidia.so", mode=0, type="VDPAU_SYMLINK", arch=Arch.NATIVE, path="/",
           target="vdpau/libvdpau_nvidia.so.460.67", module="vdpau")),
    ("libGL.so.1 0000 GLX_CLIENT_SYMLINK NATIVE libGL.so.1.7.0 MODULE:opengl",
     Entry(file="libGL.so.1", mode=0, type="GLX_CLIENT_SYMLINK", arch=Arch.NATIVE,
           target="libGL.so.1.7.0", module="opengl")),
    ("libGL.so.1 0000 GLX_CLIENT_SYMLINK NATIVE libGL.so.390.157 NON_GLVND MODULE:opengl",
     Entry(file="libGL.so.1", mode=0, type="GLX_CLIENT_SYMLINK", arch=Arch.NATIVE,
           target="libGL.so.390.157", module="opengl")),
    ("tls/libnvidia-tls.so.390.157 0755 TLS_LIB NATIVE NEW tls/ MODULE:opengl",
     Entry(file="tls/libnvidia-tls.so.390.157", mode=0o755, type="TLS_LIB", arch=Arch.NATIVE,
           path="tls/", module="opengl")),
    ("libnvidia-tls.so.460.67 0755 TLS_LIB NATIVE / MODULE:opengl",
     Entry(file="libnvidia-tls.so.460.67", mode=0o755, type="TLS_LIB", arch=Arch.NATIVE, path="/",
           module="opengl")),
    ("nvidia_icd.json.template 0644 VULKAN_ICD_JSON MODULE:opengl",
     Entry(file="nvidia_icd.json.template", mode=0o644, type="VULKAN_ICD_JSON", module="opengl")),
    ("nvidia-modprobe 04755 NVIDIA_MODPROBE /usr/bin/ MODULE:installer",
     Entry(file="nvidia-modprobe", mode=0o4755, type="NVIDIA_MODPROBE", path="/usr/bin/",
           module="installer")),
    ("libglvnd_install_checker/egl_dummy_vendor.json 0644 INTERNAL_UTILITY_DATA MODULE:installer",
     Entry(file="libglvnd_install_checker/egl_dummy_vendor.json", mode=0o644,
           type="INTERNAL_UTILITY_DATA", module="installer")),
    ("nvidia.icd 0444 CUDA_ICD MODULE:gpgpu",
     Entry(file="nvidia.icd", mode=0o444, type="CUDA_ICD", module="gpgpu")),
])
def test_lines_of_real_manifests(line: str, wanted: Entry) -> None:
    assert one(line) == wanted


# From 465 on, by the fields that the installer's table has for them.
@pytest.mark.parametrize(("line", "wanted"), [
    ("firmware/gsp_ga10x.bin 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:gsp",
     Entry(file="firmware/gsp_ga10x.bin", mode=0o644, type="FIRMWARE", module="gsp")),
    ("systemd/system/nvidia-suspend.service 0644 SYSTEMD_UNIT MODULE:installer",
     Entry(file="systemd/system/nvidia-suspend.service", mode=0o644, type="SYSTEMD_UNIT",
           module="installer")),
    # The manifest has no target: the installer takes the next word and then overwrites it.
    ("nvidia-suspend.service 0000 SYSTEMD_UNIT_SYMLINK systemd-suspend.service.requires/ "
     "MODULE:installer",
     Entry(file="nvidia-suspend.service", mode=0, type="SYSTEMD_UNIT_SYMLINK",
           path="systemd-suspend.service.requires/", target="nvidia-suspend.service",
           module="installer")),
    ("nvidia-drm_gbm.so 0000 GBM_BACKEND_LIB_SYMLINK NATIVE libnvidia-allocator.so.550.163.01 "
     "MODULE:nvalloc",
     Entry(file="nvidia-drm_gbm.so", mode=0, type="GBM_BACKEND_LIB_SYMLINK", arch=Arch.NATIVE,
           target="libnvidia-allocator.so.550.163.01", module="nvalloc")),
    ("_nvngx.dll 0755 WINE_LIB NATIVE MODULE:ngx",
     Entry(file="_nvngx.dll", mode=0o755, type="WINE_LIB", arch=Arch.NATIVE, module="ngx")),
    ("libnvidia-vgpu.so.550.144.02 0755 VGX_LIB NATIVE MODULE:vgpu",  # one word too many
     Entry(file="libnvidia-vgpu.so.550.144.02", mode=0o755, type="VGX_LIB", module="vgpu")),
])
def test_lines_of_newer_drivers(line: str, wanted: Entry) -> None:
    assert one(line) == wanted


@pytest.mark.parametrize(("line", "said"), [
    ("libcuda.so", "line 9 .* is not 'file mode TYPE"),
    ("libcuda.so rwx CUDA_LIB NATIVE /", "line 9 .* is not 'file mode TYPE"),
    ("libcuda.so 0999 CUDA_LIB NATIVE /", "is not 'file mode TYPE"),
    ("libcuda.so 0755 CUDA_LIB / MODULE:gpgpu", "says neither NATIVE nor COMPAT32"),
    ("libcuda.so 0755 CUDA_LIB X86 / MODULE:gpgpu", "says neither NATIVE nor COMPAT32"),
    ("libcuda.so 0755 CUDA_LIB NATIVE MODULE:gpgpu", "lacks the path"),
    ("libcuda.so 0000 CUDA_SYMLINK NATIVE / MODULE:gpgpu", "lacks the target"),
    ("kernel/nv.c 0644 KERNEL_MODULE_SRC MODULE:resman", "has no INHERIT_PATH_DEPTH:n that fits"),
    ("kernel/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:2", "has no INHERIT_PATH_DEPTH:n"),
    ("kernel/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:x", "has no INHERIT_PATH_DEPTH:n"),
    ("nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman", "has no INHERIT_PATH_DEPTH"),
    ("../evil 0644 UTILITY_BINARY MODULE:nvml", "names a place outside"),
    ("/etc/evil 0644 UTILITY_BINARY MODULE:nvml", "names a place outside"),
    ("evil 0644 EXPLICIT_PATH /usr/../../etc MODULE:nvml", "names a place outside"),
    ("evil 0000 OPENGL_SYMLINK NATIVE ../../etc/passwd MODULE:opengl", "names a place outside"),
])
def test_lines_without_sense(line: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as failure:
        parse(HEAD + line)
    assert line in failure.value.what
    assert failure.value.hint


@pytest.mark.parametrize(("line", "wanted"), [
    ("libnew.so.1 0755 NEW_LIB NATIVE MODULE:new",
     Entry(file="libnew.so.1", mode=0o755, type="NEW_LIB", arch=Arch.NATIVE, module="new",
           known=False)),
    ("libnew.so.1 0755 NEW_LIB COMPAT32 sub/ MODULE:new",
     Entry(file="libnew.so.1", mode=0o755, type="NEW_LIB", arch=Arch.COMPAT32, path="sub/",
           module="new", known=False)),
    ("libnew.so 0000 NEW_SYMLINK NATIVE libnew.so.1 MODULE:new",
     Entry(file="libnew.so", mode=0, type="NEW_SYMLINK", arch=Arch.NATIVE, target="libnew.so.1",
           module="new", known=False)),
    ("libnew.so 0000 NEW_SYMLINK sub/ libnew.so.1",
     Entry(file="libnew.so", mode=0, type="NEW_SYMLINK", path="sub/", target="libnew.so.1",
           known=False)),
    ("new/a/b.bin 0644 NEW_DATA INHERIT_PATH_DEPTH:1 MODULE:new",
     Entry(file="new/a/b.bin", mode=0o644, type="NEW_DATA", path="a", module="new", known=False)),
    ("new.json 0644 NEW_JSON", Entry(file="new.json", mode=0o644, type="NEW_JSON", known=False)),
])
def test_an_unknown_type_is_understood_and_reported(line: str, wanted: Entry) -> None:
    found = parse(HEAD + line)
    assert found.entries == (wanted,)
    (note,) = found.notes
    assert note.startswith("line 9 ") and wanted.type in note and wanted.file in note
    assert destination(wanted, LAYOUT) is None


def test_an_unknown_type_that_leads_outside_is_refused() -> None:
    with pytest.raises(UserError, match="names a place outside"):
        parse(f"{HEAD}a 0000 NEW_SYMLINK ../../etc/passwd")


def test_flavours() -> None:
    text = HEAD
    assert parse(text).flavours == frozenset()
    text += "kernel/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman\n"
    assert parse(text).flavours == {"closed"}
    text += "kernel-open/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman\n"
    assert parse(text).flavours == {"closed", "open"}


# destinations

LAYOUT = Layout(version="550.163.01")


@pytest.mark.parametrize(("line", "place"), [
    ("libcuda.so.550.163.01 0755 CUDA_LIB NATIVE / MODULE:gpgpu",
     "/usr/lib/x86_64-linux-gnu/libcuda.so.550.163.01"),
    ("libcuda.so.1 0000 CUDA_SYMLINK NATIVE / libcuda.so.550.163.01 MODULE:gpgpu",
     "/usr/lib/x86_64-linux-gnu/libcuda.so.1"),
    ("./32/libcuda.so.550.163.01 0755 CUDA_LIB COMPAT32 / MODULE:gpgpu",
     "/usr/lib/i386-linux-gnu/libcuda.so.550.163.01"),
    ("libvdpau_nvidia.so.550.163.01 0755 VDPAU_LIB NATIVE vdpau/ MODULE:vdpau",
     "/usr/lib/x86_64-linux-gnu/vdpau/libvdpau_nvidia.so.550.163.01"),
    ("libvdpau_nvidia.so 0000 VDPAU_SYMLINK NATIVE / vdpau/libvdpau_nvidia.so.550.163.01",
     "/usr/lib/x86_64-linux-gnu/libvdpau_nvidia.so"),
    ("firmware/gsp_ga10x.bin 0644 FIRMWARE INHERIT_PATH_DEPTH:1 MODULE:gsp",
     "/usr/lib/firmware/nvidia/550.163.01/gsp_ga10x.bin"),
    ("nvidia-smi 0755 UTILITY_BINARY MODULE:nvml", "/usr/bin/nvidia-smi"),
    ("nvidia-persistenced 0755 UTILITY_BINARY MODULE:nvpd", "/usr/bin/nvidia-persistenced"),
    ("systemd/nvidia-sleep.sh 0755 UTILITY_BINARY MODULE:installer", "/usr/bin/nvidia-sleep.sh"),
    ("nvidia-uninstall 0000 UTILITY_BIN_SYMLINK nvidia-installer MODULE:installer",
     "/usr/bin/nvidia-uninstall"),
    ("nvidia-modprobe 04755 NVIDIA_MODPROBE /usr/bin/ MODULE:installer",
     "/usr/bin/nvidia-modprobe"),
    ("nvidia.icd 0444 CUDA_ICD MODULE:gpgpu", "/etc/OpenCL/vendors/nvidia.icd"),
    ("nvidia_icd.json 0644 VULKAN_ICD_JSON icd.d/ MODULE:opengl",
     "/etc/vulkan/icd.d/nvidia_icd.json"),
    ("nvidia_icd_vksc.json 0644 VULKANSC_ICD_JSON icd.d/ MODULE:vulkansc",
     "/etc/vulkansc/icd.d/nvidia_icd_vksc.json"),
    ("10_nvidia.json 0644 GLVND_EGL_ICD_JSON MODULE:opengl",
     "/usr/share/glvnd/egl_vendor.d/10_nvidia.json"),
    ("10_nvidia_wayland.json 0644 EGL_EXTERNAL_PLATFORM_JSON MODULE:egl",
     "/usr/share/egl/egl_external_platform.d/10_nvidia_wayland.json"),
    ("nvidia-drm_gbm.so 0000 GBM_BACKEND_LIB_SYMLINK NATIVE libnvidia-allocator.so.550.163.01",
     "/usr/lib/x86_64-linux-gnu/gbm/nvidia-drm_gbm.so"),
    ("nvidia-drm_gbm.so 0000 GBM_BACKEND_LIB_SYMLINK COMPAT32 libnvidia-allocator.so.550.163.01",
     "/usr/lib/i386-linux-gnu/gbm/nvidia-drm_gbm.so"),
    ("nvidia_drv.so 0755 XMODULE_SHARED_LIB drivers/ MODULE:xdriver",
     "/usr/lib/xorg/modules/drivers/nvidia_drv.so"),
    ("libglxserver_nvidia.so.550.163.01 0755 GLX_MODULE_SHARED_LIB extensions MODULE:opengl",
     "/usr/lib/xorg/modules/extensions/libglxserver_nvidia.so.550.163.01"),
    ("nvoptix.bin 0444 OPENGL_DATA /usr/share/nvidia/ MODULE:optix",
     "/usr/share/nvidia/nvoptix.bin"),
    ("nvidia-dbus.conf 0644 EXPLICIT_PATH /usr/share/dbus-1/system.d/ MODULE:nvtopps",
     "/usr/share/dbus-1/system.d/nvidia-dbus.conf"),
    ("gsp.bin 0644 EXPLICIT_PATH /lib/firmware MODULE:gsp", "/usr/lib/firmware/gsp.bin"),
    ("systemd/system/nvidia-powerd.service 0644 SYSTEMD_UNIT MODULE:nvtopps",
     "/usr/lib/systemd/system/nvidia-powerd.service"),
    ("nvidia-suspend.service 0000 SYSTEMD_UNIT_SYMLINK systemd-suspend.service.requires/",
     "/etc/systemd/system/systemd-suspend.service.requires/nvidia-suspend.service"),
    ("systemd/system-sleep/nvidia 0755 SYSTEMD_SLEEP_SCRIPT MODULE:installer",
     "/usr/lib/systemd/system-sleep/nvidia"),
    ("_nvngx.dll 0755 WINE_LIB NATIVE MODULE:ngx",
     "/usr/lib/x86_64-linux-gnu/nvidia/wine/_nvngx.dll"),
    ("libglvnd_install_checker/glvnd_check 0755 INTERNAL_UTILITY_BINARY NATIVE MODULE:installer",
     "/usr/lib/nvidia/glvnd_check"),
    ("./32/libglvnd_install_checker/glvnd_check 0755 INTERNAL_UTILITY_BINARY COMPAT32",
     "/usr/lib/nvidia/32/glvnd_check"),
    ("kernel/nvidia/nv.c 0644 KERNEL_MODULE_SRC INHERIT_PATH_DEPTH:1 MODULE:resman",
     "/usr/src/nvidia-550.163.01/nvidia/nv.c"),
    ("nvidia-smi.1.gz 0444 MANPAGE man1/ MODULE:nvml", "/usr/share/man/man1/nvidia-smi.1.gz"),
    ("README.txt 0444 DOCUMENTATION NVIDIA_GLX-1.0/ MODULE:installer",
     "/usr/share/doc/NVIDIA_GLX-1.0/README.txt"),
    ("sandboxutils-filelist.json 0644 SANDBOXUTILS_FILELIST_JSON / MODULE:nvsandboxutils",
     "/usr/share/nvidia/files.d/sandboxutils-filelist.json"),
])
def test_where_the_installer_puts_it(line: str, place: str) -> None:
    entry = one(line)
    assert str(destination(entry, LAYOUT)) == place


def test_another_layout() -> None:
    layout = Layout(version="510.54", libdir="/usr/lib64", libdir32="/lib",
                    xorg="/usr/lib64/xorg/modules")
    cuda = "libcuda.so.510.54 0755 CUDA_LIB {} / MODULE:gpgpu"
    assert str(destination(one(cuda.format("NATIVE")), layout)) == "/usr/lib64/libcuda.so.510.54"
    assert str(destination(one(cuda.format("COMPAT32")), layout)) == "/usr/lib/libcuda.so.510.54"


def test_every_entry_of_a_package_has_its_own_place() -> None:
    """But for types that get none, and 32-bit links to other libraries of the same name."""
    text = manifest(Name(version="550.163.01"), [line.split()[0] for line in lines("550.163.01")],
                    lines("550.163.01"))
    found = [destination(entry, LAYOUT) for entry in parse(text).entries]
    assert None not in found and len(set(found)) == len(found) > 100


def test_types_of_the_installer_have_a_place() -> None:
    """Known ones without: keys and modules, which the installer places by its options, and types
    that were gone before 510."""
    placeless = {kind for kind, fields in TYPES.items()
                 if destination(Entry(file="a/b", mode=0, type=kind, arch=Arch.NATIVE, path="p"),
                                LAYOUT) is None}
    assert placeless == {"KERNEL_MODULE", "MODULE_SIGNING_KEY", "OPENGL_HEADER", "ALLOCATOR_JSON"}
