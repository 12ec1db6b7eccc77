"""What is done to the merged root of a guest, in the namespace that owns its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from katagpu import guestfiles
from katagpu.check import check_guest
from katagpu.check.facts import (
    Capability,
    Driver,
    Finding,
    Flavour,
    GuestFacts,
    RootFormat,
    Toolkit,
)


def lay(root: Path, variables: dict[str, object]) -> list[str]:
    """Lay the guest's own files; their paths."""
    entries = guestfiles.render(variables)
    guestfiles.lay(entries, root)
    return [str(entry.path) for entry in entries]


def check(root: Path, facts: dict[str, Any]) -> list[Finding]:
    """The consistency checks; their findings."""
    driver = facts.pop("driver")
    known = GuestFacts(
        kernel_release=facts["kernel_release"], symvers=Path(facts["symvers"]),
        kernel_config=Path(facts["kernel_config"]), kernel_build_id=facts["kernel_build_id"],
        toolkit=Toolkit(facts["toolkit"]), agent=facts["agent"], vgpu=facts["vgpu"],
        root_format=RootFormat(facts["root_format"]), compressor=facts["compressor"],
        driver=None if driver is None else Driver(
            version=driver["version"], flavour=Flavour(driver["flavour"]),
            capabilities=frozenset(Capability(name) for name in driver["capabilities"])))
    return check_guest(root, known)
