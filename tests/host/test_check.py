"""`host check` on recorded hosts: what passes, what fails, and the cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katagpu import nvbranches
from katagpu.host import kataguest, support
from tests import hosttree
from tests.host import katatree, vgpuhost
from tests.host.conftest import Host, Make
from tests.hosttree import Device, Tree

LIMITS = ("Limit                     Soft Limit           Hard Limit           Units\n"
          "Max locked memory         {}            {}            bytes\n")
RUNTIME = "opt/kata/share/defaults/kata-containers/runtimes/qemu-nvidia-gpu"
A30 = "0000:d0:00.0"


def ready(build: Callable[[Path], Tree]) -> Callable[[Path], Tree]:
    """A host where all else is as it has to be."""
    def made(root: Path) -> Tree:
        tree = build(root)
        tree.file("dev/kvm", "")
        katatree.kata(tree)
        katatree.guest(tree)
        tree.file("proc/meminfo", "MemAvailable:  99000000 kB\nHugePages_Total:  0\n")
        tree.process(500, "containerd")
        tree.file("proc/500/limits", LIMITS.format("unlimited", "unlimited"))
        manifest(tree)
        return tree

    return made


def manifest(tree: Tree, version: str = "550.163.01", flavour: str = "open", **more: Any) -> None:
    """The manifest of an installed release."""
    place = f"{kataguest.CURRENT}/manifest-1.0.0.json"
    tree.file(place, json.dumps({"schema": 1, "recipe": "toy", "kernel_release": "6.12", "driver": {
        "version": version, "kernel_module": flavour, **more}}))


def of(host: Host, name: str, *words: str) -> list[tuple[str, str, str]]:
    """State, words and cure of a check's lines."""
    return [(line["state"], line["said"], line["cure"] or "")
            for line in host("check", *words, "--json").data["checks"] if line["name"] == name]


def one(host: Host, name: str, *words: str) -> tuple[str, str, str]:
    """The only line of a check."""
    (found,) = of(host, name, *words)
    return found


def test_a_host_that_is_ready(host: Make) -> None:
    here = host(ready(hosttree.a30))
    assert here("bind", A30, "--yes").status == 0
    said = here("check", A30)
    assert said.status == 0, said.out
    assert "fail  " not in said.out
    assert "warn  " not in said.out
    assert said.out.splitlines()[-1].endswith("pass, 0 warn, 0 fail")
    for name in ("kernel", "iommu", "kvm", "vsock", "kata", "kata-config", "kata-guest", "memlock",
                 "hugepages", "memory", f"bars {A30}", f"group {A30}", f"driver {A30}",
                 f"reset {A30}", f"driver-id {A30}"):
        assert f"pass  {name}: " in said.out


def test_a_host_that_lacks_all(host: Make) -> None:
    here = host(hosttree.no_iommu)
    said = here("check", "--json")
    assert said.status == 1
    bad = {line["name"] for line in said.data["checks"] if line["state"] == "fail"}
    assert bad == {"kernel", "iommu", "kvm", "vsock", "kata", "bars", "group"}
    assert all(line["cure"] for line in said.data["checks"] if line["state"] == "fail")


def test_the_kernel_of_proc(host: Make) -> None:
    here = host(ready(hosttree.t4))
    found = of(here, "kernel")
    assert found[:3] == [("pass", f"CONFIG_{name}=m (/proc/config.gz)", "")
                         for name in ("VFIO", "VFIO_IOMMU_TYPE1", "VFIO_PCI")]
    assert found[-1][1].startswith("CONFIG_VFIO_MDEV_DEVICE: 6.1.0-18-amd64 has no such symbol")


def with_config(text: str | None, release: str = hosttree.RELEASE) -> Callable[[Path], Tree]:
    """A host with a kernel."""
    def made(root: Path) -> Tree:
        return Tree(root, config=text, release=release)

    return made


