"""The command line of `katagpu host`: options that all commands have, questions, failures."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from katagpu.host import cli
from tests import hosttree
from tests.host.conftest import Make

REPOSITORY = Path(cli.__file__).parents[2]


def commands() -> list[str]:
    """The names of all commands."""
    (action,) = (action for action in cli.parser("x")._actions if action.dest == "command")
    return list(action.choices or ())


@pytest.mark.parametrize("name", commands())
def test_each_command_has_help_and_the_common_options(
        name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    for option in ("--json", "--dry-run", "--yes", "--root"):
        assert option in said


@pytest.mark.parametrize("words", [[], ["what"], ["bind"], ["gpus", "--what"]])
def test_command_lines_that_are_refused(
        words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 1
    assert "error:" in capfd.readouterr().err


@pytest.mark.parametrize(("words", "near"), [
    (["chek"], "check"), (["vgpu", "lst"], "list"), (["gpus", "--jsom"], "--json"),
    (["configure", "--shim", "runtime-r"], "runtime-rs"),
    (["configure", "--functons=3"], "--functions"), (["bind"], None)])
def test_a_wrong_command_line_has_the_nearest_name(
        words: list[str], near: str | None, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*words, "--json"], prog="python3 x.pyz") == 1
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert set(found) == {"error", "hint"} and found["error"] in said.err
    assert "usage:" not in said.err and found["hint"].endswith("--help")
    assert near is None or f"did you mean {near}? python3 x.pyz" in found["hint"]


@pytest.mark.parametrize("words", [["python", "-m", "katagpu", "host"],
                                   ["python", "-m", "katagpu.host"]])
def test_both_ways_to_call_it(words: list[str], tmp_path: Path) -> None:
    hosttree.t4(tmp_path / "root")
    said = subprocess.run([sys.executable, *words[1:], "gpus", "--json", "--root",
                           tmp_path / "root"], cwd=REPOSITORY, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["gpus"][0]["bdf"] == "0000:3b:00.0"


def test_commands_in_messages_are_those_of_the_program(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosttree.t4(tmp_path / "root")
    words = ["check", "--root", str(tmp_path / "root")]
    assert cli.main(words, prog="python3 x.pyz") == 1
    said = capsys.readouterr().out
    assert "python3 x.pyz bind 0000:3b:00.0; python3 x.pyz persist 0000:3b:00.0" in said
    assert cli.main([*words, "--json"], prog="python3 x.pyz") == 1
    assert "python3 x.pyz bind 0000:3b:00.0" in capsys.readouterr().out
    assert cli.main(["smoke", *words[1:], "--release", "/x"], prog="./doitw host") == 1
    assert "katagpu host" not in capsys.readouterr().err


@pytest.mark.parametrize("reader", ["head -n 1", "cat"])
def test_a_terminal_without_utf_8_and_a_reader_that_leaves(tmp_path: Path, reader: str) -> None:
    hosttree.t4(tmp_path / "root")
    said = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m katagpu host check --root {tmp_path}/root | {reader}"],
        cwd=REPOSITORY, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert said.stdout.startswith(b"pass  kernel: ")
    assert said.stderr == b""


@pytest.mark.parametrize("words", [["configure", "--functions", "0"], ["smoke", "--timeout", "-1"],
                                   ["snippets", "--functions", "two"]])
def test_numbers_that_are_none(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 1
    assert "is no number from 1 on" in capfd.readouterr().err


def test_a_root_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpus", "--json", "--root", "/no/such"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "error": "--root /no/such: there is no such directory", "hint": None}


def ask(tree: hosttree.Tree, answer: bytes, search: str) -> tuple[int, str]:
    """Run `bind` on a terminal, and answer its question."""
    code = f"""
import functools, sys
from katagpu.host import cli
from katagpu.host.machine import Machine
from tests.hosttree import Kernel, Tree
tree = Tree.__new__(Tree)
from pathlib import Path
tree.root = Path({str(tree.root)!r})
tree.paths = {{name: Path(path) for name, path in {
    {name: str(path) for name, path in tree.paths.items()}!r}.items()}}
make = functools.partial(Machine, attributes=Kernel(tree), search={search!r})
sys.exit(cli.main(["bind", "3b:00.0", "--root", str(tree.root)], make=make))
"""
    leader, follower = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=follower, stdout=follower,
                             stderr=follower, cwd=REPOSITORY, env={**os.environ, "TERM": "dumb"})
    os.close(follower)
    said = b""
    while b"[y/N]" not in said:
        said += os.read(leader, 4096)
    os.write(leader, answer)
    status = child.wait(timeout=30)
    while True:
        try:
            more = os.read(leader, 4096)
        except OSError:
            break
        if not more:
            break
        said += more
    os.close(leader)
    return status, said.decode()


@pytest.mark.parametrize(("answer", "driver"), [(b"y\n", "vfio-pci"), (b"n\n", "nouveau"),
                                                (b"\n", "nouveau"), (b"\x04", "nouveau")])
def test_it_asks_on_a_terminal(host: Make, answer: bytes, driver: str) -> None:
    here = host(hosttree.t4)
    status, said = ask(here.tree, answer, here.search)
    assert "This will give 0000:3b:00.0 [10de:1eb8] (nouveau) to vfio-pci." in said
    assert here.tree.bound("0000:3b:00.0") == driver
    assert (status == 0) == (driver == "vfio-pci")
    assert ("nothing was changed" in said) == (driver == "nouveau")
