"""Golden plans: what each recipe that no test builds asks for and would do, as a text to review.

    python tests/test_plans.py --renew

writes the texts anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from katagpu import guest, recipe, request
from katagpu.errors import UserError
from katagpu.lock import Group, Lock
from katagpu.schema import Recipe
from katagpu.stages.api import Stage

ROOT = Path(__file__).resolve().parent.parent
PLANS = ROOT / "tests/data/plans"
BUILT = {"debian-trixie"}
"""Recipes that a test builds for real."""


def unbuilt() -> list[str]:
    """The other recipes."""
    return [name for name in recipe.known(ROOT) if name not in BUILT]


def plan(name: str) -> str:
    """The text of a recipe's plan. The build host has no part in it."""
    wanted = recipe.load(name, ROOT)
    stages = guest.stages(wanted, Lock(recipe=name, request="", groups={}), ROOT)
    parts = [f"{name}\n", *archives(wanted)]
    parts += [group_text(title, group) for title, group in request.groups(wanted, ROOT).items()]
    parts += [stage_text(stage) for stage in stages.values()]
    return "\n".join(parts)


def archives(wanted: Recipe) -> Iterator[str]:
    """The sets of archives, with the addresses where the host has none to offer."""
    for title, distribution in request.distributions(wanted).items():
        yield "".join([f"archives {title}\n", *(
            f"  {one.uri} {', '.join(one.suites)}: {', '.join(one.components)}\n"
            f"    signed by {one.keyring.removeprefix(f'{ROOT}/')}\n"
            for one in request.archives(distribution, ROOT))])


def group_text(title: str, group: Group) -> str:
    """A group: what is asked for, of whom, and on top of what."""
    rest = " alone" if group.alone else f" on {group.on}" if group.on else ""
    return f"packages {title} from {group.archives}{rest}\n" + "".join(
        wrapped([*group.packages, *(Path(deb.path).name for deb in group.files)]))


def stage_text(stage: Stage) -> str:
    """A stage: all of its key but digests."""
    lines = [f"stage {stage.name}: {stage.title}{' (network)' if stage.network else ''}\n"]
    lines += [f"  input {role}: {ref.stage}.{ref.output}\n" for role, ref in stage.inputs.items()]
    lines += option_lines(stage.options)
    for role, (url, digest) in stage.downloads.items():
        lines.append(f"  download {role}: {url} sha256:{digest}\n")
    # Single files belong to the review of the directory that they are in.
    places = sorted({"/".join(path.relative_to(ROOT).parts[:2 if path.is_relative_to(
        ROOT / "kernel-configs") else 1]) for path in stage.files.values()})
    if places:
        lines.append(f"  files of {', '.join(places)}\n")
    lines.append(f"  output {', '.join(stage.outputs)}\n")
    return "".join(lines)


def option_lines(options: Mapping[str, Any]) -> Iterator[str]:
    """One line for each option; long lists are wrapped."""
    for name, value in options.items():
        if isinstance(value, list) and len(str(value)) > 80:
            yield f"  option {name}\n"
            yield from wrapped([str(item) for item in value], "    ")
        else:
            yield f"  option {name}: {value}\n"


def wrapped(words: Iterable[str], indent: str = "  ") -> Iterator[str]:
    """Words in lines of at most 100 characters."""
    line = ""
    for word in words:
        if line and len(indent) + len(line) + len(word) > 98:
            yield f"{indent}{line}\n"
            line = ""
        line += f"{' ' if line else ''}{word}"
    if line:
        yield f"{indent}{line}\n"


@pytest.mark.parametrize("name", unbuilt())
def test_the_plan_is_the_reviewed_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "host_archive", lambda _distribution: {})
    assert plan(name) == (PLANS / f"{name}.txt").read_text(), (
        "look at the difference; if it is meant: python tests/test_plans.py --renew")


def test_every_plan_has_its_recipe() -> None:
    assert sorted(path.stem for path in PLANS.glob("*")) == unbuilt()


def test_a_driver_too_old_for_the_kernel_is_refused_before_anything_is_fetched() -> None:
    wanted = recipe.load("nvidia-reference", ROOT)
    newer = replace(wanted, kernel=replace(wanted.kernel, version="6.12.1"))
    with pytest.raises(UserError, match=r"510\.54 \(closed\) does not build for kernel 6\.12"):
        guest.stages(newer, Lock(recipe="newer", request="", groups={}), ROOT)


def renew() -> None:
    """Write the texts, as on a host of no distribution."""
    vars(request)["host_archive"] = lambda _distribution: {}
    PLANS.mkdir(exist_ok=True)
    for old in PLANS.iterdir():
        old.unlink()
    for name in unbuilt():
        (PLANS / f"{name}.txt").write_text(plan(name))


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit(f"usage: {sys.argv[0]} --renew")
    renew()
