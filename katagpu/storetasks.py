"""Care of the store: what is in it, is it sound, and how to make it smaller."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from katagpu import log, sandbox
from katagpu.errors import StepError, UserError
from katagpu.stages.api import CCACHE_SIZE

if TYPE_CHECKING:
    from katagpu.context import Context

DEFAULT_LIMIT = 20_000_000_000


PARTS = {
    "blobs": "what was made, and fetched packages",
    "unpacked": "unpacked copies; cache:gc drops them",
    "partial": "downloads that were broken off; cache:gc drops them",
}
"""What is in the store's larger directories."""


def show(context: Context) -> None:
    """Every action, newest use first: stage, size, age. Then what takes the space."""
    most = _limit()
    try:
        actions = list(context.store.actions())
    except OSError as refusal:  # a name that is too long, no right to look into it
        raise UserError(f"cannot list the store {context.store.root}: {refusal.strerror}",
                        hint="set KATAGPU_STORE to a directory that you may read") from None
    for digest, used, action in actions:
        size = sum(output.size for output in action.outputs.values())
        age = log.duration(time.time() - used)
        sys.stdout.write(f"{digest[:12]}  {log.size(size):>9}  {age:>12} ago  {action.stage}\n")
    usage = context.store.usage()
    ccache = usage.pop("ccache", 0)
    for name, what in PARTS.items():
        sys.stdout.write(f"{log.size(usage.get(name, 0)):>23}  {what}\n")
    other = sum(size for name, size in usage.items() if name not in PARTS)
    sys.stdout.write(
        f"{log.size(other):>23}  package lists, records and scratch space\n"
        f"{log.size(ccache):>23}  ccache; not counted below, it keeps each compiler's part under "
        f"{CCACHE_SIZE}B by itself\n"
        f"{log.size(sum(usage.values()))} in {context.store.root}; cache:gc makes that at most "
        f"{log.size(most)} (KATAGPU_STORE_SIZE)\n")


def verify(context: Context) -> None:
    """Re-hash every blob. Raises `StepError` when some were damaged; they are dropped."""
    context.store.prepare()
    damaged = context.store.verify()
    if damaged:
        raise StepError(f"{len(damaged)} damaged blobs were dropped: "
                        + ", ".join(digest[:12] for digest, _found in damaged),
                        hint="the next build makes them again")
    sys.stdout.write("every blob is what its name says\n")


def collect(context: Context) -> None:
    """Drop the least recently used until the store fits KATAGPU_STORE_SIZE (bytes; 20 GB).

    All of it counts but ccache. A build that runs holds the lease, and then nothing is dropped.
    """
    most = _limit()
    context.store.prepare()
    with context.store.lease(exclusive=True) as free:
        if not free:
            raise UserError("a build is using the store", hint="run it when the build has ended")
        freed = context.store.gc(most, sandbox.remove)
    sys.stdout.write(f"{log.size(freed)} freed\n")


def _limit() -> int:
    text = os.environ.get("KATAGPU_STORE_SIZE", str(DEFAULT_LIMIT))
    if not text.isdecimal():
        raise UserError(f"KATAGPU_STORE_SIZE={text} is not a number of bytes",
                        hint=f"digits alone, for example KATAGPU_STORE_SIZE={DEFAULT_LIMIT}")
    return int(text)


TASKS: tuple[tuple[str, Callable[[Context], None], str], ...] = (
    ("list", show, "list what is in the store"),
    ("verify", verify, "re-hash every blob of the store, and drop damaged ones"),
    ("gc", collect, "drop the least recently used until the store fits KATAGPU_STORE_SIZE"),
)
