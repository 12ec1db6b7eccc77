"""`host smoke`, with programs in the place of ctr, nerdctl and crictl."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu.host import containers, smokeparts, standalone
from tests import hosttree
from tests.host import katatree, vgpuhost
from tests.host.conftest import Host, Make
from tests.hosttree import Device, Tree

GPU = "0000:41:00.0"
SOCKET = "/var/lib/kubelet/pod-resources/kubelet.sock"
LARGE = ("0x0000380000000000 0x00003820ffffffff 0x000000000014220c")
NOTHING = "0x0000000000000000 0x0000000000000000 0x0000000000000000"
SMI = """\
Fri Nov 27 09:13:36 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |
|=========================================+========================+======================|
|   0  NVIDIA A100 80GB PCIe          On  |   00000000:02:00.0 Off |                    0 |
+-----------------------------------------------------------------------------------------+
"""


def answer(*, kernel: str = katatree.KERNEL_RELEASE, ids: str = "0x10de 0x20b5",
           bars: str = f"  0x00000000c0000000 0x00000000c0ffffff 0x0000000000040200\n  {LARGE}",
           lspci: str = "", smi: str = SMI, status: int = 0) -> str:
    """What the script says in a container."""
    mark = smokeparts.MARK
    return (f"{mark} kernel\n{kernel}\n{mark} functions\n0000:00:01.0 0x1af4 0x1041 0x020000\n"
            f"  {NOTHING}\n0000:02:00.0 {ids} 0x030200\n{bars}\n{mark} lspci\n{lspci}"
            f"{mark} nvidia-smi\n{smi}{mark} status {status}\n")


def ready(root: Path) -> Tree:
    """A GPU that is bound to vfio-pci, Kata, and a guest."""
    tree = Tree(root)
    tree.add(Device(GPU, "10de:20b5", driver="vfio-pci", group=192,
                    bars=hosttree.bars(0x222800000000, 128 << 30)))
    tree.file("dev/vfio/192", "")
    katatree.kata(tree)
    katatree.guest(tree)
    return tree


Node = Callable[..., Host]


@pytest.fixture
def node(host: Make) -> Node:
    """A host whose ctr answers this; `calls` is a file with how it was called."""
    def make(text: str, status: int = 0, *, err: str = "", build: Callable[[Path], Tree] = ready,
             program: str = "ctr", sleep: str = "") -> Host:
        script = (f"printf '%s\\n' \"$*\" >> \"$KATAGPU_HOST_ROOT/calls\"\n"
                  f"case \"$*\" in *' run '*|'run '*) {sleep}\n"
                  'cp "$KATAGPU_HOST_ROOT"/run/katagpu-smoke/*.toml "$KATAGPU_HOST_ROOT/config" '
                  "2>/dev/null\n"
                  f"cat \"$KATAGPU_HOST_ROOT/said\"; "
                  f"printf '%s' {shlex.quote(err)} >&2; exit {status};; esac")
        here = host(build, **{program: script})
        here.tree.file("said", text)
        return here

    return make


def calls(here: Host) -> list[str]:
    return (here.tree.root / "calls").read_text().splitlines()


def test_all_of_the_guide_s_steps(node: Node) -> None:
    line = "02:00.0 3D controller [0302]: NVIDIA Corporation GA100 [10de:20b5]"
    here = node(answer(lspci=f"{line}\n"))
    here("configure", "--yes")
    said = here("smoke", "--yes")
    assert said.status == 0, said.out + said.err
    assert said.out.splitlines() == [
        f"/dev/vfio/192: {GPU} [10de:20b5]",
        "pass  a container with /dev/vfio/192: ran by ctr",
        f"pass  uname -r: {katatree.KERNEL_RELEASE}",
        f"pass  lspci -nn: 10de:20b5: {line}",
        "pass  Region of 0000:02:00.0: Region 0: 16M at c0000000, Region 1: 132G at 380000000000",
        "pass  nvidia-smi: driver 580.159.04, NVIDIA A100 80GB PCIe",
        f"note: {standalone.NOTE.format(SOCKET)}"]
    listing, pulling, running = calls(here)[:3]
    assert listing == "image ls -q"
    assert pulling == "image pull docker.io/library/ubuntu:24.04"
    assert re.match(
        "run --rm --runtime /opt/kata/bin/containerd-shim-kata-v2 --runtime-config-path "
        r"/run/katagpu-smoke/katagpu-smoke-\d+\.toml --device /dev/vfio/192 "
        r"docker\.io/library/ubuntu:24\.04 katagpu-smoke-", running)


def test_ctr_s_container_is_in_no_pod_that_a_kubelet_knows(node: Node) -> None:
    """Kata would ask it with an empty name, and end: a copy of the configuration does not ask."""
    here = node(answer())
    here("configure", "--yes")
    before = here.tree.snapshot()
    assert here("smoke", "--yes").status == 0
    copy = tomllib.loads((here.tree.root / "config").read_text())
    assert copy["runtime"]["pod_resource_api_sock"] == ""
    seen = tomllib.loads((here.tree.root / katatree.GO).read_text())
    assert set(seen["runtime"]) <= set(copy["runtime"])
    assert copy["hypervisor"]["qemu"]["kernel"].startswith(f"/{katatree.HOME}/toy-1.0.0/")
    assert copy["hypervisor"]["qemu"]["pcie_root_port"] == 1  # drop-ins are in it
    after = here.tree.snapshot()
    assert {name for name in after if before.get(name) != after[name]} == {"calls", "config"}


@pytest.mark.parametrize("mine", [
    '[runtime]\npod_resource_api_sock = ""', '[hypervisor.qemu]\ncold_plug_vfio = "no-port"'])
def test_where_kata_asks_no_kubelet_its_own_configuration_is_used(node: Node, mine: str) -> None:
    here = node(answer())
    here.tree.file(f"{katatree.DROP_INS}/60-mine.toml", mine + "\n")
    said = here("smoke", "--yes", "--json")
    assert said.status == 0 and said.data["notes"] == []
    assert f"--runtime-config-path /{katatree.GO} " in calls(here)[2]


@pytest.mark.parametrize(("changes", "step", "reason"), [
    ({"kernel": "6.18.35-nvidia-gpu"}, "uname -r", "Kata boots another one"),
    ({"ids": "0x1234 0x1111"}, "lspci -nn: 10de:20b5", "the GPU was not plugged in"),
    ({"bars": "  0x0000000000000000 0x0000001fffffffff 0x000000002014220c"},
     "Region of 0000:02:00.0", "the guest has no room for it"),
    ({"smi": "sh: 1: nvidia-smi: not found\n", "status": 127}, "nvidia-smi",
     "the toolkit in the guest did not put it"),
    ({"smi": "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
      "status": 9}, "nvidia-smi", "the driver in the guest has not taken the GPU"),
    ({"smi": "Failed to initialize NVML: Driver/library version mismatch\n", "status": 18},
     "nvidia-smi", "are of two drivers"),
    ({"smi": "", "status": 1}, "nvidia-smi", "journalctl -t kata")])
def test_each_step_fails_with_a_reason(node: Node, changes: dict[str, object], step: str,
                                       reason: str) -> None:
    said = node(answer(**changes))("smoke", "--yes", "--json")  # type: ignore[arg-type]
    assert said.status == 1
    failed = [one for one in said.data["steps"] if not one["passed"]]
    assert [one["name"] for one in failed] == [step]
    assert reason in failed[0]["reason"]


@pytest.mark.parametrize(("err", "cure"), [
    ('ctr: failed to create shim task: host system doesn\'t support vsock: stat /dev/vhost-vsock: '
     "no such file or directory: unknown", "modprobe vhost-vsock"),
    ("qemu-system-x86_64: -device vfio-pci,host=0000:41:00.0: vfio 0000:41:00.0: group 192 is not "
     "viable\nPlease ensure all devices within the iommu_group are bound", "host bind"),
    ("Could not access KVM kernel module: No such file or directory", "modprobe kvm_intel"),
    ("vfio 0000:41:00.0: failed to setup container for group 192: memory listener initialization "
     "failed: VFIO_MAP_DMA failed: Cannot allocate memory", "LimitMEMLOCK"),
    ("error applying key '[hypervisor qemu pcie_root_port]' from drop-in file: key "
     '"pcie_root_port" not found', "host configure --check"),
    ("Failed to Check if grpc server is working: rpc error: dial vsock: timed out",
     "the guest did not start"),
    ('ctr: failed to start shim: fork/exec /opt/kata/bin/containerd-shim-kata-v2: no such file or '
     "directory", "snippets containerd"),
    ('ctr: failed to create shim task: stat /opt/kata/share/x/vmlinuz-6.12: no such file or '
     "directory", "katagpu-install.pyz status"),
    ("ctr: failed to create shim task: device cold plug failed: cold plug: GetPodResources failed "
     "for pod() in namespace(): rpc error: code = Unknown desc = pod  not found", "snippets ctr"),
    ("cold plug: missing annotation io.kubernetes.cri.sandbox-name", "asks the kubelet"),
    ("Number of PCIe Root Ports exceeed allowed max of 16", "katagpu host configure"),
    ('ctr: failed to resolve reference "docker.io/library/ubuntu:24.04"', "--image"),
    ("ctr: failed to dial \"/run/containerd/containerd.sock\": connect: permission denied", "sudo"),
    ('ctr: cannot access containerd socket "/run/containerd/containerd.sock": no such file or '
     "directory", "systemctl start containerd"),
    ("something that nobody has seen", "journalctl -t kata")])
def test_no_container_has_a_reason(node: Node, err: str, cure: str) -> None:
    said = node("", 1, err=err)("smoke", "--yes", "--json")
    assert said.status == 1
    (step,) = said.data["steps"]
    assert not step["passed"] and cure in step["reason"]
    assert err.splitlines()[-1] in step["said"]


def test_a_guest_that_never_answers_is_cleaned_up(node: Node) -> None:
    here = node("", sleep="sleep 60")
    said = here("smoke", "--yes", "--timeout", "1")
    assert said.status == 1 and "did not end within 1 s" in said.out
    names = [line.split() for line in calls(here)[-3:]]
    assert [words[:2] for words in names] == [["task", "kill"], ["task", "rm"],
                                              ["container", "rm"]]
    assert len({words[-1] for words in names}) == 1


def test_the_script_runs_in_a_plain_shell() -> None:
    """dash, without lspci: what it says of this machine is understood."""
    said = subprocess.run(["sh", "-c", smokeparts.SCRIPT], capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin"})
    parts = smokeparts.sections(said.stdout)
    assert set(parts) == {"kernel", "functions", "lspci", "nvidia-smi", "status"}
    assert parts["kernel"] == [Path("/proc/sys/kernel/osrelease").read_text().strip()]
    found = smokeparts.functions(parts["functions"])
    devices = Path("/sys/bus/pci/devices")
    there = sorted(path.name for path in devices.iterdir()) if devices.is_dir() else []
    if there:
        assert sorted(found) == there
        first = devices / there[0]
        assert found[there[0]][0] == ":".join(
            (first / name).read_text().strip()[2:] for name in ("vendor", "device"))


def test_a_vgpu(host: Make) -> None:
    def build(root: Path) -> Tree:
        tree = vgpuhost.vendor(root)
        katatree.kata(tree)
        katatree.guest(tree)
        (tree.paths[vgpuhost.VF] / "nvidia/current_vgpu_type").write_text("1428\n")
        tree.file("dev/vfio/30", "")
        return tree

    here = host(build, ctr='cat "$KATAGPU_HOST_ROOT/said"')
    here.tree.file("said", answer())
    said = here("smoke", vgpuhost.VF, "--yes", "--json")
    assert said.data["device"] == "/dev/vfio/30"
    assert said.status == 0, said.data


def test_an_mdev_has_its_card_s_ids(host: Make) -> None:
    def build(root: Path) -> Tree:
        tree = vgpuhost.mdev(root)
        katatree.kata(tree)
        katatree.guest(tree)
        kernel = vgpuhost.Manager(tree)
        kernel(tree.paths[vgpuhost.VF] / "mdev_supported_types/nvidia-692/create", b"some-uuid")
        return tree

    here = host(build, ctr='cat "$KATAGPU_HOST_ROOT/said"')
    here.tree.file("said", answer())
    for words in ((), ("some-uuid",), ("/dev/vfio/192",)):
        said = here("smoke", *words, "--yes", "--json")
        assert said.data["device"] == "/dev/vfio/192"
        assert "lspci -nn: 10de:20b5" in [step["name"] for step in said.data["steps"]]


def test_what_is_not_ready(host: Make) -> None:
    here = host(hosttree.a30, ctr="exit 0")
    katatree.kata(here.tree)
    katatree.guest(here.tree)
    for words, word in (((), "no GPU is bound to vfio-pci"), (("d0:00.0",), "bound to nvidia"),
                        (("/dev/vfio/7",), "there is no /dev/vfio/7"), (("x",), "no PCI address")):
        said = here("smoke", *words, "--yes")
        assert said.status == 1 and word in said.err, said.err


def test_no_program(host: Make) -> None:
    said = host(ready)("smoke", "--yes")
    assert "there is no ctr, no nerdctl, no crictl on this host" in said.err


def test_nerdctl(node: Node) -> None:
    here = node(answer(), program="nerdctl")
    said = here("smoke", "--yes")
    assert said.status == 0 and "note: nerdctl cannot say which configuration" in said.out
    (running,) = calls(here)[:1]
    assert "--runtime io.containerd.kata.v2 --device /dev/vfio/192" in running


def test_nerdctl_where_kata_s_defaults_ask_the_kubelet(node: Node) -> None:
    here = node(answer(), program="nerdctl")
    place = here.tree.root / katatree.DEFAULTS / "configuration.toml"
    here.tree.link(place, here.tree.root / katatree.GO)
    said = here("smoke", "--yes")
    assert said.status == 1 and "asks the kubelet" in said.err and "--with ctr" in said.err
    assert not (here.tree.root / "calls").exists()
    here.tree.file(f"{katatree.DROP_INS}/{standalone.LAST}",
                   '[runtime]\npod_resource_api_sock = ""\n')  # as the error says
    assert here("smoke", "--yes").status == 0


CRICTL = r"""
printf '%s\n' "$*" >> "$KATAGPU_HOST_ROOT/calls"
case $1 in
  images) cat "$KATAGPU_HOST_ROOT/images" 2> /dev/null || echo '{}';;
  runp) cat "$KATAGPU_HOST_ROOT/run/katagpu-smoke/pod.json" > "$KATAGPU_HOST_ROOT/pod"; echo POD;;
  create) cat "$KATAGPU_HOST_ROOT/run/katagpu-smoke/container.json" > "$KATAGPU_HOST_ROOT/made"
          echo NAME;;
  inspect) state=CONTAINER_EXITED
           [ -e "$KATAGPU_HOST_ROOT/once" ] || state=CONTAINER_RUNNING
           touch "$KATAGPU_HOST_ROOT/once"; echo "{\"status\": {\"state\": \"$state\"}}";;
  logs) cat "$KATAGPU_HOST_ROOT/said";;
