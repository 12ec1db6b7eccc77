"""Kata's configuration on a host: which file is read, what is merged into it, what is effective.

The rules are those of Kata's two loaders, src/runtime/pkg/katautils/config.go and
src/libs/kata-types/src/config/drop_in.rs: links to the main file are followed; then every entry of
config.d beside it is read, by name; tables merge, all else (arrays, `kernel_params`) is replaced.
tests/host/test_kataloader.py and test_kataloader_rust.py ask the loaders themselves.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from katagpu.errors import UserError
from katagpu.host import tomlreader
from katagpu.host.machine import Machine
from katagpu.kataconfig import default_handler
from katagpu.kataversions import (
    OWN_DIRECTORIES,
    Shim,
    Version,
    has_history,
    known,
    parse,
    reads_drop_ins,
)

DEFAULTS = "share/defaults/kata-containers"
PREFIXES = ("/opt/kata", "/usr/local", "/usr")
RUST = "runtime-rs"
PROGRAMS: Mapping[Shim, tuple[str, ...]] = {
    Shim.GO: ("/opt/kata/bin/containerd-shim-kata-v2", "/opt/kata/bin/kata-runtime",
              "/usr/local/bin/containerd-shim-kata-v2", "/usr/bin/containerd-shim-kata-v2",
              "/usr/local/bin/kata-runtime", "/usr/bin/kata-runtime"),
    Shim.RUST: ("/opt/kata/runtime-rs/bin/containerd-shim-kata-v2",)}


@dataclass(frozen=True)
class Target:
    """A runtime of Kata on this host: `config` is its configuration file, links followed."""

    shim: Shim
    version: Version
    config: str

    @property
    def directory(self) -> str:
        """Where the file is."""
        return self.config.rpartition("/")[0]

    @property
    def drop_ins(self) -> str:
        """Where its drop-ins are read, if they are."""
        return f"{self.directory}/config.d"

    @property
    def handler(self) -> str | None:
        """Its name at containerd, where kata-deploy made the directory: of one of its own
        runtimes, or of one that the user added (`customRuntimes`), whose name is the user's.
        """
        if not self.alone:
            return None
        name = self.directory.rpartition("/")[2]
        return name if "/custom-runtimes/" in self.config else f"kata-{name}"

    @property
    def alone(self) -> bool:
        """Is the directory that of this runtime, so that its drop-ins are for no other?"""
        return "/runtimes/" in self.config or "/custom-runtimes/" in self.config


@dataclass(frozen=True)
class Effective:
    """What a runtime sees. `origin` has the file that a value is from, by (table, key)."""

    files: tuple[str, ...]
    values: dict[str, Any]
    origin: Mapping[tuple[str, str], str]
    problems: tuple[tuple[str, str], ...] = field(default=())  # what is wrong, and the cure

    def table(self, name: str) -> Mapping[str, Any]:
        """A table by its dotted name; an empty one where it is not there."""
        found: Any = self.values
        for part in name.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else {}


def installed(machine: Machine, shim: Shim) -> tuple[str, str] | None:
    """The release that is installed, as text, and the file or program that says so."""
    text = machine.text("/opt/kata/VERSION") or ""
    if re.match(r"\d+\.\d+", text):
        return text.split()[0], "/opt/kata/VERSION"
    for program in PROGRAMS[shim]:
        if not machine.exists(program):
            continue
        with contextlib.suppress(UserError):  # it hangs, or cannot be started: the next one may
            said = machine.ask([program, "--version"], timeout=10)
            found = re.search(r"(?:version|kata-runtime)\s*:\s*(\d[^\s,]*)", said.out)
            if said.status == 0 and found:
                return found[1], program
    return None


def version(machine: Machine, shim: Shim) -> Version:
    """The release of Kata that is installed. Raises `UserError` where it cannot be told."""
    found = installed(machine, shim)
    if found is None:
        raise UserError("which release of Kata is installed cannot be told",
                        hint="install Kata (kata-deploy, or the static tarball below /opt/kata), "
                             "or say --kata-version X.Y.Z")
    return parse(found[0])


def places(shim: Shim, named: str | None, there: Version) -> Iterator[str]:
    """Where a runtime's configuration file may be, the likeliest first.

    A runtime that is `named` is that one, or none.
    """
    handler = named or default_handler(shim)
    level = f"/{RUST}" if shim is Shim.RUST else ""
    for prefix in PREFIXES:
        base = f"{prefix}/{DEFAULTS}"
        if there >= OWN_DIRECTORIES:
            yield f"{base}{level}/runtimes/{handler}/configuration-{handler}.toml"
        yield f"{base}{level}/configuration-{handler}.toml"
    if named:
        return
    yield f"/etc/kata-containers{level}/configuration.toml"
    for prefix in PREFIXES:
        for name in ("configuration.toml", "configuration-qemu.toml"):
            yield f"{prefix}/{DEFAULTS}{level}/{name}"


def _custom(machine: Machine, shim: Shim, handler: str) -> Iterator[str]:
    """The configuration of a runtime that the user added at kata-deploy.

    Its file is a copy of that of one of kata-deploy's, under that one's name
    (install_custom_runtime_configs in kata-deploy's artifacts/install.rs).
    """
    for prefix in PREFIXES:
        place = f"{prefix}/{DEFAULTS}/custom-runtimes/{handler}"
        for name in machine.names(place):
            if re.fullmatch(r"configuration-.+\.toml", name) and (RUST in name) is (
                    shim is Shim.RUST):
                yield f"{place}/{name}"


def targets(machine: Machine, *, shim: Shim | None = None, config: str | None = None,
            kata: str | None = None, handler: str | None = None) -> list[Target]:
    """The runtimes that are configured: those that were asked for, or all that are there.

    Raises `UserError` where there is none.
    """
    if config is not None:
        kind = shim or (Shim.RUST if RUST in config else Shim.GO)
        if not machine.exists(config):
            raise UserError(f"{config}: there is no such file")
        there = parse(kata) if kata else version(machine, kind)
        return [Target(kind, there, machine.real(config))]
    found, last = [], None
    for kind in [shim] if shim else list(Shim):
        try:
            there = parse(kata) if kata else version(machine, kind)
        except UserError as failure:
            last = failure
            continue
        own = _custom(machine, kind, handler) if handler else ()
        for path in (*places(kind, handler, there), *own):
            if machine.exists(path):
                found.append(Target(kind, there, machine.real(path)))
                break
    if not found:
        raise last or UserError(
            f"Kata has no runtime {handler} on this host" if handler else
            "Kata has no configuration file on this host",
            hint="--config FILE names its configuration" if handler else
            "install Kata, or say --config FILE")
    return found


def directories(machine: Machine) -> Iterator[str]:
    """Where Kata and kata-deploy have configurations of runtimes, whatever their names."""
    for level in ("", f"/{RUST}"):
        yield f"/etc/kata-containers{level}"
        for base in (f"{prefix}/{DEFAULTS}{level}" for prefix in PREFIXES):
            yield base
            for kind in ("runtimes", "custom-runtimes"):
                yield from (f"{base}/{kind}/{name}" for name in machine.names(f"{base}/{kind}"))


def read(machine: Machine, path: str) -> dict[str, Any]:
    """A TOML file. Raises `UserError` with the line that is wrong."""
    data = machine.raw(path)
    if data is None:
        raise UserError(f"{path} cannot be read", hint="run it as root: sudo")
    try:
        text = data.decode()
    except UnicodeDecodeError as failure:
        line = data[:failure.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: this is no UTF-8") from None
    try:
        return loads(text)
    except tomlreader.Wrong as failure:
        lines = text.splitlines()
        shown = lines[failure.line - 1].strip() if failure.line <= len(lines) else ""
        raise UserError(f"{path}:{failure.line}: {failure.why}\n    {failure.line} | {shown}",
                        hint="mend that line: Kata starts no container until it is") from None


def loads(text: str, *, old: bool = sys.version_info < (3, 11)) -> dict[str, Any]:
    """TOML by tomllib, and by our own reader where Python has none. Raises `Wrong`."""
    if old:
        return tomlreader.loads(text)
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as failure:
        why, _, place = str(failure).rpartition(" (at ")
        found = re.match(r"line (\d+)", place)
        line = int(found[1]) if found else text.rstrip("\n").count("\n") + 1
        raise tomlreader.Wrong(why or str(failure), line) from None


def effective(machine: Machine, target: Target, *, without: Container[str] = ()) -> Effective:
    """What a runtime sees. Raises `UserError` where it would not get that far.

    `without`: names of drop-ins that are left out.
    """
    values = read(machine, target.config)
    origin = {(table, key): target.config for table, key in _keys(values)}
    files, problems = [target.config], []
    if reads_drop_ins(target.shim, target.version):
        for name in sorted(machine.names(target.drop_ins), key=lambda word: word.encode()):
            if name in without:
                continue
            path = f"{target.drop_ins}/{name}"
            link = machine.path(path, follow=False).is_symlink()
            if not machine.path(path).is_file() or (link and target.shim is Shim.RUST):
                problems.append((f"{path} is no regular file, and Kata reads all that is in there",
                                 f"move {path} away: no container starts while it is there"))
                continue
            found = read(machine, path)
            merge(values, found)
            files.append(path)
            for table, key in _keys(found):
                origin[table, key] = path
                problems += _unknown(target, path, table, key)
    elif machine.names(target.drop_ins):
        problems.append((f"Kata {target.version} does not read {target.drop_ins}",
                         "set the values in the configuration file, or install Kata 2.5 or newer"))
    return Effective(tuple(files), values, origin, tuple(problems))


def _unknown(target: Target, path: str, table: str, key: str) -> Iterator[tuple[str, str]]:
    if target.shim is Shim.GO and table != "runtime" and has_history(table, key) \
            and not known(target.shim, target.version, table, key):
        yield (f"{path} sets {key} in [{table}], which Kata {target.version} does not know: no "
               "container starts", f"remove {key} from {path}")


def merge(base: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Merge as both loaders do: tables into tables, anything else in place of what was there."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def _keys(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The keys of all tables, with the tables' dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{above}.{key}" if above else key)
        else:
            yield above, key
