"""Checks of the container toolkit: the CDI programs, or the hook, and never both.

The agent loses guest hooks as soon as a CDI specification brings hooks of its own
(append_guest_hooks in src/agent/src/rpc.rs), so with both modes at once neither can be relied on.
"""

from __future__ import annotations

import re
import stat
import tomllib
from collections.abc import Iterator

from katagpu.check.context import Guest
from katagpu.check.facts import Fault, Toolkit
from katagpu.check.guest import units

HOOKS = "/usr/share/oci/hooks"
HOOK = f"{HOOKS}/prestart/nvidia-container-toolkit.sh"
# The second is the older name; packages bring both.
HOOK_PROGRAMS = ("/usr/bin/nvidia-container-runtime-hook", "/usr/bin/nvidia-container-toolkit")
PROGRAM_IN_SCRIPT = re.compile(r"(?<![\w.:-])/(?:usr/)?s?bin/[\w.-]+")
HOOK_CONFIG = "/etc/nvidia-container-runtime/config.toml"
CLI = "/usr/bin/nvidia-container-cli"


def cdi(guest: Guest) -> Iterator[Fault]:
    """Mode CDI: the programs that the specification will name are at those very paths."""
    if guest.facts.toolkit is not Toolkit.CDI:
        return
    for path in guest.facts.toolkit_programs:
        if not guest.root.is_program(path):
            yield Fault(what="the CDI specification needs this program at this path", where=path,
                        cure="install the toolkit there")
    if not list(_generators(guest)):
        yield Fault(what="no unit calls 'nvidia-ctk cdi generate', so the agent waits for "
                         "/var/run/cdi in vain", where="/usr/lib/systemd/system",
                    cure="lay the CDI unit into the guest")


def hook(guest: Guest) -> Iterator[Fault]:
    """Mode hook: the script is one that the agent takes, and what it calls is there.

    The agent passes over symlinks and files that nobody may execute, and ignores a hook that fails.
    """
    if guest.facts.toolkit is not Toolkit.HOOK:
        return
    root = guest.root
    if not root.is_file(HOOK):
        yield Fault(what="there is no hook", where=HOOK, cure="lay the hook's script there")
        return
    if root.link_target(HOOK) is not None:
        yield Fault(what="it is a symlink, which the agent passes over", where=HOOK,
                    cure="put the script itself there")
    if not stat.S_IMODE(root.mode(HOOK)) & 0o111:
        yield Fault(what="nobody may execute it, so the agent passes over it", where=HOOK,
                    cure="set its mode to 0755")
    first, _, script = root.text(HOOK).partition("\n")
    shell = (first.removeprefix("#!").split() or [""])[0]
    if not first.startswith("#!") or not root.is_program(shell):
        yield Fault(what=f"its first line names no program of the guest: {first[:60]!r}",
                    where=HOOK, cure="begin the script with #!/bin/sh, and ship /bin/sh")
    yield from _hook_programs(guest, script)
    yield from _legacy(guest)


def _hook_programs(guest: Guest, script: str) -> Iterator[Fault]:
    lines = [line for line in script.splitlines() if not line.lstrip().startswith("#")]
    needed = {CLI, *PROGRAM_IN_SCRIPT.findall("\n".join(lines))}
    if not needed & set(HOOK_PROGRAMS) and not any(map(guest.root.is_program, HOOK_PROGRAMS)):
        needed.add(HOOK_PROGRAMS[0])
    for path in sorted(needed):
        if not guest.root.is_program(path):
            yield Fault(what="the hook needs this program and it is not there", where=path,
                        cure="take the toolkit and libnvidia-container from packages: the Go "
                             "module alone does not have nvidia-container-cli")


def _legacy(guest: Guest) -> Iterator[Fault]:
    try:
        config = tomllib.loads(guest.root.text(HOOK_CONFIG))
    except tomllib.TOMLDecodeError as wrong:
        yield Fault(what=f"it cannot be read: {wrong}", where=HOOK_CONFIG,
                    cure="write it with 'nvidia-ctk config'")
        return
    section = config.get("nvidia-container-runtime", {})
    mode = section.get("mode") if isinstance(section, dict) else None
    if mode != "legacy":
        yield Fault(what=f"the runtime's mode is {mode or 'not set'}; the hook works in mode "
                         "legacy only", where=HOOK_CONFIG,
                    cure='set mode = "legacy" under [nvidia-container-runtime]')


def one_mode(guest: Guest) -> Iterator[Fault]:
    """Nothing of the mode that was not chosen is in the guest."""
    mode = guest.facts.toolkit
    if mode is not Toolkit.HOOK:
        for path in guest.root.below(HOOKS):
            if stat.S_IMODE(guest.root.mode(path)) & 0o111:
                yield Fault(what=f"an OCI hook, although the toolkit's mode is '{mode}': the agent "
                                 "loses it as soon as CDI brings hooks", where=path,
                            cure="leave the hook out, or choose the mode 'hook'")
    if mode is not Toolkit.CDI:
        for path in _generators(guest):
            yield Fault(what=f"this unit writes a CDI specification, although the toolkit's mode "
                             f"is '{mode}': its hooks displace those of the guest", where=path,
                        cure="leave the unit out, or choose the mode 'cdi'")


def _generators(guest: Guest) -> Iterator[str]:
    """The units that write a CDI specification, themselves or by a script they start."""
    for path, unit in units(guest):
        programs = [(line.partition("=")[2].split() or [""])[0].lstrip("-@:+!|")
                    for line in unit.splitlines() if line.startswith("Exec")]
        scripts = [guest.root.text(program) for program in programs
                   if program.startswith("/") and _is_script(guest, program)]
        if any("cdi generate" in text for text in (unit, *scripts)):
            yield path


def _is_script(guest: Guest, program: str) -> bool:
    real = guest.root.resolve(program)
    return real is not None and guest.root.is_file(real) \
        and guest.root.host(real).stat().st_size < 1 << 16
