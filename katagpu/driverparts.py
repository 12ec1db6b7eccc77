"""Which files of the NVIDIA driver ship for a recipe's capabilities, and how large each part is.

The answer is made from the package's own data: the TYPE and the `MODULE:` word of each entry of its
manifest, and, from 570 on, `sandboxutils-filelist.json`, in which NVIDIA says for container
runtimes what each file is for. Capabilities have the names of the container toolkit
(NVIDIA_DRIVER_CAPABILITIES): compute, utility, video, graphics, display, ngx, compat32.

Sources: the `MODULE:` words of the manifests of 390.157, 440.44 and 460.67; those of 570 to 610 as
public packagings name them (Gentoo's ebuild, NVIDIA's build scripts with a word on each); what is
for what: the lists of libnvidia-container (src/nvc_info.c) and of the container toolkit
(internal/discover/graphics.go). The file list's form and categories are those that a public program
reads from the lists of 570 to 615; no copy of one was at hand.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from katagpu.drivermanifest import FILELIST, Entry, Manifest
from katagpu.errors import StepError

CAPABILITIES = frozenset({"compute", "utility", "video", "graphics", "display", "ngx", "compat32"})

_COMPUTE, _UTILITY = frozenset({"compute"}), frozenset({"utility"})
_VIDEO, _NGX, _DISPLAY = frozenset({"video"}), frozenset({"ngx"}), frozenset({"display"})
_GRAPHICS = frozenset({"graphics"})
# libglxserver_nvidia, the X server's half, is linked against libnvidia-glcore and -tls (550, 535).
_SCREEN = frozenset({"graphics", "display"})

ALWAYS, DOCUMENTATION = frozenset({"(always)"}), frozenset({"(documentation)"})
NEVER: frozenset[str] = frozenset()

BY_MODULE: dict[str, frozenset[str]] = {
    "gpgpu": _COMPUTE,  # libcuda, libnvidia-opencl, MPS
    "gpgpucomp": _COMPUTE,  # libnvidia-ptxjitcompiler
    "gpgpudbg": _COMPUTE,  # libcudadebugger
    "compiler": _COMPUTE,  # libnvidia-compiler up to 470, libnvidia-nvvm
    "nvlibpkcs11": _COMPUTE,  # libcuda opens it for confidential computing
    "nvml": _UTILITY,  # libnvidia-ml, nvidia-smi, nvidia-debugdump
    "nvpd": _UTILITY,  # nvidia-persistenced
    "nvsandboxutils": _UTILITY,  # nvidia-ctk reads the file list through it
    "vdpau": _VIDEO, "nvcuvid": _VIDEO, "encodeapi": _VIDEO, "opticalflow": _VIDEO,
    "opengl": _SCREEN, "egl": _SCREEN,
    "raytracing": _GRAPHICS, "optix": _GRAPHICS, "nvpresent": _GRAPHICS, "nvapi": _GRAPHICS,
    "vulkansc": _GRAPHICS,
    "nvfbc": _SCREEN, "nvifr": _SCREEN,
    "nvalloc": _COMPUTE | _SCREEN,  # libnvidia-allocator, which is GBM's backend too
    "nvgpucomp": _COMPUTE | _SCREEN,  # libnvidia-gpucomp; glcore and eglcore are linked to it
    "xdriver": _DISPLAY,
    "ngx": _NGX,
    "gsp": ALWAYS,
    # License daemon and its files in a GRID guest package; no other guest package has it.
    "vgpu": ALWAYS,
    # nvidia-settings, -xconfig and their GTK libraries; Dynamic Boost of notebooks; the offline
    # compiler of Vulkan SC; the installer with its check of libglvnd, sleep scripts and the
    # set-user-id nvidia-modprobe, in whose place the guest's own units make the device nodes.
    "xutils": NEVER, "nvtopps": NEVER, "powerd": NEVER, "pcc": NEVER, "installer": NEVER,
}

# The TYPE decides alone.
BY_TYPE: dict[str, frozenset[str]] = {
    "FIRMWARE": ALWAYS,
    **dict.fromkeys(("GRID_LIB", "GRID_LIB_SYMLINK", "FLEXERA_LIB", "FLEXERA_LIB_SYMLINK"), ALWAYS),
    **dict.fromkeys(("DOCUMENTATION", "MANPAGE"), DOCUMENTATION),
    # Modules are built apart, and the guest has units of its own; the rest belongs to the installer
    # or to a desktop.
    **dict.fromkeys(("KERNEL_MODULE_SRC", "KERNEL_MODULE", "DKMS_CONF", "MODULE_SIGNING_KEY",
                     "INSTALLER_BINARY", "NVIDIA_MODPROBE", "NVIDIA_MODPROBE_MANPAGE", "LIBGL_LA",
                     "OPENGL_HEADER", "DOT_DESKTOP", "ICON", "SYSTEMD_UNIT", "SYSTEMD_UNIT_SYMLINK",
                     "SYSTEMD_SLEEP_SCRIPT"), NEVER),
    **dict.fromkeys(("XMODULE_SHARED_LIB", "XMODULE_SYMLINK", "XMODULE_NEWSYM",
                     "GLX_MODULE_SHARED_LIB", "GLX_MODULE_SYMLINK", "XORG_OUTPUTCLASS_CONFIG"),
                    _DISPLAY),
    **dict.fromkeys(("NVCUVID_LIB", "NVCUVID_LIB_SYMLINK", "ENCODEAPI_LIB", "ENCODEAPI_LIB_SYMLINK",
                     "VDPAU_LIB", "VDPAU_SYMLINK"), _VIDEO),
    **dict.fromkeys(("GBM_BACKEND_LIB", "GBM_BACKEND_LIB_SYMLINK"), _SCREEN),
    "SANDBOXUTILS_FILELIST_JSON": _UTILITY,
}

# For a MODULE that the table lacks: what a start of the TYPE says.
_BY_START = (
    (("CUDA_", "OPENCL_"), _COMPUTE), (("UTILITY_",), _UTILITY),
    (("OPENGL_", "GLVND_", "GLX_", "EGL_", "TLS_", "VULKAN", "APPLICATION_PROFILE"), _SCREEN),
)

# The one rule by name. libnvidia-cfg has the MODULE of the installer (up to 440) or of the X tools
# (460), which do not ship; nvidia-persistenced opens it (its source, nvidia-cfg.h), and
# libnvidia-container counts it among the utility libraries.
BY_NAME: dict[str, frozenset[str]] = {"libnvidia-cfg.so": _UTILITY}

# What NVIDIA calls it in the file list. It is also told which files are firmware and which make
# device nodes: those two are decided by TYPE.
BY_CATEGORY: dict[str, frozenset[str]] = {
    "nvml": _UTILITY, "utils": _UTILITY, "cuda": _COMPUTE, "opencl": _COMPUTE, "video": _VIDEO,
    "vdpau": _VIDEO, "ngx": _NGX, "xdriver": _DISPLAY,
    **dict.fromkeys(("glvnd", "glx", "gbm", "vulkan", "egl", "egl_headless", "egl_wayland",
                     "egl_gbm", "egl_x11"), _SCREEN),
    "optix": _GRAPHICS, "vulkansc": _GRAPHICS,
    "firmware": NEVER, "modprobe": NEVER,
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What ships and what does not; `notes` are things that the user should see."""

    shipped: tuple[Entry, ...]
    left: tuple[Entry, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Part:
    """Files of the driver that are for the same thing; `size` in bytes."""

    name: str
    files: int
    size: int


def filelist(text: str) -> dict[str, frozenset[str]]:
    """NVIDIA's own categories by file name, from `sandboxutils-filelist.json`.

    A list of objects with `name`, `type` and `category`; a file may be listed more than once.
    Raises `StepError` when it is not such a list.
    """
    found: dict[str, frozenset[str]] = {}
    try:
        for item in json.loads(text):
            name = item["name"].rpartition("/")[2]
            category = item["category"]
            words = [category] if isinstance(category, str) else category
            found[name] = found.get(name, frozenset()) | frozenset(map(str, words))
    except (ValueError, TypeError, KeyError, AttributeError) as bad:
        raise StepError(f"the driver's {FILELIST} is not a list of files with categories "
                        f"({type(bad).__name__}: {bad})",
                        hint="take the file from NVIDIA again") from None
    return found


def purposes(entry: Entry, categories: Mapping[str, frozenset[str]]) -> frozenset[str] | None:
    """What a file is for: capabilities, `ALWAYS`, `DOCUMENTATION` or `NEVER`.

    None when neither manifest nor file list say anything that is known. NVIDIA's categories add to
    what the manifest says and never take away: a library too many costs space, one too few fails.
    """
    by_name = next((purpose for start, purpose in BY_NAME.items() if entry.name.startswith(start)),
                   None)
    decided = BY_TYPE.get(entry.type)
    if decided in (ALWAYS, DOCUMENTATION, NEVER):
        return decided
    own = by_name or decided or _by_module(entry)
    told = [BY_CATEGORY[word] for word in categories.get(entry.name, ()) if word in BY_CATEGORY]
    if own == ALWAYS or not any(told):
        return own
    return (own or NEVER).union(*told)


def _by_module(entry: Entry) -> frozenset[str] | None:
    if entry.module in BY_MODULE:
        return BY_MODULE[entry.module]
    return next((purpose for starts, purpose in _BY_START if entry.type.startswith(starts)), None)


def select(manifest: Manifest, capabilities: Collection[str], *, filelist_json: str | None = None,
           documentation: bool = False) -> Selection:
    """The entries that ship: those of the capabilities, and GSP firmware in any case.

    A file of which nothing is known ships, and a note says so. 32-bit files ship for `compat32`
    where their own capability is asked for too. Raises `StepError` for an unusable file list.
    """
    unknown = set(capabilities) - CAPABILITIES
    assert not unknown, f"no capabilities: {unknown}"
    categories = filelist(filelist_json) if filelist_json is not None else {}
    wanted = {*capabilities, *ALWAYS, *(DOCUMENTATION if documentation else ())}
    shipped: list[Entry] = []
    left: list[Entry] = []
    notes = list(manifest.notes)
    strange: dict[str, list[str]] = {}
    for entry in manifest.entries:
        found = purposes(entry, categories)
        if found is None:
            strange.setdefault(f"type {entry.type}, module {entry.module or '(none)'}",
                               []).append(entry.name)
        ships = (found is None or bool(found & wanted)) \
            and ("compat32" in wanted or not entry.compat32)
        (shipped if ships else left).append(entry)
    notes += [f"shipped, since nothing says what it is for ({what}): {_some(names)}"
              for what, names in strange.items()]
    words = sorted({word for found in categories.values() for word in found} - set(BY_CATEGORY))
    if words:
        notes.append(f"{FILELIST} has categories that are not known: {', '.join(words)}")
    notes += _gaps(manifest, wanted)
    return Selection(shipped=tuple(shipped), left=tuple(left), notes=tuple(notes))


def _gaps(manifest: Manifest, wanted: Collection[str]) -> Iterable[str]:
    if "compat32" in wanted and not any(entry.compat32 for entry in manifest.entries):
        yield "the package has no 32-bit files for compat32"
    # Read from the libraries of 535.261.03 and 550.163.01.
    openers = {"video": "libnvcuvid", "graphics": "libnvidia-rtcore (ray tracing)"}
    for capability, library in openers.items():
        if capability in wanted and "compute" not in wanted:
            yield f"{capability} without compute: {library} opens libcuda.so.1, a file of compute"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def parts(entries: Iterable[Entry], sizes: Mapping[str, int], *,
          filelist_json: str | None = None) -> list[Part]:
    """Sizes by purpose, the largest first; `sizes` are bytes by the archive's file names.

    Links count as files of no size. A file of several capabilities makes a part of its own, for
    example `compute, graphics`.
    """
    categories = filelist(filelist_json) if filelist_json is not None else {}
    files: dict[str, int] = {}
    total: dict[str, int] = {}
    for entry in entries:
        name = _part(entry, purposes(entry, categories))
        files[name] = files.get(name, 0) + 1
        if entry.target is None:
            total[name] = total.get(name, 0) + sizes.get(entry.file, 0)
    found = [Part(name=name, files=count, size=total.get(name, 0)) for name, count in files.items()]
    return sorted(found, key=lambda part: (-part.size, part.name))


def _part(entry: Entry, purpose: frozenset[str] | None) -> str:
    if entry.type == "FIRMWARE" or entry.module == "gsp":
        name = "GSP firmware"
    elif purpose is None:
        name = "not known"
    elif purpose == ALWAYS:
        name = "vGPU licensing"
    elif purpose == DOCUMENTATION:
        name = "documentation"
    elif purpose == NEVER:
        source = entry.type in ("KERNEL_MODULE_SRC", "DKMS_CONF")
        name = "kernel module source" if source else "installer and desktop tools"
    else:
        name = ", ".join(sorted(purpose))
    return f"{name} (32-bit)" if entry.compat32 else name
