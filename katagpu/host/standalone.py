"""Kata for a container that is in no pod: of ctr, of nerdctl, on a node of Kubernetes too.

With cold plug Kata asks the kubelet which GPUs the pod has, where [runtime] has
`pod_resource_api_sock`: kata-deploy's configurations for GPUs have it (Go's since 3.24, Rust's
since 3.31). A container of ctr is in no pod, and the kubelet's refusal ends it. Source: Kata's
src/runtime/pkg/containerd-shim-v2/device_cold_plug.go, which until 3.32 does not look whether the
socket is there, and prepare_coldplug_cdi_devices of src/runtime-rs.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from katagpu.errors import UserError
from katagpu.host import katafiles, tomlwriter
from katagpu.host.katafiles import DEFAULTS, PREFIXES, Effective, Target
from katagpu.host.machine import Machine
from katagpu.kataconfig import HYPERVISOR, RUNTIME

SOCKET = "pod_resource_api_sock"
PLACE = "/run/katagpu-ctr"
LAST = "zz-no-kubelet.toml"  # read after all other drop-ins
NOTE = (f"Kata asks the kubelet ({{}}) for a pod's GPUs, and this container is in no pod: it runs "
        f"with a copy of the configuration whose {SOCKET} is empty")


def cold(found: Effective) -> bool:
    """Is a GPU there from the sandbox's start?"""
    return found.table(HYPERVISOR).get("cold_plug_vfio", "no-port") not in ("", "no-port")


def socket(found: Effective) -> str:
    """The kubelet's socket, where Kata asks there for GPUs; else nothing."""
    return str(found.table(RUNTIME).get(SOCKET, "")) if cold(found) else ""


def text(found: Effective) -> str:
    """The configuration, with all that is merged into it, that asks no kubelet."""
    values = dict(found.values)
    values[RUNTIME] = {**found.table(RUNTIME), SOCKET: ""}
    return tomlwriter.dumps(values)


def copying(target: Target, *, own: bool) -> tuple[str, list[str]]:
    """Where such a copy is for a shell, and the lines that make it; `own`: it has no drop-ins.

    Kata merges it itself: every release that has the key reads drop-ins.
    """
    place = f"{PLACE}/{target.shim}"
    lines = [f"rm -rf {place} && mkdir -p {place}/config.d",
             f"cp {shlex.quote(target.config)} {place}/configuration.toml"]
    if not own:
        lines.append(f"cp -L {shlex.quote(target.drop_ins)}/* {place}/config.d/")
    lines.append(f"printf '[{RUNTIME}]\\n{SOCKET} = \"\"\\n' > {place}/config.d/{LAST}")
    return f"{place}/configuration.toml", lines


def defaults() -> Iterator[str]:
    """The files that Kata reads where nobody names one, the first that is there."""
    yield "/etc/kata-containers/configuration.toml"
    for prefix in PREFIXES:
        yield f"{prefix}/{DEFAULTS}/configuration.toml"


def by_default(machine: Machine, target: Target) -> None:
    """Raise `UserError` where the configuration of Kata's defaults asks the kubelet."""
    path = next((name for name in defaults() if machine.exists(name)), None)
    if path is None:
        return
    there = Target(target.shim, target.version, machine.real(path))
    found = katafiles.effective(machine, there)
    if socket(found):
        raise UserError(
            f"nerdctl runs Kata with {path}, which asks the kubelet ({socket(found)}) for a pod's "
            "GPUs; a container of nerdctl is in no pod",
            hint=f"--with ctr, which runs with a copy that does not; or, where no pod uses that "
                 f"file, `{SOCKET} = \"\"` in [{RUNTIME}] of {there.drop_ins}/{LAST}")


def in_a_pod(found: Effective, config: str) -> None:
    """Raise `UserError` where a container of crictl would get no GPU.

    Its device is in the container's request, and Kata has started the sandbox by then.
    """
    if cold(found):
        raise UserError(
            f"crictl names the GPU with the container, and {config} has it plugged with the pod's "
            "sandbox, before that (cold_plug_vfio)",
            hint="--with ctr; or, with Go's runtime, katagpu host configure --plug hot")
