"""The TOML reader of old Pythons reads what tomllib reads, and refuses what it refuses."""

from __future__ import annotations

import random
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from katagpu.host import tomlreader

DATA = Path(__file__).parent / "data"
GOOD = [
    "", "# nothing", "a = 1", "a=1 # c\n\n[t]\nb = true", "'a b' = 2", '"a.b".c = 3', "a.b.c = 1",
    "a = [1, 2,\n 3, # c\n]\n", "a = []", "a = {}", "a = {b = 1, 'c' = [2]}", "[a.b]\n[a]\nc = 1",
    "[[a]]\nb = 1\n[[a]]\nb = 2\n[a.c]\nd = 3\n[[a.e]]\n[[a.e]]", "a = 0x1F\nb = 0o17\nc = 0b11",
    "a = 1_000\nb = -0\nc = +7", "a = 1.5\nb = 1e3\nc = -1.5E-2\nd = inf\ne = -inf",
    'a = "x\\ty\\u00e9\\U0001F600\\"\\\\"', "a = 'C:\\x'", 'a = """\nx\ny"""', "a = '''\nx'y''z'''",
    'a = """x\\\n   y"""', 'a = """x""""', 'a = """x"""""', "a = ''''x'''''", "a = '''x'''",
    "[a]\nb.c = 1\n[a.b.d]\ne = 2", "\ta\t=\t1\t", "a = [[1], ['x'], [{y = 1}]]", "1 = 1", "-_ = 1",
    "a = 1\r\nb = 2\r\n", "[ a . 'b' ]\nc = 1", "a = true\nb = false", "a = [\n\n]",
    "[a]\n[a.b.c]\n[a.b]\nx = 1"]
BAD = [
    "a", "a =", "a = 1 b = 2", "= 1", "a = 01", "a = 1__0", "a = _1", "a = 1.", "a = .5", "a = 1e",
    "a = tru", "a = True", "a = 'x", 'a = "x', 'a = "x\ny"', "a = '''x", 'a = "\\q"', 'a = "\\u12"',
    'a = "\\ud800"', "a = [1 2]", "a = [1,", "a = {b = 1,}", "a = {b = 1\n}", "a = {b 1}", "a = {",
    "[a", "[a]]", "[[a]", "[]", "[a]\n[a]", "a = 1\na = 2", "a = 1\n[a]", "[a]\n[[a]]",
    "[[a]]\n[a]", "a = [1]\n[[a]]", "a = {}\n[a.b]", "a = {b = 1}\na.c = 2", "a.b = 1\n[a]",
    "[a.b]\n[a]\nb.c = 1", "a.b = 1\na.b.c = 2", "a = 1\na.b = 2", "a = 0xg", "a = 0b2",
    "a = +0x1", "a = \x01", "a = 'x\x7f'", "# \x01", "a = 1\rb = 2", "[a] b = 1", "a = b",
    "a = 'x' 'y'", "a = \"\"\"x\"\"\"\"\"\"", "a = {b = 1, b = 2}", "a = {b.c = 1, b = 2}",
    "\"\"\"a\"\"\" = 1", "[a.b.c]\n[a.b]\n[a.b]", "é = 1", "a = 1_", "a = [,]", "a.= 1", ".a = 1",
    "[[a.b]]\n[a.b]", "[a]\nb.c = 1\n[a.b]", "a = nan1", "a = 1e1.5"]


def same(found: Any, wanted: Any) -> bool:
    """Equal, and of the same types: 1, 1.0 and true are not."""
    if type(found) is not type(wanted):
        return False
    if isinstance(found, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in found)
    if isinstance(found, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted) or bool(found != found and wanted != wanted)


def both(text: str) -> tuple[Any, Any]:
    """What the reader makes of it, and tomllib; None where it is no TOML."""
    try:
        wanted = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError):
        wanted = None
    try:
        return tomlreader.loads(text), wanted
    except tomlreader.Wrong:
        return None, wanted


@pytest.mark.parametrize("text", GOOD)
def test_reads_what_is_toml(text: str) -> None:
    found, wanted = both(text)
    assert wanted is not None and same(found, wanted)


@pytest.mark.parametrize("text", BAD)
def test_refuses_what_is_none(text: str) -> None:
    assert both(text) == (None, None)


def test_nan() -> None:
    assert tomlreader.loads("a = nan")["a"] != tomlreader.loads("a = nan")["a"]


@pytest.mark.parametrize(("text", "line", "word"), [
    ("a = 1\n[hypervisor.qemu]\nkernel = \"/x\nimage = 1\n", 3, 'not closed by "'),
    ("a = [\n1,\n2\nb = 1", 4, "comma"), ("x = 1\n\n\nx = 2", 4, "already"),
    ("a = yes\n", 1, "a value is wanted"), ("a = 2026-01-01", 1, "dates"),
    ("[a]\nb = 'x' c", 2, "nothing more"), ("a\n", 1, "wants `=`"), ("\n[a\nb = 1", 2, "] is")])
def test_says_where_and_why(text: str, line: int, word: str) -> None:
    with pytest.raises(tomlreader.Wrong) as caught:
        tomlreader.loads(text)
    assert caught.value.line == line
    assert word in caught.value.why


def test_depth_is_bounded() -> None:
    with pytest.raises(tomlreader.Wrong, match="deeply"):
        tomlreader.loads("a = " + "[" * 5000)


@pytest.mark.parametrize("path", sorted((DATA / "kata").glob("*.toml")), ids=lambda path: path.name)
def test_configurations_in_kata_s_shape(path: Path) -> None:
    found, wanted = both(path.read_text())
    assert wanted and same(found, wanted)


WORDS = ["a", "b", "a.b", "b.a.c", "'x y'", '"k\\t"', "hypervisor", "qemu"]
VALUES = ["1", "-7", "true", "false", "'l'", '"s\\n"', "1.5", "[1, 2]", "[]", "{a = 1}", "['x',\n]",
          '"""m\n"""', "0x10", "{}", "{a.b = 1}", "[[1], [{c = 2}]]", "1_0", "inf", "'''q'''"]
SPOILERS = "[]{}=.,\"'#\\\n \t0aE_-+x"


def document(chance: random.Random) -> str:
    """Lines as TOML has them; half of the documents contradict themselves."""
    lines = []
    for _ in range(chance.randint(1, 8)):
        kind = chance.random()
        word = chance.choice(WORDS)
        if kind < 0.25:
            lines.append(f"[{word}]")
        elif kind < 0.35:
            lines.append(f"[[{word}]]")
        elif kind < 0.4:
            lines.append("# comment")
        else:
            lines.append(f"{word} = {chance.choice(VALUES)}")
    return "\n".join(lines) + chance.choice(["", "\n"])


def test_random_documents_are_read_alike() -> None:
    chance = random.Random(7)
    valid = 0
    for number in range(6000):
        text = document(chance)
        for _ in range(number % 3):  # and spoiled ones
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(SPOILERS) + text[at + chance.randint(0, 1):]
        found, wanted = both(text)
        if re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d", text):
            continue
        valid += wanted is not None
        assert (found is None) == (wanted is None), text
        assert wanted is None or same(found, wanted), text
    assert valid > 1000
