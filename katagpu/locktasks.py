"""The tasks of locks: `lock`, and `fetch`, which brings into the store what a lock names."""

from __future__ import annotations

from katagpu import log, parameters
from katagpu.errors import UserError
from katagpu.tasks import Task, plain


def lock() -> Task:
    """Make the committed lock, or move parts of it."""

    def resolve(update: str) -> None:
        from katagpu import relock
        from katagpu.current import guests as current

        guests = current()
        first = guests.contexts[0]
        update = update or first.values.get("update", "")
        committed = first.locks.committed
        draft = parameters.flag(first.values, "draft")
        if draft and committed.path.exists():
            raise UserError(f"draft=1 resolves under out/, and {committed} is what builds take",
                            hint=f"`./doitw recipe={first.plain.name} lock` makes that anew; or "
                                 "remove it")
        if not (draft or guests.all or first.other):
            relock.relock(first, update)
            return
        if update:
            raise UserError(f"update= moves parts of {committed}, and this lock is under out/",
                            hint="leave out driver=, EXTRA_PKGS and draft=; or leave out update=")
        _resolve()

    return plain(resolve, "resolve into recipes/NAME.lock (--update PART; draft=1: under out/)",
                 task_dep=["_host"], params=[{
                     "name": "update", "long": "update", "default": "", "metavar": "PART",
                     "help": "the same as update=PART"}])


def _resolve() -> None:
    """Resolve anew under out/."""
    from katagpu.current import guests
    from katagpu.several import worst

    refused = guests().lock(anew=True)
    if refused:
        error = worst(refused)
        for other in {str(one): one for one in refused}.values():
            if str(other) != str(error):
                log.error(f"lock: {other}")
        raise error


def fetch() -> Task:
    """Bring all that is fetched into the store."""

    def bring() -> None:
        from katagpu import supply
        from katagpu.current import guests

        found = guests()
        for context in found.contexts:
            if context.refused is not None:
                raise context.refused
        supply.supply(found.contexts)

    return plain(bring, "bring all that builds fetch into the store; they need no network then",
                 task_dep=["_lock"])
