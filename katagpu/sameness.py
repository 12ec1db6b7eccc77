"""Which outputs of two builds in stores of their own are the same, and where a difference began.

What is compared are identities: the SHA-256 of a file's bytes, and of a tree's tar before it is
compressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from katagpu import log
from katagpu.plan import Plan
from katagpu.store import Kind, Output

SHOWN = 16  # hexadecimal digits of a digest in the table


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One output of both builds; None: it was not made there.

    `fetched`: it came from outside, once for both. `cause`: all that its stage reads is the same,
    so that the difference began here.
    """

    stage: str
    output: str
    name: str
    first: Output | None
    second: Output | None
    fetched: bool = False
    cause: bool = False

    @property
    def same(self) -> bool:
        """Is it there in both, and identical?"""
        return self.first is not None and self.second is not None \
            and self.first.identity == self.second.identity


def compare(plans: tuple[Plan, Plan], targets: Iterable[str], names: Mapping[tuple[str, str], str],
            ) -> list[Compared]:
    """Every output of the stages that `targets` need, in the order in which they are made.

    `names` are the files in out/, by stage and output.
    """
    first, second = plans
    stages = dict.fromkeys(name for target in targets for name in first.closure(target))
    found: dict[tuple[str, str], Compared] = {}
    for stage in stages:
        made = [plan.action(stage) for plan in plans]
        cause = all(found[ref.stage, ref.output].same
                    for ref in first.stages[stage].inputs.values())
        for output in first.stages[stage].outputs:
            one, other = (None if action is None else action.outputs.get(output)
                          for action in made)
            found[stage, output] = Compared(
                stage=stage, output=output, first=one, second=other, cause=cause,
                name=names.get((stage, output), ""), fetched=first.stages[stage].network)
    assert second.stages.keys() == first.stages.keys(), "two builds of one guest"
    return list(found.values())


def counted(found: Iterable[Compared]) -> list[Compared]:
    """Those that count: what was fetched once for both is no proof."""
    return [one for one in found if not one.fetched]


def differing(found: Iterable[Compared]) -> list[Compared]:
    """Those that differ, where the differences began first."""
    return sorted((one for one in counted(found) if not one.same), key=lambda one: not one.cause)


def share(found: Sequence[Compared]) -> float:
    """Of those that count the share that is identical, 0 to 1."""
    mine = counted(found)
    return sum(one.same for one in mine) / len(mine) if mine else 0.0


def table(found: Sequence[Compared]) -> Iterator[str]:
    """The table: a line for each output, and the share."""
    for one in found:
        known = one.first or one.second
        size = log.size(known.size) if known is not None else "-"
        kind = "tree" if known is not None and known.kind is Kind.TREE else "file"
        sign = "  " if one.fetched else "= " if one.same else "! "
        yield (f"{sign}{one.stage:<18} {one.output:<14} {kind}  {_digests(one):<36} "
               f"{size:>9}  {one.name}").rstrip()
    mine = counted(found)
    same = sum(one.same for one in mine)
    whole = 100 if same == len(mine) else min(99.9, 100 * share(found))
    yield f"identical: {same} of {len(mine)} outputs ({whole:.4g} %)"


def _digests(one: Compared) -> str:
    first, second = (output.identity[:SHOWN] if output is not None else "not made"
                     for output in (one.first, one.second))
    if one.fetched:
        return f"{first} fetched once"
    return first if one.same else f"{first} {second}"


def as_json(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """All of it as data."""
    def output(one: Output | None) -> dict[str, Any] | None:
        return None if one is None else {"sha256": one.identity, "size": one.size}

    return [{"stage": one.stage, "output": one.output, "file": one.name or None,
             "first": output(one.first), "second": output(one.second), "identical": one.same,
             "fetched": one.fetched, "began_here": one.cause and not one.same} for one in found]