esac
"""


def plugged_hot(root: Path) -> Tree:
    """The same; the GPU is plugged with the container, and not with its pod."""
    tree = ready(root)
    tree.file(f"{katatree.DROP_INS}/60-mine.toml",
              '[hypervisor.qemu]\ncold_plug_vfio = "no-port"\nhot_plug_vfio = "root-port"\n')
    return tree


def test_crictl(host: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "POLL", 0.01)
    here = host(plugged_hot, crictl=CRICTL)
    here.tree.file("said", answer())
    said = here("smoke", "--yes", "--with", "crictl")
    assert said.status == 0, said.out + said.err
    verbs = [line.split()[0] for line in calls(here)]
    assert verbs == ["images", "pull", "runp", "create", "start", "inspect", "inspect", "logs",
                     "stopp", "rmp"]
    assert "runp --runtime kata-qemu-nvidia-gpu" in calls(here)[2]
    made = json.loads((here.tree.root / "made").read_text())
    assert made["devices"][0]["host_path"] == "/dev/vfio/192"
    assert not list((here.tree.root / "run/katagpu-smoke").iterdir())


@pytest.mark.parametrize(("names", "pulls"), [
    ({"repoTags": ["docker.io/library/ubuntu:24.04"]}, False),
    ({"repoTags": None, "repoDigests": ["docker.io/library/ubuntu@sha256:00"]}, True)])
def test_crictl_pulls_what_is_not_there(host: Make, monkeypatch: pytest.MonkeyPatch,
                                        names: dict[str, object], pulls: bool) -> None:
    monkeypatch.setattr(containers, "POLL", 0.01)
    here = host(plugged_hot, crictl=CRICTL)
    here.tree.file("said", answer())
    here.tree.file("images", json.dumps({"images": [{"id": "sha256:1", **names}]}))
    assert here("smoke", "--yes").status == 0
    assert ("pull docker.io/library/ubuntu:24.04" in calls(here)) is pulls


def test_crictl_gives_no_gpu_to_a_sandbox(host: Make) -> None:
    """Kata plugs it with the sandbox, and crictl has the device in the container's request."""
    here = host(ready, crictl=CRICTL)
    said = here("smoke", "--yes")
    assert said.status == 1 and "--plug hot" in said.err and "cold_plug_vfio" in said.err
    assert not (here.tree.root / "calls").exists()


