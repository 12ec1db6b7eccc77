"""The table of checks for a person, from their docstrings. `python -m katagpu.boot.docs` writes it.

It stands between two marks in docs/boot.md; a test compares it with the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from katagpu.boot.table import TABLE, name, title

BEGIN = "<!-- checks: written by `python -m katagpu.boot.docs docs/boot.md` -->"
END = "<!-- end of checks -->"


def rows() -> str:
    """A line for each check: its id, the machines that it runs in, its title."""
    machines: dict[str, list[str]] = {}
    titles: dict[str, str] = {}
    for machine, checks in TABLE.items():
        for check in checks:
            machines.setdefault(name(check), []).append(machine)
            titles[name(check)] = title(check)
    lines = [f"| `{each}` | {', '.join(found)} | {titles[each]} |"
             for each, found in machines.items()]
    return "\n".join(["| id | machine | what it proves |", "|---|---|---|", *lines])


def updated(text: str) -> str:
    """The document with the table of today."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{rows()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(updated(document.read_text()))
