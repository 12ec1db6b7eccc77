"""The emulated functions in a real QEMU, seen through QMP after SeaBIOS has given addresses."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu.boot.gpu import Gpu, physical_bits, root_port
from katagpu.boot.pcifunction import GIB, KIB, MIB, Bar, Function
from katagpu.boot.vfiouser import Server
from tests.machines import NEEDS_QEMU, QEMU

from .client import wait_for

pytestmark = list(NEEDS_QEMU)

GPU_BARS = {0: (16 * MIB, False, False), 1: (32 * GIB, True, True), 3: (32 * MIB, True, True)}
PLAIN = Function(vendor=0x1B36, device=5, class_code=0xFF0000, express=False,
                 bars={0: Bar(size=4 * KIB), 2: Bar(size=MIB, wide=True, prefetchable=True)})


class Machine:
    """A running QEMU, by QMP."""

    def __init__(self, path: Path, log: Path) -> None:
        self._log = log
        with contextlib.ExitStack() as stack:
            self._sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            self._sock.settimeout(60)
            self._sock.connect(str(path))
            stack.pop_all()
        self._lines = self._sock.makefile("rwb")
        assert b"QMP" in self._lines.readline()
        self.ask("qmp_capabilities")

    def wait_for_firmware(self) -> None:
        """SeaBIOS has given all addresses, and found nothing to boot."""
        wait_for(lambda: b"No bootable device" in self._log.read_bytes(), 60)

    def close(self) -> None:
        self._lines.close()
        self._sock.close()

    def ask(self, command: str, **arguments: Any) -> Any:
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}).encode())
        self._lines.flush()
        while True:
            said = json.loads(self._lines.readline())
            if "event" not in said:
                assert "return" in said, f"{command}: {said}"
                return said["return"]

    def function(self, name: str) -> dict[str, Any]:
        """What `query-pci` says of a device, wherever it is."""
        waiting = [device for bus in self.ask("query-pci") for device in bus["devices"]]
        while waiting:
            device = waiting.pop()
            if device["qdev_id"] == name:
                return dict(device)
            waiting += device.get("pci_bridge", {}).get("devices", [])
        raise AssertionError(f"no device {name}")

    def bars(self, name: str) -> dict[int, tuple[int, bool, bool]]:
        """Size, prefetchable and 64-bit of each BAR."""
        return {bar["bar"]: (bar["size"], bar["prefetch"], bar["mem_type_64"])
                for bar in self.function(name)["regions"]}

    def addresses(self, name: str) -> dict[int, int]:
        """Where firmware put each BAR; -1 is nowhere."""
        return {bar["bar"]: bar["address"] for bar in self.function(name)["regions"]}


def plug(name: str, bus: str, server: Server, **more: str) -> dict[str, Any]:
    return {"driver": "vfio-user-pci", "id": name, "bus": bus,
            "socket": {"type": "unix", "path": str(server.path)}, **more}


@contextlib.contextmanager
def machine(place: Path, *argv: str, bits: int = 40) -> Iterator[Machine]:
    """A machine without disk and kernel: SeaBIOS, and then nothing."""
    log = place / "qemu.log"
    base = ["-nodefaults", "-no-user-config", "-display", "none", "-M", "q35", "-m", "128",
            "-accel", "tcg", "-cpu", f"max,phys-bits={bits}",
            "-chardev", f"file,id=firmware,path={place}/firmware.log",
            "-device", "isa-debugcon,iobase=0x402,chardev=firmware",  # where SeaBIOS logs to
            "-qmp", f"unix:{place}/qmp,server=on,wait=off"]
    with log.open("wb") as out, subprocess.Popen(
            [*shlex.split(QEMU), *base, *argv], stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT) as qemu:
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    found = Machine(place / "qmp", place / "firmware.log")
                    break
                time.sleep(0.02)
                assert qemu.poll() is None and time.monotonic() < end, log.read_text()
            with contextlib.closing(found):
                yield found
            assert qemu.poll() is None, log.read_text()
        finally:
            qemu.kill()


def port(name: str, slot: int, options: str = "") -> list[str]:
    return ["-device", f"pcie-root-port,id={name},bus=pcie.0,chassis={slot},slot={slot}{options}"]


@pytest.mark.parametrize("gpu", [Gpu(), Gpu(msix=True)], ids=["msi", "msix"])
def test_a_cold_plugged_gpu(tmp_path: Path, gpu: Gpu) -> None:
    with Server(tmp_path / "gpu", gpu) as server:
        with machine(tmp_path, *port("rp0", 1),
                     "-device", json.dumps(plug("gpu0", "rp0", server))) as qemu:
            qemu.wait_for_firmware()
            seen = qemu.function("gpu0")
            assert (seen["id"]["vendor"], seen["id"]["device"]) == (0x10DE, 0x20B7)
            assert seen["class_info"]["class"] == 0x0302
            assert qemu.bars("gpu0") == GPU_BARS
            assert server.device.decodes_memory
            places = qemu.addresses("gpu0")
            assert places == server.device.addresses()
            assert places[0] < 4 * GIB < places[1] and places[1] % (32 * GIB) == 0
        wait_for(lambda: server.events[-1] == "the client went")


def test_two_gpus_plugged_into_a_running_machine(tmp_path: Path) -> None:
    large = Gpu(device=0x2335, bar1=256 * GIB)
    reserves = [root_port(gpu.function) for gpu in (Gpu(), large)]
    with Server(tmp_path / "a", Gpu()) as one, Server(tmp_path / "b", large) as two, \
            machine(tmp_path, *port("rp0", 1, f",{reserves[0].options}"),
                    *port("rp1", 2, f",{reserves[1].options}"),
                    bits=physical_bits(reserves)) as qemu:
        qemu.wait_for_firmware()
        qemu.ask("device_add", **plug("gpu0", "rp0", one))
        qemu.ask("device_add", **plug("gpu1", "rp1", two))
        assert qemu.bars("gpu0") == GPU_BARS
        assert qemu.bars("gpu1") == {
            0: (16 * MIB, True, True), 2: (256 * GIB, True, True), 4: (32 * MIB, True, True)}
        assert qemu.function("gpu1")["id"]["device"] == 0x2335
        assert qemu.addresses("gpu0") == {0: -1, 1: -1, 3: -1}, "no system is there to give any"


def test_a_conventional_function_on_a_bridge(tmp_path: Path) -> None:
    with Server(tmp_path / "plain", PLAIN) as cold, Server(tmp_path / "hot", PLAIN) as hot, \
            machine(tmp_path, "-device", "pci-bridge,id=br0,bus=pcie.0,chassis_nr=9",
                    "-device", json.dumps(plug("cold", "br0", cold, addr="0x1"))) as qemu:
        qemu.wait_for_firmware()
        assert cold.device.decodes_memory and all(cold.device.addresses().values())
        assert qemu.addresses("cold") == cold.device.addresses()
        qemu.ask("device_add", **plug("hot", "br0", hot, addr="0x2"))
        for name in ("cold", "hot"):
            assert qemu.bars(name) == {0: (4 * KIB, False, False), 2: (MIB, True, True)}
