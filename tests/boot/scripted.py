"""A session whose guest is a table: what the checks are asked about is put into it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from katagpu.boot import kata
from katagpu.boot.accel import Accel, Kind
from katagpu.boot.channel import Channel
from katagpu.boot.facts import Facts
from katagpu.boot.gpu import Gpu
from katagpu.boot.qmp import Monitor
from katagpu.boot.session import Session, of_gpu
from katagpu.boot.vm import HotPlug, Machine
from katagpu.boot.vsocklink import Link
from katagpu.kataconfig import KataSettings, render_drop_in

from .fakeguest import FakeGuest, FakeMonitor

RELEASE = "6.12.117-nvidia-gpu"
DRIVER = "550.163.01"
GPU = Gpu()
OFFER = of_gpu(GPU)
UNSET = 0x20000000
Region = tuple[int, int, int]  # start, size, flags
SPEC = "/var/run/cdi/nvidia.yaml"


def gpu_regions(high: int = 0x380000000000, low: int = 0xFC000000) -> dict[int, Region]:
    """The GPU's BARs with addresses, and the flags that the kernel shows."""
    return {0: (low, 16 << 20, 0x40200), 1: (high, 32 << 30, 0x14220C),
            3: (high + (32 << 30), 32 << 20, 0x14220C)}


def shown(address: str, vendor: int, device: int, class_code: int, driver: str | None,
          regions: Mapping[int, Region]) -> str:
    """What sysfs has of a function, as grep and the shell print it."""
    rows = [f"{start:#018x} {start + size - 1:#018x} {flags:#018x}"
            for number in range(13)
            for start, size, flags in [regions.get(number, (0, 1, 0))]]
    lines = [f"{address}/vendor:{vendor:#06x}", f"{address}/device:{device:#06x}",
             f"{address}/class:{class_code:#08x}",
             *(f"{address}/resource:{row}" for row in rows)]
    if driver:
        lines.append(f"{address}/driver:../../../../bus/pci/drivers/{driver}")
    return "\n".join(lines) + "\n"


class Scripted:
    """A guest, its monitor, and the session of both. Close it at the end."""

    def __init__(self, place: Path, **facts: Any) -> None:
        self.guest = FakeGuest(place / "probe")
        self.qmp = FakeMonitor(place / "qmp")
        self.tables = self.guest.tables
        self.bus: dict[str, str] = {}
        self.tables.programs["cd /sys/bus/pci/devices"] = lambda _asked: "".join(self.bus.values())
        self.tables.files["/proc/uptime"] = "12.34 20.00\n"
        known = kata.read(render_drop_in(KataSettings(kernel="/k", image="/i")))
        self.machine = Machine(
            configuration=known, kernel=Path("/k"), root=Path("/r"), probe=Path("/p"),
            directory=place, accel=Accel(kind=Kind.TCG, why=""), hot_plug=HotPlug.NATIVE)
        (place / "built").write_text("CONFIG_A=y\nCONFIG_B=m\n")
        (place / "load").write_bytes(b"program")
        (place / "nvml").write_bytes(b"library")
        self.facts = Facts(release=RELEASE, build_id="ab" * 20, config=place / "built",
                           root_format="erofs", driver=DRIVER, flavour="open",
                           capabilities=("compute", "utility"), toolkit="cdi", agent=True)
        self.facts = replace(self.facts, **facts)
        self.link = Link(how="a test", cid=3, arguments=(), descriptors=(), attempt=self._attempt)
        self.agent: list[socket.socket] = []
        self.channel = Channel(place / "probe", lambda: None)
        self.channel.wait_ready(5)
        self.monitor = Monitor.connect(place / "qmp")
        self.session = Session(
            self.facts, self.machine, self.channel, self.monitor, link=self.link, gpu=OFFER,
            helpers={"load": place / "load", "libnvidia-ml.so.1": place / "nvml"}, patience=0.1)

    def _attempt(self, port: int, timeout: float) -> socket.socket:
        if port != 1024 or not self.agent:
            raise ConnectionResetError(f"nobody listens on {port} for {timeout:.0f} s")
        return self.agent.pop()

    def put(self, address: str = "0000:01:00.0", *, driver: str | None = "nvidia",
            vendor: int = 0x10DE, device: int = 0x20B7, class_code: int = 0x030200,
            regions: Mapping[int, Region] | None = None) -> None:
        """A function on the guest's bus; by itself the GPU, with all of its BARs."""
        self.bus[address] = shown(address, vendor, device, class_code, driver,
                                  gpu_regions() if regions is None else regions)

    def cold(self, **other: Any) -> None:
        """The GPU is there, and found."""
        self.put(**other)
        self.session.cold()

    def plugs(self, address: str, *words: str, **other: Any) -> None:
        """QEMU plugs in what comes next: a function is there, and the kernel says `words`."""
        def add(_words: Mapping[str, Any]) -> None:
            self.put(address, **other)
            for word in words:
                self.guest.log(word)

        self.qmp.done["device_add"] = add

    def unplugs(self, address: str, *words: str, level: int = 6) -> None:
        """QEMU takes a function out."""
        def remove(_words: Mapping[str, Any]) -> None:
            for word in words:
                self.guest.log(word, level=level)
            self.bus.pop(address, None)

        self.qmp.done["device_del"] = remove

    def says(self, *texts: str, level: int = 6, kernel: bool = True) -> None:
        """Lines of the kernel's log, which have come when this returns."""
        wanted = self.channel.mark() + len(texts)
        for text in texts:
            self.guest.log(text, level=level, kernel=kernel)
        assert self.channel.until(lambda: self.channel.mark() >= wanted, 5, step=0.001)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for each in (self.guest, self.qmp, self.channel, self.monitor, self.session):
                stack.callback(each.close)
            for connection in self.agent:
                stack.callback(connection.close)