@pytest.mark.parametrize(("release", "text", "said"), [
    ("5.4.0", "CONFIG_VFIO=y\nCONFIG_VFIO_PCI=y\nCONFIG_VFIO_IOMMU_TYPE1=y\nCONFIG_VFIO_MDEV=m\n",
     ("warn", "CONFIG_VFIO_MDEV_DEVICE is not set")),
    ("5.4.0", "CONFIG_VFIO_MDEV_DEVICE=m\n", ("pass", "CONFIG_VFIO_MDEV_DEVICE=m: vGPUs")),
    ("6.12.1", "CONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\n", ("fail", "CONFIG_VFIO_GROUP is not set")),
    ("6.12.1", "CONFIG_VFIO=y\n", ("fail", "CONFIG_VFIO_PCI is not set")),
    ("6.12.1", "# CONFIG_VFIO_IOMMU_TYPE1 is not set\n",
     ("fail", "CONFIG_VFIO_IOMMU_TYPE1 is not set"))])
def test_kernels(host: Make, release: str, text: str, said: tuple[str, str]) -> None:
    found = of(host(with_config(text, release)), "kernel")
    assert any(state == said[0] and words.startswith(said[1]) for state, words, _ in found), found


def test_a_kernel_without_its_configuration(host: Make) -> None:
    here = host(with_config(None))
    place = f"lib/modules/{hosttree.RELEASE}"
    here.tree.file(f"{place}/modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz: x.ko\n")
    here.tree.file(f"{place}/modules.builtin", "kernel/drivers/vfio/vfio.ko\n")
    assert [(state, said.partition(":")[0]) for state, said, _ in of(here, "kernel")] == [
        ("pass", "CONFIG_VFIO"), ("fail", "CONFIG_VFIO_IOMMU_TYPE1"), ("pass", "CONFIG_VFIO_PCI")]
    (here.tree.root / "sys/module/vfio_iommu_type1").mkdir()
    assert {state for state, _, _ in of(here, "kernel")} == {"pass"}


def iommu_host(cmdline: str, vendor: str, tables: tuple[str, ...]) -> Callable[[Path], Tree]:
    """A host without groups."""
    def made(root: Path) -> Tree:
        tree = Tree(root, iommu=None, cmdline=cmdline, vendor=vendor)
        for table in tables:
            tree.file(f"sys/firmware/acpi/tables/{table}", "")
        tree.file("etc/default/grub", "")
        return tree

    return made


@pytest.mark.parametrize(("cmdline", "vendor", "tables", "said", "cure"), [
    ("quiet", "GenuineIntel", ("DMAR", "FACP"), "intel_iommu=on is not on", "/etc/default/grub"),
    ("quiet", "GenuineIntel", ("FACP",), "no ACPI table DMAR", "VT-d"),
    ("intel_iommu=on", "GenuineIntel", ("FACP",), "no ACPI table DMAR", "VT-d"),
    ("quiet", "AuthenticAMD", ("FACP",), "no ACPI table IVRS", "AMD-Vi"),
    ("amd_iommu=off", "AuthenticAMD", ("IVRS",), "amd_iommu=off is on the", "take it away"),
    ("quiet", "AuthenticAMD", ("IVRS",), "off, though nothing turns it off", "dmesg")])
def test_an_iommu_that_is_off(host: Make, cmdline: str, vendor: str, tables: tuple[str, ...],
                              said: str, cure: str) -> None:
    state, words, mended = one(host(iommu_host(cmdline, vendor, tables)), "iommu")
    assert state == "fail"
    assert said in words
    assert cure in mended


def test_a_virtual_machine_has_no_setup_of_its_firmware(host: Make) -> None:
    here = host(iommu_host("quiet", "GenuineIntel", ("FACP",)))
    here.tree.file("proc/cpuinfo", "vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx hypervisor\n")
    state, words, mended = one(here, "iommu")
    assert (state, "no ACPI table DMAR" in words) == ("fail", True)
    assert "virtual IOMMU" in mended and "VT-d" not in mended


def test_a_kernel_that_turns_the_iommu_on_unasked(host: Make) -> None:
    here = host(iommu_host("quiet", "GenuineIntel", ("DMAR",)))
    here.tree.file(f"boot/config-{hosttree.RELEASE}", "CONFIG_INTEL_IOMMU_DEFAULT_ON=y\n")
    assert one(here, "iommu")[1] == "off, though nothing turns it off"


