"""Guests with a fault: the boot check finds each, and says what it is.

Each is the default guest, really altered and packed anew, or a kernel of another configuration.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import disk
from katagpu import guest as stages
from katagpu.boot import runner, table
from katagpu.boot.report import Report
from katagpu.check import elf
from katagpu.context import Context
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.schema import ToolkitSource
from katagpu.stages import boot, image, layers
from katagpu.stages.api import Build
from tests import bootguest
from tests.boot.deadgpu import fallen_off
from tests.bootguest import failed
from tests.hookguest import toolkit
from tests.splitguest import Split
from tests.toyarchive import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

HOOK = boot.HOOK
LIBRARIES = "/usr/lib/x86_64-linux-gnu"


@dataclass(frozen=True, kw_only=True)
class Booted:
    """The default guest's parts, and how it is booted."""

    context: Context
    build: Build
    guest: runner.Guest
    setting: runner.Setting
    image: Build

    def altered(self, script: str, *, binds: Sequence[Bind] = (), name: str = "altered") -> Path:
        """The image after a script ran in the guest's root as root."""
        upper = self.image.directory(f"{name}-upper")
        lower = layers.stack(self.image)
        self.image.enter(["sh", "-euc", script], [Root(lower=lower, upper=upper)], binds=binds,
                         env={"RELEASE": self.guest.facts.release})
        root = Root(lower=lower, upper=upper, special=False)
        return image.pack(self.image, root, self.image.directory(f"{name}-packed")).file

    def check(self, *boots: str, **changes: Any) -> Report:
        """The report on the guest with other parts or facts, of these machines or all."""
        known = {field.name for field in dataclasses.fields(self.guest.facts)}
        facts = {name: changes.pop(name) for name in known & set(changes)}
        return runner.check(dataclasses.replace(self.guest, **changes, facts=dataclasses.replace(
            self.guest.facts, **facts)), self.setting, boots)


@pytest.fixture(scope="module")
def booted(context: Context, guest_build: Build) -> Iterator[Booted]:
    with context.booting.inputs("boot-faults") as build:
        setting = dataclasses.replace(
            boot.setting(build, context.booting.qemu), logs=build.directory("logs"))
        # Not compressed: it is packed once for each fault.
        options = {**guest_build.options, "compression": "none", "level": 0}
        stage = dataclasses.replace(guest_build.stage, options=options)
        packing = Build(stage, context.store, guest_build.inputs, build.directory("packing"),
                        build.scratch / "packing.log")
        yield Booted(context=context, build=build, guest=boot.guest(build), setting=setting,
                     image=packing)


def test_without_a_fault_the_same_way_of_packing_passes(booted: Booted) -> None:
    report = booted.check(root=booted.altered("true"))
    assert failed(report) == {} and report.passed


# What the guest is without: how it loses that, the checks that must fail, a word of one of them.
ALTERED: dict[str, tuple[str, set[str], str]] = {
    "modules for another release": (
        "cd /usr/lib/modules/$RELEASE; find . -name 'nvidia*.ko' | "
        "xargs sed -i 's/vermagic=[0-9]*\\./vermagic=9./'",
        {"cold-plug: modules", "cold-plug: vermagic", "hot-plug: hot-bound"}, "version magic"),
    "modules that modules.dep does not know": (
        "cd /usr/lib/modules/$RELEASE; mkdir /tmp/kept; "
        "find . -name 'nvidia*.ko' -exec mv {} /tmp/kept/ \\; ; depmod $RELEASE; "
        "mv /tmp/kept/* kernel/drivers/video/",
        {"cold-plug: modules", "cold-plug: vermagic", "hot-plug: hot-bound"}, "modules.dep"),
    "a library that libcuda is linked to": (
        f"rm {LIBRARIES}/librt.so.1",
        {"cold-plug: libraries", "cold-plug: driver-libraries", "cold-plug: nvml"}, "librt.so.1"),
    "libnvidia-nvvm, which is only opened at run time": (
        "find /usr/lib -name 'libnvidia-nvvm.so*' -delete; ldconfig",
        {"cold-plug: driver-libraries"}, "libnvidia-nvvm"),
    "the GSP firmware": (
        "rm -r /usr/lib/firmware/nvidia/*", {"cold-plug: firmware"}, "firmware"),
    "the unit that writes the CDI specification": (
        "ln -sf /dev/null /etc/systemd/system/nvidia-cdi.service",
        {"cold-plug: cdi-cold", "hot-plug: cdi-hot", "hot-plug: cdi-again"}, "nvidia-cdi.service"),
}


