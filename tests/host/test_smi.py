"""What nvidia-smi says, of several drivers: recorded (an H200), and as NVIDIA's guides print it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu.errors import UserError
from katagpu.host import smi
from katagpu.host.machine import Machine
from tests.hosttree import Tree

DATA = Path(__file__).parent / "data" / "smi"
Say = Callable[..., Machine]


@pytest.fixture
def say(tmp_path: Path) -> Say:
    """A host whose nvidia-smi says this, with this status."""
    def make(text: str, status: int = 0, *, where: str = "") -> Machine:
        tree = Tree(tmp_path / "root")
        tree.file("said", text)
        return Machine(tree.root, search=tree.programs(
            nvidia_smi=f"cat '{tree.root}/said' {where}; exit {status}"))

    return make


GPU = smi.Gpu(0, "0000:41:00.0", "NVIDIA A100", "550.54.16", True, True, [], [], "None")


def test_an_h200_of_driver_580(say: Say) -> None:
    (found,) = smi.gpus(say((DATA / "h200-580.xml").read_text()))
    assert found == smi.Gpu(index=0, address="0000:00:06.0", name="NVIDIA H200",
                            driver="580.159.04", current=False, pending=False, devices=[],
                            processes=[], virtualization="Pass-Through")
    assert not found.waits


def test_its_profiles(say: Say) -> None:
    found = smi.profiles(say((DATA / "h200-580-lgip.txt").read_text()), GPU)
    assert [(one.name, one.number, one.free, one.total, one.memory) for one in found] == [
        ("1g.18gb", 19, 7, 7, 16.0), ("1g.18gb+me", 20, 1, 1, 16.0), ("1g.35gb", 15, 4, 4, 32.5),
        ("2g.35gb", 14, 3, 3, 32.5), ("3g.71gb", 9, 2, 2, 69.75), ("4g.71gb", 5, 1, 1, 69.75),
        ("7g.141gb", 0, 1, 1, 140.0)]


GUIDE = """\
+-----------------------------------------------------------------------------+
| GPU instance profiles:                                                      |
| GPU   Name             ID    Instances   Memory     P2P    SM    DEC   ENC  |
|                              Free/Total   GiB              CE    JPEG  OFA  |
|=============================================================================|
|   0  MIG 1g.10gb       19     7/7        9.50       No     14     0     0   |
|                                                             1     0     0   |
+-----------------------------------------------------------------------------+
|   0  MIG 1g.10gb+me    20     1/1        9.50       No     14     1     0   |
|                                                             1     1     1   |
+-----------------------------------------------------------------------------+
"""


@pytest.mark.parametrize(("text", "rows"), [
    (GUIDE, [("1g.10gb", 19, 7), ("1g.10gb+me", 20, 1)]),
    # Driver 450, narrower; a comma for a point, from a locale that was not asked for.
    ("| GPU   Name          ID |\n|=====|\n|   0  MIG 7g.40gb     0     1/1        39,50      No  "
     "   98     5     0   |\n", [("7g.40gb", 0, 1)]),
    ("|  12  MIG 1g.24gb-me  65     0/4       23.62       No     46     1     1   |\n",
     [("1g.24gb-me", 65, 0)])])
def test_profiles_of_other_drivers(say: Say, text: str, rows: list[tuple[str, int, int]]) -> None:
    found = smi.profiles(say(text), GPU)
    assert [(one.name, one.number, one.free) for one in found] == rows


def test_instances(say: Say) -> None:
    text = """\
+-------------------------------------------------------+
| GPU instances:                                        |
| GPU   Name             Profile  Instance   Placement  |
|                          ID       ID       Start:Size |
|=======================================================|
|   0  MIG 1g.5gb          19       13          6:1     |
+-------------------------------------------------------+
|   0  MIG 3g.20gb          9        1          0:4     |
+-------------------------------------------------------+
"""
    assert smi.instances(say(text), GPU) == [
        smi.Instance(0, "1g.5gb", 19, 13, 6, 1), smi.Instance(0, "3g.20gb", 9, 1, 0, 4)]


def test_compute_instances(say: Say) -> None:
    text = """\
