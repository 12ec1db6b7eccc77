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
    "files": 1,
    "inside": 1,
    "tree": 2,
    "fetch": 1,
    "enter": 2,
    "sandbox": 2,
    "recipe": 1,
    "schema": 1,
    "lock": 1,
    "stages.api": 1,
    # these judge and explain; what they let pass is made by others
    "nvbranches": 1,
    "nvcauses": 1,
    "nvoutcome": 1,
    "nvpreflight": 1,
}

_IMPORT = re.compile(
    r"^\s*(?:from\s+katagpu([\w.]*)\s+import\s+(\((?:[^)#]|#[^\n]*)*\)|[^\n#]+)|import\s+katagpu\.([\w.]+))",
    re.MULTILINE)
_NOISE = re.compile(r"#[^\n]*|[()\\]")


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


def readable_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; of a file that cannot be read, why, which is no digest."""
    try:
        return file_digest(path)
    except OSError as refusal:
        return str(refusal.strerror)


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
        prefix = plain or package.lstrip(".")
        for name in _NOISE.sub("", names).split(","):
            child = name.split(" as ")[0].strip()
            module = ".".join(part for part in (prefix, child) if part)
            # a name that is no module is one of its package's
            found.add(module if module_path(module) is not None else prefix)
    return {name for name in found if name and module_path(name) is not None}


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
