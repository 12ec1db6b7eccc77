"""`host configure`: what it writes for each Kata, what it leaves alone, what `--check` finds."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from katagpu import kataconfig
from katagpu.host import configure, kataguest
from katagpu.release import host as release_host
from tests import hosttree
from tests.host import katatree
from tests.host.conftest import Host, Make
from tests.host.katatree import OURS, OWN


def qemu(here: Host, path: str) -> Any:
    return tomllib.loads(katatree.read(here.tree, path))["hypervisor"]["qemu"]


@pytest.fixture
def here(host: Make) -> Host:
    """A host with one GPU, Kata 4.1 and an installed guest."""
    made = host(hosttree.a100)
    katatree.kata(made.tree)
    katatree.guest(made.tree)
    return made


def test_the_places_are_those_of_the_installer() -> None:
    assert f"{release_host.PLACE}/{release_host.NAME}" == kataguest.HOME
    assert release_host.DROP_IN == configure.INSTALLED
    assert configure.INSTALLED < configure.DROP_IN < "60-mine.toml"


def test_beside_an_installed_drop_in_only_what_depends_on_the_host(here: Host) -> None:
    before = here.tree.snapshot()
    said = here("configure", "--yes")
    assert (said.status, said.err) == (0, "")
    text = katatree.read(here.tree, OURS)
    assert text.startswith(configure.MARK)
    assert tomllib.loads(text) == {"hypervisor": {"qemu": {
        "cold_plug_vfio": "root-port", "pcie_root_port": 1, "hot_plug_vfio": "no-port"}}}
    assert "ok: " in said.out and "toy, driver 580.95.05" in said.out
    after = here.tree.snapshot()
    assert {name for name in after if after[name] != before.get(name)} == {OURS.lstrip("/")}
    assert stat.S_IMODE((here.tree.root / OURS[1:]).stat().st_mode) == 0o644


def test_without_it_all_that_the_guest_needs(host: Make) -> None:
    here = host(hosttree.t4)
    katatree.kata(here.tree)
    wanted = katatree.guest(here.tree, placed=False, kernel_verity_params=katatree.LINE)
    assert here("configure", "--yes").status == 0
    table = qemu(here, OURS)
    assert (table["kernel"], table["image"]) == (wanted.kernel, wanted.image)
    assert table["kernel_verity_params"] == katatree.LINE
    assert table["pcie_root_port"] == 1


def test_as_many_ports_as_the_group_has_functions(host: Make) -> None:
    """Two GPUs and an audio function in one group, whose bridges stay on the host."""
    here = host(hosttree.switch)
    katatree.kata(here.tree)
    katatree.guest(here.tree)
    assert here("configure", "--yes").status == 0
    assert qemu(here, OURS)["pcie_root_port"] == 3


def test_no_more_ports_than_kata_has(here: Host) -> None:
    said = here("configure", "--yes", "--functions", "20", "--json")
    assert qemu(here, OURS)["pcie_root_port"] == kataconfig.MAX_PORTS
    assert "16 of the 20 functions" in said.data["notes"][0]


def test_both_runtimes(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, rust=True)
    katatree.guest(here.tree)
    said = here("configure", "--yes")
    assert said.status == 0, said.out + said.err
    path = f"{katatree.RUST.rpartition('/')[0]}/config.d/55-katagpu-host.toml"
    assert qemu(here, path)["guest_extension_images"] == []
    assert "hot_plug_vfio" not in qemu(here, path)
    assert [one["shim"] for one in here("configure", "--check", "--json").data["runtimes"]] == [
        "go", "runtime-rs"]


def test_a_directory_of_several_runtimes_gets_no_drop_in(host: Make) -> None:
    """Kata 3.7: a drop-in would make every runtime there boot this guest."""
    here = host(hosttree.a100)
    katatree.kata(here.tree, "3.7.0")
    wanted = katatree.guest(here.tree, placed=False)
    before = here.tree.snapshot()
    assert here("configure", "--yes").status == 0
    after = here.tree.snapshot()
    assert {name for name in after if after[name] != before.get(name)} == {OWN.lstrip("/")}
    found = tomllib.loads(katatree.read(here.tree, OWN))
    table = found["hypervisor"]["qemu"]
    assert (table["image"], table["cold_plug_vfio"], table["pcie_root_port"]) == (
        wanted.image, "root-port", 1)
    assert "initrd" not in table  # that of the file it was made of, and would be refused beside
    assert table["virtio_fs_extra_args"] == ["--thread-pool-size=1", "-o", "announce_submounts"]
    assert found["agent"]["kata"] == {"kernel_modules": [], "dial_timeout": 1200}


def test_kata_2_4_reads_no_drop_ins(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, "2.4.3")
    katatree.guest(here.tree, placed=False, rootfs_type="ext4")
    said = here("configure", "--yes")
    assert said.status == 0, said.out
    table = qemu(here, OWN)
    assert (table["hotplug_vfio_on_root_bus"], table["pcie_root_port"]) == (True, 1)
    assert not {"cold_plug_vfio", "rootfs_type"} & set(table)
    assert "note: go: this Kata has no cold_plug_vfio" in said.out
    assert here("configure", "--check").status == 0


def test_small_bars_on_an_old_kata(host: Make) -> None:
    here = host(hosttree.t4)
    katatree.kata(here.tree, "2.4.3")
    katatree.guest(here.tree, placed=False, rootfs_type="ext4")
    assert here("configure", "--yes").status == 0
    assert qemu(here, OWN)["hotplug_vfio_on_root_bus"] is False


def test_a_copy_is_stale_when_what_it_was_made_of_changes(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, "3.7.0")
    katatree.guest(here.tree, placed=False)
    assert here("configure", "--yes").status == 0
    source = here.tree.root / katatree.DEFAULTS / "configuration-qemu-nvidia-gpu.toml"
    source.write_text(source.read_text() + "\n# changed\n")
    said = here("configure", "--check")
    assert said.status == 1 and "which has changed since" in said.out
    assert here("configure", "--yes").status == 0
    assert here("configure", "--check").status == 0


def test_written_again_only_where_something_changed(here: Host) -> None:
    here("configure", "--yes")
    assert here("configure", "--json").data.get("changes") is None  # and nobody has to agree
    assert "changes" in here("configure", "--yes", "--json", "--functions", "2").data


def test_remove_takes_back_what_was_written(here: Host) -> None:
    before = here.tree.snapshot()
    here("configure", "--yes")
    assert here("configure", "--remove", "--dry-run").out == f"rm -f {OURS}\n"
    assert "removed" not in here("configure", "--remove", "--dry-run", "--json").data
    assert here("configure", "--remove", "--yes").out == f"removed: {OURS}\n"
    assert here.tree.snapshot() == before
    assert "nothing of this command" in here("configure", "--remove", "--yes").out


def test_remove_finds_what_was_written_for_any_runtime(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, rust=True)
    katatree.guest(here.tree)
    place = f"{katatree.DEFAULTS}/custom-runtimes/mine/configuration-qemu-nvidia-gpu.toml"
    here.tree.file(place, (here.tree.root / katatree.GO).read_text())
    here.tree.file("etc/kata-containers/configuration.toml",
                   (here.tree.root / katatree.GO).read_text())
    before = here.tree.snapshot()
    for words in ([], ["--handler", "mine"], ["--config", "/etc/kata-containers/configuration.toml",
                                              "--shim", "go"]):
        assert here("configure", "--yes", *words).status == 0
    said = here("configure", "--remove", "--yes", "--handler", "mine", "--json").data["removed"]
    assert said == [f"/{place.rpartition('/')[0]}/config.d/{configure.DROP_IN}"]
    said = here("configure", "--remove", "--yes", "--json").data["removed"]
    assert len(said) == 3 and f"/etc/kata-containers/config.d/{configure.DROP_IN}" in said
    assert here.tree.snapshot() == before


@pytest.mark.parametrize("words", [
    ["--shim", "go"], ["--handler", "qemu"], []])
def test_remove_of_a_whole_configuration(host: Make, words: list[str]) -> None:
    """Of a Kata that reads no drop-ins; with another runtime's name it stays."""
    here = host(hosttree.a100)
    katatree.kata(here.tree, "2.4.3")
    katatree.guest(here.tree, rootfs_type="ext4")
    path = f"{configure.OWN}/configuration.toml"
    assert here("configure", "--yes").status == 0
    assert katatree.read(here.tree, path).startswith(configure.MARK)
    assert "nothing of this command" in here(
        "configure", "--remove", "--yes", "--config", "/etc/hostname").out
    assert here("configure", "--remove", "--yes", *words).out == f"removed: {path}\n"