+--------------------------------------------------------------------+
| Compute instances:                                                 |
| GPU     GPU       Name             Profile   Instance   Placement  |
|       Instance                       ID        ID       Start:Size |
|         ID                                                         |
|====================================================================|
|   0      1       MIG 1c.3g.20gb       0         0          0:1     |
|   0      5       MIG 3g.20gb          2         1          0:3     |
+--------------------------------------------------------------------+
"""
    assert smi.computes(say(text), GPU) == [
        smi.Compute(0, 1, "1c.3g.20gb", 0, 0), smi.Compute(0, 5, "3g.20gb", 2, 1)]


@pytest.mark.parametrize(("text", "status"), [
    ("No MIG-enabled devices found.\n", 0), ("No GPU instances found: Not Found\n", 6),
    ("No MIG-supported devices found.\n", 6)])
def test_that_there_is_none_is_an_answer(say: Say, text: str, status: int) -> None:
    assert smi.instances(say(text, status), GPU) == []


@pytest.mark.parametrize("text", [
    "", "Keine MIG-Geräte gefunden.\n", "| GPU instances: |\n|  0  MIG 1g.5gb  19  |\n",
    "|   0  MIG 1g.5gb          19       13          6:1     |\n|   0  MIG new row |\n"])
def test_a_table_of_another_form_is_not_taken_for_empty(say: Say, text: str) -> None:
    with pytest.raises(UserError, match="form that is not known"):
        smi.instances(say(text), GPU)


MODES = ("<nvidia_smi_log><gpu id='00000000:41:00.0'><mig_mode><current_mig>{}</current_mig>"
         "<pending_mig>{}</pending_mig></mig_mode><mig_devices><mig_device><gpu_instance_id>9"
         "</gpu_instance_id><compute_instance_id>0</compute_instance_id></mig_device></mig_devices>"
         "</gpu></nvidia_smi_log>")


@pytest.mark.parametrize(("current", "pending", "wanted", "waits"), [
    ("Enabled", "Enabled", True, False), ("Disabled", "Enabled", False, True),
    ("N/A", "N/A", None, False), ("[N/A]", "", None, False), ("enabled", "disabled", True, True)])
def test_modes(say: Say, current: str, pending: str, wanted: bool | None, waits: bool) -> None:
    (found,) = smi.gpus(say(MODES.format(current, pending)))
    assert (found.current, found.waits) == (wanted, waits)
    assert found.devices == [(9, 0)]


def test_a_mode_in_another_language_is_not_off(say: Say) -> None:
    with pytest.raises(UserError, match="'Aktiviert', which is not known"):
        smi.gpus(say(MODES.format("Aktiviert", "Aktiviert")))


@pytest.mark.parametrize(("text", "word"), [
    ("", "in no XML"), ("Fri Nov 27 2026\n+---+\n", "it begins: Fri Nov 27"),
    ("<nvidia_smi_log><gpu>", "in no XML"), ("<html></html>", "<html>, which is not known")])
def test_answers_that_are_none(say: Say, text: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        smi.gpus(say(text))


@pytest.mark.parametrize(("text", "status", "cure"), [
    ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.163",
     18, "the driver was renewed"),
    ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "
     "the latest NVIDIA driver is installed and running.", 9, "modprobe nvidia"),
    ("No devices were found", 6, "no GPU is bound"),
    ("Unable to enable MIG Mode for GPU 00000000:41:00.0: Insufficient Permissions", 4, "sudo"),
    ("Unable to determine the device handle for GPU0000:41:00.0: GPU is lost.  Reboot the system",
     15, "reboot")])
def test_failures_have_their_cure(say: Say, text: str, status: int, cure: str) -> None:
    with pytest.raises(UserError) as caught:
        smi.gpus(say(text, status, where=">&2" if status % 2 else ""))
    assert text.splitlines()[0] in caught.value.what
    assert f"status {status}" in caught.value.what
    assert cure in str(caught.value.hint)


def test_it_is_not_there(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "root")
    with pytest.raises(UserError, match="no nvidia-smi on this host") as caught:
        smi.gpus(Machine(tree.root, search=tree.programs()))
    assert "driver on the host" in str(caught.value.hint)


def test_it_hangs_and_is_killed_with_its_children(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smi, "TIMEOUT", 0.5)
    tree = Tree(tmp_path / "root")
    machine = Machine(tree.root, search=tree.programs(
        nvidia_smi=f"sleep 300 & echo $! > {tree.root}/child; trap '' TERM; wait"))
    started = time.monotonic()
    with pytest.raises(UserError, match="did not end within"):
        smi.gpus(machine)
    assert time.monotonic() - started < 20
    child = int((tree.root / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")
