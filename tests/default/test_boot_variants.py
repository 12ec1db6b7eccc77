"""The default guest packed and set up otherwise, booted as Kata would boot it then."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu.boot import runner
from katagpu.boot.report import Report
from katagpu.context import Context
from katagpu.lock import Lock
from katagpu.schema import Agent, Compression, ImageFormat
from katagpu.stages import boot
from katagpu.stages.api import Build
from tests import bootguest
from tests.closedguest import Closed
from tests.splitguest import Split

pytestmark = pytest.mark.slow
ALONE = {"signatures", "agent-runs", "agent-answers", "agent-details", "hook"}


@dataclass(frozen=True, kw_only=True)
class Booting:
    """How guests are booted here."""

    context: Context
    lock: Lock
    setting: runner.Setting
    build: Build

    def check(self, name: str, *, split: Split | None = None, **parts: Any) -> Report:
        """The report on the default guest with other sections of its recipe."""
        recipe = split.recipe if split else replace(self.context.recipe, **parts)
        guest = bootguest.of(self.context, recipe, split.lock if split else self.lock,
                             self.setting.qemu, self.build.directory(name))
        return runner.check(guest, dataclasses.replace(
            self.setting, logs=self.build.directory(f"{name}-logs")))


@pytest.fixture(scope="module")
def booting(context: Context) -> Iterator[Booting]:
    locked = context.locked()
    assert locked is not None
    with context.booting.inputs("boot-variants") as build:
        yield Booting(context=context, lock=locked, build=build,
                      setting=boot.setting(build, context.booting.qemu))


def evidence(report: Report, name: str) -> str:
    """What a check says, of the first machine that has it."""
    return "\n".join(next(each.lines for each in report.outcomes if each.id == name))


def test_driver_on_a_disk_of_its_own_with_a_hash_tree(booting: Booting, split: Split) -> None:
    report = booting.check("split", split=split)
    assert bootguest.failed(report) == {}
    assert bootguest.skipped(report) == ALONE
    assert "VERITY" in evidence(report, "verity")
    assert "/run/kata-extensions/gpu" in evidence(report, "extension")


def test_ext4_as_persistent_memory(booting: Booting) -> None:
    recipe = booting.context.recipe
    report = booting.check("dax", image=replace(
        recipe.image, format=ImageFormat.EXT4, compression=Compression.NONE, level=None,
        dax_header=True))
    assert bootguest.failed(report) == {}
    # 259:1 is the first partition of /dev/pmem0 (devices.txt: block extended major)
    assert " 259:1 " in evidence(report, "root") and "dax=always" in evidence(report, "root")


def test_a_hash_tree_of_the_image(booting: Booting) -> None:
    """On a virtio disk, where `/` is the device that the kernel made of Kata's command line."""
    report = booting.check("measured", image=replace(booting.context.recipe.image, verity=True))
    assert bootguest.failed(report) == {}
    assert bootguest.skipped(report) == {*ALONE, "extension"}
    assert "dm-verity" in evidence(report, "verity")
    assert "/dev/root" in evidence(report, "root") or "dm-0" in evidence(report, "root")


def test_a_hash_tree_of_ext4_as_persistent_memory(booting: Booting) -> None:
    report = booting.check("measured-dax", image=replace(
        booting.context.recipe.image, format=ImageFormat.EXT4, compression=Compression.NONE,
        level=None, dax_header=True, verity=True))
    assert bootguest.failed(report) == {}
    assert "dm-verity" in evidence(report, "verity")


def test_initrd(booting: Booting) -> None:
    recipe = booting.context.recipe
    report = booting.check("initrd", image=replace(recipe.image, format=ImageFormat.INITRD))
    assert bootguest.failed(report) == {}
    assert bootguest.skipped(report) == {*ALONE, "verity", "extension", "root"}


@pytest.mark.timeout(900)
def test_closed_modules(booting: Booting, closed: Closed) -> None:
    report = dataclasses.replace(booting, lock=closed.lock).check(
        "closed", driver=closed.recipe.driver)
    assert bootguest.failed(report) == {}
    # They take the firmware where it is, as the open ones do.
    assert "RmInitAdapter failed! (0x62:0x25:" in evidence(report, "firmware")


@pytest.mark.skipif(shutil.which("go") is None, reason="needs go")
def test_an_agent_is_called_over_vsock(booting: Booting) -> None:
    """A program of ours in the agent's place, which speaks its protocol and runs as its unit."""
    agent = booting.build.directory("agent") / "kata-agent"
    subprocess.run(["go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent, "."], check=True,
                   cwd=booting.context.root / "tests/boot/agent",
                   env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"})
    report = booting.check("agent", agent=Agent(file=str(agent)))
    assert bootguest.failed(report) == {}
    assert bootguest.skipped(report) == {"signatures", "hook", "verity", "extension"}
    assert "SERVING" in evidence(report, "agent-answers")
    assert "3.99.0-toy" in evidence(report, "agent-details")


def test_another_gpu(booting: Booting) -> None:
    """An H200's BAR has 256 GiB, which take more address bits than an emulated processor has."""
    gpu = dataclasses.replace(booting.setting.gpu, device=0x2335, bar1=256 << 30)
    report = dataclasses.replace(
        booting, setting=dataclasses.replace(booting.setting, gpu=gpu)).check("h200")
    assert bootguest.failed(report) == {}
    assert "NVIDIA H200" in evidence(report, "cold-model")
    assert "BAR2 64-bit 256 GiB at 0x" in evidence(report, "hot-addresses")


def test_lesser_check_without_vfio_user(booting: Booting) -> None:
    qemu = dataclasses.replace(booting.setting.qemu, vfio_user=False)
    report = dataclasses.replace(booting, setting=dataclasses.replace(
        booting.setting, qemu=qemu)).check("lesser")
    assert bootguest.failed(report) == {}
    assert "lesser" in str(report.facts["gpu"])
    assert {"cold-bound", "firmware", "cdi-hot"} <= bootguest.skipped(report)
    assert "pciehp" in evidence(report, "hot-plug")
    assert Path(booting.build.directory("lesser-logs") / "hot-plug-serial.log").exists()
