"""`host vgpu` on hosts with NVIDIA's vGPU manager: mdev, and NVIDIA's own attributes."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katagpu.host import vgpu
from tests.host import fakesmi, vgpuhost
from tests.host.conftest import Host, Make
from tests.host.vgpuhost import PF, VF, Manager
from tests.hosttree import Tree

UUID = "6bd5e6e1-6b8c-4d6b-9a62-5a6e6e7e1f11"
Cards = Callable[..., Host]


@pytest.fixture
def card(host: Make) -> Cards:
    """A host of vgpuhost; `mig` is what nvidia-smi says of MIG (None: it is not there)."""
    def make(build: Callable[[Path], Tree], mig: str | None = "Disabled", **programs: str) -> Host:
        if mig is not None:
            programs["nvidia_smi"] = fakesmi.script()
        here = host(build, **programs)
        here.kernel = Manager(here.tree)
        if mig is not None:
            fakesmi.write(here.tree.root, PF, current=mig, pending=mig)
        return here

    return make


def refused(here: Host, word: str, *words: str) -> str:
    """An error, status 1, and the host as it was."""
    before = {name: text for name, text in here.tree.snapshot().items() if "create" not in name
              and fakesmi.STATE not in name}
    said = here("vgpu", *words, "--yes")
    assert said.status == 1 and said.err.startswith("error: ") and word in said.err, said.err
    after = {name: text for name, text in here.tree.snapshot().items() if name in before
             or ("create" not in name and fakesmi.STATE not in name)}
    assert after == before
    return said.err


# list


def test_the_guide_s_table(card: Cards) -> None:
    here = card(vgpuhost.mdev)
    lines = here("vgpu", "list").out.splitlines()
    assert lines[0].split() == ["BDF", "INSTANCES", "NAME", "DIR", "BACKING"]
    assert lines[1].split() == [VF, "1", "GRID", "A100D-4C", "nvidia-692", "time-sliced"]
    assert len(lines) == 1 + 3 * 2  # those without an instance are left out
    assert len(here("vgpu", "list", "--all").out.splitlines()) == 1 + 3 * 3


def test_types_of_the_other_interface(card: Cards) -> None:
    found = card(vgpuhost.vendor)("vgpu", "list", "--json").data["types"]
    assert found[0] == {"bdf": VF, "instances": 1, "name": "NVIDIA H200X-1-18C", "dir": "1414",
                        "backing": "MIG", "interface": "vendor"}
    assert [one["backing"] for one in found[:3]] == ["MIG", "time-sliced", "time-sliced"]
    assert len(found) == 9


def test_types_of_a_card_before_ampere(card: Cards) -> None:
    here = card(vgpuhost.old)
    assert here("vgpu", "list", PF, "--json").data["types"][0]["bdf"] == PF
    said = here("vgpu", "create", PF, "V100-4C", "--uuid", UUID, "--yes")
    assert said.status == 0, said.err
    assert f"{UUID}: GRID V100-4C on {PF}, /dev/vfio/192" in said.out


@pytest.mark.parametrize(("build", "changes", "word"), [
    (vgpuhost.card, {}, f"katagpu host vgpu enable {PF}"),
    (vgpuhost.card, {"total": 0}, "-vgpu-kvm.run"),
    (vgpuhost.card, {"total": 16, "ids": "10de:1eb8"}, "-vgpu-kvm.run"),  # a T4 has SR-IOV too
    (vgpuhost.card, {"driver": "vfio-pci"}, f"katagpu host unbind {PF}")])
def test_why_there_is_none(card: Cards, build: Any, changes: dict[str, Any], word: str) -> None:
    assert word in card(lambda root: build(root, **changes))("vgpu", "list").out


# enable, disable


def test_virtual_functions_by_sysfs(card: Cards) -> None:
    here = card(vgpuhost.card)
    said = here("vgpu", "enable", PF, "--yes")
    assert (said.status, said.out.splitlines()[0]) == (0, f"{PF}: 3 virtual functions")
    assert here.kernel.written == [
        (f"sys/devices/pci0000:40/0000:40:01.0/{PF}/sriov_numvfs", "3")]
    assert "already" in here("vgpu", "enable", PF, "--yes").out
    assert here("vgpu", "list", "--json").data["types"][0]["bdf"] == VF
    assert "are gone" in here("vgpu", "disable", VF, "--yes").out  # one names the card as well
    assert here("vgpu", "list", "--json").data["types"] == []


SRIOV_MANAGE = """#!/bin/sh
echo "$@" >> "$KATAGPU_HOST_ROOT/calls"
cd "$KATAGPU_HOST_ROOT/sys/bus/pci/devices/$2"
case $1 in
  -e) for each in off-*; do mv "$each" "${each#off-}"; done;;
  -d) for each in virtfn*; do mv "$each" "off-$each"; done;;
