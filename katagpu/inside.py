"""Calls a function in the namespace that owns a root's files, seeing the root as a directory.

Started by `stages.api.Build.inside`, which names the function; the stage that asks imports it,
so that its code is in the stage's key.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """A dataclass as a dictionary, for JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in an answer")


def main(path: str) -> None:
    """Answer one request: module, function, root and arguments; the answer goes to a file."""
    request = json.loads(Path(path).read_text())
    function = getattr(importlib.import_module(request["module"]), request["function"])
    answer = function(Path(request["root"]), **request["arguments"])
    Path(request["answer"]).write_text(json.dumps(answer, default=plain))
