"""The plan: the order of stages, what stops a rebuild, and what `why` says, on toy stages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import plan as plan_module
from katagpu.errors import CorruptBlob, StepError, UserError
from katagpu.plan import Plan, differing
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, Store

MODULE = "errors"  # some module: a key has the digest of its code
Text = Callable[[dict[str, str]], str]


class Toy:
    """Stages that make text of text, in one store; `made` says which ones ran, in order."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.store = Store(top / "store")
        self.made: list[str] = []
        self.stages: dict[str, Stage] = {}

    def add(self, name: str, *needs: str, text: Text | None = None,
            options: Mapping[str, Any] | None = None, files: Mapping[str, Path] | None = None,
            ) -> None:
        """A stage; its text is that of its inputs with its options, or what `text` makes of it."""

        def make(build: Build) -> None:
            inputs = {need: build.blob(need).read_text() for need in needs}
            self.made.append(name)
            default = f"{name}({','.join(inputs.values())}){dict(build.options) or ''}"
            build.put_bytes("out", (text(inputs) if text else default).encode())

        self.stages[name] = Stage(
            name=name, title=f"toy {name}", module=MODULE, make=make, outputs={"out": Kind.FILE},
            options=options or {}, files=files or {},
            inputs={need: Ref(stage=need, output="out") for need in needs})

    def plan(self) -> Plan:
        """A plan as a new process would make it."""
        return Plan(dict(self.stages), self.store, self.top / "logs")

    def build(self, name: str) -> list[str]:
        """Ensure a stage in a new plan: which stages ran."""
        self.made.clear()
        self.plan().ensure(name)
        return list(self.made)

    def text(self, name: str) -> str:
        """The output of a stage."""
        action = self.plan().action(name)
        assert action is not None
        return self.store.blob(action.outputs["out"].blob).read_text()


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """a → b → c → d, and e beside them."""
    toy = Toy(tmp_path)
    toy.add("d", "c", "e")
    toy.add("a", options={"word": "one"})
    toy.add("b", "a", text=lambda inputs: inputs["a"].upper()[:1])
    toy.add("c", "b")
    toy.add("e", options={"word": "x"})
    return toy


def test_inputs_come_first_and_each_stage_runs_once(toy: Toy) -> None:
    assert toy.plan().closure("d") == ["a", "b", "c", "e", "d"]
    assert toy.build("d") == ["a", "b", "c", "e", "d"]
    assert toy.build("d") == []
    assert toy.text("d") == "d(c(A),e(){'word': 'x'})"


def test_a_stage_with_the_same_output_stops_the_rebuild(toy: Toy) -> None:
    toy.build("d")
    toy.add("a", options={"word": "two"})
    assert toy.build("d") == ["a", "b"]  # b's output is a's first letter


def test_back_to_an_earlier_recipe_is_a_hit(toy: Toy) -> None:
    toy.build("d")
    toy.add("e", options={"word": "y"})
    assert toy.build("d") == ["e", "d"]
    toy.add("e", options={"word": "x"})
    assert toy.build("d") == []


def test_only_what_a_stage_reads_is_in_its_key(toy: Toy, tmp_path: Path) -> None:
    """Neither titles, nor other stages' options, nor where a file is, nor an input's action."""
    (tmp_path / "one").write_text("same")
    (tmp_path / "two").write_text("same")
    toy.add("f", files={"file": tmp_path / "one"})
    toy.build("f")
    toy.build("d")
    key = toy.plan().key("c")
    toy.add("f", files={"file": tmp_path / "two"})
    assert toy.build("f") == []
    toy.add("e", options={"word": "z"})
    assert toy.plan().key("c") == key
    (tmp_path / "two").write_text("other")
    assert toy.build("f") == ["f"]


def test_an_option_that_is_read_is_in_the_key(toy: Toy) -> None:
    toy.build("e")
    toy.add("e", options={"word": "x", "new": None})
    assert toy.build("e") == ["e"]


