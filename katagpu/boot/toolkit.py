"""Checks of what containers get: NVIDIA's libraries, toolkit, hook and CDI specification."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from katagpu.boot.channel import Gone
from katagpu.boot.facts import Failed, Skipped
from katagpu.boot.session import Session
from katagpu.check.dlopen import DLOPENED

LIBRARIES = "/usr/lib/x86_64-linux-gnu"
NVML = "libnvidia-ml.so.1"
SMI = ("NVIDIA-SMI", "No devices were found", "Unable to determine the device handle")
PLACE = "/run/katagpu-check"  # the check's own files in the guest
SPEC = "/var/run/cdi/nvidia.yaml"  # where kata-agent looks
KIND = "nvidia.com/gpu"
NO_TOOLKIT = "this guest has no toolkit"
NEVER_STARTS = ("masked", "not-found", "bad-setting", "error")  # of a unit's LoadState
NO_SPEC = ("nvidia-cdi.service did not run or failed: kata-agent would wait for it, then fail the "
           "container")
SPEC_CURE = "rootfs/: nvidia-refresh.path, nvidia-cdi.service and the udev rule; recipe: toolkit"


def _library_path(session: Session) -> dict[str, str]:
    place = session.facts.extension
    path = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return path if place is None else {
        "PATH": f"{path['PATH']}:{place}/bin", "LD_LIBRARY_PATH": f"{place}{LIBRARIES}"}


def _hand_over(session: Session, name: str) -> str:
    """Put one of the check's own files into the guest's memory; its path."""
    path = f"{PLACE}/{name}"
    if not session.guest.exists(path):
        session.guest.run(["mkdir", "-p", PLACE])
        session.guest.write(path, session.helpers[name].read_bytes(), 0o755)
    return path


def driver_libraries(session: Session) -> list[str]:
    """The driver's libraries load, those too that are only opened at run time."""
    facts = session.facts
    session.require_driver(working=False)
    assert facts.driver is not None
    branch = int(facts.driver.split(".")[0])
    names = [row.name.format(version=facts.driver) for row in DLOPENED
             if str(row.capability) in facts.capabilities and branch >= row.since
             and (row.loader is None or session.guest.exists((facts.extension or "") + row.loader))]
    found = session.guest.run([_hand_over(session, "load"), *names], env=_library_path(session),
                              timeout=30)
    failed = [line for line in found.stdout.splitlines() if " ok " not in line]
    if failed or found.status != 0:
        raise Failed(f"{len(failed) or 'some'} of the driver's libraries do not load",
                     [*failed, *found.stderr.splitlines()],
                     cause="a library that the driver opens at run time, or one that it is linked "
                           "to, is missing: containers fail with CUDA errors",
                     cure="driver.capabilities must name what containers use; for a driver of "
                          "packages, its package (docs/driver.md)")
    return found.stdout.splitlines()


def nvml(session: Session) -> list[str]:
    """nvidia-smi starts, loads the real NVML, and gets as far as the emulated GPU lets it."""
    facts = session.facts
    session.require_driver()
    if "utility" not in facts.capabilities:
        raise Skipped("this guest has no nvidia-smi")
    found = session.guest.run(["nvidia-smi"], env=_library_path(session), timeout=60)
    text = "\n".join(found.said)
    # What 550.163.01's nvidia-smi said beside the module of 580.159.04, with status 18.
    if "version mismatch" in text:
        raise Failed("NVML and the kernel's module are of different drivers", found.said,
                     cause="module and user space are not of one driver",
                     cure="./doitw build_image")
    # Its own words when NVML was loaded and no GPU could be initialised.
    if not any(words in text for words in SMI) or "couldn't find libnvidia-ml" in text:
        raise Failed(f"nvidia-smi ended with status {found.status}", found.said,
                     cause=f"{NVML} is missing, of another driver, or the device nodes are",
                     cure="./doitw build_image; recipe: driver.capabilities")
    return [f"status {found.status}", *found.said]


def programs(session: Session) -> list[str]:
    """The toolkit's programs run."""
    if session.facts.toolkit == "none":
        raise Skipped(NO_TOOLKIT)
    names = ["nvidia-ctk", "nvidia-cdi-hook"]
    if session.facts.toolkit == "hook":
        names += ["nvidia-container-runtime-hook", "nvidia-container-cli"]
    lines = []
    for name in names:
        found = session.guest.run([name, "--version"], env=_library_path(session))
        if found.status != 0:
            raise Failed(f"{name} --version ended with status {found.status}", found.said,
                         cause="the program or a library of it is missing",
                         cure="recipe: toolkit; ./doitw build_image")
        lines += found.said[:1]
    return lines


def hook(session: Session) -> list[str]:
    """The OCI hook is what kata-agent takes, and runs as the agent calls it."""
    path = session.facts.hook
    if path is None:
        raise Skipped("this guest's containers get their GPUs by CDI, without a hook")
    found = session.guest.run(["stat", "-c", "%f %N", path])
    mode = int(found.stdout.split()[0], 16) if found.status == 0 else 0
    if not stat.S_ISREG(mode) or not mode & 0o111:
        raise Failed("kata-agent would not run the hook", found.said,
                     cause="it takes regular files with an executable bit, and no links",
                     cure="rootfs/layout.yaml: the hook's mode; hooks/: a file and not a link")
    # As the agent does: no environment, the name and the kind as arguments, the state on stdin.
    state = {"ociVersion": "1.0.2", "id": "boot-check", "status": "created", "pid": 1,
             "bundle": "/run/katagpu-check/bundle", "annotations": {}}
    session.guest.shell("mkdir -p /run/katagpu-check/bundle/rootfs")
    session.guest.write("/run/katagpu-check/bundle/config.json", json.dumps({
        "ociVersion": "1.0.2", "root": {"path": "rootfs"},
        "process": {"args": ["true"], "cwd": "/", "env": []}}).encode())
    ran = session.guest.run([path, "prestart"], env={}, stdin=json.dumps(state).encode(),
                            timeout=10)  # the agent's own limit
    if ran.status != 0:
        raise Failed(f"the hook ended with status {ran.status} for a container without a GPU",
                     ran.said, cause="it needs a variable or a program that the agent's empty "
                     "environment does not give", cure="hooks/prestart")
    return [found.stdout.strip(), f"status 0 in {ran.seconds:.2f} s", *ran.said]