def test_remove_where_kata_is_gone(host: Make) -> None:
    here = host(hosttree.a100)
    path = f"{configure.OWN}/configuration-runtime-rs.toml"
    here.tree.file(path, f"{configure.MARK}\n")
    said = here("configure", "--remove", "--yes", "--shim", "runtime-rs")
    assert said.out == f"removed: {path}\n", said.err


def test_a_dry_run_writes_nothing(here: Host) -> None:
    before = here.tree.snapshot()
    said = here("configure", "--dry-run")
    assert said.status == 0
    assert f"write the file {OURS}:" in said.out and "pcie_root_port = 1" in said.out
    assert here.tree.snapshot() == before


def test_without_a_word_nothing_is_written(here: Host) -> None:
    before = here.tree.snapshot()
    said = here("configure")
    assert said.status == 1 and "--yes" in said.err
    assert here.tree.snapshot() == before


PROXY = "agent.https_proxy=http://proxy:3128"


def with_proxy(here: Host, *more: str) -> None:
    """kata-deploy's drop-in for a proxy: Kata's own words, and its."""
    words = " ".join((*kataconfig.KERNEL_PARAMS, *more, PROXY))
    here.tree.file(f"{katatree.DROP_INS}/30-kernel-params.toml",
                   f'[hypervisor.qemu]\nkernel_params = "{words}"\n')