def test_many_threads_do_the_work_once(toy: Toy) -> None:
    def slow(_inputs: dict[str, str]) -> str:
        time.sleep(0.1)
        return "slow"

    toy.add("slow", "a", text=slow)
    plan, other = toy.plan(), toy.plan()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: (plan, other)[number % 2].ensure("slow"), range(8)))
    assert toy.made == ["a", "slow"]
    assert len({action.outputs["out"].identity for action in found}) == 1


def test_independent_stages_run_side_by_side(toy: Toy) -> None:
    meeting = threading.Barrier(2, timeout=20)
    for name in ("left", "right"):
        toy.add(name, text=lambda _inputs: str(meeting.wait() >= 0))
    plan = toy.plan()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(plan.ensure, ["left", "right"]))
    assert sorted(toy.made) == ["left", "right"]


def damage(toy: Toy, name: str) -> None:
    """Flip the blob of a stage, its size as it was."""
    action = toy.plan().action(name)
    assert action is not None
    path = toy.store.blob(action.outputs["out"].blob)
    path.chmod(0o644)
    path.write_bytes(b"?" * path.stat().st_size)


def test_a_damaged_input_is_dropped_and_made_again(
    toy: Toy, capfd: pytest.CaptureFixture[str],
) -> None:
    toy.build("c")
    damage(toy, "b")
    toy.add("c", "b", options={"again": True})
    assert toy.build("c") == ["b", "c"]
    assert "is damaged" in capfd.readouterr().err
    assert toy.text("b") == "A"


def test_a_blob_that_is_damaged_every_time_is_an_error(toy: Toy) -> None:
    def broken(_inputs: dict[str, str]) -> str:
        raise CorruptBlob("0" * 64, "1" * 64)

    toy.add("broken", "a", text=broken)
    with pytest.raises(CorruptBlob):
        toy.plan().ensure("broken")
    assert toy.made == ["a", *["broken"] * plan_module.TRIES]


def test_a_lost_blob_is_a_miss_with_its_reason(toy: Toy) -> None:
    toy.build("d")
    action = toy.plan().action("e")
    assert action is not None
    toy.store.drop(action.outputs["out"].blob)
    assert toy.plan().reason("e") == "an output of it is no longer in the store"
    assert toy.build("d") == ["e"]


def test_a_failed_stage_leaves_nothing_and_runs_again(toy: Toy) -> None:
    fails = [True]

    def sometimes(_inputs: dict[str, str]) -> str:
        if fails.pop() if fails else False:
            raise StepError("not today")
        return "fine"

    toy.add("sometimes", "a", text=sometimes)
    toy.add("last", "sometimes")
    with pytest.raises(StepError, match="not today"):
        toy.plan().ensure("last")
    assert list((toy.store.root / "staging").iterdir()) == []
    assert toy.plan().action("sometimes") is None
    assert toy.build("last") == ["sometimes", "last"]


def test_an_output_that_is_not_made_is_an_error(toy: Toy) -> None:
    toy.stages["none"] = Stage(name="none", title="", module=MODULE, make=lambda _build: None,
                               outputs={"out": Kind.FILE})
    with pytest.raises(StepError, match="none did not make: out"):
        toy.plan().ensure("none")


def test_a_missing_file_of_the_recipe_is_named(toy: Toy, tmp_path: Path) -> None:
    toy.add("agent", files={"source": tmp_path / "kata-agent"})
    with pytest.raises(UserError, match=r"agent: cannot read .*kata-agent"):
        toy.plan().ensure("agent")


def test_a_hit_counts_as_a_use(toy: Toy) -> None:
    toy.build("d")
    names = [action.stage for _digest, _used, action in toy.store.actions()]
    assert names[0] == "d"
    time.sleep(0.02)
    toy.plan().action("a")
    assert next(toy.store.actions())[2].stage == "a"


