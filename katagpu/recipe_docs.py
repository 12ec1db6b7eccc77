"""The reference of the recipe's fields, from the schema. `python -m katagpu.recipe_docs` writes it.

It stands between two marks in docs/recipe.md; a test compares it with the schema.
"""

from __future__ import annotations

import sys
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from katagpu.schema import Recipe, Section

BEGIN = "<!-- fields: written by `python -m katagpu.recipe_docs docs/recipe.md` -->"
END = "<!-- end of fields -->"


def tables() -> str:
    """A table for the recipe itself, and one for each kind of section."""
    places: dict[type[Section], list[str]] = {}
    _collect(Recipe, "", places)
    return "\n\n".join([_table("Top level", Recipe), *(
        _table(", ".join(f"`{place}`" for place in found), kind)
        for kind, found in places.items())])


def _collect(kind: type[Section], prefix: str, places: dict[type[Section], list[str]]) -> None:
    """Where each kind of section stands below `kind`, in the order of the fields."""
    for field in msgspec.structs.fields(kind):
        section = next((arm for arm in _arms(field.type) if isinstance(arm, type)
                        and issubclass(arm, Section)), None)
        if section is not None:
            places.setdefault(section, []).append(f"{prefix}{field.name}")
            _collect(section, f"{prefix}{field.name}.", places)


def updated(text: str) -> str:
    """The document with the tables of today."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def _table(title: str, kind: type[Section]) -> str:
    rows = [f"### {title}", "", " ".join((kind.__doc__ or "").split()), "",
            "| field | default | meaning |", "|---|---|---|"]
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        rows.append(f"| `{field.name}` | {_default(field)} | {_meaning(hints[field.name])} |")
    return "\n".join(rows)


def _arms(kind: Any) -> list[Any]:
    """The types in `Annotated[A | B, …]`, without what annotates them."""
    origin = typing.get_origin(kind)
    if origin is Annotated:
        return _arms(typing.get_args(kind)[0])
    if origin in {typing.Union, types.UnionType}:
        return [part for arm in typing.get_args(kind) for part in _arms(arm)]
    if origin is tuple:
        return _arms(typing.get_args(kind)[0])
    return [kind]


def _default(field: Any) -> str:
    default = field.default
    if default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT:
        return "required"
    if isinstance(default, Section) and not any(
            inner.required for inner in msgspec.structs.fields(default)):
        return "all defaults"
    value = msgspec.json.encode(msgspec.to_builtins(default)).decode().replace(",", ", ")
    return f"`{value}`".replace('"', "")


def _meaning(kind: Any) -> str:
    metas = getattr(kind, "__metadata__", ())
    # The field's own comes last, after that of a type which has one (`words.DeviceId`).
    text = next((meta.description for meta in reversed(metas) if meta.description), "see below")
    choices = [f"`{item.value}`" for arm in _arms(kind)
               if isinstance(arm, type) and issubclass(arm, Enum) for item in arm]
    named = all(choice in text for choice in choices)
    return text if named else f"{text} ({', '.join(choices)})"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(updated(document.read_text()))
