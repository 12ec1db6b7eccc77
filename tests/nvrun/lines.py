"""NVIDIA's manifest written for the files that a test package has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.nvrun.archive import HERE, Member, Name

NO_INSTALLER = b"#! /bin/sh\necho 'this test package has no installer' >&2\nexit 1\n"
# Modules of a source directory in the order of loading, and the word in the manifest.
MODULES = {"nvidia": "resman", "nvidia-uvm": "uvm", "nvidia-modeset": "nvkms",
           "nvidia-drm": "nvidia_drm", "nvidia-peermem": "nvidia_peermem"}


def lines(version: str) -> list[str]:
    """NVIDIA's lines of user space for a version."""
    text = (HERE / "entries.txt").read_text().replace("{v}", version)
    return [line.removeprefix("+ ") for line in text.splitlines() if line[0] != "#"]


def manifest(name: Name, files: Iterable[str], entries: Iterable[str], *,
             modules: Iterable[str] = ()) -> str:
    """A complete manifest for `files`: sources of modules, `entries`, and their 32-bit forms.

    Entries whose file is not there are left out, and links whose target is not there.
    """
    there = set(files)
    source = [_source_line(file) for file in sorted(there)
              if file.partition("/")[0] in ("kernel", "kernel-open")]
    found, found32 = [], []
    targets, targets32 = set(there), {Path(file).name for file in there if file.startswith("32/")}
    for line in entries:
        file, mode, _type, *rest = line.split()
        target = next((word.removeprefix("vdpau/") for word in rest[::-1]
                       if not word.startswith("MODULE:")), "")
        if file in there or (mode == "0000" and (target in targets or "_UNIT_" in line)):
            found.append(line)
            targets.add(file)
        if " NATIVE " in line and (target if mode == "0000" else file) in targets32:
            prefix = "" if mode == "0000" else "./32/"
            found32.append(prefix + line.replace(" NATIVE ", " COMPAT32 "))
            targets32.add(file)
    head = [f"NVIDIA Accelerated Graphics Driver for Linux-{name.architecture}", name.version, " ",
            "".join(f"{module} " for module in modules), " ", " ", "./kernel/",
            "./kernel/precompiled/"]
    return "".join(line + "\n" for line in (*head, *source, *found, *found32))


def _source_line(file: str) -> str:
    top, _, rest = file.partition("/")
    word = MODULES.get(rest.partition("/")[0], "resman")
    if top == "kernel-open" and word not in ("resman", "uvm"):
        word = f"open_{word}"
    kind = "DKMS_CONF" if rest == "dkms.conf" else "KERNEL_MODULE_SRC"
    return f"{file} 0644 {kind} INHERIT_PATH_DEPTH:1 MODULE:{word}"


def modes(entries: Iterable[str]) -> dict[str, int]:
    """Permissions by file; the set-user-id bit is the installer's to give."""
    return {line.split()[0]: int(line.split()[1], 8) & 0o777 for line in entries}


def member(file: str, content: bytes | Path, known: dict[str, int]) -> Member:
    """A file of a package with the mode of its line."""
    mode = known.get(file.removeprefix("32/"), 0o644)
    return Member(name=f"./{file}", content=content, mode=mode)
