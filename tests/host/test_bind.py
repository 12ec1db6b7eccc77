"""`host bind`, `host unbind` on recorded hosts: whole groups, or nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu.host import bind
from tests import hosttree
from tests.host.conftest import Host, Make
from tests.hosttree import AUDIO, NIC, Device, Tree

A30, T4, A10 = "0000:d0:00.0", "0000:3b:00.0", "0000:18:00.0"
GROUP = ("0000:18:00.0", "0000:18:00.1", "0000:19:00.0")


def drivers(host: Host, *addresses: str) -> list[str | None]:
    """Their drivers."""
    return [host.tree.bound(address) for address in addresses]


def test_there_and_back(host: Make) -> None:
    here = host(hosttree.a30)
    said = here("bind", A30, "--yes", "--json").data
    assert said["functions"] == [{
        "bdf": A30, "id": "10de:20b7", "driver": "vfio-pci", "was": "nvidia", "iommu_group": 192,
        "vfio": ["/dev/vfio/192", "/dev/vfio/devices/vfio2080"]}]
    assert here.tree.override(A30) == "vfio-pci"
    assert here.kernel.written == [
        (f"sys/devices/pci0000:d0/{A30}/driver_override", "vfio-pci"),
        ("sys/bus/pci/drivers/nvidia/unbind", A30), ("sys/bus/pci/drivers_probe", A30)]
    said = here("unbind", A30, "--yes")
    assert said.out == f"{A30} [10de:20b7]  vfio-pci → nvidia\n"
    assert here.tree.override(A30) == "(null)"
    assert not (here.tree.root / "dev/vfio/192").exists()


def test_twice_is_once(host: Make) -> None:
    here = host(hosttree.a30)
    here("bind", A30, "--yes")
    before = here.tree.snapshot()
    said = here("bind", A30)  # nothing to ask about
    assert said.status == 0
    assert "bound to vfio-pci already" in said.out
    assert here.tree.snapshot() == before


def test_a_dry_run_prints_what_a_run_does(host: Make) -> None:
    here = host(hosttree.a30)
    before = here.tree.snapshot()
    said = here("bind", A30, "--dry-run")
    assert said.status == 0
    assert said.out.splitlines() == [
        "modprobe vfio-pci",
        f"echo vfio-pci > /sys/bus/pci/devices/{A30}/driver_override",
        f"echo {A30} > /sys/bus/pci/drivers/nvidia/unbind",
        f"echo {A30} > /sys/bus/pci/drivers_probe"]
    changes = here("bind", A30, "--dry-run", "--json").data["dry_run"]
    assert changes[0] == {"run": ["modprobe", "vfio-pci"]}
    assert changes[2] == {"write": "/sys/bus/pci/drivers/nvidia/unbind", "text": A30}
    assert here.tree.snapshot() == before
    assert here("bind", A30, "--yes", "--json").data["changes"] == changes


def test_the_whole_group(host: Make) -> None:
    here = host(hosttree.switch)
    assert here("bind", A10, "--yes").status == 0
    assert drivers(here, *GROUP) == ["vfio-pci"] * 3
    assert drivers(here, "0000:16:02.0", "0000:17:00.0") == ["pcieport"] * 2
    assert here("unbind", "0000:19:00.0", "--yes").status == 0
    assert drivers(here, *GROUP) == ["nvidia", "snd_hda_intel", "nvidia"]


def test_what_a_kill_left_half_done_is_completed_or_taken_back(host: Make) -> None:
    here = host(hosttree.switch)
    for address in ("0000:18:00.0", "0000:18:00.1"):  # killed before the second was probed
        here.kernel(here.tree.paths[address] / "driver_override", b"vfio-pci")
        name = here.tree.bound(address)
        here.kernel(here.tree.root / f"sys/bus/pci/drivers/{name}/unbind", address.encode())
    before = drivers(here, *GROUP)
    assert before == [None, None, "nvidia"]
    assert here("unbind", A10, "--yes").status == 0
    assert drivers(here, *GROUP) == ["nvidia", "snd_hda_intel", "nvidia"]
    here.kernel(here.tree.paths[A10] / "driver_override", b"vfio-pci")
    here.kernel(here.tree.root / "sys/bus/pci/drivers/nvidia/unbind", A10.encode())
    assert here("bind", A10, "--yes").status == 0
    assert drivers(here, *GROUP) == ["vfio-pci"] * 3


def test_nouveau(host: Make) -> None:
    here = host(hosttree.t4)
    assert here("bind", "3b:00.0", "--yes").status == 0  # as lspci writes it
    assert drivers(here, T4) == ["vfio-pci"]
    assert here("unbind", "00000000:3B:00.0", "--yes").status == 0  # as nvidia-smi does
    assert drivers(here, T4) == ["nouveau"]


@pytest.mark.parametrize(("end", "text", "number"), [
    ("19:00.0/driver_override", "vfio-pci", errno.EACCES),
    ("snd_hda_intel/unbind", "0000:18:00.1", errno.EBUSY),
    ("nvidia/unbind", "0000:19:00.0", errno.EIO),
    ("drivers_probe", "0000:18:00.0", errno.EINVAL),
    ("drivers_probe", "0000:19:00.0", errno.EPERM)])
def test_a_write_that_is_refused_half_way(host: Make, end: str, text: str, number: int) -> None:
    here = host(hosttree.switch)
    before = here.tree.snapshot()
    here.kernel.refuses[end, text] = number
    said = here("bind", A10, "--yes")
    assert said.status == 1
    assert end in said.err
    assert "NOT undone" not in said.err
    assert here.tree.snapshot() == before
    if end != "drivers_probe" or text != "0000:18:00.0":
        assert "undone by: echo 0000:18:00.0 > /sys/bus/pci/drivers/nvidia/bind" in said.err


def test_a_probe_that_fails(host: Make) -> None:
    here = host(hosttree.switch)
    before = here.tree.snapshot()
    here.kernel.unwilling.add(("vfio-pci", "0000:19:00.0"))
    said = here("bind", A10, "--yes", "--json")
    assert said.status == 1
    assert "0000:19:00.0 [10de:2236] was not taken by vfio-pci" in said.data["error"]
    assert "dmesg" in said.data["hint"]
    assert here.tree.snapshot() == before


def test_what_cannot_be_undone_is_said(host: Make) -> None:
    here = host(hosttree.a30)
    here.kernel.refuses = {("drivers_probe", A30): errno.EINVAL, ("nvidia/bind", A30): errno.EBUSY}
    said = here("bind", A30, "--yes")
    assert "NOT undone: echo 0000:d0:00.0 > /sys/bus/pci/drivers/nvidia/bind" in said.err
    assert here.tree.override(A30) == "(null)"


def test_giving_back_that_fails(host: Make) -> None:
    here = host(hosttree.switch)
    here("bind", A10, "--yes")
    before = here.tree.snapshot()
    here.kernel.refuses["vfio-pci/unbind", "0000:19:00.0"] = errno.EBUSY
    assert here("unbind", A10, "--yes").status == 1
    assert here.tree.snapshot() == before


def test_a_gpu_that_no_driver_takes_back(host: Make) -> None:
    here = host(hosttree.a30)
    here("bind", A30, "--yes")
    hosttree.Kernel.__call__(here.kernel, here.tree.root / "sys/bus/pci/drivers/nvidia/new_id",
                             b"10de 20b7")
    here.kernel.unwilling.add(("nvidia", A30))
    said = here("unbind", A30, "--yes")
    assert said.status == 0
    assert "has no driver now" in said.err


@pytest.mark.parametrize(("node", "hint"), [
    ("/dev/nvidia3", "end them first"), ("/dev/vfio/192", "a guest has it")])
def test_in_use(host: Make, node: str, hint: str) -> None:
    here = host(hosttree.a30)
    here.tree.process(4242, "python3", "/dev/null", node, node)
    here.tree.process(4243, "other", "/dev/nvidia0", "/dev/nvidiactl")
    before = here.tree.snapshot()
    said = here("bind", A30, "--yes")
    assert said.status == 1
    assert f"in use: python3 (pid 4242, {node})" in said.err
    assert hint in said.err
    assert "other" not in said.err
    assert here.tree.snapshot() == before
    said = here("bind", A30, "--yes", "--force")
    assert said.status == 0
    assert "in use, and taken as was asked for: python3" in said.err


def test_the_persistence_daemon_has_a_cure_of_its_own(host: Make) -> None:
    here = host(hosttree.a30)
    here.tree.process(77, "nvidia-persiste", "/dev/nvidia3")
    assert "systemctl stop nvidia-persistenced" in here("bind", A30, "--yes").err


def test_a_guest_that_has_it_keeps_it(host: Make) -> None:
    here = host(hosttree.a30)
    here("bind", A30, "--yes")
    here.tree.process(99, "qemu-system-x86", "/dev/vfio/vfio", "/dev/vfio/192")
    said = here("unbind", A30, "--yes")
    assert said.status == 1
    assert "qemu-system-x86 (pid 99, /dev/vfio/192)" in said.err


def test_something_else_in_the_group(host: Make) -> None:
    here = host(hosttree.switch)
    here.tree.add(Device("0000:1a:00.0", "8086:1528", NIC, driver="ixgbe", group=7))
    before = here.tree.snapshot()
    said = here("bind", A10, "--yes")
    assert "0000:1a:00.0 [8086:1528] (class 0200, driver ixgbe)" in said.err
    assert "ACS" in said.err
    assert here.tree.snapshot() == before
    assert here("bind", A10, "--yes", "--force").status == 0
    assert drivers(here, "0000:1a:00.0") == ["vfio-pci"]
    here("unbind", A10, "--yes")
    assert drivers(here, "0000:1a:00.0") == ["ixgbe"]


BAD: list[tuple[Callable[[Path], Tree], str, str]] = [
    (hosttree.a30, "d0", "'d0' is no PCI address"),
    (hosttree.a30, "d0:00.0 ; rm -rf /", "is no PCI address"),
    (hosttree.a30, "0000:d1:00.0", "there is no PCI function 0000:d1:00.0"),
    (hosttree.a30, "0001:d0:00.0", "there is no PCI function"),
    (hosttree.switch, "0000:16:02.0", "0000:16:02.0 [8086:347a] is not NVIDIA's"),
    (hosttree.a100, "0000:41:00.5", "is a virtual function of 0000:41:00.0"),
    (hosttree.a100, "0000:41:00.0", "has 4 virtual functions"),
    (hosttree.no_iommu, "0000:65:00.0", "is in no IOMMU group")]


@pytest.mark.parametrize(("build", "text", "said"), BAD)
def test_bad_addresses(host: Make, build: Callable[[Path], Tree], text: str, said: str) -> None:
    here = host(build)
    before = here.tree.snapshot()
    found = here("bind", text, "--yes")
    assert found.status == 1
    assert said in found.err
    assert "hint: " in found.err
    assert here.tree.snapshot() == before


def test_the_nearest_address_is_named(host: Make) -> None:
    here = host(hosttree.switch)
    assert "did you mean 0000:19:00.0?" in here("bind", "0000:91:00.0").err


def test_an_address_in_two_domains(host: Make) -> None:
    here = host(hosttree.a30)
    here.tree.add(Device("0001:d0:00.0", "10de:20b7", group=200))
    assert "in several PCI domains: 0000:d0:00.0, 0001:d0:00.0" in here("bind", "d0:00.0").err
    assert here("bind", "0001:d0:00.0", "--yes").status == 0


def test_nobody_can_be_asked(host: Make) -> None:
    here = host(hosttree.a30)
    before = here.tree.snapshot()
    said = here("bind", A30)
    assert said.status == 1
    assert "--yes" in said.err
    assert here.tree.snapshot() == before


def test_no_modprobe(host: Make) -> None:
    here = host(hosttree.a30, modprobe="echo FATAL: Module vfio-pci not found >&2; exit 1")
    before = here.tree.snapshot()
    said = here("bind", A30, "--yes")
    assert "Module vfio-pci not found" in said.err
    assert here.tree.snapshot() == before


def test_a_device_node_that_does_not_come(host: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind, "SETTLES", 0.2)
    here = host(hosttree.a30)
    here.kernel.nodes = False
    said = here("bind", A30, "--yes")
    assert said.status == 1
    assert "/dev/vfio/192 did not appear" in said.err
    assert drivers(here, A30) == ["nvidia"]


def test_a_kernel_without_groups_has_a_device_for_each_function(host: Make) -> None:
    here = host(hosttree.switch)
    here.kernel.nodes = False
    (here.tree.root / "dev/vfio/vfio").unlink()
    said = here("bind", "18:00.0", "--yes")
    assert said.status == 0, said.err
    assert "/dev/vfio/devices/vfio240" in said.out and "/dev/vfio/7" not in said.out


def test_a_host_without_the_driver_of_grace(host: Make) -> None:
    here = host(hosttree.gh200, modprobe='echo "FATAL: Module $1 not found" >&2; exit 1')
    before = here.tree.snapshot()
    said = here("bind", "0009:01:00.0", "--yes")
    assert (said.status, here.tree.snapshot()) == (1, before)
    assert "Module nvgrace_gpu_vfio_pci not found" in said.err
    assert "CONFIG_NVGRACE_GPU_VFIO_PCI" in said.err


def test_functions_of_a_card_beside_the_gpu(host: Make) -> None:
    here = host(hosttree.a30)
    here.tree.add(Device("0000:d0:00.1", "10de:1aef", AUDIO, driver=None, group=192))
    assert here("bind", A30, "--yes").status == 0
    assert drivers(here, "0000:d0:00.1") == ["vfio-pci"]


@pytest.mark.parametrize(("file", "text", "named"), [
    ("etc/modprobe.d/vfio.conf", "# mine\noptions vfio-pci ids=10de:20B5,10de:20B7\n",
     "/etc/modprobe.d/vfio.conf"),
    ("proc/cmdline", "quiet vfio-pci.ids=10de:20b7 intel_iommu=on\n", "/proc/cmdline"),
    ("etc/modprobe.d/vfio.conf", "options vfio-pci ids=10de:1eb8\n", None)])
def test_ids_that_vfio_pci_takes_by_itself(host: Make, monkeypatch: pytest.MonkeyPatch, file: str,
                                           text: str, named: str | None) -> None:
    """No rule of udev does that: the parameter `ids` of vfio-pci."""
    monkeypatch.setitem(hosttree.MATCHES, "vfio-pci", ("10de", "03"))
    here = host(hosttree.a30)
    assert here("bind", A30, "--yes").status == 0
    here.kernel.unwilling.add(("nvidia", A30))
    here.tree.file(file, text)
    said = here("unbind", A30, "--yes")
    assert said.status == 1 and "is with vfio-pci still" in said.err
    if named is None:
        assert "udev rule" in said.err
        return
    assert f"of {named}:" in said.err
    assert "echo 10de 20b7 > /sys/bus/pci/drivers/vfio-pci/remove_id" in said.err
    assert "persist --remove" not in said.err
