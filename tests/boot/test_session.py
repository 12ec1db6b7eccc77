"""What the checks of one machine share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from katagpu.boot import session
from katagpu.boot.facts import Skipped
from katagpu.boot.gpu import Gpu
from katagpu.boot.qmp import Refused
from katagpu.boot.session import SMALL, SMALL_LESSER, Offer, Plugged, lesser, of_gpu

from .scripted import OFFER, Scripted, gpu_regions

Make = Callable[..., Scripted]
GIB = 1 << 30


def test_offers() -> None:
    gpu = Gpu(device=0x2335, bar1=256 * GIB)
    assert of_gpu(gpu) == Offer(
        vendor=0x10DE, device=0x2335, pci_class=0x0302, model="NVIDIA H200", function=gpu,
        bars={0: 16 << 20, 2: 256 * GIB, 4: 32 << 20})
    assert (SMALL.function is not None, SMALL.bars) == (True, {0: 4096, 2: 1 << 20})
    assert lesser(32 * GIB).properties == {"driver": "pci-testdev", "membar": 32 * GIB}
    assert (SMALL_LESSER.function, SMALL_LESSER.bars) == (None, {2: 1 << 20})


def test_gpus_go_to_the_next_root_port(scripted: Make) -> None:
    found = scripted()
    found.plugs("0000:01:00.0")
    first = found.session.plug_gpu()
    found.plugs("0000:02:00.0", regions=gpu_regions(1 << 44))
    second = found.session.plug_gpu()
    assert (first, second) == tuple(
        Plugged(name=f"gpu{number}", address=f"0000:0{number + 1}:00.0", offer=OFFER)
        for number in (0, 1))
    asked = [words for name, words in found.qmp.asked if name == "device_add"]
    assert [(words["id"], words["bus"]) for words in asked] == [("gpu0", "rp0"), ("gpu1", "rp1")]
    assert found.session.gpus == [first, second] and found.session.first() == first
    found.unplugs("0000:01:00.0")
    found.session.unplug(first)
    assert found.session.gpus == [second]
    assert {name: server.path.is_socket() for name, server in found.session.servers.items()} == {
        "gpu0": True, "gpu1": True}
    found.session.close()
    assert not any(server.path.exists() for server in found.session.servers.values())


def test_the_lesser_check(scripted: Make) -> None:
    """QEMU's own device, nothing is served, and no check of the driver has anything to say."""
    found = scripted()
    found.session.gpu = lesser(32 * GIB)
    found.plugs("0000:01:00.0", vendor=0x1B36, device=5, class_code=0x00FF00, driver=None)
    found.session.plug_gpu()
    assert found.qmp.asked[-1][1] == {
        "id": "gpu0", "bus": "rp0", "driver": "pci-testdev", "membar": 32 * GIB}
    with pytest.raises(Skipped, match="lesser"):
        found.session.require_driver()
    found.plugs("0000:03:01.0", vendor=0x1B36, device=5, class_code=0x00FF00, driver=None)
    found.session.plug_small("pci-bridge-0")
    assert found.qmp.asked[-1][1]["membar"] == 1 << 20
    assert found.session.servers == {}


def test_why_there_is_no_driver(scripted: Make) -> None:
    found = scripted()
    assert found.session.no_driver is None
    found.session.require_driver()


def test_qemu_refuses(scripted: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    found = scripted()
    monkeypatch.setattr(found.qmp, "take", lambda asked: found.qmp.say(
        id=asked["id"], error={"class": "GenericError", "desc": "Duplicate device ID 'gpu0'"}))
    with pytest.raises(Refused, match="device_add: Duplicate device ID"):
        found.session.plug_gpu()
    assert found.session.gpus == []


def test_the_kernel_s_log(scripted: Make) -> None:
    found = scripted()
    found.says(*(f"line {number}" for number in range(20)))
    assert [line.text for line in found.session.tail(2)] == ["line 18", "line 19"]
    assert len(found.session.tail()) == 8
    assert [line.text for line in found.session.grep("line 1$|5")] == [
        "line 1", "line 5", "line 15"]


def test_contexts_are_left_last_first(scripted: Make) -> None:
    left: list[int] = []

    @contextlib.contextmanager
    def context(number: int) -> Iterator[None]:
        yield
        left.append(number)

    found = scripted()
    for number in (1, 2):
        found.session.keep(context(number))
    found.session.close()
    found.session.close()
    assert left == [2, 1]


def test_a_socket_for_qemu(scripted: Make) -> None:
    path = scripted().session.directory / "gpu0"
    assert session.served(path) == {
        "driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(path)}}
