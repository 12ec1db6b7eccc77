"""`host snippets`: what containerd, Kubernetes and ctr want to hear, ready to paste."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from katagpu.errors import UserError
from katagpu.host import command, configure, katafiles, pci, standalone, tomlreader, vfio
from katagpu.host.command import Answer, Commands
from katagpu.host.configure import Goal
from katagpu.host.katafiles import PROGRAMS
from katagpu.host.machine import Machine
from katagpu.kataversions import Shim

CONTAINERD = "/etc/containerd/config.toml"
# By the version of its configuration; one without that line is version 1 (its config.toml(5)).
PLUGINS: Mapping[int, str] = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime",
                              4: "io.containerd.cri.v1.runtime"}
CRI = ("cri", *PLUGINS.values())
# Where kata-deploy leaves its part of containerd's configuration (3.12 to 4.1).
DEPLOYED = ("/opt/kata/containerd/config.d/kata-deploy.toml",
            "/etc/containerd/containerd.d/kata-deploy.toml",
            "/etc/containerd/conf.d/kata-deploy.toml")
OWN = "kata-katagpu"  # the runtime's name where kata-deploy has none for it
IMAGE = "docker.io/library/ubuntu:24.04"  # the guest's toolkit puts nvidia-smi into it
OVERHEAD = 2048  # MiB beside the guest's memory: QEMU, virtiofsd (Kata's RuntimeClass has as much)
MDEVS = "/sys/bus/mdev/devices"


def add(commands: Commands) -> None:
    """Its command line."""
    made = command.new(commands, "snippets", run, "print what containerd, Kubernetes and ctr need")
    configure.options(made)
    made.add_argument("what", nargs="?", choices=[*PARTS, "all"], default="all",
                      help="only this one")
    made.add_argument("--image", default=IMAGE, help=f"the container's image (default: {IMAGE})")


def run(machine: Machine, given: argparse.Namespace) -> Answer:
    """Run it."""
    _, goals, notes = configure.plan(machine, given)
    found = []
    for goal in goals:
        for name, make in PARTS.items():
            if given.what in (name, "all"):
                found.append({"runtime": str(goal.target.shim), "what": name,
                              "text": make(machine, goal, given.image)})
    lines: list[str] = []
    for part in found:
        if len(found) > 1:
            lines += ["", f"# ===== {part['what']}, {part['runtime']}"]
        lines += part["text"].rstrip("\n").split("\n")
    return Answer([*lines, *(f"# note: {note}" for note in notes)], {"snippets": found})


def name_of(goal: Goal) -> str:
    """The runtime class: kata-deploy's where it has one for this configuration."""
    if goal.target.handler and not goal.own:
        return goal.target.handler
    return OWN if goal.target.shim is Shim.GO else f"{OWN}-rs"


def program(machine: Machine, shim: Shim) -> str:
    """The shim that is installed."""
    shims = [path for path in PROGRAMS[shim] if path.endswith("containerd-shim-kata-v2")]
    return next((path for path in shims if machine.exists(path)), shims[0])


def containerd(machine: Machine, goal: Goal, image: str) -> str:
    """The runtime in containerd's configuration."""
    found = _containerd(machine)
    number = found.get("version", 1) if found is not None else 2
    if number not in (1, *PLUGINS):
        raise UserError(f"{CONTAINERD} is of version {number!r}, which is not known here",
                        hint="containerd config migrate brings it to the newest that it knows")
    lines = [f"# {CONTAINERD} (version {number}): {_where(goal)}"]
    if found is None:
        lines = [f"# {CONTAINERD} is not there: write it, then: systemctl restart containerd",
                 "version = 2"]
    elif number == 1:
        lines = [f"# {CONTAINERD} has no `version = 2`, and is read as version 1: that has to be "
                 "its first line,", '# and tables that it has of [plugins.cri] become those of '
                 '[plugins."io.containerd.grpc.v1.cri"]. Then:', f"# {_where(goal)}"]
    off = [name for name in (found or {}).get("disabled_plugins", []) if name in CRI]
    if off:
        lines.append(f"# disabled_plugins has {', '.join(off)}: take it out, or Kubernetes starts "
                     "nothing here")
    table = f'plugins."{PLUGINS[max(number, 2)]}".containerd.runtimes.{name_of(goal)}'
    return "\n".join(lines) + f"""
[{table}]
  runtime_type = "io.containerd.kata.v2"
  runtime_path = "{program(machine, goal.target.shim)}"
  privileged_without_host_devices = true
  pod_annotations = ["io.katacontainers.*"]
  [{table}.options]
    ConfigPath = "{goal.effective.config}"
"""


