"""What a check is told, and what it answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from katagpu.errors import StepError

LISTED = 6


class Severity(StrEnum):
    """How much a finding costs: an error fails the build, a note is an error that was allowed."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Flavour(StrEnum):
    """Which kernel modules of NVIDIA's driver the guest has."""

    OPEN = "open"
    CLOSED = "closed"


class Capability(StrEnum):
    """Driver capabilities, by the names of NVIDIA_DRIVER_CAPABILITIES."""

    COMPUTE = "compute"
    UTILITY = "utility"
    VIDEO = "video"
    GRAPHICS = "graphics"


class Toolkit(StrEnum):
    """How containers get their GPU devices and libraries in the guest."""

    NONE = "none"
    CDI = "cdi"
    HOOK = "hook"


class RootFormat(StrEnum):
    """What the root directory is packed as."""

    EROFS = "erofs"
    EXT4 = "ext4"
    INITRD = "initrd"


@dataclass(frozen=True, kw_only=True)
class Driver:
    """The NVIDIA driver that the recipe asks for."""

    version: str
    flavour: Flavour
    capabilities: frozenset[Capability] = frozenset({Capability.COMPUTE, Capability.UTILITY})


@dataclass(frozen=True, kw_only=True)
class Allow:
    """An accepted finding. `what` and `where` are globs over the finding's words."""

    check: str
    where: str
    what: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class GuestFacts:
    """What the guest root is compared with: the kernel's own files and the recipe's wishes.

    `kernel_build_id` is the hex digits of vmlinux's build id (`elf.read_build_id`); the module
    directory's record of it is compared with it. `compressor` is the image's: for erofs lz4, lz4hc,
    lzma, deflate or zstd, for an initrd gzip, bzip2, lzma, xz, lzo, lz4 or zstd. `verity`: the
    image has a hash tree. `vgpu`: the guest has NVIDIA's licence client. `extension` is where a
    disk with the driver is mounted; without `driver` it is not, and the base is alone.
    """

    kernel_release: str
    symvers: Path
    kernel_config: Path
    kernel_build_id: str | None = None
    driver: Driver | None = None
    toolkit: Toolkit = Toolkit.NONE
    toolkit_programs: tuple[str, ...] = ("/usr/bin/nvidia-ctk", "/usr/bin/nvidia-cdi-hook")
    agent: bool = False
    vgpu: bool = False
    root_format: RootFormat = RootFormat.EROFS
    compressor: str | None = None
    verity: bool = False
    extension: str | None = None
    allow: tuple[Allow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What a check yields: what is wrong, where in the guest, and how it is mended."""

    what: str
    where: str
    cure: str
    severity: Severity = Severity.ERROR


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fault with the id of the check that found it. `where` is a path in the guest."""

    check: str
    severity: Severity
    what: str
    where: str
    cure: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} [{self.check}]\n    cure: {self.cure}"


def raise_on(findings: Sequence[Finding]) -> None:
    """Raise one `StepError` that lists the errors among the findings; else do nothing.

    One cause can bring hundreds (every module of another kernel): of each check the first
    few are listed, and the others counted.
    """
    errors = [finding for finding in findings if finding.severity is Severity.ERROR]
    if not errors:
        return
    by_check: defaultdict[str, list[Finding]] = defaultdict(list)
    for error in errors:
        by_check[error.check].append(error)
    lines = "\n".join(line for found in by_check.values() for line in _lines(found))
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    raise StepError(f"the guest's consistency check found {count}:\n{lines}",
                    hint="each check and what it protects from is described in docs/checks.md")


def _lines(errors: Sequence[Finding]) -> Iterator[str]:
    yield from (f"  - {error}" for error in errors[:LISTED])
    if len(errors) > LISTED:
        yield f"  - … and {len(errors) - LISTED} more of [{errors[0].check}]"