@pytest.mark.parametrize("placed", [False, True])
def test_kernel_parameters_of_the_host_are_not_lost(host: Make, placed: bool) -> None:
    """Kata replaces the string: the guest's drop-ins would take the proxy away."""
    here = host(hosttree.a100)
    katatree.kata(here.tree)
    katatree.guest(here.tree, placed=placed, extra_kernel_params=("guest=1",))
    with_proxy(here, "devtmpfs.mount=0")
    if placed:  # only the release's own drop-in is there
        (lost,) = here("configure", "--check", "--json").data["differences"]
        assert lost["key"] == "kernel_params" and PROXY in lost["wants"]
    assert here("configure", "--yes").status == 0
    wanted = f"{PROXY} {' '.join(kataconfig.KERNEL_PARAMS)} guest=1"
    assert qemu(here, OURS)["kernel_params"] == wanted
    assert here("configure", "--check").status == 0
    here.tree.file(OURS, katatree.read(here.tree, OURS).replace(PROXY, "quiet"))
    (lost,) = here("configure", "--check", "--json").data["differences"]
    assert lost["key"] == "kernel_params"


def test_a_quoted_kernel_parameter_is_one_word(host: Make) -> None:
    """As the kernel has it: a device mapper's table of Kata's image is dropped whole."""
    here = host(hosttree.a100)
    katatree.kata(here.tree)
    katatree.guest(here.tree)
    here.tree.file(f"{katatree.DROP_INS}/30-kernel-params.toml", (
        "[hypervisor.qemu]\nkernel_params = 'dm-mod.create=\"a,,,ro,0 8 verity 1 /dev/vda1\" "
        "name=\"two words\" quiet'\n"))
    assert here("configure", "--yes").status == 0
    assert qemu(here, OURS)["kernel_params"].startswith('name="two words" quiet ')
    assert here("configure", "--check").status == 0


