"""Checks of the emulated GPUs, on a guest of words."""

from __future__ import annotations

import errno
import gzip
from collections.abc import Callable
from typing import Any

import pytest

from katagpu import provenance
from katagpu.boot import gpus, session
from katagpu.boot.channel import Channel
from katagpu.boot.facts import Failed, Skipped
from katagpu.boot.session import Session
from katagpu.boot.vm import HotPlug

from .scripted import DRIVER, RELEASE, UNSET, Scripted, gpu_regions
from .test_system import failed

Make = Callable[..., Scripted]
FIRST, SECOND = "0000:01:00.0", "0000:02:00.0"
INFORMATION = f"/proc/driver/nvidia/gpus/{FIRST}/information"
A30 = "Model: \t\t NVIDIA A30\nIRQ:   \t\t 0\nBus Location: \t 0000:01:00.0\n"
LINES = {number: f"BAR{number} {text}" for number, text in {
    0: "16 MiB at 0xfc000000", 1: "64-bit 32 GiB at 0x380000000000",
    3: "64-bit 32 MiB at 0x380800000000"}.items()}
LOADED = {f"/sys/module/{name}/refcnt" for name in ("nvidia", "nvidia_uvm")}
PCIEHP = "pcieport 0000:00:04.0: pciehp: Slot(1): Card present"
SEARCHED = "nvidia 0000:01:00.0: Direct firmware load for nvidia/550.163.01/gsp_tu10x.bin failed"
OTHER = "platform regulatory.0: Direct firmware load for regulatory.db failed with error -2"
NO_ROM = "NVRM: GPU 0000:01:00.0: RmInitAdapter failed! (0x62:0x25:1792)"
NO_FIRMWARE = "NVRM: GPU 0000:01:00.0: RmInitAdapter failed! (0x61:0x56:1705)"
NO_BIOS = "NVRM: GPU 0000:01:00.0: RmInitAdapter failed! (0x30:0xffff:1098)"


@pytest.fixture
def made(scripted: Make) -> Scripted:
    """A guest with the GPU that was there at the start."""
    found = scripted()
    found.cold()
    return found


def test_cold(scripted: Make) -> None:
    found = scripted()
    found.put("0000:00:01.0", vendor=0x8086, device=0x2922, class_code=0x010601, driver="ahci",
              regions={5: (0xFEBD5000, 4096, 0x40200)})
    failed(gpus.cold, found.session, "0 functions of this kind")
    found.put()
    assert gpus.cold(found.session) == [f"{FIRST} 10de:20b7 class 0302, driver nvidia"]
    assert [each.address for each in found.session.gpus] == [FIRST]


def test_two_where_one_is_in_the_machine(scripted: Make) -> None:
    found = scripted()
    found.put()
    found.put(SECOND)
    assert len(failed(gpus.cold, found.session, "2 functions").lines) == 2


def test_another_class(scripted: Make) -> None:
    found = scripted()
    found.put(class_code=0x030000)
    assert "class 0300" in failed(gpus.cold, found.session, "shows itself as").lines[0]


def test_addresses(made: Scripted) -> None:
    assert gpus.cold_addresses(made.session) == [LINES[0], LINES[1], LINES[3]]


@pytest.mark.parametrize(("change", "words"), [
    ({0: (0, 16 << 20, 0x40200)}, "not all have addresses"),
    ({1: (0, 32 << 30, 0x14220C | UNSET)}, "not all have addresses"),
    ({1: (0x1000, 32 << 30, 0x14220C | UNSET)}, "not all have addresses"),
    ({3: (0, 1, 0)}, "not all have addresses"),
    ({1: (0x380000000000, 16 << 30, 0x14220C)}, "the BARs are"),
    ({1: (0x40000000, 32 << 30, 0x14220C)}, "cannot lie below 4 GiB")])
def test_addresses_that_are_wrong(
    made: Scripted, change: dict[int, tuple[int, int, int]], words: str,
) -> None:
    made.put(regions=gpu_regions() | change)
    assert failed(gpus.cold_addresses, made.session, words).lines


def test_a_gpu_that_is_gone(made: Scripted) -> None:
    made.bus.clear()
    made.says("pcieport 0000:00:04.0: pciehp: Slot(1): Link Down")
    assert "Link Down" in failed(gpus.cold_addresses, made.session, f"{FIRST} is gone").lines[0]


