"""A reader of the kernel's Kconfig files: which symbols there are, and what each depends on.

It reads just enough to explain why a configuration lacks a symbol, and executes nothing: no
makefile, no compiler, no `$(shell …)`. Kconfiglib 14.1 (the newest) was tried first; it stops at
the `modules` attribute that kernels since 5.13 have, and it evaluates a configuration of its own
where the question is about one that exists.

Language: Documentation/kbuild/kconfig-language.rst and scripts/kconfig/{lexer.l,parser.y} of
Linux 6.12.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from katagpu.errors import StepError
from katagpu.kconfig_expr import Expr, Malformed, Text, expand, parse, tokens

SOURCE_ARCH = {"x86_64": "x86"}
"""ARCH as make takes it, to the directory under arch/ (top Makefile, SRCARCH)."""

_TYPES = ("bool", "tristate", "string", "int", "hex")
_ENDS = {"endmenu": "menu", "endif": "if", "endchoice": "choice"}
_IGNORED = ("mainmenu", "comment", "modules", "optional", "option", "transitional")
_ASSIGNMENT = re.compile(r"\s*[\w-]+\s*(:=|\+=|=)|\s*\$\(")


@dataclass(frozen=True, kw_only=True)
class Clause:
    """A condition with the place where it is written."""

    kind: str
    expression: Expr
    path: str
    line: int


@dataclass(kw_only=True)
class Choice:
    """A choice, by the symbols that it lets one pick from."""

    prompt: str = ""
    members: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Definition:
    """One `config` entry. A symbol may have several; it can be set where any of them allows it.

    `needs` are its own `depends on` and all conditions around it. `defaults` and `selects` pair
    what is given with its condition (None: always).
    """

    name: str
    path: str
    line: int
    type: str = ""
    prompt: str | None = None
    prompt_if: Expr | None = None
    needs: list[Clause] = field(default_factory=list)
    defaults: list[tuple[Expr, Expr | None]] = field(default_factory=list)
    selects: list[tuple[str, Expr | None]] = field(default_factory=list)
    choice: Choice | None = None
    bounds: tuple[str, str] | None = None


@dataclass(kw_only=True)
class Tree:
    """All definitions of one architecture's Kconfig files."""

    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    selectors: dict[str, list[tuple[Definition, Expr | None]]] = field(default_factory=dict)

    def type_of(self, name: str) -> str:
        """bool, tristate, string, int or hex; empty where no definition says it."""
        return next((each.type for each in self.definitions.get(name, []) if each.type), "")


@dataclass(kw_only=True)
class _Block:
    kind: str
    needs: list[Clause] = field(default_factory=list)
    choice: Choice | None = None


