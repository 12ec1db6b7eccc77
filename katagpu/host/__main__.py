"""`python -m katagpu.host`."""

from __future__ import annotations

import sys

from katagpu.host import cli

if __name__ == "__main__":
    sys.exit(cli.main())