@pytest.mark.parametrize("check", [gpus.cold_addresses, gpus.cold_bound, gpus.cold_model,
                                   gpus.hot_addresses, gpus.hot_bound, gpus.second, gpus.unplug])
def test_without_a_gpu_there_is_nothing_to_look_at(
    scripted: Make, check: Callable[[Session], list[str]],
) -> None:
    """Another check has failed then; this one asks QEMU for nothing."""
    found = scripted()
    with pytest.raises(Skipped, match="no GPU is in the guest"):
        check(found.session)
    assert [name for name, _words in found.qmp.asked] == ["qmp_capabilities"]


@pytest.mark.parametrize("check", [gpus.modules, gpus.vermagic, gpus.nodes, gpus.firmware])
def test_without_a_driver(scripted: Make, check: Callable[[Session], list[str]]) -> None:
    with pytest.raises(Skipped, match="no driver"):
        check(scripted(driver=None).session)


def test_modules(made: Scripted) -> None:
    made.tables.exists |= LOADED
    made.tables.files |= {f"/sys/module/{name}/version": f"{DRIVER}\n"
                          for name in ("nvidia", "nvidia_uvm")}
    assert gpus.modules(made.session) == [f"nvidia {DRIVER}", f"nvidia_uvm {DRIVER}"]
    made.tables.files["/sys/module/nvidia/version"] = "535.1\n"
    failed(gpus.modules, made.session, f"is of driver 535.1, the guest's is {DRIVER}")


def test_modules_that_do_not_load(scripted: Make) -> None:
    found = scripted(capabilities=("compute", "graphics"), extension="/run/x")
    found.tables.exists |= LOADED
    found.says("nvidia: disagrees about version of symbol module_layout")
    found.tables.programs["modprobe"] = (1, "", "modprobe: FATAL: Invalid argument\n")
    lines = failed(gpus.modules, found.session, r"not loaded: nvidia_modeset, nvidia_drm$").lines
    assert lines[0].startswith("modprobe: FATAL") and "disagrees" in lines[1]
    assert "modprobe --verbose --dirname /run/x nvidia" in found.guest.ran()


def test_vermagic(made: Scripted) -> None:
    made.tables.programs["modinfo"] = f"{RELEASE} SMP preempt mod_unload \n"
    assert gpus.vermagic(made.session) == [
        f"{name}: {RELEASE} SMP preempt mod_unload" for name in ("nvidia", "nvidia-uvm")]
    made.tables.programs["modinfo"] = "6.12.117 SMP mod_unload\n"
    failed(gpus.vermagic, made.session, "nvidia has the version magic '6.12.117 SMP")
    made.tables.programs["modinfo"] = (1, "", "modinfo: ERROR: Module nvidia not found.\n")
    assert failed(gpus.vermagic, made.session, "magic 'none'").lines == [
        "modinfo: ERROR: Module nvidia not found."]


def test_compiled_against(made: Scripted) -> None:
    files, place = made.tables.files, f"/lib/modules/{RELEASE}/driver-headers"
    with pytest.raises(Skipped, match="IKCONFIG"):
        gpus.compiled_against(made.session)
    files["/proc/config.gz"] = gzip.compress(b'# Linux\nCONFIG_B=y\nCONFIG_A="x"\n')
    digest = provenance.settings("CONFIG_A=x\nCONFIG_B=y\n")
    files[place] = f"{digest}  settings\n{'0' * 64}  Module.symvers\n"
    assert gpus.compiled_against(made.session) == [f"settings {digest}"]
    files[place] = f"{'1' * 64}  settings\n"
    assert "1" * 64 in failed(gpus.compiled_against, made.session, "another config").lines[0]
    files[place] = errno.ENOENT
    assert "nobody knows" in failed(gpus.compiled_against, made.session, "another").lines[0]


@pytest.mark.parametrize(("loaded", "named", "files", "passes"), [
    (False, 1, "", True), (True, 1, "", False), (False, 0, "", False),
    (False, 1, "/lib/modules/6.12/kernel/drivers/gpu/drm/nouveau/nouveau.ko.xz\n", False)])
