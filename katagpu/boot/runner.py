"""Runs the checks: boots the machines of the table side by side, and asks each its questions."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from katagpu import log
from katagpu.boot import diagnosis, kata, memory, process, session, table, vm, vsocklink
from katagpu.boot.accel import Accel
from katagpu.boot.channel import Channel, Gone
from katagpu.boot.facts import Facts, Failed, Outcome, Skipped, Verdict, shortened
from katagpu.boot.gpu import Gpu, physical_bits, root_port
from katagpu.boot.process import Process
from katagpu.boot.qemu import Qemu
from katagpu.boot.report import Report
from katagpu.boot.session import Offer, Session
from katagpu.boot.table import Check
from katagpu.boot.vfiouser import Server
from katagpu.boot.vm import HotPlug, Machine
from katagpu.errors import KatagpuError
from katagpu.run import scratch

START = 90.0  # seconds until the probe answers; 3 under an emulator on two idle processors
LONGEST = 900.0  # seconds that one machine may run: what hangs is killed
SLOWEST = 8.0  # times that of an idle host
HOT_GPUS = 2
SERIAL = 40  # lines of the serial log that a failure to boot shows


@dataclass(frozen=True, kw_only=True)
class Guest:
    """What is checked, as files: kernels, root (image or initrd), the driver's disk, our own parts.

    `configuration` is the Kata drop-in. `helpers` are what checks hand over to the guest.
    """

    recipe: str
    facts: Facts
    configuration: kata.Configuration
    vmlinuz: Path
    vmlinux: Path
    root: Path
    probe: Path
    helpers: Mapping[str, Path]
    extensions: Sequence[tuple[str, Path]] = ()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What boots it: QEMU, its acceleration, the GPU that is emulated, memory in MiB.

    Logs go to `logs`. `patience` is how many seconds anything may take on an idle host that only
    needs time, `slow` how many times that here.
    """

    qemu: Qemu
    accel: Accel
    gpu: Gpu
    logs: Path
    memory: int = 2048
    vcpus: int = 2
    patience: float = 60.0
    slow: float = 1.0

    @property
    def offer(self) -> Offer:
        """The GPU, or what stands for it where QEMU has no vfio-user."""
        return session.of_gpu(self.gpu) if self.qemu.vfio_user else session.lesser(self.gpu.bar1)


def slowness(load: float, processors: int) -> float:
    """How many times longer than on an idle host anything may take beside a load (getloadavg(3)).

    A guest that is slow for want of a processor is not a guest that fails.
    """
    return min(1 + max(0.0, load) / processors, SLOWEST)


class Watch:
    """Ends a machine that runs for too long."""

    def __init__(self, running: Process, seconds: float) -> None:
        self._timer = threading.Timer(seconds, running.stop)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """It ended in time."""
        self._timer.cancel()


def check(guest: Guest, setting: Setting, boots: Sequence[str] = ()) -> Report:
    """Boot the guest in every machine of the table, or those named, and run the checks.

    Raises `UserError` for what the host lacks: memory, a QEMU that starts.
    """
    boots = boots or list(table.TABLE)
    memory.must_have(setting.memory << 20, machines=len(boots))
    begun = time.monotonic()
    with ThreadPoolExecutor(max_workers=len(boots), thread_name_prefix="boot") as pool:
        futures = [pool.submit(_machine, guest, setting, boot) for boot in boots]
        found = [future.result() for future in futures]
    facts: dict[str, object] = {
        "qemu": f"{setting.qemu.version}: {setting.qemu.why}", "acceleration": setting.accel.why,
        "gpu": f"{setting.gpu.device:04x} over vfio-user" if setting.qemu.vfio_user
        else "pci-testdev, the lesser check: no NVIDIA driver was probed",
        "seconds": round(time.monotonic() - begun, 1),
        "patience": f"{setting.slow:.1f} times that of an idle host"}
    for boot, (_outcomes, known) in zip(boots, found, strict=True):
        facts.update({f"{boot} {name}": value for name, value in known.items()})
    return Report(recipe=guest.recipe, facts=facts,
                  outcomes=[outcome for outcomes, _known in found for outcome in outcomes])


def machine(guest: Guest, setting: Setting, boot: str, directory: Path) -> Machine:
    """The machine of that name in the table."""
    cold = boot == table.COLD
    port = root_port(setting.gpu.function)
    ports = [port] * (1 if cold else HOT_GPUS)
    devices = []
    if cold:
        properties = session.served(directory / "gpu0") if setting.qemu.vfio_user \
            else setting.offer.properties
        devices.append(json.dumps({**properties, "id": "gpu0", "bus": vm.port_name(0)},
                                  separators=(",", ":")))
    bits = physical_bits(ports)
    return Machine(
        configuration=guest.configuration, kernel=guest.vmlinuz if cold else guest.vmlinux,
        root=guest.root, probe=guest.probe, directory=directory, accel=setting.accel,
        extensions=guest.extensions, ports=ports, devices=devices, memory=setting.memory,
        vcpus=setting.vcpus, hot_plug=HotPlug.ACPI if cold else HotPlug.NATIVE,
        phys_bits=bits if bits > 40 and setting.accel.kind == "tcg" else 0)