esac
"""


def managed(root: Path) -> Tree:
    """A host with sriov-manage; what it does is to show functions that are there."""
    tree = vgpuhost.mdev(root)
    tree.file(vgpu.SRIOV_MANAGE, SRIOV_MANAGE).chmod(0o755)
    for link in tree.paths[PF].glob("virtfn*"):
        link.rename(link.with_name(f"off-{link.name}"))
    return tree


def test_virtual_functions_by_sriov_manage(card: Cards) -> None:
    here = card(managed)
    said = here("vgpu", "enable", PF, "--yes")
    assert (said.status, said.out.splitlines()[0]) == (0, f"{PF}: 3 virtual functions")
    assert "are gone" in here("vgpu", "disable", PF, "--yes").out
    assert (here.tree.root / "calls").read_text() == f"-e {PF}\n-d {PF}\n"
    assert here.kernel.written == []


@pytest.mark.parametrize(("script", "word"), [
    ("exit 0", "has no virtual function afterwards, and not 3"),
    ("echo 'sriov-manage: GPU busy' >&2; exit 1", "GPU busy")])
def test_sriov_manage_that_fails(card: Cards, script: str, word: str) -> None:
    here = card(managed)
    here.tree.file(vgpu.SRIOV_MANAGE, f"#!/bin/sh\n{script}\n")
    refused(here, word, "enable", PF)


def test_sriov_manage_that_fails_half_way(card: Cards) -> None:
    """It has enabled one function of three: that one is taken back."""
    here = card(managed)
    here.tree.file(vgpu.SRIOV_MANAGE, SRIOV_MANAGE.replace(
        "for each in off-*;", "for each in off-virtfn0;").replace("esac", "esac\n[ $1 = -d ]"))
    said = here("vgpu", "enable", PF, "--yes")
    assert said.status == 1 and f"undone by: {vgpu.SRIOV_MANAGE} -d {PF}" in said.err
    assert not list(here.tree.paths[PF].glob("virtfn*"))


def test_sriov_manage_that_makes_too_few(card: Cards) -> None:
    here = card(managed)
    here.tree.file(vgpu.SRIOV_MANAGE, SRIOV_MANAGE.replace("off-*", "off-virtfn0"))
    said = here("vgpu", "enable", PF, "--yes")
    assert said.status == 1 and "has 1 virtual function afterwards, and not 3" in said.err
    assert "undone by" in said.err and not list(here.tree.paths[PF].glob("virtfn*"))


def test_a_refusal_of_the_kernel(card: Cards) -> None:
    here = card(vgpuhost.card)
    here.kernel.refuses[f"{PF}/sriov_numvfs", "3"] = errno.EPERM
    assert "run it as root" in refused(here, "Operation not permitted", "enable", PF)


def test_a_kernel_that_makes_none(card: Cards) -> None:
    here = card(vgpuhost.card)
    here.kernel.silent = True  # type: ignore[attr-defined]
    said = here("vgpu", "enable", PF, "--yes")
    assert said.status == 1 and "no virtual function afterwards" in said.err
    assert "undone by: echo 0 >" in said.err
    assert [text for _, text in here.kernel.written] == ["3", "0"]


@pytest.mark.parametrize(("changes", "word"), [
    ({"driver": "vfio-pci"}, "is bound to vfio-pci"), ({"total": 0}, "has no SR-IOV"),
    ({"ids": "10de:1eb8"}, "is Turing: its vGPU types are on the card itself")])
def test_cards_that_have_none_to_enable(card: Cards, changes: dict[str, Any], word: str) -> None:
    refused(card(lambda root: vgpuhost.card(root, **changes)), word, "enable", PF)


def test_functions_with_vgpus_are_not_disabled(card: Cards) -> None:
    here = card(vgpuhost.vendor)
    here("vgpu", "create", VF, "1428", "--yes")
    assert f"katagpu host vgpu remove {VF}" in refused(here, f"has vGPUs: {VF}", "disable", PF)


# create, remove


@pytest.mark.parametrize("name", ["A100D-4C", "GRID A100D-4C", "nvidia-692", "692", "a100d-4c"])
def test_an_mdev(card: Cards, name: str) -> None:
    here = card(vgpuhost.mdev)
    before = here.tree.snapshot()
    said = here("vgpu", "create", VF, name, "--uuid", UUID, "--yes")
    assert said.status == 0, said.err
    assert said.out.splitlines()[0] == f"{UUID}: GRID A100D-4C on {VF}, /dev/vfio/192"
    (found,) = here("vgpu", "list", "--json").data["vgpus"]
    assert found == {"vgpu": UUID, "bdf": VF, "name": "GRID A100D-4C", "dir": "nvidia-692",
                     "interface": "mdev", "vfio": "/dev/vfio/192"}
    assert UUID in here("vgpu", "list").out
    assert here("vgpu", "remove", UUID, "--yes").out == f"removed: {UUID}\n"
    after = here.tree.snapshot()
    assert {name for name in after if after[name] != before.get(name)} == {
        f"sys/devices/pci0000:40/0000:40:01.0/{VF}/mdev_supported_types/nvidia-692/create",
        f"sys/devices/pci0000:40/0000:40:01.0/{VF}/mdev_supported_types/nvidia-698/"
        "available_instances", "nvidia-smi.json"}


def test_without_a_uuid_one_is_made(card: Cards) -> None:
    said = card(vgpuhost.mdev)("vgpu", "create", VF, "A100D-4C", "--json", "--yes")
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", said.data["vgpu"])


def test_a_vgpu_of_nvidia_s_own_interface(card: Cards) -> None:
    here = card(vgpuhost.vendor)
    before = here.tree.snapshot()
    said = here("vgpu", "create", VF, "H200X-141C", "--yes")
    assert said.out.splitlines()[0] == f"{VF}: NVIDIA H200X-141C on {VF}, /dev/vfio/30"
    assert here.kernel.written[-1][0].endswith(f"{VF}/nvidia/current_vgpu_type")
    assert here.kernel.written[-1][1] == "1428"
    (found,) = here("vgpu", "list", "--json").data["vgpus"]
    assert (found["vgpu"], found["dir"], found["name"]) == (VF, "1428", "NVIDIA H200X-141C")
    assert here("vgpu", "remove", VF.removeprefix("0000:"), "--yes").status == 0
    after = here.tree.snapshot()
    assert {name for name in after if after[name] != before.get(name)} == {"nvidia-smi.json"}


def test_a_card_stands_for_its_first_free_function(card: Cards) -> None:
    here = card(vgpuhost.vendor)
    made = [here("vgpu", "create", PF, "1428", "--json", "--yes").data["vgpu"] for _ in range(3)]
    assert made == [f"0000:41:00.{number}" for number in (4, 5, 6)]
    refused(here, "no type has an instance left", "create", PF, "1428")


def test_the_functions_of_the_physical_card_only(card: Cards) -> None:
    here = card(vgpuhost.mdev)
    (here.tree.paths[VF] / "mdev_supported_types/nvidia-692/available_instances").write_text("0\n")
    said = refused(here, f"no more GRID A100D-4C can be made on {VF}", "create", VF, "A100D-4C")
    assert "GRID A100D-8C" in said
    assert here("vgpu", "create", PF, "A100D-4C", "--json", "--yes").data["bdf"] == "0000:41:00.5"


def test_time_sliced_types_while_mig_is_on(card: Cards) -> None:
    said = refused(card(vgpuhost.mdev, "Enabled"), "is time-sliced, and MIG is on", "create", VF,
                   "A100D-4C")
    assert f"katagpu host mig disable {PF}" in said


def test_mig_backed_types_while_mig_is_off(card: Cards) -> None:
    said = refused(card(vgpuhost.mig), "is MIG-backed, and MIG is off", "create", VF, "A100D-1-10C")
    assert f"katagpu host mig enable {PF}" in said


def test_mig_backed_types_while_mig_is_on(card: Cards) -> None:
    here = card(vgpuhost.mig, "Enabled")
    assert here("vgpu", "create", VF, "A100D-1-10C", "--yes").status == 0


def test_a_mode_that_is_not_known_is_said(card: Cards) -> None:
    said = card(vgpuhost.mdev, None)("vgpu", "create", VF, "A100D-4C", "--yes")
    assert said.status == 0 and "nvidia-smi does not say" in said.out


@pytest.mark.parametrize(("build", "words", "word"), [
    (vgpuhost.mdev, ("create", VF, "A100D-5C"), "did you mean A100D-"),
    (vgpuhost.mdev, ("create", VF, "zzz"), "what can be made: GRID A100D-4C"),
    (vgpuhost.mdev, ("create", VF, "A100D-4C", "--uuid", "12"), "is no UUID"),
    (vgpuhost.vendor, ("create", VF, "1428", "--uuid", UUID), "has no UUID"),
    (vgpuhost.card, ("create", PF, "A100D-4C"), "takes no vGPU: its virtual functions are off"),
    (vgpuhost.mdev, ("create", "0000:40:01.0", "A100D-4C"), "is not NVIDIA's"),
    (vgpuhost.mdev, ("create", "banana", "A100D-4C"), "is no PCI address"),
    (vgpuhost.mdev, ("remove", UUID), f"there is no vGPU {UUID}")])
def test_bad_words(card: Cards, build: Any, words: tuple[str, ...], word: str) -> None:
    refused(card(build), word, *words)


def test_a_uuid_that_is_taken(card: Cards) -> None:
    here = card(vgpuhost.mdev)
    here("vgpu", "create", VF, "A100D-4C", "--uuid", UUID, "--yes")
    refused(here, "there is an mdev", "create", PF, "A100D-4C", "--uuid", UUID)


def test_a_vgpu_that_does_not_come_is_undone(card: Cards) -> None:
    here = card(vgpuhost.vendor)
    here.kernel.silent = True  # type: ignore[attr-defined]
    said = here("vgpu", "create", VF, "1428", "--yes")
    assert said.status == 1 and "not there afterwards" in said.err
    assert "undone by: echo 0 >" in said.err


def test_remove_all_or_none(card: Cards) -> None:
    here = card(vgpuhost.vendor)
    names = [f"0000:41:00.{number}" for number in (4, 5)]
    for name in names:
        here("vgpu", "create", name, "1428", "--yes")
    here.kernel.refuses[f"{names[1]}/nvidia/current_vgpu_type", "0"] = errno.EBUSY
    said = here("vgpu", "remove", *names, "--yes")
    assert said.status == 1 and "busy" in said.err
    assert "something uses it" in said.err
    found = here("vgpu", "list", "--json").data["vgpus"]
    assert [one["vgpu"] for one in found] == names


def test_a_dry_run_writes_nothing(card: Cards) -> None:
    here = card(vgpuhost.mdev)
    said = here("vgpu", "create", VF, "A100D-4C", "--uuid", UUID, "--dry-run")
    assert said.out == (f"echo {UUID} > /sys/bus/pci/devices/{VF}/mdev_supported_types/nvidia-692/"
                        "create\n")
    assert here.kernel.written == []


@pytest.mark.parametrize(("build", "words"), [
    (vgpuhost.card, ("enable", PF)), (vgpuhost.vendor, ("disable", PF)),
    (vgpuhost.vendor, ("create", VF, "1428")), (vgpuhost.vendor, ("remove", "0000:41:00.5"))])
def test_a_dry_run_says_nothing_of_a_result(card: Cards, build: Any,
                                            words: tuple[str, ...]) -> None:
    here = card(build)
    if words[0] == "remove":
        assert here("vgpu", "create", words[1], "1428", "--yes").status == 0
    said = here("vgpu", *words, "--dry-run")
    assert said.status == 0
    (line,) = said.out.splitlines()
    assert line.startswith("echo ")
    assert set(here("vgpu", *words, "--dry-run", "--json").data) - {"notes"} == {"dry_run"}


def test_without_a_word_nothing_is_written(card: Cards) -> None:
    here = card(vgpuhost.mdev)
    said = here("vgpu", "create", VF, "A100D-4C")
    assert said.status == 1 and "--yes" in said.err and here.kernel.written == []
