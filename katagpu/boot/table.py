"""The table of all checks, by the machine that they run in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from katagpu.boot import agent, gpus, system, toolkit
from katagpu.boot.session import Session

Check = Callable[[Session], list[str]]
"""A check: its evidence. Raises `Failed` or `Skipped`. The docstring's first line is its title."""

COLD = "cold-plug"
HOT = "hot-plug"

TABLE: Mapping[str, tuple[Check, ...]] = {
    # As the drop-in has it: the GPU is there at the start, q35's ACPI handles hot-plug.
    COLD: (
        system.ready, system.release, system.build_id, system.config, system.root, system.verity,
        system.extension, system.units, agent.agent_runs, agent.agent_answers,
        agent.agent_details, gpus.cold, gpus.cold_addresses, gpus.modules, gpus.vermagic,
        gpus.compiled_against, system.signatures, gpus.nouveau, gpus.cold_bound, gpus.cold_model,
        gpus.nodes, gpus.firmware, toolkit.driver_libraries, toolkit.nvml, toolkit.programs,
        toolkit.hook, toolkit.cdi_cold, gpus.small_hot_plug, system.libraries, system.kernel_log),
    # The GPUs come while the guest runs; PCI Express' own handler takes them.
    HOT: (
        system.ready, gpus.none_yet, gpus.hot_plug, gpus.hot_addresses, gpus.hot_bound,
        toolkit.cdi_hot, gpus.second, toolkit.cdi_again, gpus.unplug, system.units,
        system.kernel_log),
}


def name(check: Check) -> str:
    """A check's id."""
    return check.__name__.replace("_", "-")


def title(check: Check) -> str:
    """What a check proves, in a sentence."""
    return (check.__doc__ or "").strip().splitlines()[0]