@contextlib.contextmanager
def booted(
    guest: Guest, setting: Setting, boot: str, directory: Path, *, terminal: bool = False,
) -> Iterator[tuple[Machine, Process, vsocklink.Link, Server | None]]:
    """The machine, started; it is ended with all that belongs to it.

    With `terminal` its second console is on ours.
    """
    found = replace(machine(guest, setting, boot, directory), terminal=terminal)
    with ExitStack() as stack:
        link = stack.enter_context(vsocklink.link(directory))
        server = None
        if boot == table.COLD and setting.qemu.vfio_user:
            server = stack.enter_context(Server(directory / "gpu0", setting.gpu))
        running = stack.enter_context(process.running(
            setting.qemu, [*vm.arguments(found), *link.arguments], monitor=directory / "qmp",
            log=setting.logs / f"{boot}-qemu.log", descriptors=link.descriptors, terminal=terminal))
        yield found, running, link, server


def _machine(guest: Guest, setting: Setting, boot: str) -> tuple[list[Outcome], dict[str, object]]:
    """All outcomes of one machine, and what is known of it."""
    setting.logs.mkdir(parents=True, exist_ok=True)
    # A socket's path has 107 bytes: not below out/.
    with scratch() as directory, ExitStack() as stack:
        known: dict[str, object] = {}
        found, running, link, server = stack.enter_context(
            booted(guest, setting, boot, directory))
        stack.callback(_keep_log, found.log, setting.logs / f"{boot}-serial.log")
        watch = Watch(running, LONGEST * setting.slow)
        stack.callback(watch.close)
        try:
            channel = Channel(found.channel, running.check, slow=setting.slow)
            stack.callback(channel.close)
            channel.wait_ready(START)
        except KatagpuError as failure:
            return _no_boot(boot, found, failure), known
        asked = Session(guest.facts, found, channel, running.monitor, link=link,
                        gpu=setting.offer, helpers=guest.helpers, patience=setting.patience)
        stack.callback(asked.close)
        if server is not None:
            asked.servers["gpu0"] = server
        outcomes = list(_checks(boot, asked))
        with contextlib.suppress(KatagpuError, OSError, ValueError):
            known.update(_numbers(asked))
        return outcomes, known


def _keep_log(path: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        target.write_bytes(path.read_bytes())


def _no_boot(boot: str, found: Machine, failure: KatagpuError) -> list[Outcome]:
    """The guest did not come up: the first check failed, and there is nothing for the others."""
    lines = found.log.read_text(errors="replace").splitlines() if found.log.exists() else []
    cause, cure = diagnosis.explain(lines[-SERIAL:], failure.what)
    first, *others = table.TABLE[boot]
    return [Outcome(id=table.name(first), boot=boot, title=table.title(first), seconds=0.0,
                    verdict=Verdict.FAILED, what=f"the guest does not come up: {failure}",
                    lines=tuple(lines[-SERIAL:]), cause=cause, cure=cure),
            *(_skipped(boot, check, "the guest did not come up") for check in others)]


def _skipped(boot: str, check: Check, why: str) -> Outcome:
    return Outcome(id=table.name(check), boot=boot, title=table.title(check), seconds=0.0,
                   verdict=Verdict.SKIPPED, what=why)


def _checks(boot: str, asked: Session) -> Iterator[Outcome]:
    """The outcomes of one machine's checks; after the guest is gone, none is asked any more."""
    gone = False
    for each in table.TABLE[boot]:
        if gone:
            yield _skipped(boot, each, "the guest did not answer any more")
            continue
        begun = time.monotonic()
        try:
            said = _ask(each, asked)
        except Gone as lost:
            gone = True
            lines = asked.machine.log.read_text(errors="replace").splitlines()[-SERIAL:]
            said = _failed(lost.what, lines, *diagnosis.explain(lines))
        outcome = Outcome(id=table.name(each), boot=boot, title=table.title(each),
                          seconds=time.monotonic() - begun, **said)
        log.note(f"boot_check: {boot}: {outcome.id}: {outcome.verdict}")
        yield outcome


def _ask(each: Check, asked: Session) -> dict[str, Any]:
    """The fields of a check's outcome. Raises `Gone`."""
    try:
        return {"verdict": Verdict.PASSED, "lines": shortened(each(asked))}
    except Skipped as nothing:
        return {"verdict": Verdict.SKIPPED, "what": str(nothing)}
    except Failed as failed:
        return _failed(failed.what, failed.lines, failed.cause, failed.cure)
    except Gone:
        raise
    except (KatagpuError, OSError, ValueError, LookupError) as other:
        return _failed(f"it could not be asked: {other}", [str(line) for line in asked.tail()],
                       "the guest's answer is not what a guest of this kind gives",
                       "./doitw boot_shell, and ask by hand")


def _failed(what: str, lines: Sequence[str], cause: str, cure: str) -> dict[str, Any]:
    return {"verdict": Verdict.FAILED, "what": what, "lines": shortened(lines), "cause": cause,
            "cure": cure}


def _numbers(asked: Session) -> dict[str, object]:
    """Memory in MiB, and seconds since the guest's kernel started."""
    rows = dict(line.split(":", 1) for line in asked.guest.text("/proc/meminfo").splitlines())
    kib = {name: int(value.split()[0]) for name, value in rows.items()}
    return {"ready after": asked.ready_at, "ended after": round(asked.uptime(), 1),
            "memory used": (kib["MemTotal"] - kib["MemAvailable"]) >> 10,
            "kernel": asked.guest.run(["uname", "-v"]).stdout.strip()}
