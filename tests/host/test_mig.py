"""`host mig`, with a program in nvidia-smi's place that remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from katagpu.host import mig
from tests import hosttree
from tests.host import fakesmi
from tests.host.conftest import Host, Make

GPU = "0000:d0:00.0"
Smi = Callable[..., Host]


def bare(root: Any) -> hosttree.Tree:
    """An A30's place with no instances in /proc."""
    tree = hosttree.Tree(root)
    tree.add(hosttree.Device(GPU, "10de:20b7", driver="nvidia", group=192, total_vfs=4,
                             bars=hosttree.bars(0x222800000000, 32 << 30)))
    tree.functions(GPU, 4, 2, group=200, files=hosttree.mdev_types({}))
    return tree


@pytest.fixture
def smi(host: Make) -> Smi:
    """A host whose nvidia-smi begins with this state."""
    def make(**state: Any) -> Host:
        here = host(bare, nvidia_smi=fakesmi.script())
        fakesmi.write(here.tree.root, GPU, **state)
        return here

    return make


ON = {"current": "Enabled", "pending": "Enabled"}
TWO = [{"id": 7, "name": "3g.40gb", "profile": 9, "start": 0, "size": 4, "compute": [0]},
       {"id": 11, "name": "1g.10gb", "profile": 19, "start": 4, "size": 1, "compute": []}]


def calls(here: Host) -> list[str]:
    """What changed something, in order."""
    reading = ("-q", "-lgip", "-lgi", "-lci")
    return [" ".join(words).replace(f"-i {GPU} ", "") for words in
            fakesmi.read(here.tree.root)["log"]
            if not set(reading) & set(words) and not words[0].startswith("--query")]


def refused(here: Host, word: str, *words: str) -> str:
    """An error, and nothing changed."""
    before = fakesmi.read(here.tree.root)
    said = here("mig", *words, "--yes")
    assert said.status == 1 and said.err.startswith("error: ") and word in said.err, said.err
    after = fakesmi.read(here.tree.root)
    assert {**after, "log": []} == {**before, "log": []}
    return said.err


def test_status(smi: Smi) -> None:
    here = smi(**ON, instances=TWO)
    (found,) = here("mig", "status", "--json").data["gpus"]
    assert (found["bdf"], found["mig"], found["waits"]) == (GPU, True, False)
    assert [(one["id"], one["name"], one["start"], one["compute"]) for one in
            found["instances"]] == [(7, "3g.40gb", 0, [0]), (11, "1g.10gb", 4, [])]
    assert [(one["name"], one["free"]) for one in found["profiles"]][:3] == [
        ("1g.10gb", 3), ("1g.10gb+me", 1), ("2g.20gb", 1)]
    said = here("mig", "status", GPU).out.splitlines()
    assert said[0].split() == ["GPU", "BDF", "NAME", "MIG", "PENDING", "INSTANCES"]
    assert said[1].split() == ["0", GPU, "NVIDIA", "A100", "80GB", "PCIe", "on", "-", "2"]
    assert ["0", "7", "3g.40gb", "9", "0:4", "0"] in [line.split() for line in said]


def test_status_without_mig(smi: Smi) -> None:
    here = smi(current="N/A", pending="N/A")
    (found,) = here("mig", "status", "--json").data["gpus"]
    assert (found["mig"], found["profiles"], found["instances"]) == (None, [], [])
    assert "not supported" in here("mig", "status").out


def test_enable(smi: Smi) -> None:
    here = smi()
    said = here("mig", "enable", GPU, "--yes")
    assert (said.status, said.out) == (0, f"{GPU}: MIG is on\n")
    assert calls(here) == ["-mig 1"]
    assert "on already" in here("mig", "enable", GPU, "--yes").out
    assert here("mig", "disable", "d0:00.0", "--yes").status == 0
    assert fakesmi.read(here.tree.root)["current"] == "Disabled"


def test_enable_that_waits_for_a_reset(smi: Smi) -> None:
    here = smi(slow=True)
    said = here("mig", "enable", GPU, "--yes")
    assert said.status == 1  # it is not on
    assert f"mig enable {GPU} --reset" in said.out and "reboot" in said.out
    assert here("mig", "status", "--json").data["gpus"][0]["waits"] is True
    assert "after a reset" in here("mig", "status").out
    said = here("mig", "enable", GPU, "--yes", "--reset")
    assert (said.status, said.out) == (0, f"{GPU}: MIG is on\n")
    assert calls(here) == ["-mig 1", "--gpu-reset"]


def test_in_a_virtual_machine_a_reset_is_not_ours(smi: Smi) -> None:
    here = smi(slow=True, mode="Pass-Through")
    assert "stop and start the machine" in here("mig", "enable", GPU, "--yes").out


def test_a_gpu_in_use_is_not_reset(smi: Smi) -> None:
    here = smi(processes=[[4711, "train.py"]])
    said = refused(here, "is in use: 4711 train.py", "enable", GPU, "--reset")
    assert "stop them" in said


