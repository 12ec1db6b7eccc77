"""`host configure`: let Kata's runtimes on this host boot the guest, with ports for its GPUs.

A drop-in of our own where a runtime has a directory of its own (kata-deploy, since 3.27). Where the
directory has configurations of other runtimes, which would read the drop-in too, or where Kata
reads none (before 2.5): a configuration of our own, made of the one that is in use. A file that is
not ours is never written to.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from katagpu import kataconfig
from katagpu.errors import UserError
from katagpu.host import command, katacheck, katafiles, kataguest, pci, tomlwriter
from katagpu.host.command import Answer, Commands
from katagpu.host.katafiles import Target
from katagpu.host.kataguest import Guest
from katagpu.host.machine import Machine
from katagpu.kataconfig import Bar, KataSettings, Plug, Port
from katagpu.kataversions import NEWEST, Shim, reads_drop_ins

MARK = "# Written by `katagpu host configure`"
DROP_IN = "55-katagpu-host.toml"
INSTALLED = "50-katagpu.toml"  # what katagpu-install.pyz places
OWN = "/etc/kata-containers/katagpu"
OWN_NAMES = {Shim.GO: "configuration.toml", Shim.RUST: "configuration-runtime-rs.toml"}
SOURCE = "# made of "
WORD = re.compile(r'(?:[^\s"]|"[^"]*"?)+')  # as the kernel splits its command line
# Words of Kata's own guest: its init, its cgroups, its image (KERNELPARAMS_NV and KERNELPARAMS of
# src/runtime/Makefile, 3.2 to 4.1).
KATA_S = ("devtmpfs.mount=0", "systemd.unified_cgroup_hierarchy=1", *kataconfig.KERNEL_PARAMS)
KATA_S_IMAGE = ("root=", "rootfstype=", "rootflags=", "rootfs_verity.", "cc_rootfs_verity.",
                "dm-mod.create=")


@dataclass(frozen=True)
class Goal:
    """A runtime, what its guest needs, and the file of ours that says so."""

    target: Target
    settings: KataSettings
    path: str
    own: bool  # a whole configuration, and no drop-in

    @property
    def effective(self) -> Target:
        """The runtime as it is once the file is there."""
        return replace(self.target, config=self.path) if self.own else self.target


def add(commands: Commands) -> None:
    """Its command line."""
    made = command.new(commands, "configure", run,
                       "let Kata boot the installed guest, with ports for this host's GPUs")
    options(made)
    made.add_argument("--check", action="store_true",
                      help="only compare what Kata sees with what the guest needs")
    made.add_argument("--remove", action="store_true", help="remove what this command wrote")


def options(made: argparse.ArgumentParser) -> None:
    """What chooses the guest, Kata's runtime, and the GPUs."""
    made.add_argument("--release", metavar="DIR",
                      help="the guest: a release's directory, or out/RECIPE/DRIVER (default: the "
                           "installed release)")
    made.add_argument("--shim", choices=list(map(str, Shim)), help="one runtime (default: all)")
    made.add_argument("--handler", metavar="NAME",
                      help="the runtime's name at kata-deploy (default: qemu-nvidia-gpu)")
    made.add_argument("--config", metavar="FILE", help="Kata's configuration file")
    made.add_argument("--kata-version", metavar="X.Y.Z", help="the release of Kata")
    made.add_argument("--functions", type=command.positive, metavar="N",
                      help="how many PCI functions one sandbox gets (default: all GPUs' groups)")
    made.add_argument("--bar", choices=list(map(str, Bar)), help="how large the GPUs' BARs are")
    made.add_argument("--plug", choices=list(map(str, Plug)), default="cold",
                      help="with the sandbox's start, or later (default: cold)")
    made.add_argument("--port", choices=list(map(str, Port)), default="root-port",
                      help="what GPUs are plugged into (default: root-port)")


def run(machine: Machine, given: argparse.Namespace) -> Answer:
    """Run it."""
    if given.remove:
        return _removed(machine, given)
    guest, goals, notes = plan(machine, given)
    if given.check:
        return _checked(machine, guest, goals, notes)
    for goal in goals:
        _must_be_ours(machine, goal.path)
        katafiles.effective(machine, goal.target)  # what cannot be read is not added to
    texts = {goal.path: _text(machine, goal) for goal in goals}
    new = {path: text for path, text in texts.items() if machine.raw(path) != text.encode()}
    if new:
        machine.agree(f"write {', '.join(new)}")
    with machine.together():
        for path, text in new.items():
            machine.place(path, text)
    lines = [f"{goal.path}: Kata {goal.target.version} ({goal.target.shim}), "
             f"{goal.settings.ports} port(s)" for goal in goals]
    if machine.dry_run:
        return Answer([*lines, *notes], _data(guest, goals, notes, []))
    after = _checked(machine, guest, goals, notes)
    return replace(after, lines=[*lines, *after.lines,
                                 "`katagpu host snippets` has what containerd and Kubernetes need"])


