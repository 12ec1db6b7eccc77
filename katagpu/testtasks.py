"""The task of the tests: the suite, then the default build and what looks at it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from katagpu import log, parameters, tasks
from katagpu.tasks import DEFAULT, Task, plain

ON_A_BUILD = ("tests/default", "tests/boot", "tests/host")
"""Where the tests are that need the default build (`built`), or a QEMU that it names (`qemu`)."""


def test() -> Task:
    """The fast suite, then the default build and its checks; with all=1 everything."""

    def run() -> None:
        from katagpu import hostsetup
        from katagpu.current import context

        everything = parameters.flag(context().values, "all")
        hostsetup.ensure_tests()
        log.say("> the test suite" + (", with the long tests" if everything else ""))
        chosen = "" if everything else " and not slow"
        tasks.call(["pytest", "-q", *_side_by_side(), "-m", f"not built and not qemu{chosen}",
                    "tests"], "the suite failed")
        tasks.call(["python", "-m", "katagpu", DEFAULT], "the default build failed")
        log.say("> the checks of the default guest, in virtual machines too")
        with _machines() as machines:
            tasks.call(["pytest", "-q", "-m", f"(built or qemu){chosen}", *ON_A_BUILD],
                       "the default guest's checks failed", **machines)

    return plain(run, "the fast suite, then the default build and its checks (all=1: long ones)")


def _side_by_side() -> list[str]:
    """pytest's words for one process for each processor; the tests of a file stay together."""
    from katagpu.stages.api import jobs

    return ["-n", str(jobs()), "--dist", "loadfile"] if jobs() > 1 else []


@contextlib.contextmanager
def _machines() -> Iterator[dict[str, str]]:
    """What tests need for virtual machines, by its variable: a QEMU, and the default kernel."""
    from katagpu.context import Context

    default = Context(tasks.ROOT, {}, environment={})
    with default.store.lease():
        yield {"KATAGPU_TEST_QEMU": default.booting.command(),
               "KATAGPU_TEST_KERNEL": str(next(default.directory.glob("vmlinux-*")))}