def test_nouveau(made: Scripted, loaded: bool, named: int, files: str, passes: bool) -> None:
    made.tables.exists |= {"/sys/module/nouveau"} if loaded else set()
    made.tables.programs |= {
        "--show-depends nouveau": (named, "", "modprobe: FATAL: Module nouveau not found"),
        "find /lib/modules": files}
    if passes:
        assert gpus.nouveau(made.session)
    else:
        failed(gpus.nouveau, made.session, "nouveau is in this guest")


@pytest.mark.parametrize(("line", "cause"), [
    ("NVRM: The NVIDIA GPU 0000:01:00.0 (PCI ID: 10de:20b7) installed in this system has fallen "
     "off the bus and is not responding to commands.", "read as ones"),
    ("NVRM: The NVIDIA GPU 0000:01:00.0 (PCI ID: 10de:20b7) is not supported by the NVIDIA "
     "550.163.01 driver release.", "does not know the GPU"),
    ("NVRM: This PCI I/O region assigned to your NVIDIA device is invalid: BAR0 is 0M @ 0x0",
     "no address"),
    ("nvidia: Unknown symbol drm_gem_open (err -2)", "another kernel"),
    ("something else", "not loaded")])
def test_a_gpu_that_the_driver_does_not_take(made: Scripted, line: str, cause: str) -> None:
    assert gpus.cold_bound(made.session)[0].endswith("driver nvidia")
    made.put(driver=None)
    made.says(line)
    refusal = failed(gpus.cold_bound, made.session, "no driver: nvidia.ko did not take it")
    assert cause in refusal.cause
    assert line == "something else" or refusal.lines


def test_model(made: Scripted) -> None:
    made.tables.files[INFORMATION] = A30
    assert gpus.cold_model(made.session) == ["Model: NVIDIA A30", "Bus Location: \t 0000:01:00.0"]
    made.tables.files[INFORMATION] = A30.replace("NVIDIA A30", "Unknown")
    assert failed(gpus.cold_model, made.session, "calls it 'Unknown', not 'NVIDIA A30'").lines
    made.tables.files[INFORMATION] = errno.ENOENT
    failed(gpus.cold_model, made.session, f"does not know {FIRST}")


def test_nodes(made: Scripted) -> None:
    listed = "crw-rw-rw- 1 root root 195, 255 /dev/nvidiactl\n"
    made.tables.programs |= {"test -c": "", "ls -l /dev/nvidia": listed}
    assert gpus.nodes(made.session) == [listed.strip()]
    made.tables.opens["/dev/nvidia-uvm"] = errno.ENXIO
    assert failed(gpus.nodes, made.session, "cannot be opened").lines
    made.tables.programs["test -c"] = (1, "", "")
    assert failed(gpus.nodes, made.session, "are missing").lines


@pytest.mark.parametrize(("flavour", "said", "words"), [
    ("open", [OTHER, NO_ROM], None), ("closed", [NO_BIOS], None), ("closed", [NO_ROM], None),
    ("open", [SEARCHED, NO_FIRMWARE], "does not find its GSP firmware"),
    ("open", [NO_FIRMWARE], "does not find its GSP firmware"),
    ("closed", [SEARCHED, NO_BIOS], "does not find its GSP firmware"),
    ("open", [NO_BIOS], "elsewhere than behind the firmware")])
def test_firmware(scripted: Make, flavour: str, said: list[str], words: str | None) -> None:
    found = scripted(flavour=flavour)
    found.tables.opens["/dev/nvidia0"] = errno.EIO
    found.says("NVRM: loading NVIDIA UNIX Open Kernel Module", *said)
    if words is None:
        assert said[-1] in gpus.firmware(found.session)[-1]
    else:
        assert failed(gpus.firmware, found.session, words).lines


def test_a_gpu_without_a_rom_that_opens(scripted: Make) -> None:
    failed(gpus.firmware, scripted().session, "gave 0 and no word")


