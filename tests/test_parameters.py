"""The parameters of the command line: their table, flags, and paths from where they were typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from katagpu import parameters
from katagpu.errors import UserError
from tests import hosttree, toybuild
from tests.toyrepo import ToyRepository


def test_the_table_names_each_task_and_each_parameter_once() -> None:
    for task, own in parameters.TASKS.items():
        names = [one.name for one in own]
        assert len(set(names)) == len(names), task
        assert all(one.what and one.value for one in own)
    assert sorted(parameters.FLAGS) == ["all", "ccache", "draft", "json", "licensed", "no_agent",
                                        "unsigned", "unverified"]


def test_a_flag_is_0_or_1_and_nothing_else() -> None:
    assert parameters.flag({"all": "1"}, "all")
    assert not parameters.flag({"all": "0"}, "all", default=True)
    assert not parameters.flag({}, "all")
    assert parameters.flag({}, "ccache", default=True)
    for word in ("no", "yes", "", "00", "true"):
        with pytest.raises(UserError, match="neither 0 nor 1"):
            parameters.flag({"unverified": word}, "unverified")
        with pytest.raises(UserError, match="neither 0 nor 1"):
            parameters.check({"recipe": "any", "unverified": word})


def test_what_is_no_parameter() -> None:
    parameters.check({name: "1" for name in parameters.ALL})
    with pytest.raises(UserError, match="unknown parameter Recipe=") as near:
        parameters.check({"Recipe": "x"})
    assert near.value.hint == "did you mean 'recipe'?"
    with pytest.raises(UserError, match="EXTRA_PKGS is no parameter") as front:
        parameters.check({"EXTRA_PKGS": "gcc make"})
    assert front.value.hint == 'it goes in front: EXTRA_PKGS="gcc make" ./doitw …'


def test_a_parameter_goes_with_a_task_that_reads_it() -> None:
    for values, tasks in (({"recipe": "x", "driver": "y"}, ["lint"]), ({"all": "1"}, ["test"]),
                          ({"all": "1"}, ["lint", "test"]), ({"x": "1"}, ["lint"])):
        assert parameters.unread(values, tasks) is None
    found = parameters.unread({"key": "x", "to": "y"}, ["why"])
    assert str(found) == ("key= is no parameter of why\n"
                          "  hint: leave it out; it is one of release, install")


# paths


def test_a_path_starts_where_it_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    assert parameters.path("a/b") == tmp_path / "a/b"
    monkeypatch.setenv(parameters.CALLER, "/where/typed")
    for text, found in (("a", "/where/typed/a"), ("/a", "/a"), ("~/a", "/home/somebody/a"),
                        ("../a", "/where/typed/../a"), ("a~", "/where/typed/a~")):
        assert parameters.path(text) == Path(found)
        assert parameters.place(text) == found
    assert parameters.path("a", tmp_path) == tmp_path / "a"
    for address in ("oci://localhost/a:b", "oci:x", "https://localhost/a"):
        assert parameters.place(address) == address
    assert parameters.program("diffoscope") == "diffoscope"
    assert parameters.program("bin/diffoscope") == "/where/typed/bin/diffoscope"
    with pytest.raises(UserError, match="there is no such user"):
        parameters.path("~no-such-user-here/x")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory in which a command line is typed."""
    place = tmp_path / "elsewhere"
    (place / "host").mkdir(parents=True)
    return place


def test_diff_of_a_build_elsewhere(tmp_path: Path, elsewhere: Path) -> None:
    toy = ToyRepository(tmp_path)
    toybuild.write(toy.out)
    toybuild.write(elsewhere / "mine", driver="535.1")
    for word in ("mine", "./mine", "../elsewhere/mine"):
        status, out, err = toy.run("diff", "550.163.01", word, KATAGPU_CALLER=str(elsewhere))
        assert (status, err) == (0, "")
        assert out.splitlines()[0] == f"debian-trixie/550.163.01 → {word}"


def test_install_and_reproduce_with_paths_from_elsewhere(tmp_path: Path, elsewhere: Path) -> None:
    toy, caller = ToyRepository(tmp_path), str(elsewhere)
    said = toy.run("install", "from=rel", "unverified=1", "prefix=host", KATAGPU_CALLER=caller)[2]
    assert f"there is no release {elsewhere}/rel" in said
    said = toy.run("install", "from=~/rel", "unverified=1", KATAGPU_CALLER=caller)[2]
    assert f"there is no release {tmp_path}/rel" in said
    (elsewhere / "host").rmdir()
    said = toy.run("install", "--rollback", "prefix=host", KATAGPU_CALLER=caller)[2]
    assert f"{elsewhere}/host" in said
    said = toy.run("reproduce", "diffoscope=bin/diffoscope", KATAGPU_CALLER=caller)[2]
    assert f"{elsewhere}/bin/diffoscope" in said


def test_the_host_s_commands_run_where_they_were_typed(
    tmp_path: Path, elsewhere: Path, repository: Path,
) -> None:
    def said(caller: Path, *words: str) -> str:
        found = subprocess.run(
            [sys.executable, "-m", "katagpu", "host", *words], cwd=repository, text=True,
            capture_output=True, env={**os.environ, parameters.CALLER: str(caller)})
        assert "Traceback" not in found.stderr
        return found.stdout + found.stderr

    hosttree.t4(elsewhere / "host")
    assert "10de:" in said(elsewhere, "gpus", "--root", "host")
    assert f"usage: {repository}/doitw host" in said(elsewhere, "--help")
    assert "usage: ./doitw host" in said(repository, "--help")
    assert f"cannot go back to {tmp_path}/gone" in said(tmp_path / "gone", "gpus")
