"""The boot check as a stage: its result is kept by what was booted and what was asked.

What enters the guest (a static probe, a library that stands for NVML, a program that opens
libraries) is compiled here. Which QEMU boots it, and whether KVM helps, is no part of the key: what
was proven with one is proven.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from katagpu.boot import accel, kata, runner
from katagpu.boot.facts import Facts
from katagpu.boot.gpu import Gpu
from katagpu.boot.qemu import Qemu
from katagpu.check import elf
from katagpu.errors import StepError
from katagpu.kataconfig import HOOK_PATH
from katagpu.sandbox import Bind, Root
from katagpu.schema import ImageFormat, Recipe
from katagpu.stages import layers
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind

MODULE = "stages.boot"
SOURCES = Path(__file__).parent.parent / "boot"
HOOK = f"{HOOK_PATH}/prestart/nvidia-container-toolkit.sh"
PLACE = "/katagpu/parts"
SECTOR = 4096  # a disk's size is a multiple of it
LOAD, NVML = "load", "libnvidia-ml.so.1"


def parts(recipe: Recipe) -> Stage:
    """What enters the guest for the check: compiled with its own suite's compiler, and Go."""
    files = {f"{path.parent.name}/{path.name}": path
             for pattern in ("probe/*.go", "probe/go.mod", "mock/*.c")
             for path in sorted(SOURCES.glob(pattern))}
    return Stage(name="boot_parts", title="parts of the boot check that run in the guest",
                 module=MODULE, make=make_parts,
                 outputs={"probe": Kind.FILE, "load": Kind.FILE, "nvml": Kind.FILE}, files=files,
                 inputs={"tools": Ref(stage="imagetools", output="root"),
                         "toolchain": Ref(stage="toolchain", output="root")})


