"""`python -m katagpu`: doit with this repository's dodo.py, and no doit at all for a no-op.

`python -m katagpu host …` is the command line for GPU hosts (katagpu/host), and no task.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from katagpu import log, receipt

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    """Run a command line; its exit status (0, 1: the user can mend it, 2: a step failed)."""
    if argv[:1] == ["host"]:
        return _host(argv[1:])
    said = receipt.nothing_to_do(ROOT, argv, receipt.DEFAULT)
    if said is None:
        from katagpu import commands

        return commands.run(argv)
    for line in said:
        log.say(line)
    return 0


def _host(words: list[str]) -> int:
    """The host's command line, which runs where it was typed."""
    import shlex

    from katagpu import parameters
    from katagpu.host import cli

    there = parameters.caller()
    try:
        os.chdir(there)
    except OSError as refusal:
        log.error(f"cannot go back to {there}: {refusal.strerror}\n"
                  "  hint: run it in another directory")
        return 1
    doitw = "./doitw" if there.resolve() == ROOT else shlex.quote(str(ROOT / "doitw"))
    return cli.main(words, prog=f"{doitw} host")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
