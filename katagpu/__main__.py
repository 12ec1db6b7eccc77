"""`python -m katagpu`: doit with this repository's dodo.py."""

from __future__ import annotations

import sys

from katagpu.run import die_cleanly_on_signals


def main(argv: list[str]) -> int:
    """Run doit's command line; its exit status (0, 1: the user can mend it, 2: a step failed)."""
    from doit.cmd_base import ModuleTaskLoader
    from doit.doit_cmd import DoitMain

    from katagpu import tasks

    die_cleanly_on_signals()
    sys.path.insert(0, str(tasks.ROOT))
    import dodo

    return int(DoitMain(ModuleTaskLoader(dodo)).run(argv) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
