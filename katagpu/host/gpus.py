"""`host gpus`: which NVIDIA GPUs are here, and what of each matters for giving it to a guest."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from katagpu.host import command, nvidia, pci, pciids, vfio
from katagpu.host.command import Answer, Commands
from katagpu.host.machine import Machine
from katagpu.host.pci import Bar, Function

HEAD = ("BDF", "ID", "BARS", "CLASS", "DRIVER", "GROUP", "NUMA", "SR-IOV", "MIG", "vGPU", "VFIO",
        "NAME")


def add(commands: Commands) -> None:
    """Its command line."""
    command.new(commands, "gpus", run, "list the NVIDIA GPUs of this host")


def run(machine: Machine, given: argparse.Namespace) -> Answer:
    """List them."""
    gpus = pci.gpus(machine)
    if not gpus:
        return Answer(["no NVIDIA GPU is here"], {"gpus": [], "nvswitches": []})
    names = pciids.load(machine, pci.NVIDIA)
    modes = nvidia.mig(machine, gpus)
    found = [describe(machine, gpu, names, modes) for gpu in gpus]
    lines = command.table(HEAD, [_row(entry) for entry in found])
    lines += _groups(found)
    for entry in found:
        lines += _notes(entry)
    if names is None:
        lines.append("names are not known: this host has no pci.ids (Debian: the package pci.ids; "
                     "Red Hat: hwdata)")
    switches = pci.switches(machine)
    lines += [f"NVSwitch {switch}, driver {switch.driver or 'none'}, group {switch.group}: a guest "
              "with all GPUs of the board needs it too" for switch in switches]
    return Answer(lines, {"gpus": found, "nvswitches": [
        {"bdf": switch.address, "vendor": switch.vendor, "device": switch.device,
         "driver": switch.driver, "iommu_group": switch.group and int(switch.group)}
        for switch in switches]})


def describe(machine: Machine, gpu: Function, names: dict[str, str] | None,
             modes: dict[str, str]) -> dict[str, Any]:
    """All of a GPU, as `--json` has it."""
    others = [] if gpu.group is None else [
        member for member in pci.members(machine, gpu.group) if member.address != gpu.address]
    state = vfio.vgpu(machine, gpu)
    return {
        "bdf": gpu.address, "vendor": gpu.vendor, "device": gpu.device, "class": gpu.kind,
        "name": (names or {}).get(gpu.device), "bars": [_bar(bar) for bar in gpu.bars],
        "large": gpu.large, "driver": gpu.driver, "driver_override": gpu.override,
        "iommu_group": None if gpu.group is None else int(gpu.group),
        "group_members": [{"bdf": member.address, "id": member.ids, "class": member.kind,
                           "bridge": member.bridge, "driver": member.driver}
                          for member in others],
        "numa_node": gpu.numa, "reset_methods": gpu.resets,
        "sriov": {"total": gpu.total_vfs, "enabled": len(gpu.vfs), "functions": list(gpu.vfs)},
        "mig": modes.get(gpu.address),
        "vgpu": {"interface": state.interface.value if state.interface else None,
                 "made": list(state.made)},
        "vfio": vfio.nodes(machine, gpu)}


def _bar(bar: Bar) -> dict[str, Any]:
    return {**asdict(bar), "large": bar.large, "bits": 64 if bar.wide else 32}


def _row(entry: dict[str, Any]) -> list[str]:
    def word(value: object) -> str:
        return "-" if value is None else str(value)

    bars = " ".join(f"{bar['number']}:{pci.amount(bar['size']) if bar['size'] else '?'}"
                    f"{'/64' if bar['wide'] else ''}{'' if bar['assigned'] else '!'}"
                    for bar in entry["bars"])
    sriov, vgpu = entry["sriov"], entry["vgpu"]
    return [entry["bdf"], f"[{entry['vendor']}:{entry['device']}]", bars or "-",
            "large" if entry["large"] else "small", word(entry["driver"]),
            word(entry["iommu_group"]), word(entry["numa_node"]),
            f"{sriov['enabled']}/{sriov['total']}" if sriov["total"] else "-", word(entry["mig"]),
            f"{vgpu['interface']}:{len(vgpu['made'])}" if vgpu["interface"] else "-",
            " ".join(entry["vfio"]) or "-", word(entry["name"])]


def _groups(found: list[dict[str, Any]]) -> list[str]:
    """What else is in the groups, each group once."""
    lines: dict[int, str] = {}
    for entry in found:
        others = [f"{member['bdf']} [{member['id']}] "
                  f"({'a bridge, which stays' if member['bridge'] else _driver(member)})"
                  for member in entry["group_members"]]
        if others:
            lines.setdefault(entry["iommu_group"], f"  group {entry['iommu_group']}: "
                             f"{entry['bdf']}, with {', '.join(others)}")
    return list(lines.values())


def _driver(member: dict[str, Any]) -> str:
    return str(member["driver"] or "no driver")


def _notes(entry: dict[str, Any]) -> list[str]:
    """What a column has no room for."""
    lines = []
    if any(not bar["assigned"] for bar in entry["bars"]):
        lines.append(f"  {entry['bdf']}: ! is a BAR without an address: katagpu host check says "
                     "more")
    lines += [f"  {entry['bdf']}: vGPU {made}" for made in entry["vgpu"]["made"]]
    return lines
