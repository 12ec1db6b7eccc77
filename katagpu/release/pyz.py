"""`katagpu-install.pyz`, the installer as one file: these modules, and nothing else, in a zip.

It has the same bytes wherever it is made: fixed times, and no compression, whose result changes
with the zlib.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
MODULES = ("__init__.py", "errors.py", "log.py", *(f"release/{name}.py" for name in (
    "__init__", "artifact", "credentials", "host", "install", "installer", "layout", "registry",
    "signature", "source", "wire")))
"""What runs on a host: Python 3.9, standard library only (tests/release/test_pyz.py)."""
SHEBANG = b"#!/usr/bin/env python3\n"
MAIN = """\
import sys

if sys.version_info < (3, 9):
    sys.exit("error: Python 3.9 or newer is needed, and here is " + sys.version.split()[0])

from katagpu.release import installer

sys.exit(installer.main())
"""
TIME = (2025, 1, 1, 0, 0, 0)


def write(path: Path) -> None:
    """Make the file (zipapp's format)."""
    with path.open("wb") as stream:
        stream.write(SHEBANG)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, data in [("__main__.py", MAIN.encode()),
                               *((f"katagpu/{name}", (PACKAGE / name).read_bytes())
                                 for name in sorted(MODULES))]:
                entry = zipfile.ZipInfo(name, TIME)
                entry.create_system, entry.external_attr = 3, 0o644 << 16
                archive.writestr(entry, data)
    path.chmod(0o755)
