"""Expressions of the Kconfig language: read them, evaluate them, say what in them does not hold.

Values are Kconfig's own (Documentation/kbuild/kconfig-language.rst, "Menu dependencies"): n, m and
y are 0, 1 and 2, `&&` is the minimum and `||` the maximum. One value is ours: UNKNOWN, for macros
like `$(cc-option,-mfoo)`, which run the compiler; a reader that executes nothing cannot know them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

N, M, Y = 0, 1, 2
UNKNOWN = None
Tristate = int | None
TRISTATES = {"n": N, "m": M, "y": Y}
_COMPARE = ("=", "!=", "<", ">", "<=", ">=")
_TOKEN = re.compile(r"""&&|\|\||!=|<=|>=|[!=<>()]|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\w./+-]+""")


class Values(Protocol):
    """What the symbols of a configuration are."""

    def known(self, name: str) -> bool:
        """Whether the kernel defines the symbol."""

    def text(self, name: str) -> str:
        """The symbol's value as `.config` has it, without quotes; `n` where it has none."""


@dataclass(frozen=True, kw_only=True)
class Symbol:
    """A symbol, or the constants n, m and y."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Text:
    """A quoted string or a number."""

    value: str


@dataclass(frozen=True, kw_only=True)
class Macro:
    """A macro call that only the kernel's makefiles can answer."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Not:
    """`!inner`."""

    inner: Expr


@dataclass(frozen=True, kw_only=True)
class Group:
    """Operands joined by `&&` or `||`."""

    operator: str
    parts: tuple[Expr, ...]


@dataclass(frozen=True, kw_only=True)
class Compare:
    """`left operator right`, on the text of both."""

    operator: str
    left: Symbol | Text | Macro
    right: Symbol | Text | Macro


Expr = Symbol | Text | Macro | Not | Group | Compare


class Malformed(ValueError):
    """Not an expression of the Kconfig language."""


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace `$(NAME)` where the name is among `variables`; other macros stay as they are."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)


def tokens(text: str) -> Iterator[str]:
    """The words of a line: operators, quoted strings, names, whole macro calls; no comment."""
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif text[at] == "#":
            return
        elif text.startswith("$(", at):
            end = _macro_end(text, at)
            yield text[at:end]
            at = end
        else:
            match = _TOKEN.match(text, at)
            if match is None:
                raise Malformed(f"unexpected {text[at]!r} in {text!r}")
            yield match[0]
            at = match.end()


