"""`katagpu-install.pyz`, `katagpu-host.pyz`: modules, and nothing else, in a zip that runs.

They have the same bytes wherever they are made: fixed times, and no compression, whose result
changes with the zlib.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
MODULES = ("__init__.py", "errors.py", "log.py", *(f"release/{name}.py" for name in (
    "__init__", "artifact", "credentials", "host", "install", "installer", "layout", "placed",
    "placement", "reference", "registry", "signature", "source", "wire")))
"""What runs on a host: Python 3.9, standard library only (tests/release/test_pyz.py)."""
HOST_MODULES = ("__init__.py", "errors.py", "log.py", "kataconfig.py", "kataversions.py",
                "verity.py",
                *(f"host/{path.name}" for path in (PACKAGE / "host").glob("*.py")))
"""The same for `katagpu host`."""
SHEBANG = b"#!/usr/bin/env python3\n"
MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit("error: Python 3.9 or newer is needed, and here is " + sys.version.split()[0])

from katagpu.{package} import {module}

sys.exit({module}.main({words}))
"""
TIME = (2025, 1, 1, 0, 0, 0)


def write(path: Path) -> None:
    """Make `katagpu-install.pyz` (zipapp's format)."""
    _pack(path, MODULES, MAIN.format(package="release", module="installer", words=""))


def write_host(path: Path) -> None:
    """Make `katagpu-host.pyz`."""
    _pack(path, HOST_MODULES,
          MAIN.format(package="host", module="cli", words='prog=f"python3 {sys.argv[0]}"'))


def _pack(path: Path, modules: Sequence[str], main: str) -> None:
    with path.open("wb") as stream:
        stream.write(SHEBANG)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, data in [("__main__.py", main.encode()),
                               *((f"katagpu/{name}", (PACKAGE / name).read_bytes())
                                 for name in sorted(modules))]:
                entry = zipfile.ZipInfo(name, TIME)
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                archive.writestr(entry, data)
    path.chmod(0o755)