def test_kernel_parameters_of_a_previous_guest_are_dropped(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree)
    with_proxy(here)
    katatree.guest(here.tree, name="old-1", extra_kernel_params=("old=1",))
    assert here("configure", "--yes").status == 0
    assert "old=1" in qemu(here, OURS)["kernel_params"]
    (here.tree.root / katatree.HOME / "current").unlink()
    katatree.guest(here.tree, name="new-1", extra_kernel_params=("new=1",))
    assert here("configure", "--check").status == 1
    assert here("configure", "--yes").status == 0
    assert here("configure", "--check").status == 0
    katatree.guest(here.tree, name="new-2", current=False, placed=False)
    here.tree.file(f"{katatree.HOME}/new-1/config/50-katagpu.toml", katatree.read(
        here.tree, f"{katatree.HOME}/new-2/config/50-katagpu.toml").replace("new-2", "new-1"))
    (left,) = here("configure", "--check", "--json").data["differences"]
    assert left["what"].endswith(": new=1") and left["origin"] == OURS
    here.tree.file(f"{katatree.HOME}/new-1/config/50-katagpu.toml", katatree.read(
        here.tree, f"{katatree.DROP_INS}/50-katagpu.toml"))
    words = qemu(here, OURS)["kernel_params"].split()
    assert "new=1" in words and PROXY in words and "old=1" not in words


def test_kernel_parameters_in_a_configuration_of_our_own(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, "3.7.0")
    katatree.guest(here.tree, placed=False)
    assert here("configure", "--yes").status == 0
    assert qemu(here, OWN)["kernel_params"].split() == [
        "agent.hotplug_timeout=20", *kataconfig.KERNEL_PARAMS]
    source = here.tree.root / katatree.DEFAULTS / "configuration-qemu-nvidia-gpu.toml"
    source.write_text(source.read_text().replace("agent.hotplug_timeout=20", PROXY))
    lost = here("configure", "--check", "--json").data["differences"]
    assert [one["key"] for one in lost] == ["kernel_params", ""]  # and the file has changed
    assert here("configure", "--yes").status == 0
    assert qemu(here, OWN)["kernel_params"].split()[0] == PROXY


def test_switch_ports_and_the_rust_runtime(host: Make) -> None:
    here = host(hosttree.t4)
    katatree.kata(here.tree, rust=True)
    katatree.guest(here.tree)
    said = here("configure", "--yes", "--port", "switch-port")
    assert said.status == 1 and "--shim go" in said.err
    assert here("configure", "--yes", "--port", "switch-port", "--shim", "go").status == 0


DISK = kataconfig.Extension(name="gpu", path=f"/{katatree.HOME}/toy-1.0.0/gpu.image",
                            verity_params=katatree.LINE)


@pytest.mark.parametrize("placed", [False, True])
def test_a_driver_on_a_disk_of_its_own(host: Make, placed: bool) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, rust=True)
    katatree.guest(here.tree, placed=placed, extensions=(DISK,))
    assert here("configure", "--yes").status == 0
    if not placed:
        assert qemu(here, OURS)["guest_extension_images"] == [
            {"name": "gpu", "path": DISK.path, "verity_params": katatree.LINE}]
    here.tree.file(f"{katatree.DROP_INS}/60-mine.toml",
                   "[hypervisor.qemu]\nguest_extension_images = []\n")
    found = here("configure", "--check", "--json").data["differences"]
    assert [one["key"] for one in found] == ["guest_extension_images"]


