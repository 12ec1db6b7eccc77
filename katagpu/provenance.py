"""What a driver's modules were compiled against, recorded beside them.

A kernel's release says nothing of its configuration, and without MODVERSIONS nothing in a module
does. The record has a line for each of two digests (SHA-256, two spaces, its name):

    settings        the kernel's configuration: every CONFIG_NAME=value, sorted, one a line, a
                    string without its quotes. The headers have it as include/config/auto.conf
                    (their package has no .config since Linux 6.12), the kernel's build as .config,
                    and a running kernel as /proc/config.gz
    Module.symvers  that file's bytes: which symbols the kernel exports, and whence
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from katagpu.keys import file_digest

RECORD = "driver-headers"
"""Its name in /lib/modules/<release>; depmod reads names that end in .ko, and its own."""

SETTINGS = "settings"
SYMVERS = "Module.symvers"
_ESCAPED = re.compile(r"\\(.)")


def settings(config: str) -> str:
    """The digest of the settings in the text of a .config or an auto.conf, which say the same.

    auto.conf has another order, and since Linux 5.17 its strings as they are (confdata.c).
    """
    lines = sorted(_plain(line) for line in config.splitlines() if line.startswith("CONFIG_"))
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def _plain(line: str) -> str:
    name, _, value = line.partition("=")
    if len(value) > 1 and value[0] == value[-1] == '"':
        value = _ESCAPED.sub(r"\1", value[1:-1])
    return f"{name}={value}"


def of(config: Path, symvers: Path) -> str:
    """The record of a kernel with this configuration and these exports."""
    return (f"{settings(config.read_text(errors='replace'))}  {SETTINGS}\n"
            f"{file_digest(symvers)}  {SYMVERS}\n")


def record(headers: Path) -> str:
    """The record of a directory of headers (/usr/src/linux-headers-<release>)."""
    return of(headers / "include/config/auto.conf", headers / "Module.symvers")


def read(text: str) -> dict[str, str]:
    """The digests of a record by their names; nothing of what is no record."""
    rows = (line.split("  ", 1) for line in text.splitlines())
    return {row[1]: row[0] for row in rows if len(row) == 2}
