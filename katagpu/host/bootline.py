"""The kernel's command line: what is on it, and how an option gets there on this host.

Options: the kernel's Documentation/admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

from katagpu.host.machine import Machine

INTEL, AMD = "GenuineIntel", "AuthenticAMD"


def options(machine: Machine) -> list[str]:
    """The words of the command line that the kernel was booted with."""
    return (machine.text("/proc/cmdline") or "").split()


def maker(machine: Machine) -> str:
    """The processor's maker, as CPUID has it; empty where it is neither Intel nor AMD."""
    text = machine.text("/proc/cpuinfo") or ""
    return next((name for name in (INTEL, AMD) if name in text), "")


def wanted(machine: Machine) -> list[str]:
    """What turns the IOMMU on, by the processor; AMD's is on where the firmware has it on."""
    return ["intel_iommu=on", "iommu=pt"] if maker(machine) == INTEL else ["iommu=pt"]


def how(machine: Machine, words: list[str]) -> str:
    """How this host gets words onto its command line, as a line for people."""
    line = " ".join(words)
    if machine.programs.find("grubby"):
        return f'grubby --update-kernel=ALL --args="{line}", then reboot'
    if machine.exists("/etc/default/grub"):
        return (f"add `{line}` to GRUB_CMDLINE_LINUX in /etc/default/grub, then update-grub (or "
                "grub2-mkconfig -o /boot/grub2/grub.cfg), and reboot")
    if machine.exists("/etc/kernel/cmdline"):
        return f"add `{line}` to /etc/kernel/cmdline, then kernel-install add-all, and reboot"
    return f"add `{line}` to the kernel's command line in the boot loader, and reboot"