def test_disable_keeps_instances_and_vgpus(smi: Smi) -> None:
    said = refused(smi(**ON, instances=TWO), "has GPU instances: 7, 11", "disable", GPU)
    assert f"katagpu host mig destroy {GPU}" in said


@pytest.mark.parametrize("verb", ["enable", "disable"])
def test_no_mode_is_changed_below_a_vgpu(smi: Smi, verb: str) -> None:
    here = smi(**(ON if verb == "disable" else {}))
    uuid = "aa618089-8b16-4d01-a136-25a0f3c73123"
    place = here.tree.paths["0000:d0:00.4"] / uuid
    place.mkdir()
    here.tree.link(here.tree.root / "sys/bus/mdev/devices" / uuid, place)
    said = refused(here, f"has vGPUs ({uuid})", verb, GPU)
    assert f"katagpu host vgpu remove {uuid}" in said


def test_a_gpu_without_mig(smi: Smi) -> None:
    refused(smi(current="N/A", pending="N/A"), "has no MIG", "enable", GPU)


@pytest.mark.parametrize(("fail", "cure"), [
    (("Unable to enable MIG Mode for GPU: Insufficient Permissions", 4), "sudo"),
    (("Unable to enable MIG Mode for GPU: In use by another client", 19), "fuser"),
    (("Unable to enable MIG Mode for GPU: Not Supported", 3), "cannot do it")])
def test_a_refusal_has_its_cure(smi: Smi, fail: tuple[str, int], cure: str) -> None:
    here = smi(fail={"-mig": fail})
    said = refused(here, fail[0], "enable", GPU)
    assert cure in said


def test_a_status_of_0_is_no_proof(smi: Smi) -> None:
    here = smi(fail={"-mig": ("All done.", 0)})
    refused(here, "did not turn MIG on", "enable", GPU)


def test_create(smi: Smi) -> None:
    here = smi(**ON)
    said = here("mig", "create", GPU, "3g.40gb", "19,19", "--yes")
    assert said.status == 0, said.err
    assert said.out.splitlines() == [f"{GPU}: instance 7, 3g.40gb, at 0:4",
                                     f"{GPU}: instance 11, 1g.10gb, at 4:1",
                                     f"{GPU}: instance 12, 1g.10gb, at 5:1"]
    assert calls(here)[:2] == ["mig -cgi 9", "mig -cci -gi 7"]
    assert [one["compute"] for one in fakesmi.read(here.tree.root)["instances"]] == [[0]] * 3


def test_create_without_compute_instances(smi: Smi) -> None:
    here = smi(**ON)
    assert here("mig", "create", GPU, "2g.20gb", "--no-compute", "--yes").status == 0
    assert calls(here) == ["mig -cgi 14"]


def test_create_all_or_none(smi: Smi) -> None:
    """The compute instance is refused: the GPU instance goes again, with those before it."""
    here = smi(**ON, fail={"-cci": ("Unable to create a compute instance: Insufficient Resources",
                                    19)})
    said = refused(here, "Insufficient Resources", "create", GPU, "19")
    assert "undone by: nvidia-smi mig -i 0000:d0:00.0 -dgi -gi 7" in said
    assert calls(here) == ["mig -cgi 19", "mig -cci -gi 7", "mig -dgi -gi 7"]


@pytest.mark.parametrize(("option", "undone"), [
    ("-cgi", ["mig -cgi 19", "mig -dgi -gi 7"]),
    ("-cci", ["mig -cgi 19", "mig -cci -gi 7", "mig -dci -gi 7", "mig -dgi -gi 7"])])
def test_create_that_fails_after_it_was_done(smi: Smi, option: str, undone: list[str]) -> None:
    here = smi(**ON, late={option: ("Unknown Error", 255)})
    refused(here, "Unknown Error", "create", GPU, "19")
    assert calls(here) == undone


@pytest.mark.parametrize(("option", "calling"), [
    ("-dci", ["mig -dci -ci 0 -gi 7", "mig -cci 0 -gi 7"]),
    ("-dgi", ["mig -dci -ci 0 -gi 7", "mig -dgi -gi 7", "mig -cgi 9:0", "mig -cci 0 -gi 7"])])
def test_destroy_that_fails_after_it_was_done(smi: Smi, option: str, calling: list[str]) -> None:
    here = smi(**ON, instances=TWO, late={option: ("Unknown Error", 255)})
    said = here("mig", "destroy", GPU, "7", "--yes")
    assert said.status == 1 and "NOT undone" not in said.err
    assert calls(here) == calling
    after = fakesmi.read(here.tree.root)["instances"]
    assert sorted(after, key=lambda one: one["id"]) == TWO