def test_an_initrd(host: Make) -> None:
    """On a Kata whose configuration has an image: it is taken away, in a copy too."""
    for version, path in (("4.1.0", OURS), ("2.4.3", OWN)):
        here = host(lambda root, name=version: hosttree.a100(root / name))
        katatree.kata(here.tree, version)
        katatree.guest(here.tree, placed=False, image=None, rootfs_type="ext4",
                       initrd=f"/{katatree.HOME}/toy-1.0.0/toy.initrd")
        assert here("configure", "--yes").status == 0
        table = qemu(here, path)
        assert table["initrd"].endswith("toy.initrd") and not table.get("image")


def test_ports_of_a_switch_and_of_a_bridge(host: Make) -> None:
    here = host(hosttree.t4)
    katatree.kata(here.tree)
    katatree.guest(here.tree)
    assert here("configure", "--yes", "--port", "switch-port").status == 0
    assert {key: value for key, value in qemu(here, OURS).items() if "vfio" not in key} == {
        "pcie_root_port": 0, "pcie_switch_port": 1}
    assert here("configure", "--yes", "--port", "bridge-port").status == 0
    assert qemu(here, OURS)["hot_plug_vfio"] == "bridge-port"
    said = here("configure", "--yes", "--port", "bridge-port", "--bar", "large")
    assert said.status == 1 and "small BARs" in said.err


# --check


@pytest.mark.parametrize(("mine", "key", "has"), [
    ('[hypervisor.qemu]\nkernel = "/boot/vmlinuz"', "kernel", "/boot/vmlinuz"),
    ('[hypervisor.qemu]\nimage = ""', "image", ""),
    ('[hypervisor.qemu]\ninitrd = "/initrd"', "initrd", "/initrd"),
    ('[hypervisor.qemu]\nrootfs_type = "ext4"', "rootfs_type", "ext4"),
    (f'[hypervisor.qemu]\nkernel_verity_params = "{katatree.LINE}"', "kernel_verity_params",
     katatree.LINE),
    ('[hypervisor.qemu]\nkernel_params = "agent.log=debug"', "kernel_params", "agent.log=debug"),
    ('[hypervisor.qemu]\nmachine_type = "microvm"', "machine_type", "microvm"),
    ("[hypervisor.qemu]\ndisable_image_nvdimm = false", "disable_image_nvdimm", False),
    ('[hypervisor.qemu]\ncold_plug_vfio = "no-port"', "cold_plug_vfio", "no-port"),
    ('[hypervisor.qemu]\nhot_plug_vfio = "root-port"', "hot_plug_vfio", "root-port"),
    ("[hypervisor.qemu]\npcie_root_port = 0", "pcie_root_port", 0),
    ("[hypervisor.qemu]\ndefault_memory = 2048", "default_memory", 2048),
    ('[hypervisor.qemu]\nguest_hook_path = "/hooks"', "guest_hook_path", "/hooks"),
    ("[agent.kata]\ndial_timeout = 45", "dial_timeout", 45),
    ('[runtime]\nvfio_mode = "vfio"', "vfio_mode", "vfio"),
    ("[runtime]\nstatic_sandbox_resource_mgmt = false", "static_sandbox_resource_mgmt", False),
    ("[runtime]\ncreate_container_timeout = 60", "create_container_timeout", 60)])
def test_each_difference_is_a_line_with_its_cure(here: Host, mine: str, key: str,
                                                 has: Any) -> None:
    here("configure", "--yes")
    where = f"{katatree.DROP_INS}/60-mine.toml"
    here.tree.file(where, mine + "\n")
    said = here("configure", "--check", "--json")
    assert said.status == 1
    found = {one["key"]: one for one in said.data["differences"]}
    assert set(found) == {key}
    assert (found[key]["has"], found[key]["origin"]) == (has, where)
    assert found[key]["cure"] == f"remove the line from {where}, or katagpu host configure"
    text = here("configure", "--check").out
    assert f"{where} sets {key} = {has!r}; this guest needs " in text
    assert f"    cure: remove the line from {where}" in text


