"""Why a kernel configuration lacks what was asked for, told from the kernel's Kconfig files."""

from __future__ import annotations

import re
from collections.abc import Mapping

from katagpu.kconfig_expr import TRISTATES, M, N, Y, evaluate, render, unmet
from katagpu.kconfig_tree import Definition, Tree

_FIRST = 4
"""How many selectors a message names before it says that there are more."""


class Config:
    """A final `.config`, with what the kernel's tree knows of its symbols."""

    def __init__(self, values: Mapping[str, str], tree: Tree | None = None) -> None:
        self.values = values
        self.tree = tree or Tree()

    def known(self, name: str) -> bool:
        """Whether the kernel defines the symbol."""
        return name in self.tree.definitions

    def text(self, name: str) -> str:
        """The symbol's value without quotes; `n` where `.config` does not set it."""
        return self.values.get(name, "n").strip('"')


def explain(name: str, wanted: str, final: Config, denied: Mapping[str, str]) -> str:
    """Why a symbol that the kernel knows did not get the value `wanted`.

    `denied` tells for each symbol that was asked to be n where that is written.
    """
    definitions = final.tree.definitions[name]
    kind = final.tree.type_of(name)
    unfit = _unfit(wanted, kind)
    if unfit:
        return unfit
    got = TRISTATES.get(final.text(name), N)
    if kind in ("bool", "tristate") and TRISTATES[wanted] < got:
        return _forced(name, final)
    need = Y if kind == "tristate" and wanted == "y" else M
    reasons = [each for definition in definitions
               for each in _unmet_clauses(definition, final, need, denied)]
    if all(each.prompt is None for each in definitions):
        reasons.append(_promptless(name, final))
    for definition in definitions:
        choice = definition.choice
        taken = [each for each in choice.members if final.text(each) == "y"] if choice else []
        if choice and taken:
            reasons.append(f"its choice {choice.prompt!r} took {taken[0]}")
        if definition.bounds and kind in ("int", "hex"):
            low, high = (final.text(each) if final.known(each) else each
                         for each in definition.bounds)
            reasons.append(f"its range is {low} to {high}")
    if not reasons:
        reasons = [each for definition in definitions
                   for each in _unmet_clauses(definition, final, need, denied, guess=True)]
    return "; ".join(dict.fromkeys(reasons)) or "its dependencies hold, so a later setting undid it"


def _unfit(value: str, kind: str) -> str:
    """Why a value is not one that a symbol of this type can have; empty when it can."""
    fits = {"bool": r"[yn]", "tristate": r"[ymn]", "int": r"-?\d+|n",
            "hex": r"(0[xX])?[0-9a-fA-F]+|n", "string": r'".*"|n'}
    if kind in fits and not re.fullmatch(fits[kind], value):
        return f"it is of type {kind}, which cannot be {value}"
    return ""


def _unmet_clauses(definition: Definition, final: Config, need: int, denied: Mapping[str, str],
                   *, guess: bool = False) -> list[str]:
    """The conditions of one definition that do not hold, each with its place and what it lacks."""
    clauses = [(f"{each.kind} {render(each.expression)} ({each.path}:{each.line})",
                unmet(each.expression, final, need, guess=guess)) for each in definition.needs]
    if definition.prompt is not None and definition.prompt_if is not None:
        clauses.append((f"its prompt needs {render(definition.prompt_if)} "
                        f"({definition.path}:{definition.line})",
                        unmet(definition.prompt_if, final, M, guess=guess)))
    return [f"{text}: {', '.join(_deeper(each, final, denied) for each in missing)}"
            for text, missing in clauses if missing]


def _deeper(reason: str, final: Config, denied: Mapping[str, str]) -> str:
    """Add to `X is n` who asked for that, or what X itself lacks."""
    match = re.fullmatch(r"(\w+) is n", reason)
    if match is None or not final.known(match[1]):
        return reason
    if match[1] in denied:
        return f"{reason} (asked for by {denied[match[1]]})"
    lacks = [each for definition in final.tree.definitions[match[1]]
             for clause in definition.needs for each in unmet(clause.expression, final, M)]
    return f"{reason} (it needs more: {', '.join(dict.fromkeys(lacks))})" if lacks else reason


def _promptless(name: str, final: Config) -> str:
    """A symbol without a prompt gets its value from others only: name them."""
    selectors = list(dict.fromkeys(
        definition.name for definition, _ in final.tree.selectors.get(name, [])))
    if selectors:
        more = f" and {len(selectors) - _FIRST} more" if len(selectors) > _FIRST else ""
        return (f"it has no prompt, so no fragment can set it; it is selected by "
                f"{', '.join(selectors[:_FIRST])}{more}")
    defaults = [render(value) + (f" if {render(condition)}" if condition else "")
                for definition in final.tree.definitions[name]
                for value, condition in definition.defaults]
    return ("it has no prompt, so no fragment can set it; "
            + (f"its value is {' or '.join(defaults)}" if defaults else "nothing selects it"))


def _forced(name: str, final: Config) -> str:
    """Why a symbol is on although it was asked to be off."""
    on = [definition.name for definition, condition in final.tree.selectors.get(name, [])
          if final.text(definition.name) in "ym"
          and (condition is None or evaluate(condition, final) != N)]
    if on:
        return f"it is selected by {', '.join(dict.fromkeys(on))}"
    if not any(each.prompt and (each.prompt_if is None or evaluate(each.prompt_if, final) != N)
               for each in final.tree.definitions[name]):
        return "it cannot be turned off: its prompt is hidden, and its default is on"
    return "it is on by default, and a later setting undid the request"
