"""Consistency checks of a finished guest root, before anything is called built.

    findings = check_guest(root, facts)
    raise_on(findings)

The root is only read: nothing in it is run, and no link leads out of it.
"""

from __future__ import annotations

from katagpu.check.facts import (
    Allow,
    Capability,
    Driver,
    Fault,
    Finding,
    Flavour,
    GuestFacts,
    RootFormat,
    Severity,
    Toolkit,
    raise_on,
)
from katagpu.check.table import CHECKS, Check, check_guest

__all__ = ["CHECKS", "Allow", "Capability", "Check", "Driver", "Fault", "Finding", "Flavour",
           "GuestFacts", "RootFormat", "Severity", "Toolkit", "check_guest", "raise_on"]