@pytest.mark.parametrize("mine", [
    '[hypervisor.qemu]\nkernel_params = "x=1 pci=nocrs pci=realloc pci=assign-busses '
    'cgroup_no_v1=all"', "[hypervisor.qemu]\ndefault_memory = 65536\ndefault_vcpus = 8",
    '[hypervisor.qemu]\ncold_plug_vfio = "no-port"\nhot_plug_vfio = "root-port"',
    "[hypervisor.qemu]\npcie_root_port = 8", "[runtime]\nenable_debug = true",
    f'[hypervisor.qemu]\nimage = "/{katatree.HOME}/current/kata-toy.image"'])
def test_what_serves_as_well_is_no_difference(here: Host, mine: str) -> None:
    here("configure", "--yes")
    here.tree.file(f"{katatree.DROP_INS}/60-mine.toml", mine + "\n")
    said = here("configure", "--check")
    assert (said.status, said.out.partition(":")[0]) == (0, "ok"), said.out


def test_kata_as_it_was_installed_does_not_fit_the_guest(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree)
    katatree.guest(here.tree, placed=False)
    found = {one["key"] for one in
             here("configure", "--check", "--json").data["differences"]}
    assert found == {"kernel", "image", "kernel_verity_params"}


def test_files_that_are_missing(here: Host) -> None:
    here("configure", "--yes")
    (here.tree.root / katatree.HOME / "toy-1.0.0/kata-toy.image").unlink()
    said = here("configure", "--check")
    assert said.status == 1
    assert "kata-toy.image is not there" in said.out and "katagpu-install.pyz" in said.out


def test_a_configuration_of_another_hypervisor(here: Host) -> None:
    here.tree.file(f"{katatree.DROP_INS}/60-mine.toml", '[hypervisor.clh]\npath = "/x"\n')
    assert "another hypervisor (clh)" in here("configure", "--check").out


def test_an_old_key_in_a_drop_in_is_found_before_a_container_fails(here: Host) -> None:
    here.tree.file(f"{katatree.DROP_INS}/60-mine.toml",
                   "[hypervisor.qemu]\nhotplug_vfio_on_root_bus = true\n")
    said = here("configure", "--check")
    assert "hotplug_vfio_on_root_bus in [hypervisor.qemu], which Kata 4.1.0 does not know" \
        in said.out


# bad input: a clear error, status 1, and nothing written


def refused(here: Host, word: str, *words: str) -> str:
    before = here.tree.snapshot()
    said = here("configure", "--yes", *words)
    assert said.status == 1 and not said.out
    assert said.err.startswith("error: ") and word in said.err
    assert here.tree.snapshot() == before
    return said.err


def test_a_syntax_error_shows_the_line(here: Host) -> None:
    here.tree.file(f"{katatree.DROP_INS}/60-mine.toml", "[hypervisor.qemu]\nkernel = \"/x\nx = 1\n")
    said = refused(here, "60-mine.toml:2: ")
    assert '    2 | kernel = "/x' in said


def test_an_unknown_version_of_kata(here: Host) -> None:
    here.tree.file("opt/kata/VERSION", "6.0.0\n")
    assert "--kata-version 4.1.0" in refused(here, "Kata 6.0.0 is not known here")
    refused(here, "is no version of Kata", "--kata-version", "newest")
    assert here("configure", "--yes", "--kata-version", "4.1.0").status == 0


def test_a_file_of_ours_that_is_not_ours(here: Host) -> None:
    here.tree.file(OURS, "[hypervisor.qemu]\nmine = 1\n")
    refused(here, "was not written by this command")


