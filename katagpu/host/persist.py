"""`host persist`: what gives GPUs to vfio-pci at every boot, and how it is taken back.

A udev rule (udev(7)) sets driver_override before any driver is loaded by an alias, modprobe.d(5)
has vfio-pci loaded before those, and modules-load.d(5) in any case. A rule names a function by
address and ids: after a change of the hardware it does not take another one.
"""

from __future__ import annotations

import argparse
import errno
import re
from collections.abc import Mapping, Sequence

from katagpu import log
from katagpu.errors import UserError
from katagpu.host import bootline, command, groups, nvidia, pci, vfio
from katagpu.host.command import Answer, Commands
from katagpu.host.machine import Machine, Refused
from katagpu.host.pci import Function

RULES = "/etc/udev/rules.d/60-katagpu-vfio.rules"  # before 80-drivers.rules, which loads drivers
MODPROBE = "/etc/modprobe.d/katagpu-vfio.conf"
LOAD = "/etc/modules-load.d/katagpu-vfio.conf"
FILES = (RULES, MODPROBE, LOAD)
MARK = "# Written by `katagpu host persist`; `katagpu host persist --remove` takes it back.\n"
GPU_MODULES = ("nvidia", "nvidiafb", "nouveau", "nova_core")
CLASS_MODULES: Mapping[str, str] = {"0403": "snd_hda_intel", "0c03": "xhci_pci"}
_RULE = re.compile(r'KERNEL=="([^"]+)", ATTR\{vendor\}=="0x([0-9a-f]{4})", '
                   r'ATTR\{device\}=="0x([0-9a-f]{4})", ATTR\{class\}=="0x([0-9a-f]{6})"')
# udev replaces %S (where sysfs is), %p, %k, and $$.
_SCRIPT = ("d=%S%p; b=%S/bus/pci; "
           "if [ -e $$d/driver ] && [ ! $$d/driver -ef $$b/drivers/{driver} ]; "
           "then echo %k > $$d/driver/unbind; fi; echo %k > $$b/drivers_probe")

Kept = Mapping[str, tuple[str, str]]
"""What is persistent: ids (`10de:20b5`) and class by address."""


def add(commands: Commands) -> None:
    """Its command line."""
    made = command.new(commands, "persist", run, "give GPUs to vfio-pci at every boot")
    made.add_argument("bdf", nargs="*", metavar="BDF",
                      help="a GPU's PCI address (with --remove: none means all)")
    made.add_argument("--remove", action="store_true", help="take it back")
    made.add_argument("--force", action="store_true",
                      help="even where its group has functions of other vendors")


def run(machine: Machine, given: argparse.Namespace) -> Answer:
    """Write the files, or remove them. Raises `UserError`; then all is as before."""
    before = kept(machine)
    after = _less(machine, before, given.bdf) if given.remove else \
        {**before, **_more(machine, given)}
    texts = files(machine, after) if after else {}
    changed = {path: texts.get(path) for path in FILES if _text(machine, path) != texts.get(path)}
    if changed:
        machine.agree(f"{'write' if after else 'remove'} {', '.join(changed)}")
        with machine.together():
            for path, text in changed.items():
                _change(machine, path, text)
    lines = [] if machine.dry_run else _said(after, changed)
    hints = _hints(machine, after) if changed else []
    return Answer([*lines, *hints], {"persistent": sorted(after), "files": sorted(texts),
                                     "changed": sorted(changed), "hints": hints})


def kept(machine: Machine) -> dict[str, tuple[str, str]]:
    """What is persistent now. Raises `UserError` where a file is not ours."""
    for path in FILES:
        text = _text(machine, path)
        if text is not None and not text.startswith(MARK):
            raise UserError(f"{path} is not of katagpu host persist", hint="move it away")
    return {found[1]: (f"{found[2]}:{found[3]}", found[4])
            for found in _RULE.finditer(_text(machine, RULES) or "")}


def _text(machine: Machine, path: str) -> str | None:
    data = machine.raw(path)
    return None if data is None else data.decode(errors="replace")


def _more(machine: Machine, given: argparse.Namespace) -> dict[str, tuple[str, str]]:
    if not given.bdf:
        names = ", ".join(gpu.address for gpu in pci.gpus(machine))
        raise UserError("which GPUs?", hint=f"the GPUs here: {names or 'none'}")
    wanted = [groups.whole(pci.resolve(machine, text)) for text in given.bdf]
    found: list[Function] = []
    for function in wanted:
        if function.group is None:
            log.warn(f"{function} is in no IOMMU group: nothing can use it before that is mended")
            slot = function.address.rpartition(".")[0]
            found += [other for other in pci.functions(machine)
                      if other.address.rpartition(".")[0] == slot and not groups.stays(other)]
        else:
            found += groups.members(machine, [function])
    groups.no_strangers(found, force=given.force)
    return {function.address: (function.ids, function.kind) for function in found}


