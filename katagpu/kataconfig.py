"""The Kata configuration drop-in that makes a Kata runtime boot this guest.

A drop-in replaces single values of the shim's configuration file. What is written here is what the
guest depends on and, because drop-ins replace whole strings, Kata's own NVIDIA values around it.
Source of the keys: Kata 4.1.0, src/runtime/pkg/katautils/config.go and src/libs/kata-types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

from katagpu import verity
from katagpu.errors import UserError

FILE_NAME = "50-katagpu.toml"  # users' drop-ins are 50 to 89; names below are kata-deploy's
HOOK_PATH = "/usr/share/oci/hooks"
# Kata's own for NVIDIA guests (KERNELPARAMS_NV): a drop-in replaces the whole string.
KERNEL_PARAMS = ("cgroup_no_v1=all", "pci=realloc", "pci=nocrs", "pci=assign-busses")
TIMEOUT_S = 1200  # Kata's value: a guest with eight GPUs and the first pull of an image
MAX_ROOT_PORTS = 16
EXTENSION_NAME = re.compile(r"[A-Za-z0-9_-]+")  # it becomes a disk's serial and a kernel parameter

_DIRECTORIES: Mapping[str, str] = {
    "go": "/opt/kata/share/defaults/kata-containers/runtimes",
    "runtime-rs": "/opt/kata/share/defaults/kata-containers/runtime-rs/runtimes",
}


class Shim(StrEnum):
    """Kata's two runtimes; their keys differ."""

    GO = "go"
    RUST = "runtime-rs"


class Plug(StrEnum):
    """When the GPU is given to the sandbox: with its start, or while it runs."""

    COLD = "cold"
    HOT = "hot"


class ToolkitMode(StrEnum):
    """How containers get the driver's files."""

    CDI = "cdi"
    HOOK = "hook"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A disk that Kata attaches beside the image, and the guest mounts by its name.

    `path` is on the host that runs Kata; `verity_params` is the line by which the guest verifies
    it (empty: it is mounted unverified). Raises `UserError` for what Kata's runtime refuses.
    """

    name: str
    path: str
    verity_params: str = ""

    def __post_init__(self) -> None:
        if not EXTENSION_NAME.fullmatch(self.name):
            raise UserError(f"{self.name!r} cannot be the name of an extension",
                            hint="letters, digits, minus and underscore")
        if self.verity_params:
            verity.read(self.verity_params)


@dataclass(frozen=True, kw_only=True)
class KataSettings:
    """What the drop-in is made from. Paths are those on the host that runs Kata.

    Exactly one of `image` and `initrd` is given. `kernel_verity_params` is the line of that name
    (empty: the image is mounted unverified). Memory is in MiB.
    """

    shim: Shim = Shim.GO
    kernel: str
    image: str | None = None
    initrd: str | None = None
    rootfs_type: str = "erofs"
    dax_header: bool = False
    kernel_verity_params: str = ""
    toolkit_mode: ToolkitMode = ToolkitMode.CDI
    plug: Plug = Plug.COLD
    pcie_root_ports: int = 8
    machine_type: str = "q35"
    default_vcpus: int = 1
    default_memory: int = 8192
    extra_kernel_params: tuple[str, ...] = ()
    extensions: tuple[Extension, ...] = ()

    def __post_init__(self) -> None:
        if (self.image is None) == (self.initrd is None):
            raise UserError("a Kata configuration needs an image or an initrd, and not both")
        if self.initrd is not None and self.kernel_verity_params:
            raise UserError("kernel_verity_params belong to an image; an initrd cannot have them")
        if self.initrd is not None and self.dax_header:
            raise UserError("the DAX header belongs to an image; an initrd cannot have it")
        if not 1 <= self.pcie_root_ports <= MAX_ROOT_PORTS:
            raise UserError(f"pcie_root_port has to be 1 to {MAX_ROOT_PORTS}")


Value = str | int | bool | list[str]
Table = Mapping[str, Value]


def render_drop_in(settings: KataSettings, handler: str | None = None) -> str:
    """The text of `50-katagpu.toml`; `handler` is the runtime whose directory the header names."""
    tables: dict[str, Table] = {
        "hypervisor.qemu": _hypervisor(settings),
        "agent.kata": _agent(settings),
        "runtime": _runtime(settings),
    }
    lines = [*_header(settings, handler)]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_rows(table)]
        # A drop-in replaces a whole array: these are all extensions that the guest gets.
        for extension in settings.extensions if name == "hypervisor.qemu" else ():
            lines += ["", f"[[{name}.guest_extension_images]]", *_rows(asdict(extension))]
    return "\n".join(lines) + "\n"


def _rows(table: Table) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items()]


def drop_in_directory(shim: Shim, handler: str | None = None) -> str:
    """Where kata-deploy's runtimes look for drop-ins."""
    return f"{_DIRECTORIES[shim]}/{handler or _default_handler(shim)}/config.d"


