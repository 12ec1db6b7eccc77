"""Release notes: what the guest is, and what changed since the release before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from katagpu import compare, compare_text, finished, log
from katagpu.errors import UserError
from katagpu.finished import Finished
from katagpu.release import layout
from katagpu.release.layout import Release

AGAIN = "remove the directory, which is no whole release, and release again"


def read(directory: Path) -> Release:
    """The release in a directory. Raises `UserError`."""
    path = directory / layout.RELEASE
    try:
        return layout.parse(path.read_bytes(), str(directory))
    except OSError as refusal:
        raise UserError(f"{path} cannot be read: {refusal.strerror}", hint=AGAIN) from None


def text(directory: Path, release: Release, before: Path | None) -> str:
    """The notes of a release; `before` is the directory of the one before."""
    now = finished.read(directory, release.id)
    lines = [f"# {release.recipe} {release.version}", "", *_facts(now.facts, release)]
    if before is None:
        lines += ["", "## Changes", "", "This is the first release of this recipe."]
    else:
        was = read(before)
        lines += ["", f"## Changes since {was.version}",
                  *_changes(finished.read(before, was.id), now)]
    return "\n".join([*lines, "", *_use(release)]) + "\n"


def _facts(facts: Any, release: Release) -> Iterator[str]:
    driver, agent = facts.get("driver"), facts.get("kata_agent")
    toolkit, check = facts.get("toolkit") or {}, facts.get("boot_check") or {}
    yield f"- kernel: {facts['kernel_release']} (source {facts.get('kernel_source', 'unknown')})"
    yield f"- distribution: {facts.get('distribution', 'unknown')}"
    yield "- driver: none" if not driver else (
        f"- driver: NVIDIA {driver['version']}, {driver['kernel_module']} kernel modules")
    yield f"- container toolkit: {toolkit.get('version') or toolkit.get('source', 'none')}"
    yield "- kata-agent: " + ("none; Kata cannot use this guest as it is" if agent is None
                              else f"sha256:{agent['sha256']}")
    yield f"- boot check: {'passed' if check else 'none'}"
    for file in release.files:
        if file.link is not None:
            yield f"- `{file.name}`: {log.size(file.size)}"
    if release.licensed:
        yield "- It has parts of NVIDIA's vGPU software, which only licensees may have."


def _changes(old: Finished, now: Finished) -> Iterator[str]:
    """Sections of the comparison; of the guest's files only how many changed."""
    found = compare.compare(old, now)
    if found.same:
        yield from ("", "Nothing differs.")
        return
    section: list[str] = []
    for line in [*compare_text.text(replace(found, files=None), everything=True), "end"][1:]:
        if line.startswith("  "):
            section.append(line[2:])
        elif line:
            if section:
                yield from ("", "```text", *section, "```")
            section = []
            if line != "end":
                yield from ("", f"### {line}")
    if found.files:
        yield from ("", f"{len(found.files)} files of the guest differ.")


def _use(release: Release) -> Iterator[str]:
    yield from (
        "## Install", "", "On a host that runs Kata Containers, with this directory:", "", "```sh",
        f"python3 {layout.INSTALLER} install --key PUBLIC.pem .", "```", "",
        "or without it, from the registry that it is published to:", "", "```sh",
        f"python3 {layout.INSTALLER} install --key PUBLIC.pem oci://REGISTRY/REPOSITORY:"
        f"{release.version}", "```", "",
        "What the host lacks to give its GPUs to guests, and how they are given:", "", "```sh",
        f"python3 {layout.HOST} check", f"python3 {layout.HOST} --help", "```")
