"""Kata Containers on a host: its version, and the configuration files with their drop-ins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from katagpu.errors import UserError
from katagpu.host.machine import Machine
from katagpu.host.verdict import Verdict, failed, passed, warned

PROGRAMS = ("/opt/kata/bin/containerd-shim-kata-v2", "/opt/kata/bin/kata-runtime",
            "/usr/local/bin/containerd-shim-kata-v2", "/usr/bin/containerd-shim-kata-v2",
            "/usr/bin/kata-runtime", "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2")
DEFAULTS = "/opt/kata/share/defaults/kata-containers"
GPU_RUNTIMES = (f"{DEFAULTS}/runtimes/qemu-nvidia-gpu",
                f"{DEFAULTS}/runtime-rs/runtimes/qemu-nvidia-gpu-runtime-rs")
PLAIN = ("/etc/kata-containers/configuration.toml",
         "/usr/share/defaults/kata-containers/configuration.toml",
         f"{DEFAULTS}/configuration.toml")
"""Where Kata's Go runtime looks, the first that is there."""
DROP_IN = "50-katagpu.toml"
LARGE_SINCE, SMALL_SINCE = (1, 11, 0), (1, 3, 0)
INSTALL = "https://github.com/kata-containers/kata-containers/releases, or kata-deploy"


@dataclass(frozen=True)
class Configuration:
    """A configuration file in use, links followed, and its drop-ins in the order of reading."""

    path: str
    drop_ins: Sequence[str]


def version(machine: Machine) -> tuple[str, str] | None:
    """Kata's version, and the program or file that says so; None where there is no Kata."""
    text = machine.text("/opt/kata/VERSION")
    if text and re.match(r"\d+\.\d+", text):
        return text.split()[0], "/opt/kata/VERSION"
    for program in PROGRAMS:
        if not machine.exists(program):
            continue
        try:
            said = machine.ask([program, "--version"], timeout=10)
        except UserError:
            continue
        found = re.search(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.]+)?", said.out)
        return (found[0] if found else "unknown"), program
    return None


def configurations(machine: Machine) -> list[Configuration]:
    """What Kata's runtimes read: those for NVIDIA GPUs, and the one that is read without them."""
    found = []
    for directory in GPU_RUNTIMES:
        names = [name for name in machine.names(directory) if name.endswith(".toml")]
        found += [_configuration(machine, f"{directory}/{name}") for name in names]
    plain = next((path for path in PLAIN if machine.exists(path)), None)
    return found + ([_configuration(machine, plain)] if plain else [])


def _configuration(machine: Machine, path: str) -> Configuration:
    real = machine.real(path)
    place = f"{real.rpartition('/')[0]}/config.d"
    return Configuration(real, [f"{place}/{name}" for name in machine.names(place)])


def setting(machine: Machine, found: Configuration, key: str) -> str | None:
    """The last value of a key, whatever its table; enough for keys whose name is unique."""
    value = None
    for path in (found.path, *found.drop_ins):
        for match in re.finditer(rf"^\s*{re.escape(key)}\s*=\s*([^#\n]*)",
                                 machine.text(path) or "", re.M):
            value = match[1].strip().strip('"')
    return value


def check(machine: Machine, *, large: bool) -> Iterator[Verdict]:
    """Kata is there, new enough, and reads a configuration for GPUs."""
    found = version(machine)
    if found is None:
        yield failed("kata", "Kata Containers is not installed", INSTALL)
        return
    number = tuple(int(word) for word in re.findall(r"\d+", found[0])[:3])
    needed = LARGE_SINCE if large else SMALL_SINCE
    if number and number < needed:
        yield failed("kata", f"{found[0]} ({found[1]}) is older than "
                     f"{'.'.join(map(str, needed))}, which GPUs with "
                     f"{'large' if large else 'small'} BARs need", INSTALL)
    elif not number:
        yield warned("kata", f"{found[1]} does not say its version", None)
    else:
        yield passed("kata", f"{found[0]} ({found[1]})")
    files = configurations(machine)
    if not files:
        yield failed("kata-config", "no configuration file is where Kata looks",
                     f"is Kata installed whole? It looks for {', '.join(PLAIN)}")
    for file in files:
        more = "; drop-ins: " + ", ".join(path.rpartition("/")[2] for path in file.drop_ins) \
            if file.drop_ins else "; no drop-ins"
        yield passed("kata-config", f"{file.path}{more}")
    if files and not any(path.endswith(f"/{DROP_IN}") for file in files
                         for path in file.drop_ins):
        yield warned("kata-config", f"no drop-in of katagpu ({DROP_IN}) is read",
                     "katagpu-install.pyz install … places kernel, image and drop-in")