@contextmanager
def mock_nvml(session: Session) -> Iterator[None]:
    """While it lasts, the check's own NVML lies over the driver's; the image is not touched."""
    mine = _hand_over(session, NVML)
    place = f"{session.facts.extension or ''}{LIBRARIES}/{NVML}"
    real = session.guest.run(["readlink", "-f", place]).stdout.strip()
    bound = session.guest.run(["mount", "--bind", mine, real])
    if bound.status != 0:
        raise Failed(f"{place} cannot be covered", bound.said,
                     cause="the driver's NVML is not in the guest",
                     cure="recipe: driver.capabilities with utility")
    try:
        yield
    finally:
        with suppress(Gone):  # which is said where it was noticed
            session.guest.run(["umount", real])


def _specification(session: Session, gpus: int) -> dict[str, Any]:
    """The CDI specification once it has so many GPUs. Raises `Failed`."""
    import yaml

    found: dict[str, Any] = {}

    def there() -> bool:
        try:
            loaded = yaml.safe_load(session.guest.text(SPEC))
        except (OSError, yaml.YAMLError):
            return False
        found.clear()
        found.update(loaded if isinstance(loaded, dict) else {})
        return len(_numbered(found)) == gpus

    if not session.guest.until(there, session.patience, step=0.3):
        lines = session.guest.run(["journalctl", "--no-pager", "--quiet", "-o", "cat", "-n", "12",
                                   "-u", "nvidia-cdi.service", "-u", "nvidia-refresh.service"]).said
        raise Failed(f"{SPEC} has {len(_numbered(found))} GPUs, and {gpus} are plugged in" if found
                     else f"there is no {SPEC}", lines,
                     cause=NO_SPEC, cure=SPEC_CURE)
    return found


def _numbered(spec: dict[str, Any]) -> list[str]:
    return [each["name"] for each in spec.get("devices", []) if str(each["name"]).isdecimal()]


def _paths(spec: dict[str, Any]) -> set[str]:
    edits = [spec.get("containerEdits", {}),
             *(each["containerEdits"] for each in spec["devices"])]
    return {node["path"] for edit in edits for node in edit.get("deviceNodes", [])}


def _judge(session: Session, spec: dict[str, Any]) -> list[str]:
    """What kata-agent and containers need of a specification."""
    nodes = _paths(spec)
    lacking = [] if session.facts.toolkit == "hook" else sorted(
        {"/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"} - nodes)
    if spec.get("kind") != KIND or lacking:
        raise Failed(f"the specification is of kind {spec.get('kind')} and lacks "
                     f"{', '.join(lacking) or 'nothing'}", sorted(nodes),
                     cause="device nodes were missing when it was written",
                     cure="rootfs/: nvidia-devices.service before nvidia-cdi.service")
    edits = spec.get("containerEdits", {})
    mounts = [each["hostPath"] for each in edits.get("mounts", [])]
    hooks = [each["path"] for each in edits.get("hooks", [])]
    gone = [path for path in {*mounts, *hooks, *nodes} if not session.guest.exists(path)]
    if gone:
        raise Failed("the specification names files that are not in the guest", gone,
                     cause="it was written for another root",
                     cure="rootfs/usr/libexec/katagpu/nvidia-guest: --driver-root, "
                          "--nvidia-cdi-hook-path")
    return [f"kind {spec['kind']}, GPUs {', '.join(_numbered(spec))}", f"nodes: "
            f"{' '.join(sorted(nodes))}", f"{len(mounts)} files, {len(hooks)} hooks"]


def _needs_cdi(session: Session, gpus: int) -> None:
    if session.facts.toolkit == "none":
        raise Skipped(NO_TOOLKIT)
    session.require_driver()
    if len(session.gpus) < gpus:
        raise Skipped(f"{len(session.gpus)} GPUs are in the guest, as another check says")
    state = session.guest.run(["systemctl", "show", "--property=LoadState", "--value",
                               "nvidia-cdi.service"]).stdout.strip()
    if state in NEVER_STARTS:  # then waiting is in vain
        raise Failed(f"there is no {SPEC}: nvidia-cdi.service is {state}", cause=NO_SPEC,
                     cure=SPEC_CURE)


def cdi_cold(session: Session) -> list[str]:
    """The CDI specification of a GPU that is there at the start can be written."""
    _needs_cdi(session, 1)
    with mock_nvml(session):
        session.guest.run(["systemctl", "reset-failed", "nvidia-cdi.service"])
        session.guest.run(["systemctl", "restart", "--no-block", "nvidia-cdi.service"])
        return _judge(session, _specification(session, 1))


def cdi_hot(session: Session) -> list[str]:
    """The CDI specification is written by itself after a GPU was hot-plugged."""
    _needs_cdi(session, 1)
    session.keep(mock_nvml(session))
    return _judge(session, _specification(session, len(session.gpus)))


def cdi_again(session: Session) -> list[str]:
    """The CDI specification is written anew after a second GPU was hot-plugged."""
    _needs_cdi(session, 2)
    return _judge(session, _specification(session, len(session.gpus)))
