"""Patches for kernel and driver: which of them apply, and how they are applied."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from katagpu.errors import StepError, UserError
from katagpu.run import run

_FIELDS = {"patch", "target", "versions", "reason"}
_MORE = {"when", "lifts"}


class Target(StrEnum):
    """What a patch changes."""

    KERNEL = "kernel"
    DRIVER_OPEN = "driver-open"
    DRIVER_CLOSED = "driver-closed"


@dataclass(frozen=True, kw_only=True)
class Grep:
    """True when the expression `pattern` matches in `file`, a path in the kernel's headers."""

    file: str
    pattern: re.Pattern[str]

    def holds(self, headers: Path) -> bool:
        """Look into the headers; `StepError` where they have no such file."""
        path = headers / self.file
        try:
            return self.pattern.search(path.read_text(errors="replace")) is not None
        except OSError as failure:
            raise StepError(f"a patch's condition looks into {path}: {failure.strerror}",
                            hint="the kernel headers are incomplete") from None


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One entry of a series.

    `versions` are globs over the version of the target. `lifts` are the kernels, as the table of
    NVIDIA's branches names them, that it makes a driver compile on.
    """

    path: Path
    target: Target
    versions: tuple[str, ...]
    reason: str
    when: Grep | None = None
    lifts: tuple[str, ...] = ()


def load_series(path: Path) -> list[Patch]:
    """Read a series, whose patches lie beside it; `UserError` names the entry that is wrong."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text()) or []
    except (OSError, yaml.YAMLError) as failure:
        raise UserError(f"the patch series {path} cannot be read: {failure}") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: a patch series is a list of entries")
    return [_patch(entry, path.parent, f"{path}: entry {number}")
            for number, entry in enumerate(entries, start=1)]


def _patch(entry: Any, directory: Path, where: str) -> Patch:
    if not isinstance(entry, dict) or not _FIELDS <= set(entry) <= _FIELDS | _MORE:
        raise UserError(f"{where} must have the fields {', '.join(sorted(_FIELDS))}, "
                        "and may have when and lifts")
    if entry["target"] not in list(Target):
        raise UserError(f"{where}: target is one of {', '.join(Target)}, not {entry['target']!r}")
    versions, lifts, reason = entry["versions"], entry.get("lifts", []), entry["reason"]
    if not _words(versions):
        raise UserError(f"{where}: versions is a list of patterns, such as '550.163.*'")
    if not _words(lifts):
        raise UserError(f"{where}: lifts is a list of kernels, such as '6.15'")
    if not isinstance(reason, str) or not reason.strip():
        raise UserError(f"{where} gives no reason", hint="say what breaks without the patch")
    file = directory / str(entry["patch"])
    if not file.is_file():
        raise UserError(f"{where}: there is no patch {file}")
    when = _grep(entry["when"], where) if "when" in entry else None
    return Patch(path=file, target=Target(entry["target"]), versions=tuple(versions),
                 reason=reason.strip(), when=when, lifts=tuple(lifts))


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _grep(when: Any, where: str) -> Grep:
    grep = when.get("grep") if isinstance(when, dict) and set(when) == {"grep"} else None
    if not isinstance(grep, dict) or set(grep) != {"file", "pattern"}:
        raise UserError(f"{where}: when is grep: with file and pattern")
    try:
        return Grep(file=str(grep["file"]), pattern=re.compile(str(grep["pattern"])))
    except re.error as problem:
        raise UserError(f"{where}: {grep['pattern']!r} is not a regular expression: {problem}"
                        ) from None


def select(series: Iterable[Patch], target: Target, version: str, headers: Path) -> list[Patch]:
    """The patches for a version of the target, in order.

    `headers` is the directory that has `include/linux` of the kernel: its source, or the one that a
    driver is compiled against.
    """
    return [each for each in series if _meant(each, target, version)
            and (each.when is None or each.when.holds(headers))]


def lifted(series: Iterable[Patch], target: Target, version: str) -> frozenset[str]:
    """The kernels that a version of the target compiles on thanks to its patches."""
    return frozenset(kernel for each in series if _meant(each, target, version)
                     for kernel in each.lifts)


def _meant(patch: Patch, target: Target, version: str) -> bool:
    return patch.target == target and any(fnmatchcase(version, glob) for glob in patch.versions)


def patch_argv(patch: Path, tree: Path) -> list[str]:
    """The command that applies one patch: exactly, once, and without leaving reject files.

    `--forward` makes a patch that is already there a failure and no question (patch(1)).
    """
    return ["patch", "-p1", "--forward", "--fuzz=0", "--reject-file=-", "--no-backup-if-mismatch",
            f"--directory={tree}", f"--input={patch.resolve()}"]


def apply(patches: Iterable[Patch], tree: Path, log: Path) -> None:
    """Apply patches to a source tree, in order; `StepError` on the first that does not fit.

    patch(1) says on stdout what did not fit, and that goes to `log`.
    """
    for each in patches:
        run(patch_argv(each.path, tree), log=log)
