"""Which of Kata's configuration files is read, what is merged, and what is said of bad ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katagpu.errors import UserError
from katagpu.host import katafiles, tomlreader
from katagpu.host.katafiles import Target
from katagpu.host.machine import Machine
from katagpu.kataversions import Shim, Version
from tests.host import katatree
from tests.hosttree import Tree

V41 = Version(4, 1, 0)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "root")


@pytest.fixture
def machine(tree: Tree) -> Machine:
    return Machine(tree.root, search=tree.programs())


def target(tree: Tree, files: dict[str, str], base: str = "", shim: Shim = Shim.GO,
           version: Version = V41) -> Target:
    """A configuration with drop-ins."""
    tree.file("kata/configuration.toml", base)
    for name, text in files.items():
        tree.file(f"kata/config.d/{name}", text)
    return Target(shim, version, "/kata/configuration.toml")


@pytest.mark.parametrize("shim", list(Shim))
def test_tables_merge_and_all_else_is_replaced(tree: Tree, machine: Machine, shim: Shim) -> None:
    found = katafiles.effective(machine, target(tree, {
        "50-a.toml": '[hypervisor.qemu]\nkernel_params = "c"\nlist = [3]\n',
        "60-b.toml": "[hypervisor.qemu]\nmemory = 2\n[[hypervisor.qemu.disks]]\nname = 'x'\n",
    }, '[hypervisor.qemu]\nkernel_params = "a b"\nlist = [1, 2]\nmemory = 1\nkept = true\n'
       "[[hypervisor.qemu.disks]]\nname = 'y'\n[[hypervisor.qemu.disks]]\nname = 'z'\n", shim))
    assert found.table("hypervisor.qemu") == {
        "kernel_params": "c", "list": [3], "memory": 2, "kept": True, "disks": [{"name": "x"}]}
    assert found.files == ("/kata/configuration.toml", "/kata/config.d/50-a.toml",
                           "/kata/config.d/60-b.toml")
    assert found.origin["hypervisor.qemu", "list"] == "/kata/config.d/50-a.toml"
    assert found.origin["hypervisor.qemu", "kept"] == "/kata/configuration.toml"
    assert found.problems == ()


def test_they_are_read_by_name_whatever_the_name(tree: Tree, machine: Machine) -> None:
    found = katafiles.effective(machine, target(tree, {
        "9": "x = 9", "10-a.toml": "x = 10", ".hidden": "x = 0\ny = 0", "é.toml": "z = 1",
        "Z.toml": "z = 2"}))
    assert found.values == {"x": 9, "y": 0, "z": 1}


def test_before_2_5_none_is_read_and_that_is_said(tree: Tree, machine: Machine) -> None:
    found = katafiles.effective(machine, target(tree, {"50-a.toml": "x = 1"}, "x = 0",
                                                version=Version(2, 4, 3)))
    assert found.values == {"x": 0}
    assert "does not read" in found.problems[0][0]


@pytest.mark.parametrize(("shim", "count"), [(Shim.GO, 1), (Shim.RUST, 2)])
def test_what_is_no_regular_file(tree: Tree, machine: Machine, shim: Shim, count: int) -> None:
    """A directory stops both runtimes, a link the Rust one alone."""
    where = target(tree, {}, "x = 0", shim)
    (tree.root / "kata/config.d/old").mkdir(parents=True)
    tree.file("kata/elsewhere.toml", "x = 1")
    (tree.root / "kata/config.d/60-link.toml").symlink_to("/kata/elsewhere.toml")
    found = katafiles.effective(machine, where)
    assert len(found.problems) == count
    assert found.values == {"x": 1 if shim is Shim.GO else 0}


@pytest.mark.parametrize(("shim", "version", "key", "wrong"), [
    (Shim.GO, Version(3, 2, 0), "hotplug_vfio_on_root_bus", True),
    (Shim.GO, Version(3, 1, 0), "hotplug_vfio_on_root_bus", False),
    (Shim.GO, Version(3, 4, 0), "pcie_root_port", True),
    (Shim.GO, Version(3, 6, 0), "pcie_root_port", False),
    (Shim.RUST, V41, "hotplug_vfio_on_root_bus", False)])
def test_keys_that_stop_the_runtime(tree: Tree, machine: Machine, shim: Shim, version: Version,
                                    key: str, wrong: bool) -> None:
    found = katafiles.effective(machine, target(
        tree, {"60-mine.toml": f"[hypervisor.qemu]\n{key} = 1\n"}, "", shim, version))
    assert bool(found.problems) is wrong
    assert not wrong or (key in found.problems[0][0] and "60-mine.toml" in found.problems[0][1])


@pytest.mark.parametrize("old", [False, True])
def test_a_syntax_error_is_shown_with_its_line(tree: Tree, machine: Machine, old: bool,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    loads: Callable[..., dict[str, Any]] = katafiles.loads
    monkeypatch.setattr(katafiles, "loads", lambda text: loads(text, old=old))
    where = target(tree, {"60-mine.toml": "# mine\n[hypervisor.qemu]\ndefault_memory = 8192 MiB\n"})
    with pytest.raises(UserError) as caught:
        katafiles.effective(machine, where)
    first, second = caught.value.what.splitlines()
    assert first.startswith("/kata/config.d/60-mine.toml:3: ")
    assert second == "    3 | default_memory = 8192 MiB"
    assert caught.value.hint


@pytest.mark.parametrize(("text", "line"), [
    ("a = 1\nb = \"x\n", 2), ("[t]\na = 1\na = 2\n", 3), ("a = [1,\n", 1), ("a = 1\n\n[t", 3)])
def test_both_readers_name_a_line(text: str, line: int) -> None:
    for old in (False, True):
        with pytest.raises(tomlreader.Wrong) as caught:
            katafiles.loads(text, old=old)
        assert abs(caught.value.line - line) <= 1, old  # tomllib names the line behind, at times


def test_other_bytes_than_utf_8(tree: Tree, machine: Machine) -> None:
    tree.file("kata/configuration.toml", b"a = 1\nb = '\xff'\n")
    with pytest.raises(UserError, match=r"configuration.toml:2: this is no UTF-8"):
        katafiles.effective(machine, Target(Shim.GO, V41, "/kata/configuration.toml"))


def test_a_file_that_is_not_there(machine: Machine) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        katafiles.read(machine, "/no/such.toml")


# where they are


def test_kata_deploy_s_own_directories_since_3_27(tree: Tree, machine: Machine) -> None:
    katatree.kata(tree, rust=True)
    go, rust = katafiles.targets(machine)
    assert (go.shim, go.version, go.config) == (Shim.GO, V41, f"/{katatree.GO}")
    assert (rust.shim, rust.config) == (Shim.RUST, f"/{katatree.RUST}")
    assert go.alone and rust.alone
    assert katafiles.targets(machine, shim=Shim.RUST) == [rust]


def test_one_directory_for_all_before(tree: Tree, machine: Machine) -> None:
    katatree.kata(tree, "3.7.0")
    (go,) = katafiles.targets(machine)
    assert go.config == f"/{katatree.DEFAULTS}/configuration-qemu-nvidia-gpu.toml"
    assert not go.alone


def test_links_are_followed(tree: Tree, machine: Machine) -> None:
    katatree.kata(tree, "2.4.3")
    (go,) = katafiles.targets(machine)
    assert go.config == f"/{katatree.DEFAULTS}/configuration-qemu.toml"
    (given,) = katafiles.targets(machine, config=f"/{katatree.DEFAULTS}/configuration.toml")
    assert given == go


def test_a_distribution_s_kata_says_its_version_itself(tree: Tree, machine: Machine) -> None:
    tree.file("etc/kata-containers/configuration.toml", "")
    path = tree.file("usr/bin/kata-runtime", "")
    path.chmod(0o755)
    answers = iter(["kata-runtime  : 3.4.0\n   commit : 12\n"])

    class Said(Machine):
        def ask(self, argv: Any, **_: Any) -> Any:
            assert argv == ["/usr/bin/kata-runtime", "--version"]
            return type("Result", (), {"status": 0, "out": next(answers)})

    (go,) = katafiles.targets(Said(tree.root))
    assert (go.version, go.config) == (Version(3, 4, 0), "/etc/kata-containers/configuration.toml")


def test_a_handler_of_one_s_own(tree: Tree, machine: Machine) -> None:
    katatree.kata(tree)
    for base, shim in (("qemu-nvidia-gpu", Shim.GO), ("qemu-nvidia-gpu-runtime-rs", Shim.RUST)):
        handler = f"my-{base}"  # kata-deploy copies the file of one of its own, with its name
        path = tree.file(f"{katatree.DEFAULTS}/custom-runtimes/{handler}/configuration-{base}.toml",
                         "")
        (found,) = katafiles.targets(machine, handler=handler)
        assert (found.shim, found.config) == (shim, "/" + os.path.relpath(path, tree.root))
        assert found.handler == handler
        (found,) = katafiles.targets(machine, config=found.config)
        assert found.shim is shim


def test_a_handler_that_is_not_there(tree: Tree, machine: Machine) -> None:
    katatree.kata(tree)
    tree.file("etc/kata-containers/configuration.toml", "")  # of another runtime
    with pytest.raises(UserError, match="no runtime my-gpu on this host"):
        katafiles.targets(machine, handler="my-gpu")


@pytest.mark.parametrize(("arguments", "word"), [
    ({}, "cannot be told"), ({"kata": "4.1.0"}, "no configuration file"),
    ({"config": "/no.toml"}, "no such file"), ({"kata": "latest"}, "no version")])
def test_no_kata(machine: Machine, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        katafiles.targets(machine, **arguments)


def test_a_version_that_is_not_known(tree: Tree, machine: Machine) -> None:
    katatree.kata(tree)
    tree.file("opt/kata/VERSION", "7.0.0\n")
    with pytest.raises(UserError, match=r"7\.0\.0 is not known here") as caught:
        katafiles.targets(machine)
    assert "--kata-version 4.1.0" in str(caught.value.hint)