def plan(machine: Machine, given: argparse.Namespace) -> tuple[Guest, list[Goal], list[str]]:
    """What is to be: the guest, a goal for each runtime, and what has to be said of it.

    Raises `UserError` before anything is changed.
    """
    guest = kataguest.load(machine, given.release)
    functions, bar = _gpus(machine, given)
    goals, notes = [], []
    if functions > kataconfig.MAX_PORTS:
        notes.append(f"one sandbox gets {kataconfig.MAX_PORTS} of the {functions} functions at "
                     "most: Kata has no more ports")
    port = Port(given.port)
    plug = Plug.HOT if port is Port.BRIDGE else Plug(given.plug)
    for target in _targets(machine, given, given.kata_version):
        settings = replace(
            guest.on(target, functions=functions, bar=bar, plug=plug, port=port),
            host_kernel_params=_words(machine, target))
        notes += [f"{target.shim}: {line}" for line in kataconfig.losses(settings)]
        goals.append(Goal(target, settings, *_place(machine, target)))
    return guest, goals, notes


def _words(machine: Machine, target: Target) -> tuple[str, ...]:
    """Kernel parameters that are the host's: agent.https_proxy of kata-deploy, the user's own.

    A file of ours would replace them with all of the string. Those of our files are of a guest.
    """
    try:
        found = katafiles.effective(machine, target, without=(INSTALLED, DROP_IN))
    except UserError:  # who reads it for its own sake says so
        return ()
    text = str(found.table(kataconfig.HYPERVISOR).get("kernel_params", ""))
    return tuple(word for word in WORD.findall(text)
                 if word not in KATA_S and not word.startswith(KATA_S_IMAGE))


def _place(machine: Machine, target: Target) -> tuple[str, bool]:
    """The file of ours for a runtime; is it a whole configuration, and no drop-in?"""
    if reads_drop_ins(target.shim, target.version) and _alone(machine, target):
        return f"{target.drop_ins}/{DROP_IN}", False
    return f"{OWN}/{OWN_NAMES[target.shim]}", True


def in_use(machine: Machine, target: Target) -> Target:
    """A runtime with the configuration that it reads: ours, where that is there."""
    path, own = _place(machine, target)
    return replace(target, config=path) if own and machine.exists(path) else target


def defaults() -> argparse.Namespace:
    """What `options` gives where none is said."""
    empty = argparse.ArgumentParser()
    options(empty)
    return empty.parse_args([])


def _targets(machine: Machine, given: argparse.Namespace, version: str | None) -> list[Target]:
    return katafiles.targets(machine, shim=Shim(given.shim) if given.shim else None,
                             config=given.config, kata=version, handler=given.handler)


def _alone(machine: Machine, target: Target) -> bool:
    """Is no other runtime configured in that directory?"""
    others = {machine.real(f"{target.directory}/{name}")
              for name in machine.names(target.directory)
              if name.startswith("configuration") and name.endswith(".toml")}
    return target.alone or others <= {target.config}


def _gpus(machine: Machine, given: argparse.Namespace) -> tuple[int, Bar]:
    """How many functions, and how large their BARs are."""
    gpus = pci.gpus(machine)
    if not gpus and (given.functions is None or given.bar is None):
        raise UserError("this host has no NVIDIA GPU to count",
                        hint="--functions N --bar large say what it will have")
    groups = {gpu.group or gpu.address: gpu for gpu in gpus}
    count = 0
    for gpu in groups.values():
        members = pci.members(machine, gpu.group) if gpu.group else []
        count += sum(1 for one in members if not one.bridge) or 1
    bar = Bar.LARGE if any(gpu.large for gpu in gpus) else Bar.SMALL
    return given.functions or count, Bar(given.bar) if given.bar else bar


def _text(machine: Machine, goal: Goal) -> str:
    """The file's text."""
    head = [f"{MARK}; write settings of your own into another file, it is written anew.",
            f"# For Kata {goal.target.version}, {goal.target.shim}; renew it with each release of "
            "the guest and of Kata.", *(f"# {line}" for line in kataconfig.losses(goal.settings))]
    whole = kataconfig.tables(goal.settings)
    if not goal.own:
        installed = machine.text(f"{goal.target.drop_ins}/{INSTALLED}") or ""
        part = f'"{goal.settings.kernel}"' in installed
        return "\n".join(head) + "\n" + kataconfig.render_tables(
            kataconfig.host_tables(goal.settings) if part else whole,
            () if part else goal.settings.extensions)
    found = katafiles.effective(machine, goal.target)
    values = found.values
    katafiles.merge(values, katafiles.loads(
        kataconfig.render_tables(whole, goal.settings.extensions)))
    table = values["hypervisor"]["qemu"]
    for key in ("image", "initrd"):  # the oldest releases take an empty name for a name
        if table.get(key) == "":
            del table[key]
    head += [f"{SOURCE}{path} {_digest(machine, path)}" for path in found.files]
    return "\n".join(head) + "\n\n" + tomlwriter.dumps(values)


