"""Functions that run in the namespace that owns a root's files, seeing the root as a directory.

`main` is called by `stages.api.Build.inside` with a request file; it writes the answer as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from katagpu.check.facts import Capability, Driver, Flavour, GuestFacts, RootFormat, Toolkit


def lay(root: Path, variables: dict[str, object]) -> list[str]:
    """Lay the guest's own files; their paths."""
    from katagpu import guestfiles

    entries = guestfiles.render(variables)
    guestfiles.lay(entries, root)
    return [str(entry.path) for entry in entries]


def check(root: Path, facts: dict[str, Any]) -> list[dict[str, str]]:
    """The consistency checks; their findings."""
    from katagpu.check import check_guest

    driver = facts.pop("driver")
    known = GuestFacts(
        kernel_release=facts["kernel_release"], symvers=Path(facts["symvers"]),
        kernel_config=Path(facts["kernel_config"]), kernel_build_id=facts["kernel_build_id"],
        toolkit=Toolkit(facts["toolkit"]), agent=facts["agent"],
        root_format=RootFormat(facts["root_format"]), compressor=facts["compressor"],
        driver=None if driver is None else Driver(
            version=driver["version"], flavour=Flavour(driver["flavour"]),
            capabilities=frozenset(Capability(name) for name in driver["capabilities"])))
    return [{name: str(value) for name, value in asdict(finding).items()}
            for finding in check_guest(root, known)]


def measure(root: Path) -> dict[str, int]:
    """What the tree takes in ext4: inodes and blocks (`filesystem.TreeSize`)."""
    from katagpu import filesystem

    size: dict[str, int] = asdict(filesystem.measure(root))
    return size


def tar(root: Path, target: str) -> str:
    """Write the tree as an uncompressed tar to `target`; its SHA-256."""
    from katagpu.tree import Capture

    with Path(target).open("wb") as sink:
        return Capture(root, overlay=False, drop=()).write(sink)


def sizes(root: Path) -> dict[str, int]:
    """Bytes by part of the guest, for the table of what takes the space."""
    parts: dict[str, int] = {}
    for path in root.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        parts_of = path.relative_to(root).parts
        name = _part("/".join(parts_of))
        parts[name] = parts.get(name, 0) + path.stat().st_size
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def _part(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    if path.startswith("var/lib/dpkg/"):
        return "dpkg's database"
    if path.startswith("usr/lib/modules/"):
        return "NVIDIA kernel modules" if "/drivers/video/" in path else "kernel modules"
    if path.startswith("usr/lib/firmware/"):
        return "GSP firmware"
    if name.startswith("lib") and "/nvidia/" in path:
        return f"NVIDIA user space: {name.split('.so')[0]}"
    if name in ("nvidia-smi", "nvidia-persistenced"):
        return f"NVIDIA user space: {name}"
    if name in ("nvidia-ctk", "nvidia-cdi-hook", "nvidia-container-runtime-hook"):
        return "container toolkit"
    if name == "kata-agent":
        return "kata-agent"
    if path.startswith("usr/share/doc/"):
        return "licences"
    return "distribution"


OPERATIONS: dict[str, Callable[..., Any]] = {
    "lay": lay, "check": check, "measure": measure, "sizes": sizes, "tar": tar,
}


def main(path: str) -> None:
    """Answer one request."""
    request = json.loads(Path(path).read_text())
    answer = OPERATIONS[request["operation"]](Path(request["root"]), **request["arguments"])
    Path(request["answer"]).write_text(json.dumps(answer))
