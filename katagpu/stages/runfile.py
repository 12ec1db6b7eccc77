"""Kernel modules from a `.run`, and its unpacked copy, which all stages share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from katagpu import keys, nvoutcome, runfile
from katagpu.errors import StepError
from katagpu.nvcauses import Kind
from katagpu.run import run
from katagpu.schema import KernelModule, Recipe
from katagpu.stages import driver
from katagpu.stages.api import Build, Stage
from katagpu.stages.layers import RUN

MODULE = "stages.runfile"
# Where the source of each flavour of the modules lies in the package.
DIRECTORIES = {KernelModule.CLOSED: "kernel", KernelModule.OPEN: "kernel-open"}


def unpacked(build: Build) -> Path:
    """The content of the input `run`, as a directory that must not be written to."""
    identity = build.inputs["run"].identity
    code = keys.digest(keys.code("runfile"))[:16]
    return build.unpacked(f"run-{code}-{identity}", lambda target: runfile.RunFile(
        build.blob("run")).extract(target))


def modules(recipe: Recipe, root: Path) -> Stage:
    """The kernel modules, compiled here and not by the installer."""
    plain = driver.plain(recipe, root)
    return dataclasses.replace(plain, module=MODULE, make=make_modules,
                               inputs={**plain.inputs, "run": RUN})


def make_modules(build: Build) -> None:
    """Compile the flavour's source; what is known of a compile error is said."""
    flavour = KernelModule(build.options["flavour"])
    tree = unpacked(build)
    source = tree / DIRECTORIES[flavour]
    copy = build.directory("area") / "driver-source"
    run(["cp", "--recursive", "--preserve=mode,timestamps", "--reflink=auto", source, copy],
        log=build.log)
    version = build.options["version"]
    try:
        driver.compile_modules(build, copy)
    except StepError:
        verdict = nvoutcome.judge(nvoutcome.Outcome(
            status=1, log=build.log.read_text(errors="replace"), said="", version=version,
            release=build.blob("release").read_text(), flavour=flavour))
        if verdict.kind is Kind.UNKNOWN:
            raise
        known = verdict.error()
        known.what += f"\n  whole log: {build.log}"
        raise known from None
