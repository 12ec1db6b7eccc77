"""The consistency checks, as stages run them on what they have made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from katagpu import assembly, log
from katagpu.check import elf
from katagpu.check.facts import Finding, Severity
from katagpu.sandbox import Root
from katagpu.stages.api import Build, Ref

# What the checks compare a guest with.
INPUTS = {"release": Ref(stage="kernel", output="release"),
          "config": Ref(stage="kernel_config", output="config"),
          "symvers": Ref(stage="kernel", output="symvers"),
          "vmlinux": Ref(stage="kernel", output="vmlinux")}


def check(build: Build, roots: Sequence[Root], *, driver: dict[str, Any] | None, toolkit: str,
          agent: bool, vgpu: bool, root_format: str, compressor: str | None,
          extension: str | None, verity: bool = False) -> list[Finding]:
    """Run the checks in the namespace that owns the files; warnings go to the terminal.

    The facts are those of `assembly.check` that only the stage knows; the kernel's come from the
    stage's inputs (`INPUTS`).
    """
    found = build.inside(assembly.check, roots, facts={
        "kernel_release": build.blob("release").read_text(),
        "symvers": str(build.blob("symvers")), "kernel_config": str(build.blob("config")),
        "kernel_build_id": elf.read_build_id(build.blob("vmlinux")),
        "driver": driver, "toolkit": toolkit, "agent": agent, "vgpu": vgpu,
        "root_format": root_format, "compressor": compressor, "extension": extension,
        "verity": verity, **_signer(build)})
    findings = [Finding(check=item["check"], severity=Severity(item["severity"]),
                        what=item["what"], where=item["where"], cure=item["cure"])
                for item in found]
    for finding in findings:
        if finding.severity is Severity.WARNING:
            log.warn(f"{build.stage.name}: {finding}")
    return findings


def _signer(build: Build) -> dict[str, str]:
    """Whose signatures the modules must have: the certificate, and the kernel that trusts it."""
    if "certificate" not in build.stage.files:
        return {}
    return {"certificate": str(build.file("certificate")), "vmlinux": str(build.blob("vmlinux"))}


def report(findings: Sequence[Finding]) -> bytes:
    """The findings as text."""
    lines = [f"{finding.severity}: {finding}" for finding in findings]
    return ("\n".join(lines or ["every check passed"]) + "\n").encode()
