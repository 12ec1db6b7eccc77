"""The stages of configuration, kernel and driver modules with the real make on a toy kernel.

Sandbox, tar, patch series, make and compiler are real, the compiler is the build host's. The tree
(`data/toykernel`) has the targets of Linux's build that the stages call.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import zstandard
from msgspec.structs import replace

from katagpu import guest, keys, patches, provenance, recipe
from katagpu.check import elf
from katagpu.errors import KatagpuError, StepError
from katagpu.lock import Lock
from katagpu.plan import Plan
from katagpu.run import Result
from katagpu.sandbox import Root
from katagpu.stages import driver, kbuild
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind, Store
from katagpu.tree import EPOCH
from tests.nvrun.machine import MAKEFILE, SOURCE

ROOT = keys.PACKAGE.parent
TOY = Path(__file__).parent / "data/toykernel"
RELEASE = "9.9.1-toy-nvidia-gpu"
FRAGMENT = ('CONFIG_LOCALVERSION="-nvidia-gpu"\nCONFIG_MODULES=y\nCONFIG_PCI=y\nCONFIG_TOY=m\n'
            "# CONFIG_PCI_QUIRKS is not set\n")
PROGRAMS = ("gcc", "make", "strip", "nm", "dpkg-deb")

pytestmark = pytest.mark.skipif(any(shutil.which(name) is None for name in PROGRAMS),
                                reason=f"needs {', '.join(PROGRAMS)}")


@pytest.fixture(autouse=True)
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for what Linux's headers have; the compiler is not in the root by itself."""
    monkeypatch.setattr(driver, "require_modules", lambda *_where: None)


class HostBuild(Build):
    """A build whose roots have their programs from the build host's /usr, under a layer of own."""

    def enter(self, argv: Sequence[str], roots: Sequence[Root], **more: Any) -> Result:
        empty, upper = self.directory("host/empty"), self.directory("host/usr")
        usr = Root(lower=(empty, Path("/usr")), upper=upper, target="/usr", special=False)
        return super().enter(argv, [*roots, usr], **more)


def make_toolchain(build: Build) -> None:
    """A root that has all but /usr."""
    root = build.directory("root")
    for name in ("etc", "usr"):
        (root / name).mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    shutil.copytree("/etc/alternatives", root / "etc/alternatives", symlinks=True)
    build.put_tree("root", root)


def make_source(build: Build) -> None:
    """The toy as a tarball."""
    target = build.scratch / "toy.tar"
    with tarfile.open(target, "w") as tar:
        for name, path in sorted(build.stage.files.items()):
            tar.add(path, f"linux-9.9.1/{name}")
    build.put_file("tarball", target)


def make_driver(build: Build) -> None:
    """What follows in the driver's stage when its source is unpacked."""
    source = build.directory("driver-source")
    (source / "nvidia").mkdir()
    (source / "nvidia/nv.c").write_text(SOURCE.replace("linux/kernel.h", "linux/toy.h"))
    (source / "Makefile").write_text(MAKEFILE.format(modules="nvidia nvidia-uvm nvidia-drm"))
    for name in ("conftest.sh", "Kbuild"):
        (source / name).write_text("# nothing\n")
    driver.compile_modules(build, source)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """A plan of the default recipe's stages with a toy source, of these fragments."""
    monkeypatch.setattr("katagpu.plan.Build", HostBuild)
    default = recipe.load("debian-trixie", ROOT)
    default = replace(default, driver=replace(default.driver, version="999.1"))  # has no patches
    lock = Lock(recipe=default.name, request="", groups={})
    real = guest.stages(default, lock, ROOT)
    allow = tmp_path / "allow.yaml"
    allow.write_text("[]\n")

    def make(fragment: str = FRAGMENT, store: str = "store") -> Plan:
        path = tmp_path / "own.conf"
        path.write_text(fragment)
        series = kbuild.patch_files(ROOT, patches.Target.KERNEL)
        stages = [
            Stage(name="toolchain", title="", module="errors", make=make_toolchain,
                  outputs={"root": Kind.TREE}),
            Stage(name="kernel_source", title="", module="errors", make=make_source,
                  outputs={"tarball": Kind.FILE},
                  files={str(file.relative_to(TOY)): file for file in TOY.rglob("*")
                         if file.is_file()}),
            dataclasses.replace(real["kernel_config"], options={"fragments": ["own.conf"]},
                                files={"own.conf": path, "allow": allow, **series}),
            dataclasses.replace(real["kernel"], options={
                **real["kernel"].options, "package_version": "9.9.1-1"}),
            dataclasses.replace(real["driver_modules"], make=make_driver, packages={})]
        return Plan({stage.name: stage for stage in stages}, Store(tmp_path / store),
                    tmp_path / "logs")

    return make


