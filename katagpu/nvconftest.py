"""Results of NVIDIA's `conftest.sh`, kept between builds like compiler output.

Half of a module build is some 300 tiny compilations that probe the kernel. They depend on the
script, the rules that call it, the kernel headers and the compiler, not on the driver's flavour;
make takes the results that are there, as long as they are newer than what they were made from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from katagpu.files import sync
from katagpu.keys import digest, file_digest

DIRECTORY = "conftest"
RULES = ("conftest.sh", "Kbuild", "header-presence-tests.mk")
# The order in which make expects times: each depends on those before it (Kbuild's rules).
ORDER = ("uts_release", "header_presence", "headers.h", "compile-tests")


def key(source: Path, *others: str) -> str:
    """What the results depend on: the rules, the flags that modules add, and `others`."""
    flags = sorted(line.strip() for path in source.glob("*/*.Kbuild")
                   for line in path.read_text().splitlines() if "ccflags" in line.lower())
    return digest([*(file_digest(path) for path in _rules(source)), flags, *others])


def _rules(source: Path) -> list[Path]:
    """The rules that this branch has: `header-presence-tests.mk` came with 545 or so."""
    return [path for name in RULES if (path := source / name).exists()]


def restore(cache: Path, source: Path) -> bool:
    """Put kept results into the source tree; False when there are none."""
    if not cache.is_dir():
        return False
    target = source / DIRECTORY
    shutil.copytree(cache, target)
    newest = max(path.stat().st_mtime for path in _rules(source))
    for rank, name in enumerate(ORDER, 1):
        for path in _files(target / name):
            os.utime(path, (newest + rank, newest + rank))
    return True


def seconds(source: Path, since: float) -> float:
    """How long the probes of a build took that began at `since`: objects wait for all of them."""
    times = [path.stat().st_mtime for name in ORDER for path in _files(source / DIRECTORY / name)]
    return max(0.0, max(times, default=since) - since)


def keep(source: Path, cache: Path, scratch: Path) -> None:
    """Keep the results of a finished build; an earlier result for the same key stays."""
    if cache.exists():
        return
    part = scratch / "conftest-results"
    for name in ORDER:
        for path in _files(source / DIRECTORY / name):
            place = part / path.relative_to(source / DIRECTORY)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            sync(place)  # an empty result after a power cut would be taken for an answer
    if not part.is_dir():
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    sync(part)
    try:
        part.rename(cache)
    except OSError:
        if not cache.is_dir():
            raise


def _files(path: Path) -> Sequence[Path]:
    if path.is_file():
        return [path]
    return [found for found in path.rglob("*") if found.is_file()]