def _default_handler(shim: Shim) -> str:
    return "qemu-nvidia-gpu" if shim is Shim.GO else "qemu-nvidia-gpu-runtime-rs"


def _header(settings: KataSettings, handler: str | None) -> Iterable[str]:
    yield f"# Kata Containers, {settings.shim} shim: boot the guest made by katagpu."
    yield "# Copy it, as a regular file and with nothing else beside it that is no drop-in, to"
    yield f"#   {drop_in_directory(settings.shim, handler)}/{FILE_NAME}"
    yield "# (or into config.d next to the configuration.toml in use). Renew it with every image:"
    yield "# paths, kernel parameters and the root hash are those of one build."


def _hypervisor(settings: KataSettings) -> Table:
    # Empty strings take away what the file below sets: Kata's own image, its root hash, its hooks.
    table: dict[str, Value] = {
        "kernel": settings.kernel,
        "image": settings.image or "",
        "initrd": settings.initrd or "",
        "rootfs_type": settings.rootfs_type,
        "kernel_verity_params": settings.kernel_verity_params,
        "kernel_params": " ".join((*KERNEL_PARAMS, *settings.extra_kernel_params)),
        "machine_type": settings.machine_type,
        "default_vcpus": settings.default_vcpus,
        "default_memory": settings.default_memory,
        "disable_image_nvdimm": not settings.dax_header,
        "cold_plug_vfio": _port(settings, Plug.COLD),
        "pcie_root_port": settings.pcie_root_ports,
        # Hooks are lost when CDI puts hooks into the same container (Kata's append_guest_hooks).
        "guest_hook_path": HOOK_PATH if settings.toolkit_mode is ToolkitMode.HOOK else "",
    }
    if settings.shim is Shim.GO:
        table["hot_plug_vfio"] = _port(settings, Plug.HOT)
    else:
        table["vm_rootfs_driver"] = "virtio-pmem" if settings.dax_header else "virtio-blk-pci"
        if not settings.extensions:
            # The driver is in our image; Kata's composable guest has it in a second one.
            table["guest_extension_images"] = []
    return table


def _port(settings: KataSettings, plug: Plug) -> str:
    return "root-port" if settings.plug is plug else "no-port"


def _agent(settings: KataSettings) -> Table:
    if settings.shim is Shim.GO:
        return {"dial_timeout": TIMEOUT_S}
    return {"reconnect_timeout_ms": TIMEOUT_S * 1000, "create_container_timeout": TIMEOUT_S}


def _runtime(settings: KataSettings) -> Table:
    table: dict[str, Value] = {
        # The guest's driver takes the GPU; in mode "vfio" the container would get the raw device.
        "vfio_mode": "guest-kernel",
        "static_sandbox_resource_mgmt": True,
        "sandbox_cgroup_only": True,
    }
    if settings.shim is Shim.GO:
        table["create_container_timeout"] = TIMEOUT_S
    return table


def _toml(value: Value) -> str:
    # Strings, numbers, booleans and lists of strings are written the same in JSON and TOML, but for
    # DEL, which JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