def _less(machine: Machine, before: Kept, texts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What stays. With a function go those of its group, and of its card where it has none."""
    gone: set[str] = set() if texts else set(before)
    for text in texts:
        address = _address(machine, before, text)
        slot = address.rpartition(".")[0]
        gone |= {address, *(other for other in before if other.rpartition(".")[0] == slot)}
        group = machine.link(f"{pci.DEVICES}/{address}/iommu_group")
        gone |= {member.address for member in pci.members(machine, group)} if group else set()
    if texts and not gone & set(before):
        raise UserError(f"not persistent: {', '.join(texts)}",
                        hint=f"persistent: {', '.join(before) or 'nothing'}")
    return {address: facts for address, facts in before.items() if address not in gone}


def _address(machine: Machine, before: Kept, text: str) -> str:
    """The address that is meant: of what is persistent, its card may be gone; else of a function.
    """
    word = text.strip().lower()
    named = [address for address in before
             if word in (address, address.partition(":")[2]) or nvidia.address(word) == address]
    return named[0] if len(named) == 1 else pci.resolve(machine, text).address


def files(machine: Machine, wanted: Kept) -> dict[str, str]:
    """The files for functions, by path."""
    rules = "".join(
        f'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="{address}", ATTR{{vendor}}=="0x{ids[:4]}", '
        f'ATTR{{device}}=="0x{ids[5:]}", ATTR{{class}}=="0x{kind}", '
        f'ATTR{{driver_override}}="{driver}", RUN{{builtin}}+="kmod load {driver}", '
        f"RUN+=\"/bin/sh -c '{_SCRIPT.format(driver=driver)}'\"\n"
        for address, (ids, kind) in sorted(wanted.items()) for driver in [vfio.driver(ids)])
    drivers = sorted({vfio.driver(ids) for ids, _ in wanted.values()})
    modules = [*GPU_MODULES, *(module for kind, module in CLASS_MODULES.items()
                               if any(facts[1].startswith(kind) for facts in wanted.values()))]
    modprobe = "".join(f"softdep {module} pre: {' '.join(drivers)}\n" for module in modules)
    if all(gpu.address in wanted for gpu in pci.gpus(machine)):
        modprobe += "".join(f"blacklist {module}\n" for module in GPU_MODULES[1:])
    return {RULES: MARK + rules, MODPROBE: MARK + modprobe,
            LOAD: MARK + "".join(f"{module}\n" for module in (*drivers, "vhost_vsock"))}


def _change(machine: Machine, path: str, text: str | None) -> None:
    try:
        if text is None:
            machine.remove(path)
        else:
            machine.place(path, text)
    except Refused as refusal:
        if refusal.number == errno.EROFS:
            raise Refused(refusal.what, number=refusal.number, hint=(
                "/etc is read-only here. An immutable distribution takes such files through its "
                "own configuration: `--dry-run` prints them")) from None
        raise


def _said(after: Kept, changed: Mapping[str, str | None]) -> list[str]:
    if not changed:
        return [f"persistent already: {', '.join(sorted(after)) or 'nothing'}"]
    return [*(f"{'removed' if text is None else 'written'}: {path}"
              for path, text in changed.items()),
            f"persistent from the next boot on: {', '.join(sorted(after)) or 'nothing'}"]


def _hints(machine: Machine, after: Kept) -> list[str]:
    """What is to be done by hand."""
    found = []
    for program, line in (("update-initramfs", "update-initramfs -u -k all"),
                          ("dracut", "dracut --force --regenerate-all"),
                          ("mkinitcpio", "mkinitcpio -P")):
        if machine.programs.find(program):
            found.append(f"the initrd has a copy of modprobe.d: {line}")
            break
    there = bootline.options(machine)
    lacking = [word for word in bootline.wanted(machine) if word not in there]
    on = bool(machine.names("/sys/kernel/iommu_groups"))
    if after and not on:
        found.append(f"the IOMMU is off: {bootline.how(machine, lacking)}" if lacking else
                     groups.IOMMU_OFF)
    gpus = [address for address, facts in sorted(after.items()) if facts[1][:2] == "03"]
    if gpus and on:
        found.append(f"now, without a reboot: katagpu host bind {' '.join(gpus)}")
    if not after and any(machine.names(f"{pci.DRIVERS}/{driver}") for driver in vfio.DRIVERS):
        found.append("what is bound to vfio-pci stays so until it is given back (katagpu host "
                     "unbind)")
    return found
