"""Digests: what changes a key, what does not, and that no mechanism changes unconsidered.

    python tests/test_keys.py --renew

writes the record of the mechanisms anew, after you decided whether their numbers must be raised.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from katagpu import keys

RECORD = Path(__file__).parent / "data" / "mechanisms.json"
ALL = sorted(".".join(path.relative_to(keys.PACKAGE).with_suffix("").parts)
             .removesuffix(".__init__") for path in keys.PACKAGE.rglob("*.py"))


# values


class Colour(StrEnum):
    """An option."""

    RED = "red"


def test_the_canonical_form_is_pinned() -> None:
    value = {"b": [1, True, None, "ä\n"], "a": {"z": 1.5, "y": Colour.RED}, "c": ()}
    assert keys.canonical(value) == \
        '{"a":{"y":"red","z":1.5},"b":[1,true,null,"ä\\n"],"c":[]}'.encode()
    assert keys.digest({}) == hashlib.sha256(b"{}").hexdigest()


def test_order_of_a_mapping_does_not_count_and_of_a_list_does() -> None:
    assert keys.digest({"a": 1, "b": 2}) == keys.digest({"b": 2, "a": 1})
    assert keys.digest([1, 2]) != keys.digest([2, 1])
    assert keys.digest({"a": 1}) != keys.digest({"a": "1"})


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", Path("x"), object()])
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        keys.digest({"a": value})


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert keys.file_digest(path) == hashlib.sha256(b"abc").hexdigest()
    assert keys.readable_digest(path) == keys.file_digest(path)
    assert keys.readable_digest(tmp_path / "none") == "No such file or directory"


# code


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package in the place of katagpu: one stage that reaches modules in every way."""
    for name, text in {
        "__init__.py": "",
        "store.py": "from katagpu import only_of_store\n",
        "only_of_store.py": "",
        "stages/__init__.py": "",
        "stages/one.py": """
import json
from katagpu import store, plain
from katagpu.many import (
    first,  # the first (of two)
    second as other,
)
from katagpu.values import VALUE
from katagpu.mixed import module, function
import katagpu.dotted

def make():
    from katagpu import lazy
    # from katagpu import commented
""",
        "plain.py": "from katagpu.below import deep\n", "below/__init__.py": "",
        "below/deep.py": "", "many/__init__.py": "", "many/first.py": "", "many/second.py": "",
        "many/third.py": "", "values.py": "VALUE = 1\n", "mixed/__init__.py": "function = 1\n",
        "mixed/module.py": "", "dotted.py": "", "lazy.py": "", "commented.py": "", "other.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(keys, "PACKAGE", tmp_path)
    keys.code.cache_clear()
    yield tmp_path
    keys.code.cache_clear()


def stage_key() -> str:
    """The digest of the toy stage's code now."""
    keys.code.cache_clear()
    return keys.digest(keys.code("stages.one"))


REACHED = ("stages/one", "plain", "below/deep", "many/first", "many/second", "values",
           "mixed/__init__", "mixed/module", "dotted", "lazy")
NOT_REACHED = ("store", "only_of_store", "many/third", "commented", "other")


@pytest.mark.parametrize("name", REACHED)
def test_a_key_changes_with_the_text_that_it_reaches(package: Path, name: str) -> None:
    before = stage_key()
    with (package / f"{name}.py").open("a") as stream:
        stream.write("# a comment\n")
    assert stage_key() != before


@pytest.mark.parametrize("name", NOT_REACHED)
def test_a_key_does_not_change_with_other_text_or_a_mechanism(package: Path, name: str) -> None:
    before = stage_key()
    with (package / f"{name}.py").open("a") as stream:
        stream.write("# a comment\n")
    assert stage_key() == before


def test_a_key_changes_with_a_mechanisms_number(
    package: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = stage_key()
    monkeypatch.setitem(keys.MECHANISMS, "store", keys.MECHANISMS["store"] + 1)
    assert stage_key() != before


def parsed_imports(name: str) -> set[str]:
    """What `keys.imports` should find, by Python's own parser."""
    path = keys.module_path(name)
    assert path is not None
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("katagpu.")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "katagpu":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                module = keys.module_path(whole.removeprefix("katagpu."))
                found.add(whole if module is not None else str(node.module))
    return {module.removeprefix("katagpu.") for module in found - {"katagpu"}}


@pytest.mark.parametrize("name", [name for name in ALL if name != "__init__"])
def test_the_quick_search_finds_what_the_parser_finds(name: str) -> None:
    missed = parsed_imports(name) - keys.imports(name)
    assert not missed, f"keys.imports does not see {missed} in {name}"


def test_every_mechanism_is_a_module() -> None:
    assert not [name for name in keys.MECHANISMS if keys.module_path(name) is None]


# the mechanisms' numbers


def syntax_digest(text: str) -> str:
    """The digest of a module's syntax tree without docstrings, comments and positions.

    Independent of the Python version: only the names and values of the fields that are set count.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) \
                and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MECHANISMS":
            node.value = None  # a raised number is no change of the module `keys`

    def plain(node: object) -> object:
        if isinstance(node, ast.AST):
            fields = {name: plain(value) for name, value in ast.iter_fields(node)
                      if value not in (None, [])}
            return [type(node).__name__, fields]
        return [plain(item) for item in node] if isinstance(node, list) else repr(node)

    return keys.digest(plain(tree))


def mechanisms() -> dict[str, dict[str, str | int]]:
    """Each mechanism's number, and the digest of its code now."""
    found: dict[str, dict[str, str | int]] = {}
    for name, number in keys.MECHANISMS.items():
        path = keys.module_path(name)
        assert path is not None, name
        found[name] = {"number": number, "code": syntax_digest(path.read_text())}
    return found


def test_docstrings_and_comments_do_not_count_and_code_does() -> None:
    one = 'def f():\n    """A docstring."""\n    return 1\n'
    assert syntax_digest(one) == syntax_digest("def f():\n    # why\n    return (1)\n")
    assert syntax_digest(one) != syntax_digest("def f():\n    return 2\n")
    assert syntax_digest("MECHANISMS: D = {1: 2}") == syntax_digest("MECHANISMS: D = {1: 3}")
    assert syntax_digest("x = 'a'") != syntax_digest("x = b'a'")


def test_no_mechanism_changed_unconsidered() -> None:
    recorded = json.loads(RECORD.read_text())
    now = mechanisms()
    changed = [name for name in now if now[name] != recorded.get(name)]
    assert list(recorded) == list(now) and not changed, (
        f"the code of {', '.join(changed) or 'a mechanism that is gone'} is not the recorded one.\n"
        "Can the change alter what a stage puts out? Then raise the number in keys.MECHANISMS.\n"
        "In both cases: python tests/test_keys.py --renew, and commit the record with the change.")


def renew() -> None:
    """Write the record."""
    RECORD.write_text(json.dumps(mechanisms(), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit(f"usage: {sys.argv[0]} --renew")
    renew()
