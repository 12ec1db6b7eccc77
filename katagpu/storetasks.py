"""Care of the store: what is in it, is it sound, and how to make it smaller."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from katagpu import log, sandbox
from katagpu.errors import StepError, UserError

if TYPE_CHECKING:
    from katagpu.context import Context

DEFAULT_LIMIT = 20_000_000_000


def show(context: Context) -> None:
    """Every action, newest use first: stage, size, age."""
    total = 0
    for digest, used, action in context.store.actions():
        size = sum(output.size for output in action.outputs.values())
        total += size
        age = log.duration(time.time() - used)
        sys.stdout.write(f"{digest[:12]}  {log.size(size):>9}  {age:>12} ago  {action.stage}\n")
    sys.stdout.write(f"{log.size(context.store.usage())} in {context.store.root}\n")


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
    """Drop the least recently used until the store fits KATAGPU_STORE_SIZE (bytes; 20 GB)."""
    text = os.environ.get("KATAGPU_STORE_SIZE", str(DEFAULT_LIMIT))
    if not text.isdigit():
        raise UserError(f"KATAGPU_STORE_SIZE={text} is not a number of bytes")
    context.store.prepare()
    with context.store.lease(exclusive=True) as free:
        if not free:
            raise UserError("a build is using the store", hint="run it when the build has ended")
        freed = context.store.gc(int(text), sandbox.remove)
    sys.stdout.write(f"{log.size(freed)} freed\n")


TASKS: tuple[tuple[str, Callable[[Context], None], str], ...] = (
    ("list", show, "list what is in the store"),
    ("verify", verify, "re-hash every blob of the store, and drop damaged ones"),
    ("gc", collect, "drop the least recently used until the store fits KATAGPU_STORE_SIZE"),
)
