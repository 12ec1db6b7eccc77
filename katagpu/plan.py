"""The plan: a recipe's stages in order, and what the store knows of each.

`ensure` makes an action that is not there, once, whoever asks; `action` only looks. Inputs enter a
key by content, so a stage that runs again and puts out the same bytes stops the rebuild there.
"""

from __future__ import annotations

import operator
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from katagpu import keys, log, sandbox
from katagpu.errors import CorruptBlob, StepError, UserError
from katagpu.files import full_disk
from katagpu.lock import Deb
from katagpu.stages.api import Build, Stage
from katagpu.store import Action, Output, Store, writing

_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
TRIES = 3  # a damaged blob is dropped and remade; more than two of them is a broken disk


class Plan:
    """Stages by name, in an order in which every input comes first."""

    def __init__(self, stages: Mapping[str, Stage], store: Store, logs: Path, *,
                 ccache: bool = True,
                 address: Callable[[Deb], str] = operator.attrgetter("url")) -> None:
        self.stages = stages
        self.address = address
        self.store = store
        self.logs = logs
        self.ccache = ccache
        self._known: dict[str, tuple[str, Action]] = {}
        self._lock = threading.RLock()

    def needs(self, name: str) -> list[str]:
        """The stages whose outputs a stage reads."""
        return list(dict.fromkeys(ref.stage for ref in self.stages[name].inputs.values()))

    def closure(self, name: str) -> list[str]:
        """A stage with all that it needs, inputs first."""
        found: dict[str, None] = {}

        def visit(stage: str) -> None:
            if stage not in found:
                for need in self.needs(stage):
                    visit(need)
                found[stage] = None

        visit(name)
        return list(found)

    def key(self, name: str) -> dict[str, Any] | None:
        """The action key, or None while an input is not made."""
        stage = self.stages[name]
        identities = {}
        for role, ref in stage.inputs.items():
            found = self.action(ref.stage)
            if found is None:
                return None
            identities[role] = found.outputs[ref.output].identity
        try:
            return stage.key(identities)
        except OSError as refusal:
            raise UserError(f"{name}: cannot read {refusal.filename}: {refusal.strerror}",
                            hint="the recipe, or the repository, names it") from None

    def inputs(self, name: str) -> dict[str, Output]:
        """The outputs that a stage reads, by their role. What it needs must be made."""
        found = {}
        for role, ref in self.stages[name].inputs.items():
            needed = self.action(ref.stage)
            assert needed is not None, f"{name} needs {ref.stage}"
            found[role] = needed.outputs[ref.output]
        return found

    def action(self, name: str) -> Action | None:
        """The stage's action, if it is a hit."""
        with self._lock:
            known = self._known.get(name)
            if known is not None:
                return known[1]
            key = self.key(name)
            if key is None:
                return None
            digest = keys.digest(key)
            action = self._kept(digest)
            if action is not None:
                self._known[name] = (digest, action)
                self.store.touch(digest)
            return action

    def _kept(self, digest: str) -> Action | None:
        """What the store has; a build without ccache takes nothing that was compiled through it."""
        action = self.store.action(digest)
        return None if action is None or (not self.ccache and through_ccache(action)) else action

    def digest(self, name: str) -> str | None:
        """The digest of the stage's action, if it is a hit."""
        with self._lock:
            return self._known[name][0] if self.action(name) is not None else None

    def forget(self) -> None:
        """Ask the store anew from here on."""
        with self._lock:
            self._known.clear()

    def ensure(self, name: str) -> Action:
        """The stage's action; it and what it needs are made where they are not there."""
        for left in reversed(range(TRIES)):
            try:
                return self._ensure(name)
            except CorruptBlob as damaged:
                log.warn(f"{damaged}; it is dropped and made again")
                self.forget()
                if left == 0:
                    raise
        raise AssertionError("unreachable")

    def _ensure(self, name: str) -> Action:
        found = self.action(name)
        if found is not None:
            return found
        for need in self.needs(name):
            self._ensure(need)
        key = self.key(name)
        assert key is not None, name
        digest = keys.digest(key)
        self.store.prepare()
        with self.store.lock(digest, lambda: log.note(f"{name}: another build is making it")):
            action = self._kept(digest)
            if action is None:
                reason = self.reason(name)
                with log.step(f"{name}: {self.stages[name].title}", stage=name, hit=False,
                              reason=reason, action=digest):
                    action = self._make(name, key, reason)
                self.store.commit(digest, action)
        with self._lock:
            self._known[name] = (digest, action)
        return action

    def _make(self, name: str, key: Mapping[str, Any], reason: str) -> Action:
        stage = self.stages[name]
        inputs = self.inputs(name)
        logfile = self.logs / f"{name}.log"
        with writing(self.logs):
            self.logs.mkdir(parents=True, exist_ok=True)
            logfile.write_text("")
        started = time.monotonic()
        with (writing(self.store.root),
              self.store.staging(name, sandbox.remove) as scratch):
            build = Build(stage, self.store, inputs, scratch, logfile, ccache=self.ccache,
                          address=self.address)
            try:
                stage.make(build)
            except StepError as failure:
                full_disk(self.store.root, failure)
                raise
            if stage.file_digests() != key["files"]:
                raise UserError(f"{name}: a file that it reads was edited while it ran",
                                hint="run the same command again")
            return build.finish(key, {"wall": round(time.monotonic() - started, 2),
                                      "cpu": round(build.cpu, 2), "reason": reason})

    # why

    def reason(self, name: str) -> str:
        """Why the stage is a miss: what differs from the nearest earlier action."""
        key = self.key(name)
        if key is None:
            missing = [need for need in self.needs(name) if self.action(need) is None]
            return f"waits for {', '.join(missing)}"
        kept = self.store.action(keys.digest(key))
        if kept is not None:
            return "hit" if self.ccache or not through_ccache(kept) else \
                "it was compiled through ccache, and ccache=0 asks for one that was not"
        nearest: list[str] | None = None
        for digest, _used, action in self.store.actions():
            if action.stage != name:
                continue
            if digest == keys.digest(key):
                return "an output of it is no longer in the store"
            differences = list(differing(action.key, key))
            if nearest is None or len(differences) < len(nearest):
                nearest = differences
        if nearest is None:
            return "never made in this store"
        more = f" (and {len(nearest) - 3} more)" if len(nearest) > 3 else ""
        return "; ".join(nearest[:3]) + more

    def explain(self, name: str) -> Iterator[str]:
        """One line for each stage of a closure: hit, or miss and why."""
        for stage in self.closure(name):
            state = self.reason(stage)
            yield f"{stage}: hit" if state == "hit" else f"{stage}: miss: {state}"


def through_ccache(action: Action) -> bool:
    """Was something of an action compiled through ccache, or taken from it?

    Where the record is older than the field `compiler_cache`, ccache's counters tell.
    """
    counted = action.record.get("ccache", {})
    return bool(action.record.get("compiler_cache", sum(counted.values()) > 0))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _leaves(child, f"{path}.{name}" if path else name)
    else:
        yield path, value


def _short(value: Any) -> str:
    text = _DIGEST.sub(lambda found: found[0][:12], str(value))
    return text if len(text) <= 60 else text[:40] + "…" + text[-19:]


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """The fields in which two keys differ, as `field: old → new`; of lists only what differs."""
    before, after = dict(_leaves(dict(old))), dict(_leaves(dict(new)))
    for field in dict.fromkeys([*before, *after]):
        was, now = before.get(field, "absent"), after.get(field, "absent")
        if was == now:
            continue
        if isinstance(was, list) and isinstance(now, list) and sorted(was) != sorted(now):
            was, now = ([item for item in was if item not in now],
                        [item for item in now if item not in was])
        yield f"{field}: {_short(was)} → {_short(now)}"