def test_vfio_without_an_iommu_is_no_cure(host: Make) -> None:
    here = host(hosttree.no_iommu)
    here.tree.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n")
    assert any("enable_unsafe_noiommu_mode" in said for _, said, _ in of(here, "iommu"))


REMAPPED = " 126:   0   730  IR-PCI-MSI-0000:17:00.0   0-edge   pciehp\n"
PLAIN = " 126:   0   730  PCI-MSI 524288-edge   pciehp\n"


@pytest.mark.parametrize(("cmdline", "interrupts", "unsafe", "state", "said"), [
    ("intel_iommu=on", REMAPPED, None, "pass", "interrupts are remapped"),
    ("intel_iommu=on", REMAPPED, "Y", "pass", "interrupts are remapped"),
    ("intel_iommu=on intremap=off", PLAIN, None, "fail", "intremap=off is on"),
    ("intel_iommu=on", PLAIN, "N", "fail", "interrupts are not remapped"),
    ("intel_iommu=on", PLAIN, "Y", "warn", "vfio_iommu_type1.allow_unsafe_interrupts is on"),
    ("intel_iommu=on", "", None, "warn", "whether interrupts are remapped cannot be told")])
def test_interrupt_remapping(host: Make, cmdline: str, interrupts: str, unsafe: str | None,
                             state: str, said: str) -> None:
    here = host(hosttree.t4)
    here.tree.file("proc/cmdline", cmdline)
    here.tree.file("proc/interrupts", interrupts)
    if unsafe:
        here.tree.file("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", unsafe)
    found = one(here, "remapping")
    assert (found[0], said in found[1], bool(found[2])) == (state, True, state != "pass")


def test_no_line_about_remapping_where_there_is_no_iommu_or_no_need(host: Make) -> None:
    assert of(host(hosttree.no_iommu), "remapping") == []
    assert of(host(lambda root: hosttree.gh200(root.with_name("arm"))), "remapping") == []


@pytest.mark.parametrize(("more", "state", "said"), [
    ("CONFIG_VFIO_DEVICE_CDEV=y\nCONFIG_IOMMUFD=m\n", "warn", "but /dev/vfio/devices/vfioN"),
    ("CONFIG_VFIO_DEVICE_CDEV=y\n", "fail", "nor /dev/vfio/devices/vfioN")])
def test_a_kernel_without_groups(host: Make, more: str, state: str, said: str) -> None:
    found = of(host(with_config(f"CONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\n{more}", "6.12.1")), "kernel")
    assert any(line[0] == state and said in line[1] and line[2] for line in found), found
    assert not any("IOMMU_TYPE1" in line[1] for line in found)


def test_the_gpu_of_a_grace_superchip(host: Make) -> None:
    here = host(hosttree.gh200)
    assert ("pass", "CONFIG_NVGRACE_GPU_VFIO_PCI=m", "") in [
        (state, said.partition(" ")[0], cure) for state, said, cure in of(here, "kernel")]
    assert here("bind", "9:01:00.0", "--yes").status == 1  # no such address
    assert here("bind", "0009:01:00.0", "--yes").status == 0
    assert one(here, "driver")[1].startswith("nvgrace_gpu_vfio_pci, /dev/vfio/17")
    assert here("persist", "0009:01:00.0", "--yes").status == 0
    assert "nvgrace_gpu_vfio_pci" in katatree.read(here.tree, "/etc/modules-load.d/"
                                                              "katagpu-vfio.conf")
    assert here("unbind", "0009:01:00.0", "--yes").status == 0
    assert here.tree.bound("0009:01:00.0") == "nvidia"
    tree = hosttree.gh200(here.tree.root.with_name("wrong"))
    (tree.paths["0009:01:00.0"] / "driver").unlink()
    tree.link(tree.paths["0009:01:00.0"] / "driver", tree.driver("vfio-pci"))
    here.tree = tree
    state, said, cure = one(here, "driver")
    assert (state, "wants nvgrace_gpu_vfio_pci" in said) == ("fail", True)
    assert cure == "katagpu host bind 0009:01:00.0"