@pytest.mark.parametrize("fault", ALTERED)
def test_an_altered_image(booted: Booted, fault: str) -> None:
    script, wanted, word = ALTERED[fault]
    name = f"fault{list(ALTERED).index(fault)}"
    boots = sorted({check.partition(": ")[0] for check in wanted})
    found = failed(booted.check(*boots, root=booted.altered(script, name=name)))
    # A unit that failed and lines in the kernel's log may go with it.
    causes = {check for check in found if not check.endswith(("units", "kernel-log"))}
    assert causes == wanted, found
    assert any(word in found[check] for check in wanted), found


def test_no_agent(booted: Booted) -> None:
    found = failed(booted.check(table.COLD, agent=True))
    assert set(found) == {"cold-plug: agent-runs", "cold-plug: agent-answers",
                          "cold-plug: agent-details"}


def test_nouveau(booted: Booted, tmp_path: Path) -> None:
    """A module of that name, compiled for this kernel."""
    plan = booted.context.plan
    stage = plan.stages["driver_modules"]
    build = Build(stage, booted.context.store, plan.inputs("driver_modules"), tmp_path / "scratch",
                  tmp_path / "log")
    headers, source = build.directory("headers"), build.directory("source")
    release = booted.guest.facts.release
    build.enter(["dpkg-deb", "--extract", "/headers.deb", "/out"],
                [Root(lower=(build.tree("toolchain"),), upper=build.directory("upper"))],
                binds=[Bind(source=build.blob("headers"), target="/headers.deb"),
                       Bind(source=headers, target="/out", writable=True)])
    (source / "Kbuild").write_text("obj-m := nouveau.o\n")
    (source / "nouveau.c").write_text('#include <linux/module.h>\nMODULE_LICENSE("GPL");\n')
    place = f"/usr/src/linux-headers-{release}"
    build.enter(["make", "-C", place, "M=/katagpu/nouveau", "modules"],
                [Root(lower=(build.tree("toolchain"),), upper=build.directory("upper"))],
                binds=[Bind(source=headers / place.lstrip("/"), target=place),
                       Bind(source=source, target="/katagpu/nouveau", writable=True)])
    packed = booted.altered(
        "install -D /katagpu/nouveau.ko /usr/lib/modules/$RELEASE/kernel/drivers/gpu/nouveau.ko; "
        "depmod $RELEASE", name="nouveau",
        binds=[Bind(source=source / "nouveau.ko", target="/katagpu/nouveau.ko")])
    found = failed(booted.check(table.COLD, root=packed))
    assert set(found) == {"cold-plug: nouveau"}
    assert "nouveau.ko" in found["cold-plug: nouveau"]


