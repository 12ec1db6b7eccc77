"""The table of all checks, and the one function that runs it."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from katagpu.check import (
    closure,
    dlopen,
    driver,
    extension,
    guest,
    leftovers,
    modindex,
    modules,
    signed,
    toolkit,
    vgpu,
)
from katagpu.check.context import Guest
from katagpu.check.facts import Allow, Fault, Finding, GuestFacts, Severity
from katagpu.errors import StepError


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check: its id, and the function whose docstring says what it protects from."""

    id: str
    find: Callable[[Guest], Iterable[Fault]]


CHECKS = (
    Check(id="elf-damaged", find=closure.damaged),
    Check(id="elf-foreign", find=closure.foreign),
    Check(id="elf-interpreter", find=closure.interpreters),
    Check(id="elf-needed", find=closure.libraries),
    Check(id="elf-version", find=closure.symbol_versions),
    Check(id="elf-cache", find=closure.cache),
    Check(id="driver-dlopen", find=dlopen.driver_libraries),
    Check(id="driver-programs", find=dlopen.programs),
    Check(id="driver-vendor-files", find=dlopen.vendor_files),
    Check(id="driver-version", find=driver.versions),
    Check(id="driver-flavour", find=driver.flavour),
    Check(id="driver-firmware", find=driver.firmware),
    Check(id="driver-rivals", find=driver.rivals),
    Check(id="driver-graphics", find=driver.graphics_module),
    Check(id="module-readable", find=modules.readable),
    Check(id="module-other-kernel", find=modules.other_kernels),
    Check(id="module-vermagic", find=modules.vermagic),
    Check(id="module-crc", find=modules.symbol_versions),
    Check(id="module-build-id", find=modules.build_id),
    Check(id="module-headers", find=modules.headers),
    Check(id="module-symbols", find=modules.symbols),
    Check(id="module-name", find=modules.names),
    Check(id="module-signature", find=signed.signatures),
    Check(id="module-certificate", find=signed.certificates),
    Check(id="depmod-complete", find=modindex.complete),
    Check(id="depmod-closure", find=modindex.closure),
    Check(id="depmod-index", find=modindex.indexes),
    Check(id="depmod-alias", find=modindex.aliases),
    Check(id="modprobe-nvidia", find=modindex.modprobe),
    Check(id="image-format", find=guest.image_format),
    Check(id="image-verity", find=guest.image_verity),
    Check(id="guest-layout", find=guest.layout),
    Check(id="guest-programs", find=guest.programs),
    Check(id="guest-agent", find=guest.agent),
    Check(id="guest-units", find=guest.unit_programs),
    Check(id="guest-dev", find=guest.special_files),
    Check(id="toolkit-cdi", find=toolkit.cdi),
    Check(id="toolkit-hook", find=toolkit.hook),
    Check(id="toolkit-one-mode", find=toolkit.one_mode),
    Check(id="vgpu-config", find=vgpu.config),
    Check(id="vgpu-daemon", find=vgpu.daemon),
    Check(id="vgpu-no-token", find=vgpu.no_token),
    Check(id="extension-mount", find=extension.mounting),
    Check(id="extension-base", find=extension.no_driver),
    Check(id="extension-libraries", find=extension.libraries),
    Check(id="left-links", find=leftovers.dangling_libraries),
    Check(id="left-build-links", find=leftovers.build_links),
    Check(id="left-caches", find=leftovers.caches),
)


def check_guest(root: Path, facts: GuestFacts) -> list[Finding]:
    """Everything that is wrong with an unpacked guest root, errors first.

    The root may belong to other users and lie on a read-only mount. Raises `StepError` where the
    root or one of the kernel's files is not there.
    """
    for path in (root, facts.symvers, facts.kernel_config):
        if not os.access(path, os.R_OK):
            raise StepError(f"the guest cannot be checked: {path} is not there or not readable",
                            hint="build the kernel and the root file system again")
    subject = Guest(root, facts)
    findings = [_finding(check, fault, facts.allow)
                for check in CHECKS for fault in check.find(subject)]
    order = list(Severity)
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def _finding(check: Check, fault: Fault, allowed: Iterable[Allow]) -> Finding:
    for allow in allowed:
        if allow.check == check.id and fnmatch.fnmatchcase(fault.where, allow.where) \
                and fnmatch.fnmatchcase(fault.what, allow.what):
            return Finding(check=check.id, severity=Severity.NOTE, what=fault.what,
                           where=fault.where, cure=f"none needed: {allow.reason}")
    return Finding(check=check.id, severity=fault.severity, what=fault.what, where=fault.where,
                   cure=fault.cure)
