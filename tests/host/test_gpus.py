"""`host gpus` on recorded hosts."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from tests import hosttree
from tests.host.conftest import Make

IDS = """\
# comment
10dd  Enhance Electronics Co., Ltd.
\t20b5  not this one
10de  NVIDIA Corporation
\t1eb8  TU104GL [Tesla T4]
\t20b5  GA100 [A100 PCIe 80GB]
\t\t10de 1533  a subsystem
10df  Emulex Corporation
\t20b5  nor this
"""


def test_an_a100_with_virtual_functions(host: Make) -> None:
    here = host(hosttree.a100)
    here.tree.file("usr/share/misc/pci.ids", IDS)
    (gpu,) = here("gpus", "--json").data["gpus"]
    assert gpu["bdf"] == "0000:41:00.0"
    assert (gpu["vendor"], gpu["device"], gpu["name"]) == ("10de", "20b5", "GA100 [A100 PCIe 80GB]")
    assert [(bar["number"], bar["size"], bar["bits"], bar["large"]) for bar in gpu["bars"]] == [
        (0, 16 << 20, 32, False), (1, 128 << 30, 64, True), (3, 32 << 20, 64, False)]
    assert gpu["large"] is True
    assert (gpu["driver"], gpu["iommu_group"], gpu["numa_node"]) == ("nvidia", 27, 1)
    assert gpu["group_members"] == []
    assert gpu["sriov"] == {"total": 20, "enabled": 4, "functions": [
        f"0000:41:00.{number}" for number in range(4, 8)]}
    assert gpu["vgpu"] == {"interface": "mdev", "made": ["aa618089-8b16-4d01-a136-25a0f3c73123"]}
    assert gpu["reset_methods"] == ["flr", "bus"]
    assert gpu["vfio"] == []


def test_the_table(host: Make) -> None:
    here = host(hosttree.a100)
    here.tree.file("usr/share/hwdata/pci.ids.gz", gzip.compress(IDS.encode()))
    head, row, *notes = here("gpus").out.splitlines()
    assert head.split() == ["BDF", "ID", "BARS", "CLASS", "DRIVER", "GROUP", "NUMA", "SR-IOV",
                            "MIG", "vGPU", "VFIO", "NAME"]
    assert row.split() == ["0000:41:00.0", "[10de:20b5]", "0:16M", "1:128G/64", "3:32M/64", "large",
                           "nvidia", "27", "1", "4/20", "-", "mdev:1", "-", "GA100", "[A100",
                           "PCIe", "80GB]"]
    assert notes == ["  0000:41:00.0: vGPU aa618089-8b16-4d01-a136-25a0f3c73123"]


def test_names_that_are_not_known(host: Make) -> None:
    said = host(hosttree.t4)("gpus")
    assert "small" in said.out
    assert "this host has no pci.ids" in said.out


def test_mig_of_what_the_driver_shows(host: Make) -> None:
    assert host(hosttree.a30)("gpus", "--json").data["gpus"][0]["mig"] == "enabled"


@pytest.mark.parametrize(("script", "mode"), [
    ('echo "00000000:D0:00.0, Disabled"', "disabled"),
    ('echo "00000000:D0:00.0, [N/A]"', "enabled"),  # what the driver shows
    ("echo >&2 NVIDIA-SMI has failed; exit 9", "enabled")])
def test_mig_of_nvidia_smi(host: Make, script: str, mode: str) -> None:
    said = host(hosttree.a30, nvidia_smi=script)("gpus", "--json")
    assert said.data["gpus"][0]["mig"] == mode


def test_a_shared_group(host: Make) -> None:
    said = host(hosttree.switch)("gpus")
    (line,) = [line for line in said.out.splitlines() if line.startswith("  group 7: ")]
    assert line == (
        "  group 7: 0000:18:00.0, with 0000:16:02.0 [8086:347a] (a bridge, which stays), "
        "0000:17:00.0 [10b5:8747] (a bridge, which stays), 0000:18:00.1 [10de:1aef] "
        "(snd_hda_intel), 0000:19:00.0 [10de:2236] (nvidia)")


def test_bars_without_an_address(host: Make) -> None:
    here = host(hosttree.no_iommu)
    (gpu,) = here("gpus", "--json").data["gpus"]
    assert [bar["assigned"] for bar in gpu["bars"]] == [True, False, False]
    assert gpu["large"] is True
    assert gpu["iommu_group"] is None
    assert "1:16G/64!" in here("gpus").out


def test_a_bar_that_only_the_header_knows(host: Make) -> None:
    here = host(hosttree.no_iommu)
    (here.tree.paths["0000:65:00.0"] / "resource").write_text(
        "0x00000000d6000000 0x00000000d6ffffff 0x0000000000040200\n" + f"{' '.join(['0x0'] * 3)}\n"
        * 6)
    (gpu,) = here("gpus", "--json").data["gpus"]
    assert [(bar["number"], bar["size"]) for bar in gpu["bars"]] == [(0, 16 << 20), (1, 0), (3, 0)]
    assert "1:?/64!" in here("gpus").out


def test_the_newer_interface_of_vgpus(host: Make) -> None:
    here = host(hosttree.a100)
    for address, number in (("0000:41:00.4", "0"), ("0000:41:00.6", "692")):
        shutil.rmtree(here.tree.paths[address] / "mdev_supported_types")
        path = here.tree.paths[address] / "nvidia/current_vgpu_type"
        path.parent.mkdir()
        path.write_text(f"{number}\n")
    (gpu,) = here("gpus", "--json").data["gpus"]
    assert gpu["vgpu"]["interface"] == "vendor"
    assert "0000:41:00.6" in gpu["vgpu"]["made"]
    assert "0000:41:00.4" not in gpu["vgpu"]["made"]


def test_an_nvswitch(host: Make) -> None:
    here = host(hosttree.a30)
    here.tree.add(hosttree.Device("0000:c4:00.0", "10de:22a3", "068000", driver="nvidia-nvswitch",
                                  group=170))
    said = here("gpus", "--json").data
    assert [gpu["bdf"] for gpu in said["gpus"]] == ["0000:d0:00.0"]
    assert said["nvswitches"] == [{"bdf": "0000:c4:00.0", "vendor": "10de", "device": "22a3",
                                   "driver": "nvidia-nvswitch", "iommu_group": 170}]
    assert "NVSwitch 0000:c4:00.0 [10de:22a3], driver nvidia-nvswitch, group 170" in \
        here("gpus").out


def test_none(host: Make) -> None:
    def empty(root: Path) -> hosttree.Tree:
        return hosttree.Tree(root)

    assert host(empty)("gpus").out == "no NVIDIA GPU is here\n"


def test_a_damaged_list_of_names(host: Make) -> None:
    here = host(hosttree.t4)
    here.tree.file("usr/share/misc/pci.ids.gz", gzip.compress(IDS.encode())[:40])
    said = here("gpus")
    assert said.status == 0
    assert "no pci.ids" in said.out