def test_an_open_that_says_nothing(scripted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found, wait = scripted(), Channel.wait_line
    monkeypatch.setattr(Channel, "wait_line", lambda self, pattern, timeout: wait(
        self, pattern, timeout=timeout / 100))
    found.tables.opens["/dev/nvidia0"] = errno.ENXIO
    failed(gpus.firmware, found.session, "gave ENXIO and no word")


def test_none_yet(scripted: Make) -> None:
    found = scripted()
    assert gpus.none_yet(found.session)
    found.tables.exists |= LOADED
    assert failed(gpus.none_yet, found.session, "no GPU is there").lines == ["nvidia", "nvidia_uvm"]


def test_hot_plug(scripted: Make) -> None:
    found = scripted()
    found.plugs(FIRST, PCIEHP)
    assert gpus.hot_plug(found.session) == [
        f"{FIRST} 10de:20b7 class 0302, driver nvidia", f"[    0.001] {PCIEHP}"]
    name, words = found.qmp.asked[-1]
    assert name == "device_add" and words == {
        "id": "gpu0", "bus": "rp0", "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": str(found.session.directory / "gpu0")}}
    assert (found.session.directory / "gpu0").is_socket()
    assert gpus.hot_addresses(found.session)
    found.tables.files[INFORMATION] = A30
    assert "Model: NVIDIA A30" in gpus.hot_bound(found.session)


def test_hot_plug_by_another_handler(scripted: Make) -> None:
    found = scripted()
    found.plugs(FIRST, "acpiphp: Slot [0] registered")
    assert "acpiphp" in failed(gpus.hot_plug, found.session, "pciehp had no part").lines[0]


def test_a_guest_that_does_not_see_what_is_plugged_in(scripted: Make) -> None:
    found = scripted()
    refusal = failed(gpus.hot_plug, found.session, "does not see what was plugged into rp0")
    assert "HOTPLUG_PCI_PCIE" in refusal.cure and found.session.gpus == []


@pytest.mark.parametrize(("high", "words"), [
    (0x390000000000, None), (0x380000000000, "overlap"), (0x380700000000, "overlap")])
def test_a_second(made: Scripted, high: int, words: str | None) -> None:
    made.plugs(SECOND, regions=gpu_regions(high, 0xFD000000))
    made.tables.files[INFORMATION.replace(FIRST, SECOND)] = A30
    if words is None:
        assert f"{SECOND} 10de:20b7 class 0302, driver nvidia" in gpus.second(made.session)
    else:
        assert len(failed(gpus.second, made.session, words).lines) == 2
    assert dict(made.qmp.asked[-1][1])["bus"] == "rp1"


def test_unplug(made: Scripted) -> None:
    made.unplugs(FIRST, "pcieport 0000:00:04.0: pciehp: Slot(1): Button press")
    said = gpus.unplug(made.session)
    assert said[0] == f"{FIRST} is gone" and "Button press" in said[1]
    assert made.qmp.asked[-1] == ("device_del", {"id": "gpu0"}) and made.session.gpus == []


def test_unplug_with_errors(made: Scripted) -> None:
    made.unplugs(FIRST, "nvidia 0000:01:00.0: not ready after 65535ms", level=3)
    assert failed(gpus.unplug, made.session, "reports errors").lines


def test_a_gpu_that_does_not_go(made: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "UNPLUG", 0.2)
    failed(gpus.unplug, made.session, f"{FIRST} is still there")
    assert made.session.gpus, "it is there for who comes after"


def test_small_hot_plug(scripted: Make) -> None:
    found, place = scripted(), "0000:03:01.0"
    with pytest.raises(Skipped):
        gpus.small_hot_plug(found.session)
    found.session.hot_plug = HotPlug.ACPI
    small: dict[str, Any] = {"vendor": 0x1B36, "device": 5, "class_code": 0x058000, "driver": None}
    found.plugs(place, regions={0: (0xFD000000, 4096, 0x40200),
                                2: (0xFD100000, 1 << 20, 0x40200)}, **small)
    found.unplugs(place)
    assert gpus.small_hot_plug(found.session)[0] == f"{place} came and went"
    assert [name for name, _words in found.qmp.asked[-2:]] == ["device_add", "device_del"]
    assert found.qmp.asked[-2][1]["bus"] == "pci-bridge-0"


def test_a_small_function_without_addresses(scripted: Make) -> None:
    found = scripted()
    found.session.hot_plug = HotPlug.ACPI
    found.plugs("0000:03:01.0", vendor=0x1B36, device=5, class_code=0x058000,
                regions={0: (0, 4096, 0x40200), 2: (0, 1 << 20, 0x40200)})
    with pytest.raises(Failed, match="not all have addresses"):
        gpus.small_hot_plug(found.session)
