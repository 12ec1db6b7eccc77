"""A booted guest while the checks look at it: its machine, the way into it, its GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from katagpu.boot import pci, vm
from katagpu.boot.channel import Channel, Line
from katagpu.boot.facts import Facts, Failed, Skipped
from katagpu.boot.gpu import Gpu
from katagpu.boot.pcifunction import Bar, Function
from katagpu.boot.qmp import Monitor
from katagpu.boot.vfiouser import Server
from katagpu.boot.vsocklink import Link

UNPLUG = 15.0  # seconds; PCI Express waits 5 for somebody to press the button again


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A function to plug in: what the guest has to see of it, and what QEMU is told.

    `bars` are bytes by number; a BAR that is not in it may be anything. `function` is what we serve
    over vfio-user; without it `properties` name a device of QEMU's own.
    """

    vendor: int
    device: int
    pci_class: int
    bars: Mapping[int, int]
    model: str | None = None
    function: Gpu | Function | None = None
    properties: Mapping[str, object] = field(default_factory=dict)


def of_function(function: Function, served: Gpu | Function, model: str | None = None) -> Offer:
    """The offer of a function that we serve."""
    return Offer(vendor=function.vendor, device=function.device,
                 pci_class=function.class_code >> 8, model=model, function=served,
                 bars={number: bar.size for number, bar in function.bars.items()})


def of_gpu(gpu: Gpu) -> Offer:
    """The offer of an emulated GPU."""
    return of_function(gpu.function, gpu, gpu.model)


def lesser(bar: int) -> Offer:
    """What stands for a GPU where QEMU has no vfio-user: its test device, with a BAR as large."""
    return Offer(vendor=0x1B36, device=0x0005, pci_class=0x00FF, bars={2: bar},
                 properties={"driver": "pci-testdev", "membar": bar})


_SMALL = Function(vendor=0x1B36, device=0x0005, class_code=0x058000, express=False,
                  bars={0: Bar(size=4096), 2: Bar(size=1 << 20)})
SMALL = of_function(_SMALL, _SMALL)
"""A conventional function with small BARs."""
SMALL_LESSER = lesser(1 << 20)


@dataclass(frozen=True, kw_only=True)
class Plugged:
    """A function that is in the machine: QEMU's name for it, its address in the guest."""

    name: str
    address: str
    offer: Offer


class Session:
    """What the checks of one machine share. Close it at the end.

    `helpers` are files that checks hand over to the guest, `patience` how many seconds anything may
    take that only needs time.
    """

    def __init__(self, facts: Facts, machine: vm.Machine, guest: Channel, monitor: Monitor, *,
                 link: Link, gpu: Offer, helpers: Mapping[str, Path],
                 patience: float = 60.0) -> None:
        self.facts = facts
        self.machine = machine
        self.guest = guest
        self.monitor = monitor
        self.link = link
        self.gpu = gpu
        self.helpers = helpers
        self.patience = patience
        self.hot_plug = machine.hot_plug
        self.directory = machine.directory
        self.gpus: list[Plugged] = []
        self.servers: dict[str, Server] = {}
        self.ready_at: float | None = None
        self.lost = ""  # why no check need wait for the driver any more
        self._stack = ExitStack()

    def keep(self, context: AbstractContextManager[Any]) -> None:
        """Enter a context until the session ends."""
        self._stack.enter_context(context)

    def close(self) -> None:
        """Leave all contexts, last first."""
        self._stack.close()

    def uptime(self) -> float:
        """Seconds since the guest's kernel started."""
        return float(self.guest.text("/proc/uptime").split()[0])

    def tail(self, count: int = 8) -> list[Line]:
        """The last lines of the kernel's log."""
        return self.guest.lines()[-count:]

    def grep(self, pattern: str) -> list[Line]:
        """The lines of the kernel's log in which a regular expression is found."""
        return [line for line in self.guest.lines() if re.search(pattern, line.text)]

    @property
    def no_driver(self) -> str | None:
        """Why no check of the driver has anything to look at; None: there is a driver to look at.
        """
        if self.gpu.function is None:
            return "the lesser check: no NVIDIA function is in the machine"
        return "this guest has no driver" if self.facts.driver is None else None

    def require_driver(self, *, working: bool = True) -> None:
        """Raises `Skipped` where there is no driver to look at, or, `working`, it does nothing."""
        why = self.no_driver or (self.lost if working else "")
        if why:
            raise Skipped(why)

    def first(self) -> Plugged:
        """The first GPU. Raises `Skipped` where none is in the guest."""
        if not self.gpus:
            raise Skipped("no GPU is in the guest, as another check says")
        return self.gpus[0]

    def cold(self) -> Plugged:
        """Find the GPU that the machine was started with."""
        found = [each for each in pci.functions(self.guest)
                 if (each.vendor, each.device) == (self.gpu.vendor, self.gpu.device)]
        if len(found) != 1:
            raise Failed(f"{len(found)} functions of this kind are on the guest's bus, and one is "
                         "in the machine", [*found, *self.grep(r"pci|PCI")],
                         cause="the kernel does not find functions below PCI Express root ports",
                         cure="kernel-configs: keep PCI_MMCONFIG and PCIEPORTBUS")
        self.gpus.append(Plugged(name="gpu0", address=found[0].address, offer=self.gpu))
        return self.gpus[0]

    def plug_gpu(self) -> Plugged:
        """Hot-plug one more GPU, on the next root port."""
        number = len(self.gpus)
        found = self._plug(f"gpu{number}", self.gpu, vm.port_name(number))
        self.gpus.append(found)
        return found

    def plug_small(self, bus: str) -> Plugged:
        """Hot-plug a function with small BARs on a conventional bus."""
        return self._plug("small0", SMALL if self.gpu.function else SMALL_LESSER, bus)

    def _plug(self, name: str, offer: Offer, bus: str) -> Plugged:
        before = {each.address for each in pci.functions(self.guest)}
        since = self.guest.mark()
        properties = offer.properties
        if offer.function is not None:
            server = Server(self.directory / name, offer.function)
            self.keep(server)
            self.servers[name] = server
            properties = served(server.path)
        self.monitor.command("device_add", id=name, bus=bus, **properties)
        new: list[pci.Function] = []

        def there() -> bool:
            new[:] = [each for each in pci.functions(self.guest) if each.address not in before]
            return bool(new)

        if not self.guest.until(there, self.patience / 3, step=0.2):
            raise Failed(f"the guest does not see what was plugged into {bus}",
                         self.guest.lines(since) or self.tail(),
                         cause="the kernel has no handler for hot-plug there",
                         cure="kernel-configs: keep HOTPLUG_PCI_PCIE and PCIEASPM, "
                              "HOTPLUG_PCI_ACPI, PCI_MMCONFIG")
        return Plugged(name=name, address=new[0].address, offer=offer)

    def unplug(self, plugged: Plugged) -> None:
        """Take a function out, and wait until the guest has let go of it."""
        since = self.guest.mark()
        self.monitor.command("device_del", id=plugged.name)

        def gone() -> bool:
            return all(each.address != plugged.address for each in pci.functions(self.guest))

        if not self.guest.until(gone, UNPLUG, step=0.3):
            raise Failed(f"{plugged.address} is still there {UNPLUG:.0f} s after it was to go",
                         self.guest.lines(since), cause="the driver does not let go of it, or the "
                         "kernel has no handler", cure="look at the kernel's log")
        if plugged in self.gpus:
            self.gpus.remove(plugged)


def served(path: Path) -> dict[str, object]:
    """QEMU's properties of a function that is served at a socket."""
    return {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(path)}}