def _digest(machine: Machine, path: str) -> str:
    return "sha256:" + hashlib.sha256(machine.raw(path) or b"").hexdigest()


def _must_be_ours(machine: Machine, path: str) -> None:
    found = machine.text(path)
    if found is not None and not found.startswith(MARK):
        raise UserError(f"{path} is there, and was not written by this command",
                        hint="move it away; settings of your own belong into a file beside it")


def _checked(machine: Machine, guest: Guest, goals: list[Goal], notes: list[str]) -> Answer:
    lines, data, fine = [], [], True
    for goal in goals:
        use = in_use(machine, goal.target)
        found = differences(machine, goal)
        lines.append(f"{'ok' if not found else 'differs'}: {use.config}, Kata {use.version} "
                     f"({use.shim}), guest {guest.name}")
        for difference in found:
            lines += [f"  {line}" for line in difference.lines]
            data.append({"config": use.config, "what": difference.what, "cure": difference.cure,
                         "table": difference.table, "key": difference.key, "has": difference.has,
                         "wants": difference.wants, "origin": difference.origin})
        fine = fine and not found
    return Answer([*lines, *(f"note: {note}" for note in notes)],
                  _data(guest, goals, notes, data), fine)


def differences(machine: Machine, goal: Goal) -> list[katacheck.Difference]:
    """What a runtime sees that is not what the guest needs. Raises `UserError` for bad files."""
    use = in_use(machine, goal.target)
    return [*katacheck.differences(machine, use, goal.settings), *_stale(machine, goal),
            *_leftover(machine, goal, use)]


def _leftover(machine: Machine, goal: Goal, use: Target) -> Iterator[katacheck.Difference]:
    """Kernel parameters in our file that neither this guest has nor another file."""
    table, key = kataconfig.HYPERVISOR, "kernel_params"
    found = katafiles.effective(machine, use)
    if found.origin.get((table, key)) != goal.path:
        return
    has, wants = str(found.table(table)[key]), goal.settings.kernel_params
    more = [word for word in has.split() if word not in wants.split()]
    if more and set(wants.split()) <= set(has.split()):  # what is lacking has a line already
        yield katacheck.Difference(
            f"[{table}] {goal.path} has {key} of another guest, or of a file that has changed: "
            f"{' '.join(more)}", "katagpu host configure", table, key, has, wants, goal.path)


def _stale(machine: Machine, goal: Goal) -> Iterator[katacheck.Difference]:
    """Files that our own configuration was made of, and that have changed since."""
    for line in (machine.text(goal.path) or "").splitlines() if goal.own else ():
        if line.startswith(SOURCE):
            path, _, digest = line[len(SOURCE):].rpartition(" ")
            if _digest(machine, path) != digest:
                yield katacheck.Difference(f"{goal.path} was made of {path}, which has changed "
                                           "since", "katagpu host configure")


def _data(guest: Guest, goals: list[Goal], notes: list[str],
          differences: list[dict[str, Any]]) -> dict[str, Any]:
    return {"guest": {"place": guest.place, "recipe": guest.manifest.get("recipe"),
                      "driver": guest.manifest.get("driver")},
            "runtimes": [{"shim": str(goal.target.shim), "kata": str(goal.target.version),
                          "config": goal.effective.config, "file": goal.path,
                          "ports": goal.settings.ports, "bar": str(goal.settings.bar)}
                         for goal in goals],
            "notes": notes, "differences": differences}


def _removed(machine: Machine, given: argparse.Namespace) -> Answer:
    """Remove our files; the runtimes are as they were before."""
    ours = [path for path in _written(machine, given)
            if (machine.text(path) or "").startswith(MARK)]
    if ours:
        machine.agree(f"remove {', '.join(ours)}")
        with machine.together():
            for path in ours:
                machine.remove(path)
    if ours and machine.dry_run:
        return Answer()
    return Answer([f"removed: {path}" for path in ours] or ["there is nothing of this command"],
                  {"removed": ours})


def _written(machine: Machine, given: argparse.Namespace) -> list[str]:
    """Where our files may be: of the runtime that is named, else of all that Kata can have."""
    found: list[str] = []
    chosen = given.shim or given.handler or given.config
    with contextlib.suppress(UserError):  # Kata may be gone by now
        for target in _targets(machine, given, given.kata_version or str(NEWEST)):
            own = f"{OWN}/{OWN_NAMES[target.shim]}"
            found += [f"{target.drop_ins}/{DROP_IN}",
                      *([own] if f"{SOURCE}{target.config} " in (machine.text(own) or "") else [])]
    if given.shim and not (given.handler or given.config):  # Kata may be gone by now
        found.append(f"{OWN}/{OWN_NAMES[Shim(given.shim)]}")
    if not chosen:
        found += [f"{OWN}/{name}" for name in OWN_NAMES.values()]
        found += [f"{place}/config.d/{DROP_IN}" for place in katafiles.directories(machine)]
    return list({machine.real(path): path for path in found}.values())