def _macro_end(text: str, start: int) -> int:
    depth = 0
    for at in range(start + 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise Malformed(f"unclosed macro in {text!r}")


def parse(words: list[str]) -> Expr:
    """Read one expression that takes all of the words."""
    expression, rest = _parse_group(words, ("||", "&&"))
    if rest:
        raise Malformed(f"unexpected {rest[0]!r} after an expression")
    return expression


def _parse_group(words: list[str], operators: tuple[str, ...]) -> tuple[Expr, list[str]]:
    if not operators:
        return _parse_unary(words)
    parts = []
    while True:
        part, words = _parse_group(words, operators[1:])
        parts.append(part)
        if not words or words[0] != operators[0]:
            break
        words = words[1:]
    joined = parts[0] if len(parts) == 1 else Group(operator=operators[0], parts=tuple(parts))
    return joined, words


def _parse_unary(words: list[str]) -> tuple[Expr, list[str]]:
    if not words:
        raise Malformed("an expression ends too early")
    if words[0] == "!":
        inner, rest = _parse_unary(words[1:])
        return Not(inner=inner), rest
    if words[0] == "(":
        inside, rest = _parse_group(words[1:], ("||", "&&"))
        if not rest or rest[0] != ")":
            raise Malformed("a parenthesis is not closed")
        return inside, rest[1:]
    left = _operand(words[0])
    if len(words) >= 3 and words[1] in _COMPARE:
        return Compare(operator=words[1], left=left, right=_operand(words[2])), words[3:]
    return left, words[1:]


def _operand(word: str) -> Symbol | Text | Macro:
    if "$(" in word:
        return Macro(text=word)
    if word[0] in "\"'":
        return Text(value=re.sub(r"\\(.)", r"\1", word[1:-1]))
    name = re.fullmatch(r"\w*[A-Za-z_]\w*", word)
    if name and not re.fullmatch(r"0[xX][0-9a-fA-F]+", word):
        return Symbol(name=word)
    if re.fullmatch(r"[\w.+-]+", word):
        return Text(value=word)
    raise Malformed(f"unexpected {word!r}")


def evaluate(expression: Expr, values: Values) -> Tristate:
    """The expression's value in a configuration; UNKNOWN where it depends on a macro."""
    match expression:
        case Symbol(name=name):
            return TRISTATES.get(name if name in TRISTATES else values.text(name), N)
        case Text(value=value):
            return TRISTATES.get(value, N)
        case Macro():
            return UNKNOWN
        case Not(inner=inner):
            value_of = evaluate(inner, values)
            return UNKNOWN if value_of is UNKNOWN else Y - value_of
        case Group(operator=operator, parts=parts):
            found = [evaluate(part, values) for part in parts]
            certain = [each for each in found if each is not UNKNOWN]
            decided, pick = (N, min) if operator == "&&" else (Y, max)
            if len(certain) == len(found) or decided in certain:
                return pick(certain)
            return UNKNOWN
        case Compare():
            return _compare(expression, values)


def _compare(expression: Compare, values: Values) -> Tristate:
    left, right = _text(expression.left, values), _text(expression.right, values)
    if left is None or right is None:
        return UNKNOWN
    try:
        order = (int(left, 0) > int(right, 0)) - (int(left, 0) < int(right, 0))
    except ValueError:
        order = (left > right) - (left < right)
    holds = {"=": order == 0, "!=": order != 0, "<": order < 0, ">": order > 0,
             "<=": order <= 0, ">=": order >= 0}
    return Y if holds[expression.operator] else N


def _text(operand: Symbol | Text | Macro, values: Values) -> str | None:
    match operand:
        case Symbol(name=name):
            # An undefined symbol stands for its own name (scripts/kconfig/expr.c, expr_calc_value).
            return values.text(name) if values.known(name) and name not in TRISTATES else name
        case Text(value=value):
            return value
        case Macro():
            return None


def render(expression: Expr, *, inside: bool = False) -> str:
    """The expression as Kconfig would have it."""
    match expression:
        case Symbol(name=name):
            return name
        case Text(value=value):
            return value if re.fullmatch(r"-?\d+|0[xX][0-9a-fA-F]+", value) else f'"{value}"'
        case Macro(text=text):
            return text
        case Not(inner=inner):
            return "!" + render(inner, inside=True)
        case Group(operator=operator, parts=parts):
            joined = f" {operator} ".join(render(part, inside=True) for part in parts)
            return f"({joined})" if inside else joined
        case Compare(operator=operator, left=left, right=right):
            return f"{render(left)} {operator} {render(right)}"


def unmet(expression: Expr, values: Values, need: int = Y, *, guess: bool = False) -> list[str]:
    """What keeps the expression below `need`, in words; empty when nothing known does.

    With `guess`, macros of unknown value count as possible reasons.
    """
    value = evaluate(expression, values)
    if value is UNKNOWN and not guess:
        return []
    if value is not UNKNOWN and value >= need:
        return []
    match expression:
        case Symbol(name=name) | Not(inner=Symbol(name=name)):
            if not values.known(name) and name not in TRISTATES:
                return [f"{name} does not exist in this kernel"]
            return [f"{name} is {values.text(name)}"]
        case Group(operator=operator, parts=parts):
            reasons = list(dict.fromkeys(
                each for part in parts for each in unmet(part, values, need, guess=guess)))
            return reasons if operator == "&&" or not reasons else [" and ".join(reasons)]
        case Macro(text=text):
            return [f"the toolchain may not pass {text}"]
        case Compare(left=left):
            return [f"{render(left)} is {_text(left, values)}, so {render(expression)} is false"]
        case _:
            return [f"{render(expression)} is false"]
