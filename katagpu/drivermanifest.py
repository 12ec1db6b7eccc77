"""The `.manifest` of NVIDIA's driver: what a `.run` holds, and where its installer puts each file.

Eight header lines, then one entry per line: file, octal mode, TYPE, and fields that depend on the
TYPE. Empty lines do not count; those that NVIDIA leaves blank have one blank each. Sources:
`manifest.c`, `parse_manifest`, `get_next_line` and `set_destinations` of nvidia-installer at every
tag from 390.12 to 590.48.01 (lines, fields and destinations), and the manifests of the packages
390.157, 440.44 and 460.67, which public repositories hold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Flag, StrEnum, auto
from pathlib import PurePosixPath

from katagpu.errors import UserError

FILE = ".manifest"
FILELIST = "sandboxutils-filelist.json"  # NVIDIA's own classification, since 570
HEADER_LINES = 8
NOT_NVIDIA = "take the file from NVIDIA again; an archive that was packed anew may lack parts"


class Field(Flag):
    """Fields that follow the TYPE, in this order; `OPENGL` is no field but NVIDIA's own mark."""

    NONE = 0
    ARCH = auto()
    TLS_CLASS = auto()
    PATH = auto()
    INHERITED = auto()
    LINK = auto()
    OPENGL = auto()


_A, _P, _I, _L, _G = Field.ARCH, Field.PATH, Field.INHERITED, Field.LINK, Field.OPENGL
# By nvidia-installer's own table. Older than 510 and gone since: ALLOCATOR_JSON, LIBGL_LA, NVIFR_*,
# OPENGL_HEADER, TLS_SYMLINK, XMODULE_NEWSYM, XMODULE_SYMLINK.
TYPES: dict[str, Field] = {
    "KERNEL_MODULE_SRC": _I, "KERNEL_MODULE": Field.NONE, "DKMS_CONF": _I, "FIRMWARE": _I,
    "CUDA_ICD": Field.NONE, "CUDA_LIB": _A | _P, "CUDA_SYMLINK": _A | _P | _L,
    "OPENCL_LIB": _A | _P, "OPENCL_LIB_SYMLINK": _A | _P | _L,
    "OPENCL_WRAPPER_LIB": _A | _P, "OPENCL_WRAPPER_SYMLINK": _A | _P | _L,
    "OPENGL_LIB": _A | _G, "OPENGL_SYMLINK": _A | _L | _G, "OPENGL_DATA": _P | _G,
    "OPENGL_HEADER": _P | _G, "LIBGL_LA": _A | _G,
    "TLS_LIB": _A | Field.TLS_CLASS | _P | _G, "TLS_SYMLINK": _A | Field.TLS_CLASS | _P | _L | _G,
    "GLVND_LIB": _A | _G, "GLVND_SYMLINK": _A | _L | _G, "GLVND_EGL_ICD_JSON": _G,
    "GLX_CLIENT_LIB": _A | _G, "GLX_CLIENT_SYMLINK": _A | _L | _G,
    "EGL_CLIENT_LIB": _A | _G, "EGL_CLIENT_SYMLINK": _A | _L | _G,
    "EGL_EXTERNAL_PLATFORM_JSON": _G, "ALLOCATOR_JSON": Field.NONE,
    "GLX_MODULE_SHARED_LIB": _P | _G, "GLX_MODULE_SYMLINK": _P | _L | _G,
    "XMODULE_SHARED_LIB": _P, "XMODULE_SYMLINK": _P | _L, "XMODULE_NEWSYM": _P | _L,
    "XORG_OUTPUTCLASS_CONFIG": Field.NONE, "APPLICATION_PROFILE": _P,
    "GBM_BACKEND_LIB": _A, "GBM_BACKEND_LIB_SYMLINK": _A | _L,
    "VULKAN_ICD_JSON": _P, "VULKANSC_ICD_JSON": _P, "SANDBOXUTILS_FILELIST_JSON": _P,
    "UTILITY_LIB": _A, "UTILITY_LIB_SYMLINK": _A | _L, "UTILITY_BINARY": Field.NONE,
    "UTILITY_BIN_SYMLINK": _L, "INSTALLER_BINARY": Field.NONE, "NVIDIA_MODPROBE": _P,
    "NVIDIA_MODPROBE_MANPAGE": _P, "MANPAGE": _P, "DOCUMENTATION": _P, "EXPLICIT_PATH": _P,
    "DOT_DESKTOP": _P, "ICON": _P, "WINE_LIB": _A, "MODULE_SIGNING_KEY": Field.NONE,
    "VDPAU_LIB": _A | _P, "VDPAU_SYMLINK": _A | _P | _L,
    "NVCUVID_LIB": _A, "NVCUVID_LIB_SYMLINK": _A | _L,
    "ENCODEAPI_LIB": _A, "ENCODEAPI_LIB_SYMLINK": _A | _L,
    "NVIFR_LIB": _A, "NVIFR_LIB_SYMLINK": _A | _L,
    "VGX_LIB": Field.NONE, "VGX_LIB_SYMLINK": _L, "GRID_LIB": _P, "GRID_LIB_SYMLINK": _P | _L,
    "FLEXERA_LIB": _P, "FLEXERA_LIB_SYMLINK": _P | _L,
    "INTERNAL_UTILITY_BINARY": _A, "INTERNAL_UTILITY_LIB": _A, "INTERNAL_UTILITY_DATA": Field.NONE,
    "SYSTEMD_UNIT": Field.NONE, "SYSTEMD_UNIT_SYMLINK": _P | _L,
    "SYSTEMD_SLEEP_SCRIPT": Field.NONE,
}
# Their path came later (435.17), or their target never did: the installer makes it from the name.
_OPTIONAL = {"VULKAN_ICD_JSON": Field.PATH, "SYSTEMD_UNIT_SYMLINK": Field.LINK}
_DEPTH = "INHERIT_PATH_DEPTH:"
_MODULE = "MODULE:"


