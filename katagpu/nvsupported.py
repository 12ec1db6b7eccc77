"""The GPUs that NVIDIA's package says it drives: `supported-gpus/supported-gpus.json` in a `.run`.

It has an object for each id (and for some subsystems); those with a `legacybranch` are listed only
to name the older branch that still drives them.
"""

from __future__ import annotations

import json
import re
from typing import Any

FILE = "supported-gpus/supported-gpus.json"
_DEVICE = re.compile(r"0x([0-9A-Fa-f]{4})")


def ids(text: str) -> list[str]:
    """The device ids, as `lspci -n` writes them; none where the file is of another form."""
    try:
        chips: Any = json.loads(text)["chips"]
    except (ValueError, KeyError, TypeError):
        return []
    found = set()
    for chip in chips if isinstance(chips, list) else []:
        match = _DEVICE.fullmatch(str(chip.get("devid"))) if isinstance(chip, dict) else None
        if match and "legacybranch" not in chip:
            found.add(match[1].lower())
    return sorted(found)