def test_groups(host: Make) -> None:
    here = host(ready(hosttree.switch))
    state, said, _ = one(here, "group", "0000:18:00.0")
    assert state == "warn"
    assert "0000:19:00.0 [10de:2236] too: they go to the same guest" in said
    assert "18:00.1" not in said  # its own
    here.tree.add(Device("0000:1a:00.0", "8086:1528", hosttree.NIC, driver="ixgbe", group=7))
    found = of(here, "group", "0000:18:00.0")
    assert found[0][0] == "fail"
    assert "0000:1a:00.0 [8086:1528] too" in found[0][1]
    assert "ACS" in found[0][2]


@pytest.mark.parametrize(("away", "stays"), [
    ("0000:18:00.1", "snd_hda_intel"), ("0000:19:00.0", "nvidia")])
def test_a_group_of_which_the_host_has_a_part_still(host: Make, away: str, stays: str) -> None:
    """VFIO gives no function of it away: the group is not viable."""
    here = host(ready(hosttree.switch))
    assert here("bind", "18:00.0", "--yes").status == 0
    assert one(here, "group", "18:00.0")[0] == "warn"
    drivers = here.tree.root / "sys/bus/pci/drivers"
    here.kernel(drivers / "vfio-pci/unbind", away.encode())
    here.kernel(here.tree.paths[away] / "driver_override", b"\n")
    here.kernel(drivers / stays / "bind", away.encode())
    state, said, cure = one(here, "group", "18:00.0")
    assert state == "fail"
    assert f"{away} [{here.tree.ids(away)}] ({stays})" in said and "18:00.0 " not in said
    assert cure == "katagpu host bind 0000:18:00.0"
    here.kernel(drivers / stays / "unbind", away.encode())
    here.tree.link(here.tree.paths[away] / "driver", here.tree.driver("pci-stub"))
    assert one(here, "group", "18:00.0")[0] == "warn"
    assert here("bind", "18:00.0", "--yes").status == 0
    assert one(here, "group", "18:00.0")[0] == "warn"


def test_large_bars(host: Make) -> None:
    here = host(hosttree.no_iommu)
    state, said, cure = one(here, "bars")
    assert (state, said) == ("fail", "no address for BAR 1 (16G), 3 (32M)")
    assert "Above 4G Decoding" in cure
    here = host(lambda root: hosttree.a30(root.with_name("other")))
    assert one(here, "bars") == (
        "pass", "large: BAR 1 (32G) is at 0x222800000000, above 4 GiB", "")


def test_a_gpu_that_fell_off_the_bus(host: Make) -> None:
    here = host(hosttree.a30)
    (here.tree.paths[A30] / "config").write_bytes(b"\xff" * 64)
    found = of(here, "bars")
    assert found[0][:2] == ("fail", "it does not answer: its configuration reads all ones")


def test_the_console(host: Make) -> None:
    here = host(ready(hosttree.t4))
    (here.tree.paths["0000:3b:00.0"] / "boot_vga").write_text("1\n")
    assert one(here, "console")[0] == "warn"
    here.search = here.tree.programs()
    assert "is this host's console" in here("bind", "3b:00.0", "--yes").err


@pytest.mark.parametrize(("build", "words", "state", "said"), [
    (hosttree.t4, [], "warn", "nouveau has it"),
    (hosttree.t4, ["3b:00.0"], "fail", "nouveau has it"),
    (hosttree.a30, [A30], "fail", "nvidia has it"),
    (hosttree.no_iommu, [], "warn", "none"),
    (hosttree.a100, ["41:00.0"], "pass", "nvidia, for vGPUs (mdev)")])
def test_drivers(host: Make, build: Callable[[Path], Tree], words: list[str], state: str,
                 said: str) -> None:
    found = one(host(ready(build)), "driver", *words)
    assert (found[0], said in found[1]) == (state, True), found
    assert state == "pass" or "host bind" in found[2]


