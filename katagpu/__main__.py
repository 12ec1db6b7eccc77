"""`python -m katagpu`: doit with this repository's dodo.py, and no doit at all for a no-op.

`python -m katagpu host …` is the command line for GPU hosts (katagpu/host), and no task.
"""

from __future__ import annotations

import sys
from pathlib import Path

from katagpu import log, receipt

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "build_image"


def main(argv: list[str]) -> int:
    """Run a command line; its exit status (0, 1: the user can mend it, 2: a step failed)."""
    if argv[:1] == ["host"]:
        from katagpu.host import cli

        return cli.main(argv[1:], prog="./doitw host")
    said = receipt.nothing_to_do(ROOT, argv, DEFAULT)
    if said is None:
        from katagpu import commands

        return commands.run(argv)
    for line in said:
        log.say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
