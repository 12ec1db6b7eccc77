"""Checks for what Kata's agent and runtime expect of a guest.

Sources: kata-containers src/agent/src/rpc.rs (iptables paths, modprobe, resolv.conf),
src/agent/src/sandbox.rs (guest hooks), src/agent/policy (its policy), src/agent/rustjail (mounts),
and osbuilder's rootfs.sh.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator

from katagpu.check import kernelconfig
from katagpu.check.context import Guest
from katagpu.check.facts import Fault, Severity

MOUNT_POINTS = ("/proc", "/sys", "/dev", "/run", "/tmp")
AGENT = "/usr/bin/kata-agent"
POLICY = "/etc/kata-opa/default-policy.rego"
# Either of the two directories; the agent tries both, mke2fs is looked up in its PATH.
PROGRAMS = {
    "modprobe": "kmod", "mkfs.ext4": "e2fsprogs",
    "iptables-save": "iptables", "iptables-restore": "iptables",
    "ip6tables-save": "iptables", "ip6tables-restore": "iptables",
}
UNITS = ("kata-agent.service", "kata-containers.target")
UNIT_DIRECTORIES = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")


def image_format(guest: Guest) -> Iterator[Fault]:
    """The kernel mounts the root: its file system and compressor are built in."""
    yield from kernelconfig.unreadable(guest.config, guest.facts.root_format,
                                       guest.facts.compressor)


def image_verity(guest: Guest) -> Iterator[Fault]:
    """The kernel makes the verified root by itself, where the image has a hash tree."""
    if guest.facts.verity:
        yield from kernelconfig.unverifiable(guest.config)


def layout(guest: Guest) -> Iterator[Fault]:
    """/sbin/init, the mount points, /var/run and /etc/resolv.conf are as the agent wants them."""
    root = guest.root
    if not root.is_program("/sbin/init"):
        yield Fault(what="there is no init that may be executed", where="/sbin/init",
                    cure="add systemd-sysv (or another init) to the guest")
    for path in MOUNT_POINTS:
        if not root.is_dir(path):
            yield Fault(what="this mount point is not there", where=path,
                        cure="make this directory: the root is read-only when it boots")
    if root.resolve("/var/run") != root.resolve("/run"):
        yield Fault(what="it does not lead to /run; the agent reads /var/run/cdi", where="/var/run",
                    cure="make /var/run a symlink to /run")
    if root.link_target("/etc/resolv.conf") is not None or not root.is_file("/etc/resolv.conf"):
        yield Fault(what="it is not a regular file; the agent mounts the sandbox's over it",
                    where="/etc/resolv.conf", cure="put an empty regular file there")


def programs(guest: Guest) -> Iterator[Fault]:
    """The programs that the agent calls are where it looks for them."""
    for name, package in PROGRAMS.items():
        directories = ("/sbin",) if name == "modprobe" else ("/usr/sbin", "/sbin")
        places = [f"{directory}/{name}" for directory in directories]
        if not any(guest.root.is_program(place) for place in places):
            yield Fault(what="the agent calls this program and it is not there", where=places[0],
                        cure=f"add the package {package}")


def agent(guest: Guest) -> Iterator[Fault]:
    """The agent, where the recipe gives one, may be executed, and systemd starts it."""
    if not guest.facts.agent:
        return
    if not guest.root.is_program(AGENT):
        yield Fault(what="there is no agent that may be executed", where=AGENT,
                    cure="check what 'agent:' in the recipe names")
    if "package agent_policy" not in guest.root.text(POLICY).splitlines():
        yield Fault(what="there is no policy of the package agent_policy; an agent built with "
                         "agent-policy ends without it, and the guest with the agent",
                    where=POLICY, cure="lay a policy there: Kata's default allows everything")
    init = guest.root.resolve("/sbin/init") or ""
    if not init.endswith("/systemd"):
        return
    for unit in (*UNITS, "tmp.mount"):
        if not any(guest.root.is_file(f"{directory}/{unit}") for directory in UNIT_DIRECTORIES):
            yield Fault(what="Kata's target requires this unit and it is not there",
                        where=f"/usr/lib/systemd/system/{unit}",
                        cure="lay Kata's units into the guest")
    if not any(guest.root.is_file(f"{directory}/{target}.wants/kata-containers.target")
               for directory in UNIT_DIRECTORIES
               for target in ("basic.target", "multi-user.target", "default.target")):
        yield Fault(what="nothing starts kata-containers.target",
                    where="/etc/systemd/system/basic.target.wants/kata-containers.target",
                    cure="link the target there")


def unit_programs(guest: Guest) -> Iterator[Fault]:
    """Each program that a unit for NVIDIA, Kata or CDI starts is at the path the unit names."""
    for path, unit in units(guest):
        if not any(word in path.rpartition("/")[2] for word in ("nvidia", "kata", "cdi")):
            continue
        for line in unit.splitlines():
            key, _, value = line.partition("=")
            program = (value.split() or [""])[0].lstrip("-@:+!|")
            # A leading minus says that the program may fail or be absent. Kata's unit is laid into
            # every guest, and does nothing in one without agent. A base alone has no driver.
            optional = value.strip().startswith("-") or (
                program == AGENT and not guest.facts.agent) or (
                guest.facts.extension is not None and guest.extension is None
                and program.startswith(f"{guest.facts.extension}/"))
            if key.startswith("Exec") and program.startswith("/") and not optional \
                    and not guest.root.is_program(program):
                yield Fault(what=f"it starts {program}, which is not there", where=path,
                            cure=f"add what brings {program}, or correct the unit")


def units(guest: Guest) -> Iterator[tuple[str, str]]:
    """Every unit file of systemd in the guest, with its text."""
    for directory in dict.fromkeys(guest.root.resolve(place) for place in UNIT_DIRECTORIES):
        for path in guest.root.below(directory) if directory is not None else ():
            if path.endswith((".service", ".path", ".target", ".socket", ".timer", ".mount")):
                yield path, guest.root.text(path)


def special_files(guest: Guest) -> Iterator[Fault]:
    """Nothing in /dev is a regular file: a step that wrote to a /dev/null that was not there."""
    for name in guest.root.names("/dev"):
        if stat.S_ISREG(guest.root.mode(f"/dev/{name}")):
            yield Fault(what="it is a regular file", where=f"/dev/{name}",
                        cure="a step ran without device nodes: remove the file",
                        severity=Severity.WARNING)