def test_a_truncated_image(booted: Booted, tmp_path: Path) -> None:
    half = tmp_path / "image"
    shutil.copyfile(booted.guest.root, half)
    with half.open("r+b") as stream:
        stream.truncate(half.stat().st_size // 2 // 4096 * 4096)
    found = failed(booted.check(root=half))
    assert {"cold-plug: ready", "hot-plug: ready"} <= set(found)
    assert "truncated" in found["cold-plug: ready"]


def test_a_gpu_that_does_not_answer(booted: Booted) -> None:
    """A check that cannot fail is noticed here."""
    setting = dataclasses.replace(booted.setting, gpu=fallen_off(booted.setting.gpu))
    found = failed(dataclasses.replace(booted, setting=setting).check())
    assert set(found) == {"cold-plug: units", "cold-plug: modules", "hot-plug: hot-bound"}
    assert "read as ones" in found["cold-plug: modules"]
    assert "read as ones" in found["hot-plug: hot-bound"]


# Kernels: fragments that come last hold.
KERNELS: dict[str, tuple[str, set[str]]] = {
    "no hot-plug of PCI Express": ("# CONFIG_HOTPLUG_PCI_PCIE is not set\n",
                                   {"hot-plug: hot-plug"}),
    "no extended configuration space": ("# CONFIG_PCI_MMCONFIG is not set\n",
                                        {"hot-plug: hot-plug"}),
}


def kernel(booted: Booted, name: str, fragment: str) -> dict[str, Path]:
    """A kernel with one more fragment, made by the recipe's own stage."""
    context = booted.context
    root = booted.build.directory(name.replace(" ", "-"))
    for part in ("recipes", "kernel-configs", "patches", "rootfs", "hooks", "keys"):
        shutil.copytree(context.root / part, root / part)
    (root / "fragment.conf").write_text(fragment)
    recipe = replace(context.recipe, kernel=replace(
        context.recipe.kernel, fragments=("fragment.conf",)))
    locked = context.locked()
    assert locked is not None
    plan = Plan(stages.stages(recipe, locked, root), context.store, root / "logs")
    made = plan.ensure("kernel").outputs
    config = plan.ensure("kernel_config").outputs["config"]
    return {"config": context.store.blob(config.blob),
            **{each: context.store.blob(made[each].blob) for each in ("vmlinux", "vmlinuz")}}


@pytest.mark.parametrize("fault", KERNELS)
def test_a_kernel_without(booted: Booted, fault: str) -> None:
    fragment, wanted = KERNELS[fault]
    made = kernel(booted, fault, fragment)
    found = failed(booted.check(table.HOT, **made,
                                build_id=elf.read_build_id(made["vmlinux"])))
    assert set(found) == wanted
    assert any("HOTPLUG_PCI_PCIE" in found[check] for check in wanted)
    # The same release, but not the kernel of this image: it is known by its build id alone.
    found = failed(booted.check(table.COLD, vmlinux=made["vmlinux"], vmlinuz=made["vmlinuz"]))
    assert {"cold-plug: build-id", "cold-plug: config",
            "cold-plug: compiled-against"} <= set(found)


@pytest.fixture(scope="module")
def hooked(booted: Booted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """The guest in mode hook. Its client writes nothing in a guest: it only ends well."""
    place = tmp_path_factory.mktemp("hooked")
    with toolkit(ToolkitSource.DEBS, booted.context, booted.image, place,
                 client=b"#!/bin/sh\nexit 0\n") as (recipe, locked):
        plan = Plan(stages.stages(recipe, locked, booted.context.root), booted.context.store,
                    place / "logs")
        plan.ensure("rootfs")
        stage = dataclasses.replace(plan.stages["image"], options={
            **plan.stages["image"].options, "compression": "none", "level": 0})
        packing = Build(stage, booted.context.store, plan.inputs("image"),
                        booted.build.directory("hooked"), booted.build.scratch / "hooked.log")
        facts = dataclasses.replace(booted.guest.facts, toolkit="hook", hook=HOOK)
        yield dataclasses.replace(booted, image=packing,
                                  guest=dataclasses.replace(booted.guest, facts=facts))


@pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")
@pytest.mark.parametrize(("script", "wanted"), [
    ("true", set()),
    (f"chmod a-x {HOOK}", {"cold-plug: hook"}),
    (f"mv {HOOK} {HOOK}.real; ln -s {HOOK}.real {HOOK}", {"cold-plug: hook"}),
], ids=["as it is", "not executable", "a link"])
def test_the_hook(hooked: Booted, script: str, wanted: set[str],
                  request: pytest.FixtureRequest) -> None:
    packed = hooked.altered(script, name=f"hook-{request.node.callspec.id.replace(' ', '-')}")
    assert set(failed(hooked.check(table.COLD, root=packed))) == wanted


def test_a_flipped_byte_below_a_hash_tree(booted: Booted, split: Split, tmp_path: Path) -> None:
    guest = bootguest.of(booted.context, split.recipe, split.lock, booted.setting.qemu,
                         booted.build.directory("verity"))
    ((name, path),) = guest.extensions
    damaged = tmp_path / "disk"
    shutil.copyfile(path, damaged)
    (data, _hashes) = disk.partitions(path)
    with damaged.open("r+b") as stream:
        stream.seek(data.offset + 1024)  # the superblock of erofs
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    report = runner.check(dataclasses.replace(guest, extensions=[(name, damaged)]), booted.setting,
                          [table.COLD])
    # Kata's way: a guest that cannot verify a disk powers off, and Kata sees no agent.
    assert list(failed(report)) == ["cold-plug: ready"]
    assert "is not what its hash tree says" in failed(report)["cold-plug: ready"]
