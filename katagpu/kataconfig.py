"""The Kata configuration drop-in that makes a Kata runtime boot this guest.

A drop-in replaces single values of the shim's configuration file. What is written here is what the
guest depends on and, because drop-ins replace whole strings, Kata's own NVIDIA values around it.
Source of the keys: src/runtime/pkg/katautils/config.go and src/libs/kata-types of Kata 4.1.0;
kataversions has which older release knows which.

It runs on GPU hosts too (`host configure`): Python 3.9, standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from katagpu import verity
from katagpu.errors import UserError
from katagpu.kataversions import NEWEST, OWN_DIRECTORIES, Version, Words, known
from katagpu.kataversions import Shim as Shim

FILE_NAME = "50-katagpu.toml"  # users' drop-ins are 50 to 89; names below are kata-deploy's
HOOK_PATH = "/usr/share/oci/hooks"
# Kata's own for NVIDIA guests (KERNELPARAMS_NV): a drop-in replaces the whole string.
KERNEL_PARAMS = ("cgroup_no_v1=all", "pci=realloc", "pci=nocrs", "pci=assign-busses")
TIMEOUT_S = 1200  # Kata's value: a guest with eight GPUs and the first pull of an image
MAX_PORTS = 16
LARGE_BAR = Version(1, 11, 0)  # the guide: the first release whose guests have room for them
EXTENSION_NAME = re.compile(r"[A-Za-z0-9_-]+")  # it becomes a disk's serial and a kernel parameter
HYPERVISOR, AGENT, RUNTIME = "hypervisor.qemu", "agent.kata", "runtime"

_DIRECTORIES: Mapping[str, str] = {
    "go": "/opt/kata/share/defaults/kata-containers/runtimes",
    "runtime-rs": "/opt/kata/share/defaults/kata-containers/runtime-rs/runtimes",
}


class Plug(Words):
    """When the GPU is given to the sandbox: with its start, or while it runs."""

    COLD = "cold"
    HOT = "hot"


class Port(Words):
    """What the GPU is plugged into.

    All switch ports hang on one root port. A bridge is conventional PCI: for small BARs, plugged
    hot, in Go's shim.
    """

    ROOT = "root-port"
    SWITCH = "switch-port"
    BRIDGE = "bridge-port"


class Bar(Words):
    """How much address space the GPU needs.

    A large BAR (Kata's runtime says so of more than 4 GiB) has to be placed above 4 GiB, which a
    conventional PCI bridge's window cannot do.
    """

    LARGE = "large"
    SMALL = "small"


class ToolkitMode(Words):
    """How containers get the driver's files."""

    CDI = "cdi"
    HOOK = "hook"
    NONE = "none"


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class KataSettings:
    """What the drop-in is made from. Paths are those on the host that runs Kata.

    Exactly one of `image` and `initrd` is given. `kernel_verity_params` is the line of that name
    (empty: the image is mounted unverified). Memory is in MiB. `ports` are as many as functions
    are given to one sandbox. Raises `UserError` for what no Kata, or not this one, can do.
    """

    kernel: str
    shim: Shim = Shim.GO
    version: Version = NEWEST
    image: str | None = None
    initrd: str | None = None
    rootfs_type: str = "erofs"
    dax_header: bool = False
    kernel_verity_params: str = ""
    toolkit_mode: ToolkitMode = ToolkitMode.CDI
    plug: Plug = Plug.COLD
    port: Port = Port.ROOT
    bar: Bar = Bar.LARGE
    ports: int = 8
    machine_type: str = "q35"
    default_vcpus: int = 1
    default_memory: int = 8192
    extra_kernel_params: tuple[str, ...] = ()
    host_kernel_params: tuple[str, ...] = ()  # of other files of the host, which ours replaces
    extensions: tuple[Extension, ...] = ()

    def __post_init__(self) -> None:
        if (self.image is None) == (self.initrd is None):
            raise UserError("a Kata configuration needs an image or an initrd, and not both")
        if self.initrd is not None and self.kernel_verity_params:
            raise UserError("kernel_verity_params belong to an image; an initrd cannot have them")
        if self.initrd is not None and self.dax_header:
            raise UserError("the DAX header belongs to an image; an initrd cannot have it")
        if not 1 <= self.ports <= MAX_PORTS:
            raise UserError(f"pcie_root_port and pcie_switch_port have to be 1 to {MAX_PORTS}",
                            hint="a sandbox gets no more functions than that")
        for wrong, hint in (*_unusable_ports(self), *_unusable_guest(self)):
            raise UserError(f"Kata {self.version} ({self.shim}): {wrong}", hint=hint)

    def knows(self, key: str, table: str = HYPERVISOR) -> bool:
        """Does the runtime read this key?"""
        return known(self.shim, self.version, table, key)

    @property
    def kernel_params(self) -> str:
        """The host's words, then those of the guest: of two of one name the last counts."""
        mine = (*KERNEL_PARAMS, *self.extra_kernel_params)
        return " ".join((*(word for word in self.host_kernel_params if word not in mine), *mine))


if TYPE_CHECKING:
    Value = str | int | bool | list[str]
    Table = Mapping[str, Value]


def _unusable_ports(settings: KataSettings) -> Iterator[tuple[str, str]]:
    large = settings.bar is Bar.LARGE
    if settings.shim is Shim.GO and settings.version < LARGE_BAR and large:
        yield "its guests have no room for a large BAR", f"install Kata {LARGE_BAR} or newer"
    if settings.port is Port.SWITCH and not settings.knows("pcie_switch_port"):
        yield "it has no switch ports", "plug into root ports (--port root-port)"
    elif settings.port is Port.SWITCH and settings.shim is Shim.RUST \
            and settings.plug is Plug.COLD and settings.knows("cold_plug_vfio"):
        # prepare_coldplug_cdi_devices of src/runtime-rs: "only "root-port" is supported"
        yield ("a GPU that is there from the sandbox's start is plugged into a root port",
               "plug into root ports (--port root-port), or use Go's runtime (--shim go)")
    if settings.port is Port.BRIDGE and (
            large or settings.plug is Plug.COLD or settings.shim is Shim.RUST):
        yield ("a bridge takes GPUs with small BARs, plugged hot, in Go's shim",
               "plug into root ports (--port root-port)")


def _unusable_guest(settings: KataSettings) -> Iterator[tuple[str, str]]:
    if settings.image and settings.rootfs_type != "ext4" and not settings.knows("rootfs_type"):
        yield (f"it mounts the image as ext4, and this one is {settings.rootfs_type}",
               "build the guest with image: {format: ext4} or {format: initrd}, or install Kata "
               "3.1 or newer")
    if settings.image and not settings.dax_header and not settings.knows("disable_image_nvdimm"):
        yield ("it boots the image as an NVDIMM, and this one has no DAX header",
               "build the guest with image: {dax_header: true} or {format: initrd}")
    if settings.extensions and not settings.knows("guest_extension_images"):
        yield ("it attaches no second disk, and this guest's driver is on one",
               "build the guest with image: {model: monolith}, or install Kata 4.0 or newer")
    if settings.toolkit_mode is ToolkitMode.HOOK and not settings.knows("guest_hook_path"):
        yield ("it runs no hooks in the guest", "build the guest with toolkit: {mode: cdi}, or "
               "install Kata 1.4 or newer")


def losses(settings: KataSettings) -> Iterator[str]:
    """What this guest has and this release of Kata cannot do, without which it boots too."""
    if settings.kernel_verity_params and not settings.knows("kernel_verity_params"):
        yield ("this Kata cannot verify the image (kernel_verity_params came with 3.27): the root "
               "is mounted unverified")
    if settings.plug is Plug.COLD and not settings.knows("cold_plug_vfio"):
        yield "this Kata has no cold_plug_vfio: the GPU is plugged in while the guest runs"
    if settings.bar is Bar.LARGE and settings.port is Port.ROOT and \
            not settings.knows("pcie_root_port"):
        yield "this Kata counts its root ports itself: pcie_root_port is not written"


def tables(settings: KataSettings) -> dict[str, Table]:
    """All that the guest depends on, in the names that this release of Kata reads."""
    return _readable(settings, {HYPERVISOR: _hypervisor(settings), AGENT: _agent(settings),
                                RUNTIME: _runtime(settings)})


def host_tables(settings: KataSettings) -> dict[str, Table]:
    """The part of it that depends on the host: on its GPUs, on kernel parameters of its own."""
    words: Table = {"kernel_params": settings.kernel_params} if settings.host_kernel_params else {}
    return _readable(settings, {HYPERVISOR: {**words, **_plugging(settings)}})


def _readable(settings: KataSettings, wanted: Mapping[str, Table]) -> dict[str, Table]:
    found = {name: {key: value for key, value in table.items() if settings.knows(key, name)}
             for name, table in wanted.items()}
    return {name: table for name, table in found.items() if table}


def render_drop_in(settings: KataSettings, handler: str | None = None) -> str:
    """The text of `50-katagpu.toml`; `handler` is the runtime whose directory the header names."""
    lines = [*_header(settings, handler), *(f"# {line}" for line in losses(settings))]
    return "\n".join(lines) + "\n" + render_tables(tables(settings), settings.extensions)


def render_tables(content: Mapping[str, Table], extensions: Iterable[Extension] = ()) -> str:
    """Tables as TOML, and the extensions as an array in the hypervisor's."""
    lines: list[str] = []
    for name, table in content.items():
        lines += ["", f"[{name}]", *_rows(table)]
        # A drop-in replaces a whole array: these are all extensions that the guest gets.
        for extension in extensions if name == HYPERVISOR else ():
            lines += ["", f"[[{name}.guest_extension_images]]", *_rows(asdict(extension))]
    return "\n".join(lines) + "\n"


def _rows(table: Table) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items()]


