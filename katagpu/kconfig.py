"""Kernel configuration fragments, and the audit of what became of them.

Kconfig drops a request whose dependencies are not met without an error. The audit compares each
requested value with the final `.config`, and explains a loss from the kernel's own Kconfig files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

from katagpu.errors import StepError, UserError
from katagpu.kconfig_explain import Config, explain
from katagpu.kconfig_tree import SOURCE_ARCH, Tree, read_tree

_SET = re.compile(r"CONFIG_(\w+)=(.*)")
_UNSET = re.compile(r"# CONFIG_(\w+) is not set")
_NOUVEAU = "DRM_NOUVEAU"


class Kind(StrEnum):
    """What a finding is about."""

    LOST = "lost"
    UNKNOWN = "unknown symbol"
    CONFLICT = "conflict"
    OVERRIDE = "override"
    ASSERTION = "assertion"
    ALLOWED = "allowed"
    STALE = "stale allowance"


@dataclass(frozen=True, kw_only=True)
class Request:
    """One line of a fragment. `value` is `n` for `# CONFIG_X is not set`, else as written."""

    symbol: str
    value: str
    path: Path
    line: int

    @property
    def where(self) -> str:
        """The place, as editors understand it."""
        return f"{self.path}:{self.line}"

    def __str__(self) -> str:
        return f"{self.where}: CONFIG_{self.symbol}={self.value}"


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """Permission for a request to end as `got`. `kernels` are globs over the kernel's version."""

    symbol: str
    got: str
    reason: str
    kernels: tuple[str, ...]
    path: Path


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of the audit. `request` is missing where no fragment is to blame."""

    kind: Kind
    symbol: str
    message: str
    request: Request | None = None

    @property
    def fatal(self) -> bool:
        """Whether it fails the build; the others are only said."""
        return self.kind not in (Kind.OVERRIDE, Kind.ALLOWED)


def parse_fragment(path: Path) -> list[Request]:
    """Read one fragment; `UserError` with file and line for anything but settings and comments."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as failure:
        raise UserError(f"the kernel fragment {path} cannot be read: {failure}") from None
    found = []
    for number, line in enumerate((each.strip() for each in lines), start=1):
        if match := _UNSET.fullmatch(line):
            found.append(Request(symbol=match[1], value="n", path=path, line=number))
        elif match := _SET.fullmatch(line):
            value = match[2].strip()
            if not re.fullmatch(r'"[^"]*"|\S+', value):
                raise UserError(f"{path}:{number}: {value!r} is not a value for CONFIG_{match[1]}",
                                hint='write y, m, n, a number, or "text" in double quotes')
            found.append(Request(symbol=match[1], value=value, path=path, line=number))
        elif line and not line.startswith("#"):
            raise UserError(f"{path}:{number}: not a kernel setting: {line!r}",
                            hint="write CONFIG_NAME=value or # CONFIG_NAME is not set")
    return found


def load_fragments(paths: Iterable[Path]) -> list[Request]:
    """All requests in the order in which they are merged: where two differ, the later one holds."""
    return [request for path in paths for request in parse_fragment(path)]


def load_allowances(path: Path) -> list[Allowance]:
    """Read the allow-list. `UserError` for an entry without a reason or with unknown fields."""
    import yaml

    try:
        entries = yaml.safe_load(path.read_text()) or []
    except (OSError, yaml.YAMLError) as failure:
        raise UserError(f"the allow-list {path} cannot be read: {failure}") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: an allow-list is a list of entries")
    return [_allowance(entry, f"{path}: entry {number}", path)
            for number, entry in enumerate(entries, start=1)]


def _allowance(entry: object, where: str, path: Path) -> Allowance:
    fields = {"symbol", "got", "reason", "kernels"}
    if not isinstance(entry, dict) or set(entry) != fields:
        raise UserError(f"{where} must have exactly these fields: {', '.join(sorted(fields))}")
    if not isinstance(entry["reason"], str) or not entry["reason"].strip():
        raise UserError(f"{where} (CONFIG_{entry['symbol']}) gives no reason",
                        hint="say why this kernel may do without it")
    # YAML reads a bare n or y of some dialects as a boolean.
    got = {True: "y", False: "n"}.get(entry["got"], entry["got"])
    kernels = entry["kernels"]
    if not isinstance(kernels, list) or not kernels or not all(isinstance(k, str) for k in kernels):
        raise UserError(f"{where}: kernels is a list of version patterns, such as '6.12.*'")
    return Allowance(symbol=str(entry["symbol"]).removeprefix("CONFIG_"), got=str(got),
                     reason=entry["reason"].strip(), kernels=tuple(kernels), path=path)


def read_config(path: Path) -> dict[str, str]:
    """The settings of a `.config`, values as written; symbols that are not set are left out."""
    try:
        lines = path.read_text().splitlines()
    except OSError as failure:
        raise StepError(f"the kernel configuration {path} cannot be read: {failure}") from None
    return {match[1]: match[2] for line in lines if (match := _SET.fullmatch(line))}


def kernel_version(kernel_tree: Path) -> str:
    """`VERSION.PATCHLEVEL.SUBLEVEL` and EXTRAVERSION, from the head of the kernel's Makefile."""
    head = (kernel_tree / "Makefile").read_text()[:2000]
    parts = {key: re.search(rf"^{key} *=[ \t]*(\S*)", head, re.MULTILINE)
             for key in ("VERSION", "PATCHLEVEL", "SUBLEVEL", "EXTRAVERSION")}
    version, patch, sub, extra = (match[1] if match else "" for match in parts.values())
    return f"{version}.{patch}.{sub}{extra}"


