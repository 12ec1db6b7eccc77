"""`host snippets`: valid TOML and YAML that name the right files, and lines to paste."""

from __future__ import annotations

import shlex
import subprocess
import tomllib
from typing import Any

import pytest
import yaml

from katagpu.host import katafiles
from katagpu.host.katafiles import Target
from katagpu.host.machine import Machine
from katagpu.kataversions import NEWEST, Shim
from tests import hosttree
from tests.host import katatree, vgpuhost
from tests.host.conftest import Host, Make
from tests.host.test_smoke import ready


def text(here: Host, what: str, *words: str) -> str:
    """A snippet."""
    said = here("snippets", what, *words)
    assert said.status == 0, said.err
    return said.out


@pytest.mark.parametrize(("text_", "plugin", "words"), [
    (None, "io.containerd.grpc.v1.cri", "is not there: write it"),
    ("# as Docker ships it\n", "io.containerd.grpc.v1.cri", "has no `version = 2`"),
    ("version = 1\n", "io.containerd.grpc.v1.cri", "has no `version = 2`"),
    ("version = 2\n", "io.containerd.grpc.v1.cri", "(version 2): is there already"),
    ("version = 3\n", "io.containerd.cri.v1.runtime", "(version 3)"),
    ("[proxy_plugins]\n[proxy_plugins.x]\nversion = 3\n", "io.containerd.grpc.v1.cri",
     "has no `version = 2`"),
    ("version = 4\n", "io.containerd.cri.v1.runtime", "(version 4)")])
def test_containerd(host: Make, text_: str | None, plugin: str, words: str) -> None:
    here = host(ready)
    if text_ is not None:
        here.tree.file("etc/containerd/config.toml", text_)
    said = text(here, "containerd")
    found: Any = tomllib.loads(said)
    assert words in said
    assert found.get("version") == (2 if text_ is None else None)
    runtime = found["plugins"][plugin]["containerd"]["runtimes"]["kata-qemu-nvidia-gpu"]
    assert runtime == {
        "runtime_type": "io.containerd.kata.v2",
        "runtime_path": "/opt/kata/bin/containerd-shim-kata-v2",
        "privileged_without_host_devices": True, "pod_annotations": ["io.katacontainers.*"],
        "options": {"ConfigPath": f"/{katatree.GO}"}}


def test_containerd_without_kubernetes_is_said(host: Make) -> None:
    """Docker's package turns the plugin off."""
    here = host(ready)
    here.tree.file("etc/containerd/config.toml", 'disabled_plugins = ["cri"]\n')
    assert "disabled_plugins has cri" in text(here, "containerd")
    here.tree.file("etc/containerd/config.toml", "version = 2\n")
    assert "disabled_plugins" not in text(here, "containerd")
    here.tree.file("etc/containerd/config.toml", "version = 2\nx = \n")
    said = here("snippets", "containerd")
    assert said.status == 1 and "/etc/containerd/config.toml:2: " in said.err


def test_a_configuration_of_our_own_has_a_class_of_its_own(host: Make) -> None:
    here = host(hosttree.a100)
    katatree.kata(here.tree, "3.7.0")
    katatree.guest(here.tree, placed=False)
    found: Any = tomllib.loads(text(here, "containerd"))
    (runtime,) = found["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"].items()
    assert runtime[0] == "kata-katagpu"
    assert runtime[1]["options"] == {"ConfigPath": katatree.OWN}
    assert yaml.safe_load(text(here, "runtimeclass"))["handler"] == "kata-katagpu"


def test_an_unknown_version_of_containerd(host: Make) -> None:
    here = host(ready)
    here.tree.file("etc/containerd/config.toml", "version = 9\n")
    said = here("snippets", "containerd")
    assert said.status == 1 and "config migrate" in said.err


def test_kubernetes(host: Make) -> None:
    here = host(ready)
    kind = yaml.safe_load(text(here, "runtimeclass"))
    assert (kind["apiVersion"], kind["kind"]) == ("node.k8s.io/v1", "RuntimeClass")
    assert kind["metadata"]["name"] == kind["handler"] == "kata-qemu-nvidia-gpu"
    assert kind["overhead"]["podFixed"] == {"memory": "10240Mi", "cpu": "1"}  # as kata-deploy's
    pod = yaml.safe_load(text(here, "pod", "--image", "registry.example/cuda:1"))
    assert pod["spec"]["runtimeClassName"] == "kata-qemu-nvidia-gpu"
    (container,) = pod["spec"]["containers"]
    assert container["image"] == "registry.example/cuda:1"
    assert container["resources"]["limits"] == {"nvidia.com/pgpu": "1"}


