"""TOML for Python 3.9 and 3.10, which have no tomllib: all of TOML 1.0 but dates and times.

Kata's configuration has neither. A date is an error here and not a guess: it can only be a value
that forgot its quotes. tests/host/test_tomlreader.py compares it with tomllib.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

BARE = re.compile(r"[A-Za-z0-9_-]+")
SPACE = re.compile(r"[ \t]*")
COMMENT = re.compile(r"#[^\x00-\x08\x0a-\x1f\x7f]*")
INTEGER = re.compile(r"[+-]?(0|[1-9](_?[0-9])*)(?![0-9A-Za-z_.:-])")
BASED = re.compile(r"0x[0-9A-Fa-f](_?[0-9A-Fa-f])*|0o[0-7](_?[0-7])*|0b[01](_?[01])*")
FLOAT = re.compile(r"[+-]?((0|[1-9](_?[0-9])*)(\.[0-9](_?[0-9])*)?([eE][+-]?[0-9](_?[0-9])*)?"
                   r"|inf|nan)(?![0-9A-Za-z_.:-])")
DATE = re.compile(r"\d{4}-\d\d-\d\d|\d\d:\d\d")
ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
DEEPEST = 100  # arrays and tables in each other


class Wrong(ValueError):
    """Text that is no TOML. `line` counts from 1."""

    def __init__(self, why: str, line: int) -> None:
        super().__init__(why)
        self.why = why
        self.line = line


class _Closed:
    """What may not be extended any more: inline tables, arrays, tables that have been opened."""

    def __init__(self) -> None:
        self.values: set[int] = set()  # ids of dicts and lists that are complete
        self.opened: set[int] = set()  # ids of dicts that a [header] opened
        self.dotted: set[int] = set()  # ids of dicts that a dotted key made


def loads(text: str) -> dict[str, Any]:
    """The document. Raises `Wrong`."""
    return _Reader(text.replace("\r\n", "\n")).document()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.root: dict[str, Any] = {}
        self.closed = _Closed()
        self.depth = 0

    def document(self) -> dict[str, Any]:
        """All of it."""
        here = self.root
        while True:
            self.blank()
            if self.at >= len(self.text):
                return self.root
            if self.text.startswith("[[", self.at):
                here = self.array_header()
            elif self.peek() == "[":
                here = self.header()
            else:
                self.pair(here)
            self.end_of_line()

    # the table that a line is about

    def header(self) -> dict[str, Any]:
        """`[a.b]`"""
        self.at += 1
        keys = self.keys()
        self.want("]")
        parent = self.walk(self.root, keys[:-1], header=True)
        found = parent.setdefault(keys[-1], {})
        if not isinstance(found, dict) or id(found) in (
                self.closed.values | self.closed.opened | self.closed.dotted):
            self.fail(f"{'.'.join(keys)} is there already")
        self.closed.opened.add(id(found))
        return found

    def array_header(self) -> dict[str, Any]:
        """`[[a.b]]`"""
        self.at += 2
        keys = self.keys()
        self.want("]]")
        parent = self.walk(self.root, keys[:-1], header=True)
        found = parent.setdefault(keys[-1], [])
        if not isinstance(found, list) or id(found) in self.closed.values:
            self.fail(f"{'.'.join(keys)} is there already, and is no array of tables")
        new: dict[str, Any] = {}
        found.append(new)
        return new

    def walk(self, table: dict[str, Any], keys: list[str], *, header: bool) -> dict[str, Any]:
        """Down the keys, making what is not there."""
        for key in keys:
            if key not in table:
                table[key] = {}
            found = table[key]
            if not header and id(found) in self.closed.opened:
                self.fail(f"{key} is there already")
            if not header:
                self.closed.dotted.add(id(found))
            if isinstance(found, list) and header and found and id(found) not in \
                    self.closed.values:
                found = found[-1]
            if not isinstance(found, dict) or id(found) in self.closed.values:
                self.fail(f"{key} is there already, and is no table")
            table = found
        return table

    def pair(self, table: dict[str, Any]) -> None:
        """`key = value`"""
        start = self.at
        keys = self.keys()
        if self.peek() != "=":
            self.fail("a key wants `=` and a value")
        self.at += 1
        self.space()
        value = self.value()
        end, self.at = self.at, start
        table = self.walk(table, keys[:-1], header=False)
        if keys[-1] in table:
            self.fail(f"{'.'.join(keys)} is there already")
        table[keys[-1]] = value
        self.at = end

    def keys(self) -> list[str]:
        """`a."b c".d`"""
        found = []
        while True:
            self.space()
            mark = self.peek()
            if mark and mark in "\"'":
                if self.text.startswith(mark * 3, self.at):
                    self.fail("a key cannot have several lines")
                found.append(self.string())
            else:
                bare = BARE.match(self.text, self.at)
                if not bare:
                    self.fail("a key or a [table] is wanted here")
                self.at = bare.end()
                found.append(bare[0])
            self.space()
            if self.peek() != ".":
                return found
            self.at += 1

    # values

    def value(self) -> Any:
        """Any value."""
        mark = self.peek()
        if mark and mark in "\"'":
            return self.string()
        if mark in ("[", "{"):
            self.depth += 1
            if self.depth > DEEPEST:
                self.fail("this is nested too deeply")
            found = self.array() if mark == "[" else self.inline()
            self.depth -= 1
            return found
        for word, meaning in (("true", True), ("false", False)):
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return meaning
        return self.number()

    def number(self) -> Any:
        """A whole or a floating number."""
        if DATE.match(self.text, self.at):
            self.fail("dates and times are not read here; text wants quotes")
        for pattern, make in ((BASED, lambda word: int(word, 0)), (INTEGER, int), (FLOAT, float)):
            found = pattern.match(self.text, self.at)
            if found:
                self.at = found.end()
                return make(found[0].replace("_", ""))
        return self.fail("a value is wanted here: text in quotes, a number, true or false, an "
                         "array")

    def array(self) -> list[Any]:
        """`[1, 2]`, over several lines too."""
        found: list[Any] = []
        self.at += 1
        while True:
            self.blank()
            if self.peek() == "]":
                break
            found.append(self.value())
            self.blank()
            if self.peek() == ",":
                self.at += 1
            elif self.peek() != "]":
                self.fail("an array wants a comma or its end `]` here")
        self.at += 1
        self.closed.values.add(id(found))
        return found

    def inline(self) -> dict[str, Any]:
        """`{a = 1}`"""
        found: dict[str, Any] = {}
        self.at += 1
        self.space()
        while self.peek() != "}":
            self.pair(found)
            self.space()
            if self.peek() == ",":
                self.at += 1
                self.space()
                if self.peek() == "}":
                    self.fail("an inline table cannot end in a comma")
            elif self.peek() != "}":
                self.fail("an inline table wants a comma or its end `}` here")
        self.at += 1
        self.close(found)
        return found

    def close(self, value: Any) -> None:
        """Let nothing extend it."""
        self.closed.values.add(id(value))
        for inner in value.values() if isinstance(value, dict) else ():
            if isinstance(inner, dict):
                self.close(inner)

    def string(self) -> str:
        """All four kinds."""
        mark = self.peek()
        long = self.text.startswith(mark * 3, self.at)
        self.at += 3 if long else 1
        if long and self.peek() == "\n":
            self.at += 1
        close: str = mark * (3 if long else 1)
        out: list[str] = []
        while not self.text.startswith(close, self.at):
            letter = self.peek()
            if not letter or (letter == "\n" and not long):
                self.fail(f"the text is not closed by {close}")
            if FORBIDDEN.match(letter):
                self.fail("a control character")
            if letter == "\\" and mark == '"':
                out.append(self.escape(long))
            else:
                out.append(letter)
                self.at += 1
        self.at += len(close)
        for _ in range(2):  # one or two quotes may stand before the closing three
            if long and self.peek() == mark:
                out.append(mark)
                self.at += 1
        return "".join(out)

    def escape(self, long: bool) -> str:
        """`\\n`, `\\u0041`, and in long strings the end of a line."""
        letter = self.text[self.at + 1:self.at + 2]
        if letter in ESCAPES:
            self.at += 2
            return ESCAPES[letter]
        size = {"u": 4, "U": 8}.get(letter)
        if size:
            digits = self.text[self.at + 2:self.at + 2 + size]
            number = int(digits, 16) if re.fullmatch(f"[0-9A-Fa-f]{{{size}}}", digits) else -1
            if not (0 <= number < 0xD800 or 0xDFFF < number <= 0x10FFFF):
                self.fail(f"\\{letter}{digits} is no character")
            self.at += 2 + size
            return chr(number)
        rest = re.compile(r"\\[ \t]*\n[ \t\n]*").match(self.text, self.at) if long else None
        if not rest:
            self.fail(f"\\{letter} is no escape; a backslash is written \\\\")
        self.at = rest.end()
        return ""

    # between them

    def peek(self) -> str:
        """The next letter; none at the end."""
        return self.text[self.at:self.at + 1]

    def want(self, word: str) -> None:
        """Read what has to be here."""
        if not self.text.startswith(word, self.at):
            self.fail(f"{word} is wanted here")
        self.at += len(word)

    def space(self) -> None:
        """Skip blanks."""
        found = SPACE.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def blank(self) -> None:
        """Skip blanks, comments and ends of lines."""
        while True:
            self.space()
            comment = COMMENT.match(self.text, self.at)
            if comment:
                self.at = comment.end()
            if self.peek() != "\n":
                return
            self.at += 1

    def end_of_line(self) -> None:
        """The rest of a line: a comment at most."""
        self.space()
        comment = COMMENT.match(self.text, self.at)
        if comment:
            self.at = comment.end()
        if self.peek() not in ("", "\n"):
            self.fail("nothing more is wanted in this line")

    def fail(self, why: str) -> NoReturn:
        """Raise."""
        raise Wrong(why, self.text.count("\n", 0, self.at) + 1)