def test_a_mode_that_nvidia_smi_was_killed_over(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has turned MIG on, and hangs: MIG is turned off again."""
    monkeypatch.setattr(mig, "SWITCHING", 8)
    here = smi(hangs=["1"])
    said = refused(here, "was killed", "enable", GPU)
    assert f"undone by: nvidia-smi -i {GPU} -mig 0" in said
    fakesmi.write(here.tree.root, GPU, fail={"-mig": ("In use by another client", 255)})
    assert "undone" not in refused(here, "In use", "enable", GPU)


@pytest.mark.parametrize(("profile", "word"), [
    ("1g.10GB+m", "did you mean 1g.10gb+me?"), ("42", "profiles: 1g.10gb"),
    ("7g.80gb,7g.80gb", "room for 1 of 7g.80gb, and not for 2")])
def test_profiles_that_are_not_there(smi: Smi, profile: str, word: str) -> None:
    refused(smi(**ON), word, "create", GPU, profile)


def test_no_room_left(smi: Smi) -> None:
    full = [{"id": 7, "name": "7g.80gb", "profile": 0, "start": 0, "size": 8, "compute": []}]
    refused(smi(**ON, instances=full), "has room for 0 of 1g.10gb", "create", GPU, "19")


def test_create_wants_mig_on(smi: Smi) -> None:
    here = smi()
    assert f"mig enable {GPU}" in refused(here, "MIG is off", "create", GPU, "19")
    fakesmi.write(here.tree.root, GPU, pending="Enabled")
    assert "until it is reset" in refused(here, "MIG is off", "create", GPU, "19")


def test_destroy(smi: Smi) -> None:
    here = smi(**ON, instances=TWO)
    assert here("mig", "destroy", GPU, "7", "--yes").status == 0
    assert calls(here) == ["mig -dci -ci 0 -gi 7", "mig -dgi -gi 7"]
    assert [one["id"] for one in fakesmi.read(here.tree.root)["instances"]] == [11]
    assert here("mig", "destroy", GPU, "--yes").out == f"{GPU}: instance 11 (1g.10gb) is gone\n"
    assert "has no GPU instances" in here("mig", "destroy", GPU, "--yes").out


def test_destroy_all_or_none(smi: Smi) -> None:
    """The second one is refused: the first comes back, at its place, with what it had."""
    here = smi(**ON, instances=[TWO[1], TWO[0]],
               fail={"-dci": ("Unable to destroy: In use by another client", 19)})
    said = here("mig", "destroy", GPU, "--yes")
    assert said.status == 1 and "In use by another client" in said.err
    assert calls(here) == ["mig -dgi -gi 11", "mig -dci -ci 0 -gi 7", "mig -cgi 19:4"]
    after = fakesmi.read(here.tree.root)["instances"]
    assert sorted(after, key=lambda one: one["id"]) == TWO


def test_destroy_what_is_not_there(smi: Smi) -> None:
    assert "it has 7, 11" in refused(smi(**ON, instances=TWO), "no GPU instance 3", "destroy", GPU,
                                     "3")


def test_a_dry_run_changes_nothing(smi: Smi) -> None:
    here = smi()
    for verb, state in (("enable", {}), ("disable", ON)):
        fakesmi.write(here.tree.root, GPU, **state)
        said = here("mig", verb, GPU, "--dry-run", "--reset")
        assert said.status == 0
        number = "1" if verb == "enable" else "0"
        assert said.out.splitlines() == [f"nvidia-smi -i {GPU} -mig {number}",
                                         f"nvidia-smi -i {GPU} --gpu-reset"]
        assert calls(here) == []
    fakesmi.write(here.tree.root, GPU, **ON, instances=TWO)
    assert here("mig", "destroy", GPU, "--dry-run").out.splitlines() == [
        f"nvidia-smi mig -i {GPU} -dci -ci 0 -gi 7", f"nvidia-smi mig -i {GPU} -dgi -gi 7",
        f"nvidia-smi mig -i {GPU} -dgi -gi 11"]
    assert here("mig", "create", GPU, "19,19", "--dry-run").out.splitlines() == [
        f"nvidia-smi mig -i {GPU} -cgi 19", f"nvidia-smi mig -i {GPU} -cci -gi INSTANCE"] * 2
    for words in (["create", GPU, "19"], ["destroy", GPU], ["disable", GPU]):
        fakesmi.write(here.tree.root, GPU, **ON, instances=TWO if words[0] == "destroy" else [])
        assert set(here("mig", *words, "--dry-run", "--json").data) == {"dry_run"}
    assert calls(here) == []


def test_no_nvidia_smi(host: Make) -> None:
    said = host(bare)("mig", "status")
    assert said.status == 1 and "there is no nvidia-smi on this host" in said.err


def test_a_gpu_that_nvidia_smi_does_not_show(smi: Smi) -> None:
    here = smi()
    fakesmi.write(here.tree.root, "0000:e0:00.0")
    refused(here, f"does not show {GPU}", "enable", GPU)