class Arch(StrEnum):
    """Whose libraries: the guest's own, or 32-bit ones beside them."""

    NATIVE = "NATIVE"
    COMPAT32 = "COMPAT32"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line: a file of the archive, or (`target`) a link that the installer makes.

    `file` is relative to the archive's top. `path` and `target` are as in the manifest. `module` is
    the word after `MODULE:`. `known` is false for a TYPE that this table lacks.
    """

    file: str
    mode: int
    type: str
    arch: Arch | None = None
    path: str = ""
    target: str | None = None
    module: str = ""
    known: bool = True

    @property
    def name(self) -> str:
        """The last part of `file`."""
        return self.file.rpartition("/")[2]

    @property
    def compat32(self) -> bool:
        """Is it a 32-bit file?"""
        return self.arch is Arch.COMPAT32

    @property
    def opengl(self) -> bool:
        """Does the installer leave it out with `--no-opengl-files`?"""
        return Field.OPENGL in TYPES.get(self.type, Field.NONE)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A driver package's content. `modules` are the kernel modules in the order of loading.

    `notes` says of each line that was understood only in part which it is and why.
    """

    description: str
    version: str
    modules: tuple[str, ...]
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()

    @property
    def flavours(self) -> frozenset[str]:
        """Kernel modules whose source is in it: `closed` (kernel/), `open` (kernel-open/)."""
        places = {"kernel": "closed", "kernel-open": "open"}
        tops = {entry.file.partition("/")[0] for entry in self.entries
                if entry.type == "KERNEL_MODULE_SRC"}
        return frozenset(places[top] for top in tops & set(places))


def parse(text: str) -> Manifest:
    """Read a manifest. Raises `UserError` with the line's number where it has no sense."""
    rows = [(number, line) for number, line in enumerate(text.split("\n"), 1)
            if line.rstrip("\r")]
    lines = [line for _, line in rows]
    if len(lines) < HEADER_LINES or not re.fullmatch(r"\d{3}\.\d+(\.\d+)?\S*", lines[1].strip()):
        raise UserError(f"the driver's {FILE} does not start with {HEADER_LINES} lines, of which "
                        "the second is a version", hint=NOT_NVIDIA)
    entries, notes = [], []
    for number, line in rows[HEADER_LINES:]:
        entry = _Line(number, line).entry()
        if not entry.known:
            notes.append(f"line {number} of the driver's {FILE} has the unknown type {entry.type} "
                         f"({entry.file})")
        entries.append(entry)
    return Manifest(description=lines[0].strip(), version=lines[1].strip(),
                    modules=tuple(lines[3].split()), entries=tuple(entries), notes=tuple(notes))