def make_parts(build: Build) -> None:
    """Compile them. The probe becomes a disk: whole sectors."""
    source = build.directory("parts")
    for name, path in build.stage.files.items():
        target = source / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    binds = [Bind(source=source, target=PLACE, writable=True)]
    build.enter(["go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o",
                 "../disk", "."],
                [Root(lower=(build.tree("tools"),), upper=build.directory("go"))],
                binds=binds, cwd=f"{PLACE}/probe",
                env={"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOCACHE": "/tmp/cache",
                     "GOPROXY": "off"})
    compiler = [Root(lower=(build.tree("toolchain"),), upper=build.directory("gcc"))]
    for words in ((LOAD, f"mock/{LOAD}.c", "-ldl"),
                  (NVML, "mock/nvml.c", "-shared", "-fPIC", f"-Wl,-soname,{NVML}")):
        build.enter(["gcc", "-O2", "-s", "-Wall", "-Werror", "-Wl,--build-id=none", "-o", *words],
                    compiler, binds=binds, cwd=PLACE)
    disk = source / "disk"
    with disk.open("r+b") as stream:
        stream.truncate(-(-disk.stat().st_size // SECTOR) * SECTOR)
    build.put_file("probe", disk)
    build.put_file("load", source / LOAD)
    build.put_file("nvml", source / NVML)


def check(recipe: Recipe, qemu: Callable[[], Qemu], *, lesser: bool = False) -> Stage:
    """The check. `qemu` finds the QEMU that boots it, and is asked only where there is no result.

    `lesser`: that QEMU has no vfio-user, and the result is another.
    """
    split = layers.split(recipe)
    inputs = {"vmlinuz": Ref(stage="kernel", output="vmlinuz"),
              "vmlinux": Ref(stage="kernel", output="vmlinux"),
              "release": Ref(stage="kernel", output="release"),
              "config": Ref(stage="kernel_config", output="config"),
              "image": Ref(stage="image", output="image"),
              "kata_config": Ref(stage="kata_config", output="config"),
              **{name: Ref(stage="boot_parts", output=name) for name in ("probe", "load", "nvml")}}
    if split:
        inputs["extension"] = Ref(stage="extension", output="image")
    chosen = recipe.boot_check
    return Stage(
        name="boot_check", title="boot check", module=MODULE,
        make=lambda build: make_check(build, qemu),
        outputs={"report": Kind.FILE, "junit": Kind.FILE, "log": Kind.FILE}, inputs=inputs,
        options={"recipe": recipe.name, "driver": layers.driver_facts(recipe), "lesser": lesser,
                 "toolkit": layers.toolkit_mode(recipe), "agent": recipe.agent is not None,
                 "format": str(recipe.image.format), "split": split,
                 "device": chosen.device, "boot0": chosen.boot0, "boot42": chosen.boot42,
                 "bar1_gib": chosen.bar1_gib, "memory": chosen.memory, **layers.verity(recipe)})


def record() -> Stage:
    """The guest's manifest with what came of the check."""
    return Stage(name="checked_manifest", title="manifest with the boot check", module=MODULE,
                 make=make_record, outputs={"manifest": Kind.FILE},
                 inputs={"manifest": Ref(stage="manifest", output="manifest"),
                         "report": Ref(stage="boot_check", output="report")})


def make_record(build: Build) -> None:
    """Add the report's summary, and the verdict of each check."""
    content = json.loads(build.blob("manifest").read_text())
    found = json.loads(build.blob("report").read_text())
    verdicts = {f"{each['boot']}: {each['id']}": each["verdict"] for each in found.pop("checks")}
    content["boot_check"] = {**found, "checks": verdicts}
    build.put_bytes("manifest", (json.dumps(content, indent=2) + "\n").encode())


def guest(build: Build) -> runner.Guest:
    """The guest of a stage's inputs."""
    options = build.options
    driver = options["driver"] or {}
    split = options["split"]
    facts = Facts(
        release=build.blob("release").read_text(), config=build.blob("config"),
        build_id=elf.read_build_id(build.blob("vmlinux")), root_format=options["format"],
        driver=driver.get("version"), flavour=driver.get("flavour"),
        capabilities=tuple(driver.get("capabilities", ())), toolkit=options["toolkit"],
        agent=options["agent"], extension=layers.EXTENSION_ROOT if split else None,
        verity=split, measured=options.get("verity", False),
        hook=HOOK if options["toolkit"] == "hook" else None)
    extensions = [(layers.EXTENSION, build.blob("extension"))] if split else []
    return runner.Guest(
        recipe=options["recipe"], facts=facts, extensions=extensions,
        configuration=kata.read(build.blob("kata_config").read_text()),
        vmlinuz=build.blob("vmlinuz"), vmlinux=build.blob("vmlinux"), root=build.blob("image"),
        probe=build.blob("probe"), helpers={LOAD: build.blob("load"), NVML: build.blob("nvml")})


def setting(build: Build, qemu: Qemu) -> runner.Setting:
    """How a stage's guest is booted."""
    options = build.options
    gpu = Gpu(device=int(options["device"], 16), bar1=options["bar1_gib"] << 30,
              boot0=_number(options["boot0"]), boot42=_number(options["boot42"]))
    return runner.Setting(qemu=qemu, accel=accel.choose(qemu, build.store.root / "probes"),
                          gpu=gpu, logs=build.log.parent / "boot", memory=options["memory"],
                          slow=runner.slowness(os.getloadavg()[0], os.cpu_count() or 1))


def _number(digits: str | None) -> int | None:
    return None if digits is None else int(digits, 16)


def make_check(build: Build, qemu: Callable[[], Qemu]) -> None:
    """Boot it and ask. Raises `StepError` with all that failed; the report is kept beside logs."""
    assert build.options["format"] in list(ImageFormat)
    chosen = setting(build, qemu())
    report = runner.check(guest(build), chosen)
    text = "\n".join(report.lines()) + "\n"
    found = json.dumps(report.as_json(), indent=1).encode()
    chosen.logs.mkdir(parents=True, exist_ok=True)
    (chosen.logs / "junit.xml").write_bytes(report.junit())
    (chosen.logs / "report.json").write_bytes(found)
    (chosen.logs / "report.txt").write_text(text)
    build.facts["boot"] = {name: value for name, value in report.as_json().items()
                           if name != "checks"}
    if not report.passed:
        failed = "\n".join(line for line in text.splitlines() if not line.startswith(("+", "-")))
        raise StepError(f"the guest did not pass its boot check:\n{failed}",
                        hint=f"all of it, with the guest's own log: {chosen.logs}")
    build.put_bytes("report", found)
    build.put_bytes("junit", report.junit())
    build.put_bytes("log", text.encode())
