"""What is compared of two builds: which outputs count, where a difference began, and the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from katagpu import sameness
from katagpu.plan import Plan
from katagpu.sameness import Compared
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, Output, Store

NEEDS = {"source": (), "one": ("source",), "other": ("source",), "top": ("one", "other")}


def plan(top: Path, **words: str) -> Plan:
    """Stages that put out their inputs and a word; `source` has the network."""
    def make(build: Build) -> None:
        below = b"".join(build.blob(name).read_bytes() for name in build.inputs)
        word = words.get(build.stage.name, build.stage.name)
        build.put_bytes("out", below + word.encode())

    stages = {name: Stage(name=name, title="", module="errors", make=make, network=not needs,
                          outputs={"out": Kind.FILE},
                          inputs={need: Ref(stage=need, output="out") for need in needs})
              for name, needs in NEEDS.items()}
    return Plan(stages, Store(top / "store"), top / "logs")


def compared(tmp_path: Path, *targets: str, **words: str) -> dict[str, Compared]:
    """Two builds, the second with these words."""
    plans = plan(tmp_path / "a"), plan(tmp_path / "b", **words)
    for each in plans:
        each.ensure("top")
    found = sameness.compare(plans, targets or ("top",), {("top", "out"): "top.img"})
    return {one.stage: one for one in found}


def test_all_the_same(tmp_path: Path) -> None:
    found = compared(tmp_path)
    assert list(found) == ["source", "one", "other", "top"]
    assert all(one.same for one in found.values())
    assert found["source"].fetched and found["top"].name == "top.img"
    lines = list(sameness.table(list(found.values())))
    assert "fetched once" in lines[0] and lines[-1] == "identical: 3 of 3 outputs (100 %)"
    assert lines[3].startswith("= top ") and lines[3].endswith(" top.img")
    assert sameness.share(list(found.values())) == 1.0


def test_where_a_difference_began_comes_first(tmp_path: Path) -> None:
    found = compared(tmp_path, other="another")
    assert [one.stage for one in sameness.differing(found.values())] == ["other", "top"]
    assert found["other"].cause and not found["top"].cause
    (one, top) = (each for each in sameness.as_json(list(found.values()))
                  if not each["identical"])
    assert one["began_here"] and not top["began_here"]
    assert one["first"]["sha256"] != one["second"]["sha256"]
    assert list(sameness.table(list(found.values())))[-1] == \
        "identical: 1 of 3 outputs (33.33 %)"


def test_only_what_the_targets_need_is_compared(tmp_path: Path) -> None:
    assert list(compared(tmp_path, "one", other="another")) == ["source", "one"]


def test_what_was_not_made_is_not_the_same(tmp_path: Path) -> None:
    plans = plan(tmp_path / "a"), plan(tmp_path / "b")
    plans[0].ensure("top")
    plans[1].ensure("one")
    found = sameness.compare(plans, ["top"], {})
    assert [one.stage for one in sameness.differing(found)] == ["other", "top"]
    assert "not made" in "".join(sameness.table(found))


@pytest.mark.parametrize(("same", "of", "shown"), [
    (2999, 3000, "99.9 %"), (3000, 3000, "100 %"), (0, 3, "0 %")])
def test_a_share_is_never_rounded_up_to_all(same: int, of: int, shown: str) -> None:
    def output(word: Any) -> Output:
        return Output(kind=Kind.FILE, identity=f"{word:>064}", blob="b" * 64, size=1)

    found = [Compared(stage="s", output=str(number), name="", first=output(0),
                      second=output(0 if number < same else 1)) for number in range(of)]
    assert shown in list(sameness.table(found))[-1]