class _Line:
    """One line of entries, its words taken from the left."""

    def __init__(self, number: int, line: str) -> None:
        self.number = number
        self.text = line
        words = line.split()
        if len(words) < 3 or not re.fullmatch(r"[0-7]{3,5}", words[1]):
            raise self.wrong("is not 'file mode TYPE …'")
        self.file = words[0].removeprefix("./")
        self.mode = int(words[1], 8)
        self.type = words[2]
        self.known = self.type in TYPES
        self.module = next((word.removeprefix(_MODULE) for word in words[3:]
                            if word.startswith(_MODULE)), "")
        self.words = [word for word in words[3:] if not word.startswith(_MODULE)]
        self.fields = TYPES[self.type] if self.known else self._guess()

    def wrong(self, why: str) -> UserError:
        return UserError(f"line {self.number} of the driver's {FILE} {why}: {self.text[:200]}",
                         hint=NOT_NVIDIA)

    def _guess(self) -> Field:
        """The fields of an unknown TYPE, as every known one has them: mode 0000 is a link."""
        arch = Field.ARCH if self.words[:1] and self.words[0] in list(Arch) else Field.NONE
        rest = self.words[1:] if arch else self.words
        if rest and rest[0].startswith(_DEPTH):
            return arch | Field.INHERITED
        if self.mode == 0:
            return arch | Field.LINK | (Field.PATH if len(rest) > 1 else Field.NONE)
        return arch | (Field.PATH if rest else Field.NONE)

    def entry(self) -> Entry:
        arch = self._arch() if Field.ARCH in self.fields else None
        if Field.TLS_CLASS in self.fields and self.words[:1] in (["CLASSIC"], ["NEW"]):
            self.words.pop(0)  # up to 410.104
        path = self._path()
        target = self._target() if Field.LINK in self.fields else None
        names = (self.file, path, target or "")
        if self.file.startswith("/") or any(".." in name.split("/") for name in names):
            raise self.wrong("names a place outside")
        return Entry(file=self.file, mode=self.mode, type=self.type, arch=arch, path=path,
                     target=target, module=self.module, known=self.known)

    def _arch(self) -> Arch:
        if not self.words or self.words[0] not in list(Arch):
            raise self.wrong("says neither NATIVE nor COMPAT32")
        return Arch(self.words.pop(0))

    def _path(self) -> str:
        if Field.INHERITED in self.fields:
            word = self.words.pop(0) if self.words else ""
            depth = re.fullmatch(rf"{_DEPTH}(\d)", word)
            directories = self.file.split("/")[:-1]
            if depth is None or len(directories) < int(depth[1]):
                raise self.wrong(f"has no {_DEPTH}n that fits")
            return "/".join(directories[int(depth[1]):])
        if Field.PATH not in self.fields:
            return ""
        if not self.words and _OPTIONAL.get(self.type) != Field.PATH:
            raise self.wrong("lacks the path that its type has")
        return self.words.pop(0) if self.words else ""

    def _target(self) -> str:
        if not self.words and _OPTIONAL.get(self.type) != Field.LINK:
            raise self.wrong("lacks the target that its type has")
        return self.words.pop(0) if self.words else self.file


X_MODULES = frozenset({"XMODULE_SHARED_LIB", "XMODULE_SYMLINK", "XMODULE_NEWSYM",
                       "GLX_MODULE_SHARED_LIB", "GLX_MODULE_SYMLINK"})