def same_value(wanted: str, got: str) -> bool:
    """Whether two values of a symbol mean the same; numbers may be written differently."""
    if wanted == got:
        return True
    try:
        return int(wanted, 0) == int(got, 0)
    except ValueError:
        return False


def audit(requests: Sequence[Request], config: Path, kernel_tree: Path, arch: str,
          allow: Sequence[Allowance]) -> list[Finding]:
    """Compare what was asked for with what the final configuration is.

    Reads text only; no makefile or compiler runs. The kernel's Kconfig files (a second of work) are
    read when something was lost. Raises `UserError` for an architecture that is not supported.
    """
    if arch not in SOURCE_ARCH:
        raise UserError(f"no kernel configuration for {arch}",
                        hint=f"supported: {', '.join(SOURCE_ARCH)}")
    values = read_config(config)
    version = kernel_version(kernel_tree)
    last, findings = _settle(requests)
    lost = [each for each in last.values()
            if not same_value(each.value, values.get(each.symbol, "n"))]
    tree = read_tree(kernel_tree, arch) if lost else Tree()
    final = Config(values, tree)
    usable = [each for each in allow if any(fnmatchcase(version, glob) for glob in each.kernels)]
    for request in lost:
        findings.append(_lost(request, final, last, usable, version))
    kept = set(last) - {request.symbol for request in lost}
    findings += [
        Finding(kind=Kind.STALE, symbol=each.symbol,
                message=f"{each.path}: the allowance for CONFIG_{each.symbol} is no longer needed: "
                        f"Linux {version} gives it as asked; remove the entry")
        for each in usable if each.symbol in kept]
    return findings + _assertions(values)


def _settle(requests: Sequence[Request]) -> tuple[dict[str, Request], list[Finding]]:
    """The last request for each symbol, and where requests disagree.

    Within a directory a disagreement is an error; a fragment of another directory (a feature, the
    user's own) may override an earlier one.
    """
    last: dict[str, Request] = {}
    findings = []
    for request in requests:
        earlier = last.get(request.symbol)
        if earlier is not None and not same_value(earlier.value, request.value):
            override = earlier.path.parent != request.path.parent
            verb = "overrides" if override else "contradicts"
            findings.append(Finding(
                kind=Kind.OVERRIDE if override else Kind.CONFLICT, symbol=request.symbol,
                request=request, message=f"{request} {verb} {earlier.value} of {earlier.where}"))
        last[request.symbol] = request
    return last, findings


def _lost(request: Request, final: Config, last: Mapping[str, Request],
          allow: Sequence[Allowance], version: str) -> Finding:
    name, got = request.symbol, final.values.get(request.symbol, "n")
    denied = {each.symbol: each.where for each in last.values() if each.value == "n"}
    if not final.known(name):
        near = difflib.get_close_matches(name, final.tree.definitions, n=3, cutoff=0.75)
        guess = f" (did you mean {' or '.join(near)}?)" if near else ""
        kind, why = Kind.UNKNOWN, f"no such symbol in Linux {version}{guess}"
    else:
        picked = _picked_later(request, final, last)
        if picked is not None:
            return Finding(kind=Kind.OVERRIDE, symbol=name, request=request,
                           message=f"{request} gives way to {picked} (one choice)")
        kind, why = Kind.LOST, explain(name, request.value, final, denied)
    message = f"{request} was asked for, but the kernel's configuration has {got}: {why}"
    for each in allow:
        if each.symbol == name and same_value(each.got, got):
            return Finding(kind=Kind.ALLOWED, symbol=name, request=request,
                           message=f"{message}; allowed: {each.reason}")
    return Finding(kind=kind, symbol=name, request=request, message=message)


def _picked_later(request: Request, final: Config, last: Mapping[str, Request]) -> Request | None:
    """The later request for another member of the same choice, when that one won."""
    if request.value != "y":
        return None
    order = list(last)
    for definition in final.tree.definitions[request.symbol]:
        for member in definition.choice.members if definition.choice else []:
            other = last.get(member)
            if (member != request.symbol and final.text(member) == "y" and other is not None
                    and other.value == "y" and other.path.parent != request.path.parent
                    and order.index(member) > order.index(request.symbol)):
                return other
    return None


def _assertions(values: Mapping[str, str]) -> list[Finding]:
    """What must hold for each guest, whatever the fragments say."""
    findings = []
    if values.get("64BIT") != "y":
        findings.append(Finding(
            kind=Kind.ASSERTION, symbol="64BIT",
            message="the kernel's configuration is for a 32-bit kernel (CONFIG_64BIT is not y): "
                    "make was run without ARCH=x86_64"))
    if values.get(_NOUVEAU, "n") != "n":
        findings.append(Finding(
            kind=Kind.ASSERTION, symbol=_NOUVEAU,
            message=f"CONFIG_{_NOUVEAU}={values[_NOUVEAU]}: nouveau would take the GPU before "
                    "NVIDIA's driver does; remove it from the fragments"))
    return findings


def require(findings: Sequence[Finding], shipped: Path) -> None:
    """Raise one error for all fatal findings, or return.

    It is a `UserError` when a fragment outside `shipped` (the directory of our own fragments) asked
    for what cannot be, else a `StepError`.
    """
    fatal = [each for each in findings if each.fatal]
    if not fatal:
        return
    text = "\n".join(f"  {each.message}" for each in fatal)
    theirs = [each for each in fatal if each.request is not None
              and not each.request.path.is_relative_to(shipped)]
    count = f"{len(fatal)} finding{'s' * (len(fatal) > 1)}"
    raise (UserError if theirs else StepError)(
        f"the kernel's configuration is not what the fragments ask for ({count}):\n{text}",
        hint="set what is missing in the same fragment, or take the line out; what a kernel "
             "may do without goes to kernel-configs/allow.yaml, with the reason")