def test_what_is_persistent_is_meant(host: Make) -> None:
    here = host(ready(hosttree.a30))
    assert one(here, "driver")[0] == "warn"
    here("persist", A30, "--yes")
    assert one(here, "driver")[0] == "fail"


def test_a_gpu_for_vgpus_that_is_meant_for_one_guest(host: Make) -> None:
    """With NVIDIA's vGPU manager, its types on the card itself or on functions of SR-IOV."""
    here = host(ready(vgpuhost.old))
    assert one(here, "driver")[0] == "pass"
    state, said, cure = one(here, "driver", vgpuhost.PF)
    assert (state, "for vGPUs" in said) == ("warn", True)
    assert f"katagpu host bind {vgpuhost.PF}" in cure and "vgpu create" in cure
    assert here("persist", vgpuhost.PF, "--yes").status == 0
    assert one(here, "driver")[:2] == ("fail", "nvidia has it, so no guest can")


def test_a_file_of_somebody_else_does_not_stop_it(host: Make) -> None:
    here = host(ready(hosttree.a30))
    here.tree.file("etc/modprobe.d/katagpu-vfio.conf", "options vfio-pci ids=10de:20b7\n")
    assert one(here, "persist")[0] == "warn"
    assert one(here, "driver")[0] == "warn"


def test_a_reset(host: Make) -> None:
    assert one(host(hosttree.no_iommu), "reset")[0] == "warn"
    here = host(lambda root: hosttree.a100(root.with_name("other")))
    assert one(here, "reset")[:2] == ("pass", "flr bus")
    (here.tree.paths["0000:41:00.0"] / "reset_method").unlink()
    assert one(here, "reset")[1] == "possible (this kernel does not say how)"


@pytest.mark.parametrize(("build", "facts", "state", "said"), [
    (hosttree.a30, {}, "pass", "550.163.01 (open) drives Ampere"),
    (hosttree.a30, {"supported_ids": ["20b5", "20b7"]}, "pass", "lists [10de:20b7]"),
    (hosttree.a30, {"supported_ids": ["20b5"]}, "fail", "does not list [10de:20b7]"),
    (hosttree.a30, {"version": "440.100"}, "fail", "is Ampere"),
    (hosttree.no_iommu, {}, "fail", "is Pascal, and the guest's driver is 550.163.01 (open)"),
    (hosttree.no_iommu, {"flavour": "closed"}, "pass", "drives Pascal"),
    (hosttree.gh200, {"flavour": "closed"}, "fail", "is Hopper, and the guest's driver"),
    (hosttree.gh200, {}, "pass", "drives Hopper"),
    (hosttree.no_iommu, {"flavour": "closed", "version": "590.48.01"}, "fail", "is Pascal")])
def test_the_guests_driver(host: Make, build: Callable[[Path], Tree], facts: dict[str, Any],
                           state: str, said: str) -> None:
    here = host(ready(build))
    manifest(here.tree, **facts)
    found = one(here, "driver-id")
    assert (found[0], said in found[1]) == (state, True), found
    assert state == "pass" or found[2]


def test_an_id_that_nobody_knows(host: Make) -> None:
    def unknown(root: Path) -> Tree:
        tree = Tree(root)
        tree.add(Device("0000:01:00.0", "10de:7fff", group=1))
        return tree

    assert one(host(ready(unknown)), "driver-id")[:2] == (
        "warn", "not known: [10de:7fff] is of no generation that is known here, and the manifest "
                "does not say which ids 550.163.01 (open) drives")


@pytest.mark.parametrize(("device", "name"), [
    ("102d", "Kepler"), ("13f2", "Maxwell"), ("15f8", "Pascal"), ("1b38", "Pascal"),
    ("1db4", "Volta"), ("1eb8", "Turing"), ("2182", "Turing"), ("20b5", "Ampere"),
    ("2236", "Ampere"), ("25b6", "Ampere"), ("2330", "Hopper"), ("2342", "Hopper"),
    ("26b9", "Ada"), ("27b8", "Ada"), ("2901", "Blackwell"), ("2bb5", "Blackwell"),
    ("0020", None), ("ffff", None)])