class _Reader:
    """The state between the lines of nested files."""

    def __init__(self, root: Path, variables: Mapping[str, str]) -> None:
        self.root = root
        self.variables = variables
        self.tree = Tree()
        self.blocks: list[_Block] = []
        self.entry: Definition | None = None
        self.own: list[Clause] = []

    def read(self, name: str) -> None:
        """Read one file and, in place, those that it names by `source`."""
        path = self.root / name
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as failure:
            raise StepError(f"{path}: a Kconfig file cannot be read: {failure.strerror}",
                            hint="the kernel source is incomplete") from None
        for number, line in _statements(lines):
            try:
                words = list(tokens(expand(line, self.variables)))
                self.statement(words, name, number)
            except Malformed as problem:
                raise StepError(f"{path}:{number}: this Kconfig line is not understood: {problem}",
                                hint="katagpu/kconfig_tree.py reads the language of Linux 6.12"
                                ) from None

    def statement(self, words: list[str], name: str, number: int) -> None:
        """Take in one statement."""
        head, rest = words[0], words[1:]
        if head in ("source", "rsource"):
            self.read(_unquote(rest[0]))
        elif head in ("config", "menuconfig"):
            self.begin(Definition(name=rest[0], path=name, line=number))
        elif head in ("menu", "choice", "if"):
            self.entry = None
            self.blocks.append(_Block(kind=head, choice=Choice() if head == "choice" else None))
            self.own = self.blocks[-1].needs
            if head == "if":
                self.need("if", rest, name, number)
        elif head in _ENDS:
            if not self.blocks or self.blocks.pop().kind != _ENDS[head]:
                raise Malformed(f"{head} without its beginning")
            self.entry, self.own = None, []
        elif head in ("depends", "visible"):
            self.need(f"{head} {rest[0]}", rest[1:], name, number)
        elif head in _IGNORED:
            if head == "comment":
                self.entry, self.own = None, []
        else:
            self.attribute(head, rest)

    def begin(self, definition: Definition) -> None:
        """Start a `config` entry: the conditions of all blocks around it hold for it."""
        definition.needs = [need for block in self.blocks for need in block.needs]
        for block in reversed(self.blocks):
            if block.choice is not None:
                definition.choice = block.choice
                block.choice.members.append(definition.name)
                break
        self.tree.definitions.setdefault(definition.name, []).append(definition)
        self.entry, self.own = definition, definition.needs

    def need(self, kind: str, words: list[str], name: str, number: int) -> None:
        """Add a condition to the entry or block that is open."""
        self.own.append(Clause(kind=kind, expression=parse(words), path=name, line=number))

    def attribute(self, head: str, rest: list[str]) -> None:
        """Take in an attribute of the open entry, or the prompt of a choice."""
        words, condition = _split_condition(rest)
        entry = self.entry
        if entry is None:
            if head == "prompt" and self.blocks and self.blocks[-1].choice is not None:
                self.blocks[-1].choice.prompt = _unquote(words[0])
            return
        if head in _TYPES or head == "prompt":
            entry.type = head if head in _TYPES else entry.type
            if words:
                entry.prompt, entry.prompt_if = _unquote(words[0]), condition
        elif head in ("def_bool", "def_tristate"):
            entry.type = head.removeprefix("def_")
            entry.defaults.append((_value(words), condition))
        elif head == "default":
            entry.defaults.append((_value(words), condition))
        elif head == "select":
            entry.selects.append((words[0], condition))
            self.tree.selectors.setdefault(words[0], []).append((entry, condition))
        elif head == "range":
            # Of several, the first whose condition holds counts; the later ones are rarely other.
            entry.bounds = entry.bounds or (words[0], words[1])
        elif head != "imply":
            raise Malformed(f"unknown keyword {head!r}")


def _value(words: list[str]) -> Expr:
    try:
        return parse(words)
    except Malformed:
        return Text(value=" ".join(words))


def _split_condition(words: list[str]) -> tuple[list[str], Expr | None]:
    if "if" not in words:
        return words, None
    at = words.index("if")
    return words[:at], parse(words[at + 1:])


def _unquote(word: str) -> str:
    return word[1:-1] if word[:1] in ("'", '"') else word


def _indent(line: str) -> int:
    expanded = line.expandtabs(8)
    return len(expanded) - len(expanded.lstrip())


def _statements(lines: list[str]) -> Iterator[tuple[int, str]]:
    """The statements with their line numbers: continued lines joined, no help texts, no macros.

    A help text ends at the first line indented less than its own first line (lexer.l, state HELP).
    """
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at]
        at += 1
        while line.endswith("\\") and at < len(lines):
            line = line[:-1] + " " + lines[at]
            at += 1
        word = line.strip()
        if word in ("help", "---help---"):
            depth = 0
            while at < len(lines):
                blank = not lines[at].strip()
                depth = depth or (0 if blank else _indent(lines[at]))
                if not blank and (depth == 0 or _indent(lines[at]) < depth):
                    break
                at += 1
        elif word and not word.startswith("#") and not _ASSIGNMENT.match(line):
            yield number, line


def read_tree(kernel_tree: Path, arch: str) -> Tree:
    """Read all Kconfig files of a kernel for `arch` (a value of ARCH=).

    Raises `StepError` when a file is missing or has a line that this reader does not know.
    """
    reader = _Reader(kernel_tree, {"ARCH": arch, "SRCARCH": SOURCE_ARCH[arch]})
    reader.read("Kconfig")
    return reader.tree
