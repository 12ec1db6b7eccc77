"""Digests: of values, of files, and of the code that makes an output.

A key must change whenever the output may change, and at no other time. The code that makes an
output is its stage module with every product module that it imports, by text. The mechanisms below
them are known by a format number instead, so that a better log line does not rebuild a kernel;
`tests/test_keys.py` fails when a mechanism's code changes and its number was not considered.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent

# Raise a number when the mechanism's change can change what a stage puts out.
MECHANISMS: dict[str, int] = {
    "errors": 1,
    "log": 1,
    "run": 1,
    "keys": 1,
    "store": 1,
    "tree": 1,
    "fetch": 1,
    "enter": 1,
    "sandbox": 1,
    "recipe": 1,
    "schema": 1,
    "lock": 1,
    "stages.api": 1,
}

_IMPORT = re.compile(
    r"^\s*(?:from\s+katagpu([\w.]*)\s+import\s+(\([^)]*\)|[^\n#]+)|import\s+katagpu\.([\w.]+))",
    re.MULTILINE)


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def module_path(name: str) -> Path | None:
    """The file of the module `katagpu.<name>`, or None when there is no such module."""
    base = PACKAGE.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def imports(name: str) -> set[str]:
    """The modules of this package that a module imports, wherever in its text."""
    path = module_path(name)
    assert path is not None, name
    found: set[str] = set()
    for package, names, plain in _IMPORT.findall(path.read_text()):
        if plain:
            found.add(plain)
            continue
        prefix = package.lstrip(".")
        children = [word.split(" as ")[0].strip(" ()\n") for word in names.split(",")]
        modules = [".".join(part for part in (prefix, child) if part) for child in children]
        real = [module for module in modules if module and module_path(module) is not None]
        found.update(real or ([prefix] if prefix else []))
    return found


@functools.cache
def code(name: str) -> dict[str, str | int]:
    """What identifies the code of the module `katagpu.<name>`.

    Each module that it reaches, with the digest of its text, or its number for a mechanism.
    """
    known: dict[str, str | int] = {}
    queue = [name]
    while queue:
        module = queue.pop()
        if module in known:
            continue
        if module in MECHANISMS:
            known[module] = MECHANISMS[module]
            continue
        path = module_path(module)
        assert path is not None, module
        known[module] = file_digest(path)
        queue.extend(imports(module))
    return known