def _containerd(machine: Machine) -> dict[str, Any] | None:
    """containerd's configuration; None where there is none. Raises `UserError`."""
    text = machine.text(CONTAINERD)
    if text is None:
        return None
    try:
        return katafiles.loads(text)
    except tomlreader.Wrong as failure:
        raise UserError(f"{CONTAINERD}:{failure.line}: {failure.why}",
                        hint="mend that line: containerd does not start with it") from None


def _where(goal: Goal) -> str:
    if goal.target.handler and not goal.own:
        return "is there already, by kata-deploy; compare it"
    return "append it, then: systemctl restart containerd"


def runtime_class(machine: Machine, goal: Goal, image: str) -> str:
    """The RuntimeClass of Kubernetes."""
    name = name_of(goal)
    return f"""\
# kubectl apply -f -
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: {name}
handler: {name}
overhead:
  podFixed:
    memory: "{goal.settings.default_memory + OVERHEAD}Mi"
    cpu: "1"
{_scheduling(machine, goal)}"""


def _scheduling(machine: Machine, goal: Goal) -> str:
    """Only to nodes with Kata, where they have the label that kata-deploy gives them."""
    if goal.target.handler or any(map(machine.exists, DEPLOYED)):
        return 'scheduling:\n  nodeSelector:\n    katacontainers.io/kata-runtime: "true"\n'
    return ("# Kata is not from kata-deploy, which labels its nodes: where only some have Kata, "
            "give them\n# a label, and name it here in scheduling.nodeSelector\n")


def pod(machine: Machine, goal: Goal, image: str) -> str:
    """An example pod."""
    return f"""\
# kubectl apply -f -; kubectl logs gpu-check
# nvidia.com/pgpu is what NVIDIA's device plugin for sandboxes offers for GPUs bound to vfio-pci
apiVersion: v1
kind: Pod
metadata:
  name: gpu-check
spec:
  runtimeClassName: {name_of(goal)}
  restartPolicy: Never
  containers:
    - name: nvidia-smi
      image: {image}
      command: ["nvidia-smi"]
      resources:
        limits:
          nvidia.com/pgpu: "1"
"""


def ctr(machine: Machine, goal: Goal, image: str) -> str:
    """A container by hand, for each device that can be given to one."""
    found = devices(machine)
    lines = [f"ctr image pull {shlex.quote(image)}"]
    config = goal.effective.config
    asked = standalone.socket(katafiles.effective(machine, configure.in_use(machine, goal.target)))
    if asked:
        config, copying = standalone.copying(goal.effective, own=goal.own)
        lines += [f"# Kata asks the kubelet ({asked}) for a pod's GPUs, and ctr's containers are "
                  "in no pod:", "# a copy that does not ask; renew it when the configuration "
                  "changes", *copying]
    for node, what in found.items():
        lines += [f"# {what}", shlex.join([*arguments(machine, goal, node, config), image,
                                           "gpu-check", "nvidia-smi"])]
    if not found:
        lines.append("# no GPU is bound to vfio-pci, and there is no vGPU: katagpu host bind BDF")
    return "\n".join(lines) + "\n"


def arguments(machine: Machine, goal: Goal, node: str, config: str) -> list[str]:
    """`ctr run` with a device and a configuration of Kata, up to the image."""
    return ["ctr", "run", "--rm", "--runtime", program(machine, goal.target.shim),
            "--runtime-config-path", config, "--device", node]


def devices(machine: Machine) -> dict[str, str]:
    """The nodes in /dev/vfio that are GPUs or vGPUs, and what each is."""
    found: dict[str, str] = {}
    for address in machine.names(pci.DEVICES):
        function = pci.read(machine, address)
        if not function.gpu or function.group is None:
            continue
        kind = machine.text(f"{function.path}/nvidia/current_vgpu_type")
        if function.driver in vfio.DRIVERS or (function.parent and kind not in (None, "0")):
            node = vfio.node(machine, function) or ""
            said = str(function) + (f", vGPU type {kind}" if kind not in (None, "0") else "")
            found[node] = f"{found[node]}, and {said}" if node in found else said
    for uuid in machine.names(MDEVS):
        group = machine.link(f"{MDEVS}/{uuid}/iommu_group")
        if group:
            label = machine.text(f"{MDEVS}/{uuid}/mdev_type/name")
            found[f"/dev/vfio/{group}"] = f"vGPU {uuid}, {label or 'of an unknown type'}"
    return found


PARTS: Mapping[str, Callable[[Machine, Goal, str], str]] = {
    "containerd": containerd, "runtimeclass": runtime_class, "pod": pod, "ctr": ctr}
