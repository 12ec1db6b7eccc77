"""The Kata drop-in: valid TOML, keys that the shims know, values that belong to the guest."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from katagpu.errors import UserError
from katagpu.kataconfig import (
    Bar,
    Extension,
    KataSettings,
    Plug,
    Port,
    Shim,
    ToolkitMode,
    drop_in_directory,
    host_tables,
    losses,
    render_drop_in,
    render_tables,
    tables,
)
from katagpu.kataversions import Version


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Toml tags of hypervisor, agent and runtime in src/runtime/pkg/katautils/config.go of Kata 4.1.0
# that a drop-in may set. An unknown one in [hypervisor.*] or [agent.*] stops Go's shim.
GO_HYPERVISOR = words(
    """path kernel initrd image rootfs_type firmware firmware_volume machine_accelerators
    cpu_features kernel_params kernel_verity_params machine_type block_device_driver entropy_source
    shared_fs virtio_fs_daemon virtio_fs_cache guest_hook_path seccompsandbox block_device_aio
    valid_hypervisor_paths enable_annotations memory_offset default_maxmemory default_maxvcpus
    default_memory memory_slots default_bridges default_vcpus enable_mem_prealloc enable_hugepages
    enable_virtio_mem enable_iommu enable_iommu_platform enable_numa enable_debug
    disable_nesting_checks enable_iothreads disable_image_nvdimm hot_plug_vfio cold_plug_vfio
    pcie_root_port pcie_switch_port disable_vhost_net confidential_guest rootless disable_selinux
    use_legacy_serial guest_extension_images"""
)
GO_AGENT = words(
    """kernel_modules enable_debug enable_tracing debug_console_enabled dial_timeout cdh_api_timeout
    launch_process_timeout visible_cdi_devices"""
)
GO_RUNTIME = words(
    """internetworking_model vfio_mode guest_selinux_label sandbox_bind_mounts experimental
    enable_tracing disable_new_netns disable_guest_seccomp enable_vcpus_pinning enable_debug
    sandbox_cgroup_only static_sandbox_resource_mgmt disable_guest_empty_dir emptydir_mode
    create_container_timeout dan_conf pod_resource_api_sock kubelet_root_dir"""
)
# configuration-qemu-nvidia-gpu-runtime-rs.toml.in of the same version; [agent.*] refuses others.
RUST_HYPERVISOR = GO_HYPERVISOR - {"hot_plug_vfio", "seccompsandbox", "enable_numa"} | {
    "vm_rootfs_driver"
}
RUST_AGENT = GO_AGENT - {"dial_timeout"} | {
    "dial_timeout_ms",
    "reconnect_timeout_ms",
    "create_container_timeout",
}
RUST_RUNTIME = GO_RUNTIME - {"create_container_timeout"} | {"name", "hypervisor_name", "agent_name"}
KNOWN = {
    Shim.GO: (GO_HYPERVISOR, GO_AGENT, GO_RUNTIME),
    Shim.RUST: (RUST_HYPERVISOR, RUST_AGENT, RUST_RUNTIME),
}


def settings(**changes: Any) -> KataSettings:
    values: dict[str, Any] = {"kernel": "/opt/g/vmlinuz", "image": "/opt/g/guest.img", **changes}
    return KataSettings(**values)


def parsed(**changes: Any) -> dict[str, Any]:
    return tomllib.loads(render_drop_in(settings(**changes)))


def qemu(**changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = parsed(**changes)["hypervisor"]["qemu"]
    return table


@pytest.mark.parametrize("shim", list(Shim))
@pytest.mark.parametrize("mode", list(ToolkitMode))
@pytest.mark.parametrize("plug", list(Plug))
@pytest.mark.parametrize("dax", [False, True])
def test_only_keys_that_the_shim_knows(
    shim: Shim, mode: ToolkitMode, plug: Plug, dax: bool
) -> None:
    drop_in = parsed(shim=shim, toolkit_mode=mode, plug=plug, dax_header=dax)
    hypervisor, agent, runtime = KNOWN[shim]
    assert set(drop_in) == {"hypervisor", "agent", "runtime"}
    assert set(drop_in["hypervisor"]) == {"qemu"} and set(drop_in["agent"]) == {"kata"}
    assert set(drop_in["hypervisor"]["qemu"]) <= hypervisor
    assert set(drop_in["agent"]["kata"]) <= agent
    assert set(drop_in["runtime"]) <= runtime


def test_dead_keys_of_the_guide_are_not_written() -> None:
    for shim in Shim:
        assert "hotplug_vfio_on_root_bus" not in render_drop_in(settings(shim=shim))


def test_image_takes_away_the_initrd_and_the_other_image_s_hash() -> None:
    table = qemu()
    assert (table["image"], table["initrd"]) == ("/opt/g/guest.img", "")
    # Left alone, the hash of Kata's own image would be checked against ours.
    assert table["kernel_verity_params"] == ""
    assert table["rootfs_type"] == "erofs"
    assert qemu(kernel_verity_params="root_hash=ab")["kernel_verity_params"] == "root_hash=ab"


def test_initrd_takes_away_the_image() -> None:
    table = qemu(image=None, initrd="/opt/g/initrd")
    assert (table["image"], table["initrd"]) == ("", "/opt/g/initrd")


def test_kernel_params_repeat_kata_s_own() -> None:
    own = "cgroup_no_v1=all pci=realloc pci=nocrs pci=assign-busses"
    assert qemu()["kernel_params"] == own
    extra = ("agent.log=debug", "x=y")
    assert qemu(extra_kernel_params=extra)["kernel_params"] == f"{own} agent.log=debug x=y"


def test_only_one_plug_is_a_root_port() -> None:
    assert (qemu()["cold_plug_vfio"], qemu()["hot_plug_vfio"]) == ("root-port", "no-port")
    hot = qemu(plug=Plug.HOT)
    assert (hot["cold_plug_vfio"], hot["hot_plug_vfio"]) == ("no-port", "root-port")
    assert qemu(plug=Plug.HOT, shim=Shim.RUST)["cold_plug_vfio"] == "no-port"
    assert qemu(ports=2)["pcie_root_port"] == 2


def test_dax_header_decides_the_root_s_device() -> None:
    assert qemu()["disable_image_nvdimm"] is True
    assert qemu(dax_header=True)["disable_image_nvdimm"] is False
    assert qemu(shim=Shim.RUST)["vm_rootfs_driver"] == "virtio-blk-pci"
    assert qemu(shim=Shim.RUST, dax_header=True)["vm_rootfs_driver"] == "virtio-pmem"


def test_hook_path_in_hook_mode_only() -> None:
    assert qemu(toolkit_mode=ToolkitMode.HOOK)["guest_hook_path"] == "/usr/share/oci/hooks"
    assert qemu()["guest_hook_path"] == ""
    assert qemu(toolkit_mode=ToolkitMode.NONE)["guest_hook_path"] == ""


def test_rust_shim_drops_the_second_image() -> None:
    assert qemu(shim=Shim.RUST)["guest_extension_images"] == []


def test_the_header_names_the_place() -> None:
    for shim in Shim:
        head = render_drop_in(settings(shim=shim)).split("\n\n")[0]
        assert f"{drop_in_directory(shim)}/50-katagpu.toml" in head
        assert all(line.startswith("#") for line in head.splitlines())
    assert "/runtimes/my-gpu/config.d/" in render_drop_in(settings(), handler="my-gpu")


def test_strings_survive() -> None:
    path = '/opt/a "b"\\c\x7f\té/guest.img'
    assert qemu(image=path)["image"] == path


@pytest.mark.parametrize(
    "changes",
    [
        {"image": None},
        {"initrd": "/x"},
        {"image": None, "initrd": "/x", "kernel_verity_params": "root_hash=1"},
        {"image": None, "initrd": "/x", "dax_header": True},
        {"ports": 0},
        {"ports": 17},
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        settings(**changes)


LINE = (f"root_hash={'ab' * 32},salt={'01' * 32},data_blocks=12,data_block_size=4096,"
        "hash_block_size=4096")


@pytest.mark.parametrize("shim", list(Shim))
def test_extensions_are_the_whole_array(shim: Shim) -> None:
    gpu = Extension(name="gpu", path="/opt/g/gpu.img", verity_params=LINE)
    other = Extension(name="my-2_x", path="/opt/g/x.img")
    drop_in = parsed(shim=shim, extensions=(gpu, other))
    table = drop_in["hypervisor"]["qemu"]
    assert table["guest_extension_images"] == [
        {"name": "gpu", "path": "/opt/g/gpu.img", "verity_params": LINE},
        {"name": "my-2_x", "path": "/opt/g/x.img", "verity_params": ""}]
    # The tables after the array are not swallowed by it.
    assert table["image"] == "/opt/g/guest.img" and drop_in["runtime"]["sandbox_cgroup_only"]
    assert set(drop_in) == {"hypervisor", "agent", "runtime"}


@pytest.mark.parametrize("fields", [
    {"name": "a b"}, {"name": ""}, {"name": "a/b"}, {"verity_params": "root_hash=ab"}])
def test_extensions_that_the_runtime_refuses(fields: dict[str, str]) -> None:
    with pytest.raises(UserError):
        Extension(**{"name": "gpu", "path": "/x", **fields})


GO31, GO35, GO37 = Version(3, 1, 0), Version(3, 5, 0), Version(3, 7, 0)


@pytest.mark.parametrize(("changes", "keys"), [
    ({"version": GO31}, {"hotplug_vfio_on_root_bus": True, "pcie_root_port": 8}),
    ({"version": GO31, "ports": 2}, {"hotplug_vfio_on_root_bus": True, "pcie_root_port": 2}),
    ({"version": GO31, "bar": Bar.SMALL}, {"hotplug_vfio_on_root_bus": False}),
    # The guide's own two, of Kata 1.11 and 1.3.
    ({"version": Version(1, 11, 0), "ports": 1, "rootfs_type": "ext4"},
     {"hotplug_vfio_on_root_bus": True, "pcie_root_port": 1}),
    ({"version": Version(1, 3, 0), "bar": Bar.SMALL, "rootfs_type": "ext4", "dax_header": True},
     {"hotplug_vfio_on_root_bus": False}),
    ({"version": GO35}, {"cold_plug_vfio": "root-port", "hot_plug_vfio": "no-port"}),
    ({"version": GO37, "plug": Plug.HOT},
     {"cold_plug_vfio": "no-port", "hot_plug_vfio": "root-port", "pcie_root_port": 8}),
    ({"version": GO37, "plug": Plug.HOT, "bar": Bar.SMALL, "port": Port.BRIDGE},
     {"cold_plug_vfio": "no-port", "hot_plug_vfio": "bridge-port", "pcie_root_port": 8}),
    ({"version": GO37, "port": Port.SWITCH, "ports": 4},
     {"cold_plug_vfio": "switch-port", "hot_plug_vfio": "no-port", "pcie_root_port": 0,
      "pcie_switch_port": 4}),
    ({"version": Version(3, 20, 0), "shim": Shim.RUST},
     {"hotplug_vfio_on_root_bus": True, "pcie_root_port": 8}),
    ({"version": Version(3, 31, 0), "shim": Shim.RUST},
     {"cold_plug_vfio": "root-port", "pcie_root_port": 8}),
    ({"shim": Shim.RUST, "port": Port.SWITCH, "plug": Plug.HOT},
     {"cold_plug_vfio": "no-port", "pcie_root_port": 0, "pcie_switch_port": 8})])
def test_how_a_gpu_is_plugged_by_version(changes: dict[str, Any], keys: dict[str, Any]) -> None:
    table = qemu(**changes)
    assert {key: value for key, value in table.items() if "vfio" in key or "pcie" in key} == keys
    host = tomllib.loads(render_tables(host_tables(settings(**changes))))
    assert host == {"hypervisor": {"qemu": keys}}


@pytest.mark.parametrize(("changes", "word"), [
    ({"version": Version(3, 0, 2)}, "mounts the image as ext4"),
    ({"version": Version(1, 9, 0), "rootfs_type": "ext4", "bar": Bar.SMALL}, "NVDIMM"),
    ({"version": Version(1, 10, 0), "rootfs_type": "ext4", "dax_header": True}, "large BAR"),
    ({"version": GO37, "extensions": (Extension(name="gpu", path="/g"),)}, "no second disk"),
    ({"version": Version(1, 3, 0), "rootfs_type": "ext4", "dax_header": True, "bar": Bar.SMALL,
      "toolkit_mode": ToolkitMode.HOOK}, "no hooks"),
    ({"version": GO35, "port": Port.SWITCH}, "no switch ports"),
    ({"shim": Shim.RUST, "port": Port.SWITCH}, "into a root port"),
    ({"port": Port.BRIDGE, "plug": Plug.HOT}, "small BARs"),
    ({"port": Port.BRIDGE, "bar": Bar.SMALL}, "small BARs"),
    ({"shim": Shim.RUST, "port": Port.BRIDGE, "bar": Bar.SMALL, "plug": Plug.HOT}, "small BARs")])
def test_what_this_kata_cannot_do_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        settings(**changes)
    assert caught.value.hint


def test_kernel_parameters_of_the_host_come_before_those_of_the_guest() -> None:
    made = settings(host_kernel_params=("agent.no_proxy=x", "pci=nocrs", "quiet"),
                    extra_kernel_params=("quiet",))
    assert made.kernel_params == ("agent.no_proxy=x cgroup_no_v1=all pci=realloc pci=nocrs "
                                  "pci=assign-busses quiet")
    assert host_tables(made)["hypervisor.qemu"]["kernel_params"] == made.kernel_params
    assert tables(made)["hypervisor.qemu"]["kernel_params"] == made.kernel_params
    assert "kernel_params" not in host_tables(settings())["hypervisor.qemu"]


def test_what_is_lost_is_said_in_the_file() -> None:
    said = render_drop_in(settings(version=GO31, kernel_verity_params=LINE))
    assert "# this Kata cannot verify the image" in said
    assert "# this Kata has no cold_plug_vfio" in said
    assert "kernel_verity_params =" not in said
    assert list(losses(settings(kernel_verity_params=LINE))) == []
    assert "pcie_root_port is not written" in "".join(losses(settings(version=GO35)))
    assert "For Kata 3.1.0" in said and "/runtimes/" not in said


@pytest.mark.parametrize("shim", list(Shim))
def test_what_a_build_writes_for_today_s_kata(shim: Shim) -> None:
    """To the byte: these two were loaded by Kata 4.1's own loaders."""
    golden = Path(__file__).parent / "data" / "kataconfig" / f"{shim}.toml"
    assert render_drop_in(settings(shim=shim, kernel="/k", image="/m")) == golden.read_text()