def drop_in_directory(shim: Shim, handler: str | None = None) -> str:
    """Where kata-deploy's runtimes look for drop-ins, since 3.27."""
    return f"{_DIRECTORIES[shim]}/{handler or default_handler(shim)}/config.d"


def default_handler(shim: Shim) -> str:
    """The name of kata-deploy's runtime for GPUs."""
    return "qemu-nvidia-gpu" if shim is Shim.GO else "qemu-nvidia-gpu-runtime-rs"


def _header(settings: KataSettings, handler: str | None) -> Iterable[str]:
    yield f"# Kata Containers, {settings.shim} shim: boot the guest made by katagpu."
    if settings.version >= OWN_DIRECTORIES:
        yield "# Copy it, as a regular file and with nothing else beside it that is no drop-in, to"
        yield f"#   {drop_in_directory(settings.shim, handler)}/{FILE_NAME}"
        yield "# (or into config.d next to the configuration.toml in use). Renew it with every " \
              "image:"
    else:
        yield f"# For Kata {settings.version}; it belongs into config.d next to the configuration"
        yield "# file of one runtime alone. Renew it with every image:"
    yield "# paths, kernel parameters and the root hash are those of one build."


def _hypervisor(settings: KataSettings) -> Table:
    # Empty strings take away what the file below sets: Kata's own image, its root hash, its hooks.
    table: dict[str, Value] = {
        "kernel": settings.kernel,
        "image": settings.image or "",
        "initrd": settings.initrd or "",
        "rootfs_type": settings.rootfs_type,
        "kernel_verity_params": settings.kernel_verity_params,
        "kernel_params": settings.kernel_params,
        "machine_type": settings.machine_type,
        "default_vcpus": settings.default_vcpus,
        "default_memory": settings.default_memory,
        "disable_image_nvdimm": not settings.dax_header,
        **_plugging(settings),
        # Hooks are lost when CDI puts hooks into the same container (Kata's append_guest_hooks).
        "guest_hook_path": HOOK_PATH if settings.toolkit_mode is ToolkitMode.HOOK else "",
    }
    if "hot_plug_vfio" in table:
        table["hot_plug_vfio"] = table.pop("hot_plug_vfio")  # it stays the last one
    if settings.shim is Shim.RUST:
        table["vm_rootfs_driver"] = "virtio-pmem" if settings.dax_header else "virtio-blk-pci"
        if not settings.extensions:
            # The driver is in our image; Kata's composable guest has it in a second one.
            table["guest_extension_images"] = []
    return table


def _plugging(settings: KataSettings) -> Table:
    if settings.knows("cold_plug_vfio"):
        table: dict[str, Value] = {"cold_plug_vfio": _port(settings, Plug.COLD)}
        switch = settings.port is Port.SWITCH
        # Kata's Rust runtime refuses both kinds of ports in one guest.
        table["pcie_root_port"] = 0 if switch else settings.ports
        if switch:
            table["pcie_switch_port"] = settings.ports
        if settings.shim is Shim.GO:
            table["hot_plug_vfio"] = _port(settings, Plug.HOT)
        return table
    # Until 3.1 (Go) and 3.30 (Rust): a GPU is always plugged hot, into a root port by pciehp or
    # into a bridge by acpi_pcihp.
    if settings.bar is Bar.SMALL:
        return {"hotplug_vfio_on_root_bus": False}
    return {"hotplug_vfio_on_root_bus": True, "pcie_root_port": settings.ports}


def _port(settings: KataSettings, plug: Plug) -> str:
    return str(settings.port) if settings.plug is plug else "no-port"


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