@pytest.mark.root
def test_a_read_only_etc(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, "3.7.0")
    katatree.guest(here.tree, placed=False)
    etc = here.tree.root / "etc"
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", etc],
                                      capture_output=True).returncode:
        pytest.skip("needs root, to mount a tmpfs")
    try:
        assert "read-only here" in refused(here, "Read-only file system")
    finally:
        subprocess.run(["umount", etc], check=True)


def test_no_release_no_kata_no_gpu(host: Make) -> None:
    here = host(hosttree.a100)
    assert "katagpu-install.pyz" in refused(here, "no release of katagpu is installed")
    katatree.guest(here.tree, placed=False)
    refused(here, "which release of Kata is installed cannot be told")
    refused(here, "there is no guest in /no", "--release", "/no")


def test_no_gpu(host: Make) -> None:
    here = host(hosttree.Tree)
    katatree.kata(here.tree)
    katatree.guest(here.tree)
    assert "--functions" in refused(here, "no NVIDIA GPU to count")
    assert here("configure", "--yes", "--functions", "2", "--bar", "small").status == 0


def test_a_guest_that_this_kata_cannot_boot(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, "2.4.3")
    katatree.guest(here.tree, placed=False)
    assert "format: ext4" in refused(here, "mounts the image as ext4")


def test_a_release_whose_parts_are_not_of_one_guest(here: Host) -> None:
    place = here.tree.root / katatree.HOME / "toy-1.0.0"
    facts = json.loads((place / "manifest-1.0.0.json").read_text())
    (place / "manifest-1.0.0.json").write_text(
        json.dumps({**facts, "kernel_verity_params": katatree.LINE}))
    refused(here, "are not of one guest")
    (place / "manifest-1.0.0.json").write_text("{")
    refused(here, "take the release again")
    (place / "manifest-1.0.0.json").write_text('{"schema": 9}')
    refused(here, "schema that is not known")
    for key, value in (("driver", "580"), ("driver", ["580"]), ("kernel_verity_params", 1)):
        (place / "manifest-1.0.0.json").write_text(json.dumps({**facts, key: value}))
        refused(here, f"{key} is {value!r}, and not as a build writes it")
    (place / "manifest-1.0.0.json").unlink()
    refused(here, "has no manifest.json")


@pytest.mark.parametrize(("old", "new"), [
    ("rootfs_type", "x"), ("[hypervisor.qemu]", "[hypervisor.clh]"),
    ("[hypervisor.qemu]", "hypervisor = 1\n[x]"),
    ("[hypervisor.qemu]", "[hypervisor]\nqemu = 1\n[x]"),
    ("[hypervisor.qemu]", "[hypervisor.qemu]\nguest_extension_images = [1]"),
    ('kernel_params = "', 'kernel_params = 1 # "'), ('image = "', 'image = true # "')])
def test_a_drop_in_that_no_build_wrote(here: Host, old: str, new: str) -> None:
    path = here.tree.root / katatree.HOME / "toy-1.0.0/config/50-katagpu.toml"
    path.write_text(path.read_text().replace(old, new))
    refused(here, "not as a build writes it")


def test_a_build_s_own_directory(host: Make, tmp_path: Path) -> None:
    """out/RECIPE/DRIVER, whose files were copied by hand."""
    here = host(hosttree.a100)
    katatree.kata(here.tree)
    settings = kataconfig.KataSettings(
        kernel="/opt/kata/share/kata-containers/vmlinuz-nvidia-gpu.container",
        image="/opt/kata/share/kata-containers/kata-containers-nvidia-gpu.img")
    here.tree.file("home/out/50-katagpu.toml", kataconfig.render_drop_in(settings))
    here.tree.file("home/out/50-katagpu-runtime-rs.toml", "not this one")
    here.tree.file("home/out/manifest.json", '{"schema": 1, "recipe": "mine", "driver": null}')
    said = here("configure", "--check", "--release", "/home/out")
    assert "vmlinuz-nvidia-gpu.container is not there" in said.out
    assert "guest mine, driver none" in said.out
