"""What is done to the merged root of a guest, in the namespace that owns its files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
from katagpu.check.signed import SignedFacts


def lay(root: Path, variables: dict[str, object]) -> list[str]:
    """Lay the guest's own files; their paths."""
    entries = guestfiles.render(variables)
    guestfiles.lay(entries, root)
    return [str(entry.path) for entry in entries]


def check(root: Path, facts: dict[str, Any]) -> list[Finding]:
    """The consistency checks; their findings.

    `extension` is the place of the driver's disk. With a driver it is mounted there; without, the
    base alone is checked.
    """
    driver, extension = facts.pop("driver"), facts["extension"]
    programs = "/usr/bin" if extension is None else f"{extension}/bin"
    kind: Callable[..., GuestFacts] = GuestFacts
    if "certificate" in facts:
        kind = partial(SignedFacts, certificate=Path(facts["certificate"]),
                       vmlinux=Path(facts["vmlinux"]))
    known = kind(
        kernel_release=facts["kernel_release"], symvers=Path(facts["symvers"]),
        kernel_config=Path(facts["kernel_config"]), kernel_build_id=facts["kernel_build_id"],
        toolkit=Toolkit(facts["toolkit"]), agent=facts["agent"], vgpu=facts["vgpu"],
        root_format=RootFormat(facts["root_format"]), compressor=facts["compressor"],
        verity=facts["verity"], extension=extension,
        toolkit_programs=() if extension is not None and driver is None else (
            f"{programs}/nvidia-ctk", f"{programs}/nvidia-cdi-hook"),
        driver=None if driver is None else Driver(
            version=driver["version"], flavour=Flavour(driver["flavour"]),
            capabilities=frozenset(Capability(name) for name in driver["capabilities"])))
    return check_guest(root, known)