def test_generations(device: str, name: str | None) -> None:
    assert support.generation(device) == name


@pytest.mark.parametrize(("number", "flavour", "first"), [
    (branch.number, flavour, first) for branch in nvbranches.BRANCHES
    for flavour, first in (("closed", branch.closed), ("open", branch.open)) if first])
def test_generations_are_driven_as_the_builds_table_says(
        number: int, flavour: str, first: str) -> None:
    """The two tables are apart, since a GPU host has the standard library only."""
    names = list(support.FIRST)
    for name in names:
        refused = support._problem(name, flavour, f"{number}.1.1") is not None
        older = names.index(name) < names.index(first)
        newer = support.FIRST[name] > number
        assert refused is (older or newer or (flavour == "closed" and name == "Blackwell")), name


def test_no_guest_is_named(host: Make) -> None:
    assert one(host(hosttree.a30), "driver-id")[0] == "warn"


def test_a_guest_that_is_damaged_does_not_stop_it(host: Make) -> None:
    here = host(ready(hosttree.a30))
    here.tree.file(f"{kataguest.CURRENT}/manifest-1.0.0.json", "{")
    state, said, cure = one(here, "guest")
    assert (state, "manifest-1.0.0.json is no manifest" in said) == ("fail", True)
    assert "install the release again" in cure
    assert one(here, "kata-guest")[0] == "fail"
    assert one(here, "group")[0] == "pass"


def test_a_guest_that_is_named(host: Make, tmp_path: Path) -> None:
    here = host(hosttree.a30)
    here.tree.file("tmp/manifest.json", json.dumps({"kernel_release": "6", "driver": None}))
    assert one(here, "driver-id", "--manifest", "/tmp/manifest.json")[1] == \
        "the guest has no driver"
    for name, text in (("/tmp/none", None), ("/tmp/bad", "{"), ("/tmp/other", "[]"),
                       ("/tmp/lock", '{"schema": 1}')):
        if text is not None:
            here.tree.file(name, text)
        said = here("check", "--manifest", name)
        assert said.status == 1
        assert name in said.err


def test_kata(host: Make) -> None:
    here = host(ready(hosttree.a30))
    assert one(here, "kata") == ("pass", "4.1.0 (/opt/kata/VERSION)", "")
    assert one(here, "kata-config")[1].endswith(
        "qemu-nvidia-gpu/configuration-qemu-nvidia-gpu.toml; drop-ins: 50-katagpu.toml")
    assert one(here, "kata-guest")[:2] == (
        "pass", "Kata 4.1.0 (go) is configured for toy, driver 550.163.01")
    here.tree.file("opt/kata/VERSION", "1.10.3\n")
    assert one(here, "kata")[:2] == ("fail", "1.10.3 (/opt/kata/VERSION) is older than 1.11.0, "
                                     "which GPUs with large BARs need")


@pytest.mark.parametrize(("version", "said"), [
    ("1.2.0", "Kata 1.2.0 cannot give a GPU to a guest (/opt/kata/VERSION)"),
    ("7.0.0", "Kata 7.0.0 is not known here (1.3 to 4.x are)"),
    ("latest", "Kata Containers is not installed, or does not say its version")])
def test_a_kata_that_will_not_do(host: Make, version: str, said: str) -> None:
    here = host(ready(hosttree.t4))
    here.tree.file("opt/kata/VERSION", f"{version}\n")
    state, words, cure = one(here, "kata")
    assert (state, words.startswith(said), bool(cure)) == ("fail", True, True), words
    assert of(here, "kata-config") == []


def test_both_runtimes_of_kata(host: Make) -> None:
    here = host(ready(hosttree.a30))
    katatree.kata(here.tree, rust=True)
    assert len(of(here, "kata")) == 1
    assert [said.partition(" is ")[0] for _, said, _ in of(here, "kata-guest")] == [
        "Kata 4.1.0 (go)", "Kata 4.1.0 (runtime-rs)"]
    assert [state for state, _, _ in of(here, "kata-guest")] == ["pass", "fail"]