def test_crictl_cleans_up_when_a_step_fails(host: Make) -> None:
    here = host(plugged_hot, crictl=CRICTL.replace(
        "echo NAME;;", "echo 'no such device' >&2; exit 1;;"))
    said = here("smoke", "--yes")
    assert said.status == 1 and "no such device" in said.out
    assert [line.split()[0] for line in calls(here)][-2:] == ["stopp", "rmp"]


@pytest.mark.parametrize("program", containers.PROGRAMS)
def test_a_dry_run_starts_nothing(host: Make, program: str) -> None:
    build = plugged_hot if program == "crictl" else ready
    here = host(build, **{program: "touch \"$KATAGPU_HOST_ROOT/started\""})
    before = here.tree.snapshot()
    said = here("smoke", "--dry-run")
    assert said.status == 0 and program in said.out and "/dev/vfio/192" in said.out
    lines = said.out.splitlines()
    if program == "ctr":
        assert "    pod_resource_api_sock = \"\"" in lines
        assert any(line.startswith("rm -f /run/katagpu-smoke/") for line in lines)
    if program == "crictl":
        verbs = [line.split()[1] for line in lines if line.startswith("crictl ")]
        assert verbs == ["pull", "runp", "create", "start", "logs", "stopp", "rmp"]
    assert here.tree.snapshot() == before
    assert not (here.tree.root / "started").exists()