# why


def test_why_says_hit_miss_and_what_differs(toy: Toy) -> None:
    plan = toy.plan()
    assert list(plan.explain("b")) == ["a: miss: never made in this store", "b: miss: waits for a"]
    toy.build("d")
    assert list(toy.plan().explain("b")) == ["a: hit", "b: hit"]
    toy.add("a", options={"word": "uno"})
    assert list(toy.plan().explain("b")) == ["a: miss: options.word: one → uno",
                                             "b: miss: waits for a"]


def test_why_compares_with_the_nearest_action(toy: Toy) -> None:
    toy.add("n", options={"one": 1, "two": 2, "three": 3})
    toy.build("n")
    toy.add("n", options={"one": 9, "two": 9, "three": 9})
    toy.build("n")
    toy.add("n", options={"one": 1, "two": 2, "three": 4})
    assert toy.plan().reason("n") == "options.three: 3 → 4"


def test_the_reason_of_a_miss_is_in_the_record(toy: Toy) -> None:
    toy.build("a")
    toy.add("a", options={"word": "due"})
    action = toy.plan().ensure("a")
    assert action.record["reason"] == "options.word: one → due"
    assert action.record["wall"] >= 0


@pytest.mark.parametrize(("old", "new", "said"), [
    ({"a": 1}, {"a": 1}, []),
    ({"a": {"b": 1}}, {"a": {"b": 2}}, ["a.b: 1 → 2"]),
    ({}, {"a": {"b": 2}}, ["a.b: absent → 2"]),
    ({"a": 1}, {}, ["a: 1 → absent"]),
    ({"a": ["x", "y"]}, {"a": ["x", "z"]}, ["a: ['y'] → ['z']"]),
    ({"a": ["x", "y"]}, {"a": ["y", "x"]}, ["a: ['x', 'y'] → ['y', 'x']"]),
    ({"a": "0" * 64}, {"a": "1" * 64}, ["a: 000000000000 → 111111111111"]),
    ({"a": f"2.1 sha256:{'0' * 64}"}, {"a": f"2.2 sha256:{'f' * 64}"},
     ["a: 2.1 sha256:000000000000 → 2.2 sha256:ffffffffffff"]),
])
def test_differences_are_short(old: dict[str, Any], new: dict[str, Any], said: list[str]) -> None:
    assert list(differing(old, new)) == said


# without ccache


def compiled(toy: Toy, **record: Any) -> None:
    """Put this into the record of the action of `a`."""
    digest, action = toy.plan().digest("a"), toy.plan().action("a")
    assert digest is not None and action is not None
    toy.store.commit(digest, replace(action, record={**action.record, **record}))


@pytest.mark.parametrize(("record", "through"), [
    ({"compiler_cache": True, "ccache": {"hits": 0, "misses": 0}}, True),
    ({"compiler_cache": False, "ccache": {"hits": 0, "misses": 0}}, False),
    ({"ccache": {"hits": 3, "misses": 1}}, True),
    ({"ccache": {"hits": 0, "misses": 7}}, True),
    ({"ccache": {"hits": 0, "misses": 0}}, False),
    ({}, False)])
def test_without_ccache_what_was_compiled_through_it_is_made_again(
    toy: Toy, record: dict[str, Any], through: bool,
) -> None:
    toy.build("d")
    toy.made.clear()
    compiled(toy, **record)
    plain = Plan(dict(toy.stages), toy.store, toy.top / "logs", ccache=False)
    assert (plain.action("a") is None) is through
    assert ("ccache" in plain.reason("a")) is through
    assert toy.plan().reason("a") == "hit"
    plain.ensure("d")
    # The same bytes come out, so nothing above is made again; the record is that of this build.
    assert toy.made == (["a"] if through else [])
    again = Plan(dict(toy.stages), toy.store, toy.top / "logs", ccache=False)
    assert again.reason("d") == "hit"