XORG = "/usr/lib/xorg/modules"
"""Where the X server of Debian and Ubuntu looks for `X_MODULES`."""
ONLY_WITH_X = "XORG_OUTPUTCLASS_CONFIG"
"""Installed only where `X -version` tells of an X server of 1.16 or later (manifest.c)."""
_ABSOLUTE = {"EXPLICIT_PATH", "NVIDIA_MODPROBE", "OPENGL_DATA"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a guest has its libraries; `version` is the driver's.

    The guest has a merged /usr: what the installer puts into /lib is in /usr/lib.
    """

    version: str
    libdir: str = "/usr/lib/x86_64-linux-gnu"
    libdir32: str = "/usr/lib/i386-linux-gnu"
    xorg: str = XORG


_UNITS = "/usr/lib/systemd/system"
# Directory of each TYPE: {libdir}, {path} and {version} stand for the layout's and the entry's.
_LIBRARY, _LIBRARY_PATH = "{libdir}", "{libdir}/{path}"
_PLACES: Mapping[str, str] = {
    **dict.fromkeys(("OPENGL_LIB", "OPENGL_SYMLINK", "LIBGL_LA", "GLVND_LIB", "GLVND_SYMLINK",
                     "GLX_CLIENT_LIB", "GLX_CLIENT_SYMLINK", "EGL_CLIENT_LIB", "EGL_CLIENT_SYMLINK",
                     "UTILITY_LIB", "UTILITY_LIB_SYMLINK", "NVCUVID_LIB", "NVCUVID_LIB_SYMLINK",
                     "ENCODEAPI_LIB", "ENCODEAPI_LIB_SYMLINK", "NVIFR_LIB", "NVIFR_LIB_SYMLINK",
                     "VGX_LIB", "VGX_LIB_SYMLINK"), _LIBRARY),
    **dict.fromkeys(("CUDA_LIB", "CUDA_SYMLINK", "OPENCL_LIB", "OPENCL_LIB_SYMLINK",
                     "OPENCL_WRAPPER_LIB", "OPENCL_WRAPPER_SYMLINK", "TLS_LIB", "TLS_SYMLINK",
                     "VDPAU_LIB", "VDPAU_SYMLINK", "GRID_LIB", "GRID_LIB_SYMLINK", "FLEXERA_LIB",
                     "FLEXERA_LIB_SYMLINK"), _LIBRARY_PATH),
    **dict.fromkeys(sorted(X_MODULES), "{xorg}/{path}"),
    **dict.fromkeys(("GBM_BACKEND_LIB", "GBM_BACKEND_LIB_SYMLINK"), "{libdir}/gbm"),
    **dict.fromkeys(("UTILITY_BINARY", "UTILITY_BIN_SYMLINK", "INSTALLER_BINARY"), "/usr/bin"),
    **dict.fromkeys(("MANPAGE", "NVIDIA_MODPROBE_MANPAGE"), "/usr/share/man/{path}"),
    **dict.fromkeys(("INTERNAL_UTILITY_BINARY", "INTERNAL_UTILITY_LIB", "INTERNAL_UTILITY_DATA"),
                    "/usr/lib/nvidia{bits}"),
    **dict.fromkeys(("KERNEL_MODULE_SRC", "DKMS_CONF"), "/usr/src/nvidia-{version}/{path}"),
    **dict.fromkeys(sorted(_ABSOLUTE), "{path}"),
    "FIRMWARE": "/usr/lib/firmware/nvidia/{version}/{path}",
    "CUDA_ICD": "/etc/OpenCL/vendors",
    "VULKAN_ICD_JSON": "/etc/vulkan/{path}",
    "VULKANSC_ICD_JSON": "/etc/vulkansc/{path}",
    "GLVND_EGL_ICD_JSON": "/usr/share/glvnd/egl_vendor.d",
    "EGL_EXTERNAL_PLATFORM_JSON": "/usr/share/egl/egl_external_platform.d",
    "SANDBOXUTILS_FILELIST_JSON": "/usr/share/nvidia/files.d",
    "APPLICATION_PROFILE": "/usr/share/nvidia",
    "XORG_OUTPUTCLASS_CONFIG": "/usr/share/X11/xorg.conf.d",
    "DOCUMENTATION": "/usr/share/doc/{path}",
    "DOT_DESKTOP": "/usr/share/applications",
    "ICON": "/usr/share/icons/hicolor/{path}",
    "WINE_LIB": "{native}/nvidia/wine",
    "SYSTEMD_UNIT": _UNITS,
    "SYSTEMD_UNIT_SYMLINK": "/etc/systemd/system/{path}",
    "SYSTEMD_SLEEP_SCRIPT": "/usr/lib/systemd/system-sleep",
}


def destination(entry: Entry, layout: Layout) -> PurePosixPath | None:
    """Where nvidia-installer puts an entry, as an absolute path of the guest.

    None where it puts nothing: a TYPE without a place of its own, or an unknown one.
    """
    place = _PLACES.get(entry.type)
    if place is None:
        return None
    directory = place.format(
        libdir=layout.libdir32 if entry.compat32 else layout.libdir, native=layout.libdir,
        xorg=layout.xorg, path=entry.path, version=layout.version,
        bits="/32" if entry.compat32 else "")
    path = PurePosixPath("/", *(part for part in directory.split("/") if part), entry.name)
    if path.parts[1] in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = PurePosixPath("/usr", *path.parts[1:])
    return path