def test_a_runtime_that_the_user_added_has_the_user_s_name(host: Make) -> None:
    """kata-deploy's customRuntimes: the directory is the handler, the file its base's."""
    here = host(ready)
    for base in ("qemu-nvidia-gpu", "qemu-nvidia-gpu-runtime-rs"):
        place = f"{katatree.DEFAULTS}/custom-runtimes/my-{base}"
        here.tree.file(f"{place}/configuration-{base}.toml",
                       (here.tree.root / katatree.GO).read_text())
        found: Any = tomllib.loads(text(here, "containerd", "--handler", f"my-{base}"))
        runtimes = found["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
        assert list(runtimes) == [f"my-{base}"]
        assert runtimes[f"my-{base}"]["options"] == {
            "ConfigPath": f"/{place}/configuration-{base}.toml"}
        assert ("runtime-rs" in runtimes[f"my-{base}"]["runtime_path"]) is ("-rs" in base)
        kind = yaml.safe_load(text(here, "runtimeclass", "--handler", f"my-{base}"))
        assert kind["handler"] == f"my-{base}"


def test_only_kata_deploy_labels_its_nodes(host: Make) -> None:
    here = host(ready)
    assert yaml.safe_load(text(here, "runtimeclass"))["scheduling"] == {
        "nodeSelector": {"katacontainers.io/kata-runtime": "true"}}
    katatree.kata(here.tree, "3.7.0")
    (here.tree.root / katatree.GO).unlink()
    assert "scheduling" not in yaml.safe_load(text(here, "runtimeclass"))
    here.tree.file("opt/kata/containerd/config.d/kata-deploy.toml", "")
    assert "scheduling" in yaml.safe_load(text(here, "runtimeclass"))


def test_ctr(host: Make) -> None:
    here = host(ready)
    here.tree.file(f"{katatree.DROP_INS}/60-mine.toml", '[runtime]\npod_resource_api_sock = ""\n')
    pull, comment, run = text(here, "ctr").splitlines()
    assert pull == "ctr image pull docker.io/library/ubuntu:24.04"
    assert comment == "# 0000:41:00.0 [10de:20b5]"
    words = shlex.split(run)
    assert words[words.index("--device") + 1] == "/dev/vfio/192"
    assert words[words.index("--runtime-config-path") + 1] == f"/{katatree.GO}"
    assert words[-2:] == ["gpu-check", "nvidia-smi"]


@pytest.mark.parametrize("version", ["4.1.0", "3.26.0"])
def test_ctr_with_a_copy_that_asks_no_kubelet(host: Make, version: str) -> None:
    """The lines make it; Kata merges it from there to what it reads else, without the socket."""
    here = host(ready)
    if version == "3.26.0":  # a directory of several runtimes: ours is a whole configuration
        here.tree.file("opt/kata/VERSION", version)
        katatree.kata(here.tree, version)
        path = here.tree.root / katatree.DEFAULTS / "configuration-qemu-nvidia-gpu.toml"
        path.write_text((here.tree.root / katatree.GO).read_text())
    assert here("configure", "--yes", "--shim", "go").status == 0
    lines = text(here, "ctr", "--shim", "go").splitlines()
    assert "asks the kubelet" in lines[1]
    place = str(here.tree.root / "run/katagpu-ctr/go")
    for line in lines[3:-2]:
        line = line.replace("/run/katagpu-ctr/go", place)
        for there in ("/opt/", "/etc/"):
            line = line.replace(f" {there}", f" {here.tree.root}{there}")
        subprocess.run(["sh", "-ec", line], check=True)
    assert "--runtime-config-path /run/katagpu-ctr/go/configuration.toml --device" in lines[-1]
    machine = Machine(here.tree.root)
    found = [katafiles.effective(machine, Target(Shim.GO, NEWEST, path)) for path in (
        "/run/katagpu-ctr/go/configuration.toml",
        katatree.OWN if version == "3.26.0" else f"/{katatree.GO}")]
    wanted = found[1].values
    wanted["runtime"]["pod_resource_api_sock"] = ""
    assert found[0].values == wanted


def test_two_gpus_of_one_group_have_one_line(host: Make) -> None:
    here = host(hosttree.switch)
    katatree.kata(here.tree)
    katatree.guest(here.tree)
    assert here("bind", "18:00.0", "--yes").status == 0
    lines = here("snippets", "ctr").out.splitlines()
    assert lines[-2] == "# 0000:18:00.0 [10de:2236], and 0000:19:00.0 [10de:2236]"
    assert " --device /dev/vfio/7 " in lines[-1]
    assert sum(line.startswith("ctr run ") for line in lines) == 1


def test_a_kernel_without_groups_has_a_line_for_each_gpu(host: Make) -> None:
    here = host(hosttree.switch)
    katatree.kata(here.tree)
    katatree.guest(here.tree)
    here.kernel.nodes = False
    (here.tree.root / "dev/vfio/vfio").unlink()
    assert here("bind", "18:00.0", "--yes").status == 0
    said = here("snippets", "ctr").out
    assert "--device /dev/vfio/devices/vfio240 " in said
    assert "--device /dev/vfio/devices/vfio250 " in said


def test_ctr_for_vgpus(host: Make) -> None:
    here = host(vgpuhost.mdev)
    katatree.kata(here.tree)
    katatree.guest(here.tree)
    assert "katagpu host bind" in text(here, "ctr")
    kernel = vgpuhost.Manager(here.tree)
    kernel(here.tree.paths[vgpuhost.VF] / "mdev_supported_types/nvidia-692/create", b"some-uuid")
    assert "# vGPU some-uuid, GRID A100D-4C" in text(here, "ctr")
    assert "--device /dev/vfio/192" in text(here, "ctr")


def test_all_of_them_for_both_runtimes(host: Make) -> None:
    here = host(ready)
    katatree.kata(here.tree, rust=True)
    said = here("snippets", "--json")
    assert [(one["what"], one["runtime"]) for one in said.data["snippets"]] == [
        (what, shim) for shim in ("go", "runtime-rs")
        for what in ("containerd", "runtimeclass", "pod", "ctr")]
    rust = said.data["snippets"][4]["text"]
    assert "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2" in rust
    assert f"/{katatree.RUST}" in rust
    assert "# ===== pod, runtime-rs" in here("snippets").out