def test_kata_of_a_package(host: Make) -> None:
    here = host(hosttree.t4)
    program = here.tree.file("usr/bin/kata-runtime",
                             "#!/bin/sh\necho 'kata-runtime  : 3.2.0'; echo ' OCI specs: 1.1.0'\n")
    program.chmod(0o755)
    config = "usr/share/defaults/kata-containers/configuration"
    here.tree.file(f"{config}-qemu.toml", "")
    (here.tree.root / f"{config}.toml").symlink_to(f"/{config}-qemu.toml")
    found = of(here, "kata-config")
    assert found[0][1] == f"/{config}-qemu.toml; no drop-ins"
    assert one(here, "kata-guest")[:2] == ("warn", "no guest of katagpu is installed")
    here.tree.file("etc/kata-containers/configuration.toml", "")
    assert of(here, "kata-config")[0][1].startswith("/etc/kata-containers/configuration.toml")


def test_a_configuration_of_our_own_is_what_is_read(host: Make) -> None:
    here = host(ready(hosttree.a30))
    katatree.kata(here.tree, "3.7.0")
    assert here("configure", "--yes").status == 0
    assert one(here, "kata-config")[1] == f"{katatree.OWN}; no drop-ins"
    assert one(here, "kata-guest")[0] == "pass"


def test_a_syntax_error_in_a_drop_in(host: Make) -> None:
    here = host(ready(hosttree.a30))
    here.tree.file(f"{RUNTIME}/config.d/60-mine.toml", "[hypervisor.qemu]\nmemory = 8 GiB\n")
    said = here("check")
    assert said.status == 1
    assert f"fail  kata-config: /{RUNTIME}/config.d/60-mine.toml:2: " in said.out
    assert "    2 | memory = 8 GiB\n      → mend that line: " in said.out
    assert of(here, "kata-guest") == []


def test_what_the_guest_needs_and_kata_does_not_see(host: Make) -> None:
    here = host(ready(hosttree.a30))
    here.tree.file(f"{RUNTIME}/config.d/60-mine.toml",
                   '[hypervisor.qemu]\nkernel = "/vmlinuz"\nimage = "/kata.img"\n')
    state, said, cure = one(here, "kata-guest")
    assert (state, said.endswith(", and 1 more")) == ("fail", True)
    assert f"/{RUNTIME}/config.d/60-mine.toml sets kernel = '/vmlinuz'" in said
    assert "configure --check" in cure


def test_ports_that_were_chosen_are_no_fault(host: Make) -> None:
    here = host(ready(hosttree.a30))
    assert here("configure", "--yes", "--port", "switch-port").status == 0
    assert one(here, "kata-guest")[0] == "warn"


def test_memory(host: Make) -> None:
    here = host(ready(hosttree.a30))
    assert one(here, "memory")[1] == "96679 MiB available, 8192 MiB for one guest, all pinned"
    here.tree.file("proc/meminfo", "MemAvailable:  4000000 kB\n")
    assert one(here, "memory")[0] == "warn"
    here.tree.file("proc/500/limits", LIMITS.format("67108864", "67108864"))
    state, said, cure = one(here, "memlock")
    assert (state, "64 MiB" in said) == ("warn", True)
    assert "LimitMEMLOCK=infinity in a drop-in of containerd.service" in cure
    here.tree.file(f"{RUNTIME}/config.d/60-mine.toml",
                   "[hypervisor.qemu]\nenable_hugepages = true\n")
    assert one(here, "hugepages")[0] == "fail"
    here.tree.file("proc/meminfo", "HugePages_Total: 8\nHugePages_Free: 8\nHugepagesize: 1048576\n")
    assert one(here, "hugepages")[:2] == ("pass", "8192 MiB free")


def test_no_gpu(host: Make) -> None:
    def empty(root: Path) -> Tree:
        return Tree(root)

    assert one(host(empty), "gpus")[0] == "fail"


def test_it_changes_nothing(host: Make) -> None:
    here = host(ready(hosttree.switch))
    before = here.tree.snapshot()
    here("check")
    assert here.tree.snapshot() == before
    assert here.kernel.written == []