def content(plan: Plan, stage: str, output: str) -> Path:
    """The blob of an output."""
    return plan.store.blob(plan.ensure(stage).outputs[output].blob)


def unpacked(plan: Plan, stage: str, output: str, target: Path) -> Path:
    """A tree as a directory."""
    with content(plan, stage, output).open("rb") as stream, \
            zstandard.ZstdDecompressor().stream_reader(stream) as plain, \
            tarfile.open(fileobj=plain, mode="r|") as tar:
        tar.extractall(target, filter="data")
    return target


def test_configuration_and_its_audit(planned: Callable[..., Plan]) -> None:
    plan = planned()
    lines = content(plan, "kernel_config", "config").read_text().splitlines()
    assert [line for line in lines[1:] if not line.startswith("#")] == [
        "CONFIG_64BIT=y", "CONFIG_MODULES=y", "CONFIG_PCI=y", "CONFIG_TOY=m",
        'CONFIG_LOCALVERSION="-nvidia-gpu"']


def test_a_request_that_kconfig_drops_fails_the_stage(planned: Callable[..., Plan]) -> None:
    with pytest.raises(KatagpuError, match=r"own\.conf:4: CONFIG_TOY=m was asked for.*PCI"):
        planned(FRAGMENT.replace("CONFIG_PCI=y", "# CONFIG_PCI is not set")).ensure("kernel_config")


def test_kernel_modules_and_headers(planned: Callable[..., Plan], tmp_path: Path) -> None:
    plan = planned()
    assert content(plan, "kernel", "release").read_text() == RELEASE
    assert plan.ensure("kernel").record["release"] == RELEASE
    vmlinux = content(plan, "kernel", "vmlinux")
    assert b"Toy version 9.9.1-toy-nvidia-gpu (katagpu@katagpu #1 @" in vmlinux.read_bytes()
    place = unpacked(plan, "kernel", "modules", tmp_path / "modules") / f"usr/lib/modules/{RELEASE}"
    found = {str(path.relative_to(place)) for path in place.rglob("*") if not path.is_dir()}
    assert found == {"kernel-build-id", "kernel/drivers/toy/toy.ko", "modules.builtin",
                     "modules.order"}
    assert (place / "kernel-build-id").read_text().strip() == elf.read_build_id(vmlinux)
    said = subprocess.run(["nm", "--debug-syms", place / "kernel/drivers/toy/toy.ko"], check=True,
                          capture_output=True, text=True).stdout
    assert "toy_probe" in said and "debug_info" not in said
    headers = tmp_path / "headers"
    subprocess.run(["dpkg-deb", "--extract", content(plan, "kernel", "headers"), headers],
                   check=True)
    changelog = next(headers.rglob("changelog")).read_text()
    when = datetime.fromtimestamp(EPOCH, UTC).strftime("%d %b %Y %H:%M:%S +0000")
    assert changelog.startswith("toy (9.9.1-1) stable; ") and changelog.endswith(f"{when}\n")


def test_the_kernel_is_the_same_again(planned: Callable[..., Plan]) -> None:
    one, other = (planned(store=name).ensure("kernel") for name in ("one", "other"))
    assert one.outputs == other.outputs


def test_a_driver_s_modules_say_what_they_were_compiled_against(
        planned: Callable[..., Plan], tmp_path: Path) -> None:
    plan = planned()
    place = unpacked(plan, "driver_modules", "modules", tmp_path / "driver")
    assert {str(path.relative_to(place / f"usr/lib/modules/{RELEASE}")) for path in
            place.rglob("*") if path.is_file()} == {
        "driver-headers", "kernel/drivers/video/nvidia.ko", "kernel/drivers/video/nvidia-uvm.ko"}
    recorded = provenance.read(next(place.rglob("driver-headers")).read_text())
    # The package of headers, which has no .config, says the same as what the stages put out.
    assert recorded == provenance.read(provenance.of(
        content(plan, "kernel_config", "config"), content(plan, "kernel", "symvers")))
    other = planned(FRAGMENT.replace("CONFIG_TOY=m", "# CONFIG_TOY is not set"), "other")
    assert content(other, "kernel", "release").read_text() == RELEASE
    assert recorded["settings"] != provenance.settings(
        content(other, "kernel_config", "config").read_text())


def test_a_driver_that_does_not_compile_is_an_error_with_the_compilers_words(
        planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_toykernel.SOURCE", "int nv(void) { return gone; }\n")
    with pytest.raises(StepError, match="gone"):
        planned().ensure("driver_modules")
