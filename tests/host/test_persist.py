"""`host persist`: the files of the next boot, and their removal."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from katagpu.host import persist
from tests import hosttree
from tests.host.conftest import Make
from tests.hosttree import Device

REPOSITORY = Path(persist.__file__).parents[2]
A30 = "0000:d0:00.0"


def etc(here: Path) -> dict[str, str]:
    """The files below /etc."""
    return {f"/{path.relative_to(here)}": path.read_text()
            for path in (here / "etc").rglob("*") if path.is_file()}


def test_there_and_back(host: Make) -> None:
    here = host(hosttree.a30)
    before = here.tree.snapshot()
    said = here("persist", "d0:00.0", "--yes", "--json")
    assert said.data["persistent"] == [A30]
    found = etc(here.tree.root)
    assert sorted(found) == sorted(persist.FILES) == said.data["files"]
    rule = found[persist.RULES].splitlines()[1]
    for word in (f'KERNEL=="{A30}"', 'ATTR{vendor}=="0x10de"', 'ATTR{device}=="0x20b7"',
                 'ATTR{driver_override}="vfio-pci"', 'RUN{builtin}+="kmod load vfio-pci"'):
        assert word in rule
    assert "softdep nvidia pre: vfio-pci\n" in found[persist.MODPROBE]
    assert "softdep snd_hda_intel" not in found[persist.MODPROBE]
    assert "blacklist nouveau\n" in found[persist.MODPROBE]
    assert "blacklist nvidia\n" not in found[persist.MODPROBE]
    assert found[persist.LOAD].splitlines()[1:] == ["vfio-pci", "vhost_vsock"]
    assert here("persist", "--remove", "--yes").status == 0
    assert here.tree.snapshot() == before


def test_one_of_two_groups_goes_and_the_other_stays(host: Make) -> None:
    here = host(hosttree.a30)
    here.tree.add(Device("0000:d1:00.0", "10de:1eb8", group=193, driver="nvidia"))
    here("persist", A30, "--yes")
    assert "blacklist" not in etc(here.tree.root)[persist.MODPROBE]  # the other GPU needs it
    here("persist", "d1:00.0", "--yes")
    found = etc(here.tree.root)
    assert re.findall('KERNEL=="([^"]+)"', found[persist.RULES]) == [A30, "0000:d1:00.0"]
    assert "blacklist nouveau" in found[persist.MODPROBE]
    said = here("persist", "--remove", A30, "--yes", "--json")
    assert said.data["persistent"] == ["0000:d1:00.0"]
    assert A30 not in etc(here.tree.root)[persist.RULES]


def test_the_whole_group(host: Make) -> None:
    here = host(hosttree.switch)
    here("persist", "0000:18:00.0", "--yes")
    found = etc(here.tree.root)
    assert re.findall('KERNEL=="([^"]+)"', found[persist.RULES]) == [
        "0000:18:00.0", "0000:18:00.1", "0000:19:00.0"]
    assert "softdep snd_hda_intel pre: vfio-pci" in found[persist.MODPROBE]
    here("persist", "--remove", "0000:19:00.0", "--yes")
    assert etc(here.tree.root) == {}


@pytest.mark.parametrize("text", ["0000:18:00.0", "18:00.0", "00000000:18:00.0", "19:00.0"])
def test_the_whole_group_goes_however_its_address_is_written(host: Make, text: str) -> None:
    here = host(hosttree.switch)
    here("persist", "0000:18:00.0", "--yes")
    said = here("persist", "--remove", text, "--yes")
    assert said.status == 0 and "without a reboot" not in said.out
    assert etc(here.tree.root) == {}


@pytest.mark.parametrize("text", ["65:00.0", "00000000:65:00.0"])
@pytest.mark.parametrize("there", [True, False])
def test_without_groups_a_card_goes_with_its_functions(host: Make, text: str, there: bool) -> None:
    """The IOMMU is off; the card may be gone."""
    here = host(hosttree.no_iommu)
    here.tree.add(Device("0000:65:00.1", "10de:0fb8", hosttree.AUDIO, group=None))
    here("persist", "65:00.0", "--yes")
    if not there:
        (here.tree.root / "sys/bus/pci/devices/0000:65:00.0").unlink()
    assert here("persist", "--remove", text, "--yes").status == 0
    assert etc(here.tree.root) == {}


def test_a_card_that_is_gone_can_be_taken_back(host: Make) -> None:
    here = host(hosttree.a30)
    here("persist", A30, "--yes")
    (here.tree.root / "sys/bus/pci/devices" / A30).unlink()
    assert here("persist", "--remove", A30, "--yes").status == 0
    assert etc(here.tree.root) == {}


def test_twice_is_once(host: Make) -> None:
    here = host(hosttree.a30)
    here("persist", A30, "--yes")
    before = here.tree.snapshot()
    said = here("persist", A30)
    assert (said.status, here.tree.snapshot()) == (0, before)
    assert "persistent already" in said.out


def test_a_dry_run_prints_the_files(host: Make) -> None:
    here = host(hosttree.a30)
    before = here.tree.snapshot()
    said = here("persist", A30, "--dry-run")
    assert f"write the file {persist.MODPROBE}:\n    # Written by" in said.out
    assert "    softdep nouveau pre: vfio-pci\n" in said.out
    assert here.tree.snapshot() == before


def test_without_an_iommu_it_says_how_it_is_turned_on(host: Make) -> None:
    here = host(hosttree.no_iommu)
    here.tree.add(Device("0000:65:00.1", "10de:0fb8", hosttree.AUDIO, group=None))
    here.tree.file("etc/default/grub", "GRUB_CMDLINE_LINUX=\n")
    said = here("persist", "65:00.0", "--yes")
    assert said.status == 0
    assert "intel_iommu=on iommu=pt" in said.out
    assert "/etc/default/grub" in said.out
    assert "in no IOMMU group" in said.err
    assert "without a reboot" not in said.out
    assert 'KERNEL=="0000:65:00.1"' in etc(here.tree.root)[persist.RULES]


@pytest.mark.parametrize(("program", "line"), [
    ("update_initramfs", "update-initramfs -u -k all"), ("dracut", "dracut --force")])
def test_the_initrd_is_remembered(host: Make, program: str, line: str) -> None:
    here = host(hosttree.a30, **{program: "exit 1"})
    assert line in here("persist", A30, "--yes").out


def test_a_file_of_somebody_else_is_left_alone(host: Make) -> None:
    here = host(hosttree.a30)
    here.tree.file(persist.MODPROBE, "options vfio-pci ids=10de:20b7\n")
    before = here.tree.snapshot()
    for words in (["persist", A30], ["persist", "--remove"]):
        said = here(*words, "--yes")
        assert said.status == 1
        assert f"{persist.MODPROBE} is not of katagpu host persist" in said.err
    assert here.tree.snapshot() == before


def test_a_failure_half_way_leaves_nothing(host: Make) -> None:
    here = host(hosttree.a30)
    (here.tree.root / "etc/modules-load.d").write_text("a file where a directory should be")
    before = here.tree.snapshot()
    said = here("persist", A30, "--yes")
    assert said.status == 1
    assert "undone by: rm -f /etc/modprobe.d/katagpu-vfio.conf" in said.err
    assert here.tree.snapshot() == before


@pytest.mark.parametrize(("words", "said"), [
    (["persist"], "which GPUs?"), (["persist", "--remove", A30], f"not persistent: {A30}"),
    (["persist", "00:1f.0"], "there is no PCI function"),
    (["persist", "--remove", "x"], "'x' is no PCI address")])
def test_what_is_refused(host: Make, words: list[str], said: str) -> None:
    found = host(hosttree.a30)(*words, "--yes")
    assert found.status == 1
    assert said in found.err


def test_a_read_only_etc(tmp_path: Path) -> None:
    tree = hosttree.a30(tmp_path / "root")
    for name in persist.FILES:
        (tree.root / name.lstrip("/")).parent.mkdir(parents=True)
    script = ('mount --bind "$1/etc" "$1/etc" && mount -o remount,bind,ro "$1/etc" || exit 77; '
              'exec "$2" -m katagpu.host persist d0:00.0 --yes --root "$1"')
    said = subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh",
                           tree.root, sys.executable], cwd=REPOSITORY, capture_output=True,
                          text=True)
    if said.returncode == 77 or "unshare:" in said.stderr:
        pytest.skip("nothing can be mounted here")
    assert said.returncode == 1
    assert "Read-only file system" in said.stderr
    assert "--dry-run` prints them" in said.stderr
    assert "Traceback" not in said.stderr


def test_the_rule_does_what_a_bind_does(host: Make, tmp_path: Path) -> None:
    """Its script, as udev hands it to a shell, on a tree whose attributes are plain files."""
    here = host(hosttree.a30)
    here("persist", A30, "--yes")
    rule = etc(here.tree.root)[persist.RULES]
    script = re.findall(r"RUN\+=\"/bin/sh -c '([^']*)'\"", rule)[0]
    path = here.tree.paths[A30]
    (here.tree.root / "sys/bus/pci/drivers/vfio-pci").mkdir()
    sysfs = here.tree.root / "sys"
    for old, new in (("%S", str(sysfs)), ("%p", f"/{path.relative_to(sysfs)}"), ("%k", A30),
                     ("$$", "$")):
        script = script.replace(old, new)
    subprocess.run(["sh", "-ec", script], check=True)
    assert (sysfs / "bus/pci/drivers/nvidia/unbind").read_text() == f"{A30}\n"
    assert (sysfs / "bus/pci/drivers_probe").read_text() == f"{A30}\n"
    (sysfs / "bus/pci/drivers/nvidia/unbind").write_text("")
    (path / "driver").unlink()
    here.tree.link(path / "driver", sysfs / "bus/pci/drivers/vfio-pci")
    subprocess.run(["sh", "-ec", script], check=True)
    assert not (sysfs / "bus/pci/drivers/vfio-pci/unbind").exists()
