"""Strict YAML: one file into typed structs.

Every error names the file, the line, the field and, where a word is misspelt, the nearest valid
one. YAML is parsed here only, and only when a file changed or is wrong: importing the parser costs
more than a run with nothing to do.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

from katagpu.errors import UserError

T = TypeVar("T")
Steps = tuple[str | int, ...]
"""Where a value stands: field names and list positions from the top of the file."""

_WORDS = {"str": "text", "int": "a number", "float": "a number with a fraction",
          "bool": "true or false", "array": "a list", "object": "a section of fields",
          "null": "null"}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """`did you mean …?` with the most similar known word, or what is known, or nothing."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else None


def dotted(steps: Steps) -> str:
    """A field as people write it: `kernel.features[0]`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return text.removeprefix(".")


class YamlFile:
    """The text of a YAML file, with the lines of its fields."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        try:
            loader = yaml.SafeLoader(text)
            try:
                self._node = loader.get_single_node()
                self._refuse_odd_keys(self._node)
                self.data: Any = loader.construct_document(self._node) if self._node else None
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as bad:
            mark = bad.problem_mark or bad.context_mark
            where = f"{path}:{mark.line + 1}" if mark else f"{path}"
            raise UserError(f"{where}: this is not YAML: {bad.problem}") from None
        except yaml.reader.ReaderError as bad:
            line = text.count("\n", 0, bad.position) + 1
            raise UserError(f"{path}:{line}: this is not YAML: the character "
                            f"U+{bad.character:04X} may not stand in it") from None
        except (yaml.YAMLError, ValueError) as bad:  # ValueError: a date with a thirteenth month
            raise UserError(f"{path}: this is not YAML: {bad}") from None

    def _refuse_odd_keys(self, node: yaml.Node | None) -> None:
        """YAML itself lets a repeated field overwrite the first one, and reads `on:` as true."""
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._refuse_odd_keys(item)
        if not isinstance(node, yaml.MappingNode):
            return
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else "(not a word)"
            if not key.tag.endswith(":str"):
                raise UserError(f"{self.path}:{line}: {name!r} cannot be the name of a field")
            if name in seen:
                raise UserError(f"{self.path}:{line}: field {name!r} was given already, "
                                f"in line {seen[name]}")
            seen[name] = line
            self._refuse_odd_keys(value)

    def line(self, steps: Steps) -> int:
        """The line of a field, or of the nearest thing around it that is in the file."""
        node, line = self._node, 1
        for step in steps:
            if isinstance(node, yaml.MappingNode):
                found = [(key, value) for key, value in node.value if key.value == step]
                if not found:
                    break
                line, node = found[0][0].start_mark.line + 1, found[0][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
                line = node.start_mark.line + 1
            else:
                break
        return line

    def error(self, steps: Steps, what: str, hint: str | None = None) -> UserError:
        """An error about a field of this file."""
        field = f"{dotted(steps)}: " if steps else ""
        return UserError(f"{self.path}:{self.line(steps)}: {field}{what}", hint=hint)

    def convert(self, kind: type[T], explanations: Mapping[Steps, str]) -> T:
        """The file as `kind`, a struct. `explanations` are hints for fields of a wrong type."""
        try:
            return msgspec.convert(self.data, kind)
        except msgspec.ValidationError as bad:
            steps, what, hint = _translate(str(bad), kind, self.data)
            raise self.error(steps, what, explanations.get(steps, hint)) from None


def _translate(said: str, kind: Any, data: Any) -> tuple[Steps, str, str | None]:
    """What msgspec said, in the words of somebody who reads a recipe."""
    message, _, where = said.partition(" - at `$")
    steps: Steps = tuple(
        int(index) if index else name
        for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", where.rstrip("`")))
    name = match[1] if (match := re.search(r"`(.+?)`", message)) else ""
    if "unknown field" in message:
        return (*steps, name), "there is no such field", nearest(name, _fields(_at(kind, steps)))
    if "missing required field" in message:
        return steps, f"the field {name!r} is missing", None
    value = _value(data, steps)
    description, choices = _about(_annotated(kind, steps))
    if "enum value" in message:
        return steps, f"{value!r} is not valid here", nearest(str(value), choices)
    if "matching regex" in message or "length" in message:
        return steps, f"{value!r} is not valid here", description
    if match := re.search(r"Expected `(.+?)`, got `(\w+)`", message):
        wanted = " or ".join(_WORDS.get(word, word) for word in match[1].split(" | "))
        what = f"expected {wanted}, got {_WORDS.get(match[2], match[2])}"
        quote = "str" in match[1] and match[2] in {"int", "float", "bool"}
        return steps, what, f'put it in quotes: "{value}"' if quote else description
    return steps, message, description


def _value(data: Any, steps: Steps) -> Any:
    for step in steps:
        data = data[step]
    return data


def _annotated(kind: Any, steps: Steps) -> Any:
    """The annotation at `steps`, with its `Meta`."""
    for step in steps:
        bare = _bare(kind)
        if isinstance(step, int):
            kind = typing.get_args(bare)[0]
        else:
            kind = typing.get_type_hints(bare, include_extras=True)[step]
    return kind


def _at(kind: Any, steps: Steps) -> Any:
    return _bare(_annotated(kind, steps))


def _bare(kind: Any) -> Any:
    """A type without `Annotated` and `| None`."""
    while typing.get_origin(kind) in {Annotated, typing.Union, types.UnionType}:
        kind = next(arm for arm in typing.get_args(kind) if arm is not type(None))
    return kind


def _about(kind: Any) -> tuple[str | None, list[str]]:
    """Description and valid words of an annotation."""
    metas = getattr(kind, "__metadata__", ())
    description = next((meta.description for meta in metas if meta.description), None)
    bare = _bare(kind)
    choices = [str(item.value) for item in bare] if (
        isinstance(bare, type) and issubclass(bare, Enum)) else []
    return description, choices


def _fields(kind: Any) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(kind)]
