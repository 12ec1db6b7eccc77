"""What is found out before NVIDIA's installer starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from katagpu import nvpreflight, sandbox
from katagpu.errors import UserError
from katagpu.nvpreflight import Layers, Plan, preflight, require
from katagpu.schema import KernelModule
from tests.nvrun.machine import RELEASE, VERSION, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A package and a root."""
    yield Machine(place=tmp_path / "machine")
    sandbox.remove(tmp_path)


@pytest.fixture
def plan(machine: Machine, tmp_path: Path) -> Plan:
    """A run in which the installer builds the modules, with nothing missing."""
    layer = tmp_path / "layer"
    shutil.copytree(machine.layers[1], layer / "usr", symlinks=True)
    for name in ("ldconfig", "grep", "dmesg", "tail", "cc", "make", "ld", "tr", "sed",
                 "include/stdio.h"):
        path = layer / "usr" / ("" if "/" in name else "bin") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Plan(version=VERSION, release=RELEASE, flavour=KernelModule.OPEN,
                flavours=frozenset({"open", "closed"}), layers=(layer, machine.layers[0]),
                space=tmp_path, builds=True)


def usr(plan: Plan) -> Path:
    """The /usr of the plan's root."""
    return plan.layers[0] / "usr"


def headers(plan: Plan) -> Path:
    """The kernel's headers in the plan's root."""
    return usr(plan) / "src" / f"linux-headers-{RELEASE}"


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Free bytes of the file system, as the tests say."""
    free = [10_000_000_000]
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("katagpu.nvpreflight.shutil.disk_usage",
                        lambda _: usage._replace(free=free[0]))
    return free


def test_nothing_is_wrong(plan: Plan) -> None:
    assert preflight(plan) == []
    require([])


@pytest.mark.parametrize(("builds", "headless", "needed"), [
    (False, True, 400_000_000), (False, False, 725_000_000), (True, True, 1_900_000_000),
    (True, False, 2_225_000_000)])
def test_space(plan: Plan, room: list[int], builds: bool, headless: bool, needed: int) -> None:
    plan = replace(plan, builds=builds, headless=headless)
    room[0] = needed
    assert preflight(plan) == []
    room[0] = needed - 1
    (problem,) = preflight(plan)
    assert "the driver needs" in problem.what and "cache:gc" in problem.cure


@pytest.mark.parametrize(("name", "package"), [
    ("bin/cc", "gcc"), ("bin/make", "make"), ("bin/ld", "binutils"), ("sbin/modprobe", "kmod"),
    ("include/stdio.h", "libc6-dev")])
def test_programs(plan: Plan, name: str, package: str) -> None:
    (usr(plan) / name).unlink()
    (problem,) = preflight(plan)
    assert f"add {package} to rootfs.extra_packages" in problem.cure
    assert bool(preflight(replace(plan, builds=False))) is (package == "kmod")


def test_a_link_to_a_program_is_followed_in_the_root(plan: Plan) -> None:
    (usr(plan) / "bin/cc").unlink()
    (usr(plan) / "bin/cc").symlink_to("/etc/alternatives/cc")
    (problem,) = preflight(plan)
    assert problem.what.endswith("has no cc"), "the link's target is not the build host's"
    (usr(plan) / "bin/gcc").touch()
    assert preflight(plan) == []


@pytest.mark.parametrize("name", ["include/linux/kernel.h", "include/generated/autoconf.h",
                                  "Module.symvers", "scripts/mod/modpost"])
def test_headers_that_are_incomplete(plan: Plan, name: str) -> None:
    (headers(plan) / name).unlink()
    (problem,) = preflight(plan)
    assert name in problem.what and "are incomplete" in problem.what
    assert preflight(replace(plan, builds=False)) == []


def test_headers_that_are_not_there(plan: Plan) -> None:
    (usr(plan) / "lib/modules" / RELEASE / "build").unlink()
    (problem,) = preflight(plan)
    assert f"there is no /lib/modules/{RELEASE}/build" in problem.what


def test_headers_of_another_kernel(plan: Plan) -> None:
    (headers(plan) / "include/config/kernel.release").write_text("6.1.0-other\n")
    (problem,) = preflight(plan)
    assert f"are of kernel 6.1.0-other, the guest's is {RELEASE}" in problem.what
    (headers(plan) / "include/config/kernel.release").unlink()
    (headers(plan) / "include/generated/utsrelease.h").write_text(
        f'#define UTS_RELEASE "{RELEASE}"\n')
    assert preflight(plan) == []


def test_a_flavour_that_the_package_lacks(plan: Plan) -> None:
    (problem,) = preflight(replace(plan, flavours=frozenset({"closed"})))
    assert "has no open kernel modules" in problem.what


def test_all_problems_are_named_at_once(plan: Plan, room: list[int]) -> None:
    room[0] = 0
    (usr(plan) / "bin/make").unlink()
    (headers(plan) / "Module.symvers").unlink()
    with pytest.raises(UserError) as caught:
        require(preflight(plan))
    assert len(caught.value.what.splitlines()) == 3
    assert "EXTRA_PKGS" in str(caught.value.hint) and "cache:gc" in str(caught.value.hint)


# layers


@pytest.fixture
def layers(tmp_path: Path) -> Callable[[], Layers]:
    """Two layers below tmp_path, `top` and `low`."""
    for name in ("top", "low"):
        (tmp_path / name / "usr/bin").mkdir(parents=True)
    return lambda: Layers((tmp_path / "top", tmp_path / "low"))


def test_the_topmost_layer_wins(layers: Callable[[], Layers], tmp_path: Path) -> None:
    (tmp_path / "low/usr/bin/a").touch()
    assert layers().find("/usr/bin/a") == tmp_path / "low/usr/bin/a"
    (tmp_path / "top/usr/bin/a").touch()
    assert layers().find("/usr/bin/a") == tmp_path / "top/usr/bin/a"
    assert layers().find("/usr/bin/b") is None
    assert layers().program("a") == tmp_path / "top/usr/bin/a"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_an_upper_layer_removed_is_gone(
    layers: Callable[[], Layers], tmp_path: Path,
) -> None:
    (tmp_path / "low/usr/bin/a").touch()
    os.mknod(tmp_path / "top/usr/bin/a", 0o020000, os.makedev(0, 0))
    assert layers().find("/usr/bin/a") is None


def test_what_an_upper_layer_replaced_is_gone(
    layers: Callable[[], Layers], tmp_path: Path,
) -> None:
    (tmp_path / "low/usr/bin/a").touch()
    os.setxattr(tmp_path / "top/usr/bin", "user.overlay.opaque", b"y")
    assert layers().find("/usr/bin/a") is None


def test_links_stay_in_the_root_and_end(layers: Callable[[], Layers], tmp_path: Path) -> None:
    (tmp_path / "top/lib").symlink_to("usr/lib")
    (tmp_path / "low/usr/lib").mkdir()
    (tmp_path / "low/usr/lib/x").symlink_to("/../../usr/bin/../y")
    (tmp_path / "low/usr/y").touch()
    (tmp_path / "low/round").symlink_to("/round")
    assert layers().find("/lib/x") == tmp_path / "low/usr/y"
    assert layers().find("/round") is None


def test_the_programs_are_those_that_the_installer_looks_for(repository: Path) -> None:
    text = (repository / "tests/nvrun/nvidia-installer").read_text()
    for name in (*nvpreflight.ALWAYS, *nvpreflight.BUILDING):
        assert f" {name} " in text
