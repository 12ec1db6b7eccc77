"""What differs between two builds, and that it really does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from katagpu import sandbox, vary
from katagpu.vary import DISTURBING, Side, Variation

ENVIRONMENT = {"PATH": os.environ["PATH"], "LC_TIME": "de_DE.UTF-8", "TZ": "Europe/Berlin",
               "KATAGPU_JOBS": "7", "EXTRA_PKGS": "gcc", "HOME": "/root"}
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def found(tmp_path: Path) -> Variation:
    """Two builds here."""
    return vary.variation(tmp_path, ENVIRONMENT)


def said(side: Side, script: str) -> str:
    """What a shell says where a build would run."""
    return subprocess.run([*side.prefix, "sh", "-c", script], env=dict(side.environment),
                          capture_output=True, text=True, check=True).stdout.strip()


def test_the_two(found: Variation) -> None:
    first, second = found.sides
    assert first.place != second.place and len(str(second.tree)) > len(str(first.tree))
    for name in ("TZ", "KATAGPU_STORE", "KATAGPU_JOBS", "PYTHONHASHSEED", "LANG"):
        assert first.environment[name] != second.environment[name], name
    for side in found.sides:
        assert side.environment["EXTRA_PKGS"] == "gcc", "what is built is the same"
        assert "LC_TIME" not in side.environment and str(side.store) == \
            side.environment["KATAGPU_STORE"]
    assert DISTURBING.items() <= second.environment.items()
    assert not set(DISTURBING) & set(first.environment)
    assert (first.ccache, second.ccache) == (False, True)
    assert first.argv("x")[-2:] == ["ccache=0", "x"] and second.argv("x")[-2:] == ["ccache=1", "x"]
    assert first.prefix == () and not set(found.varied) & set(found.same)


def test_the_zones_never_show_the_same_day(found: Variation) -> None:
    days = [said(side, "date +%F") for side in found.sides]
    assert days[0] < days[1]


@root
def test_host_name_and_uptime(found: Variation) -> None:
    first, second = found.sides
    for what, script in (("host name", "uname -n"), ("uptime", "cut -d. -f1 /proc/uptime")):
        if what in found.varied:
            assert said(first, script) != said(second, script), what
        else:
            assert found.same[what]


def test_an_ordinary_user_alone(found: Variation, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """What only root can vary is said."""
    monkeypatch.setattr(sandbox, "rootless", lambda: True)
    mine = vary.variation(tmp_path, ENVIRONMENT)
    assert {"host name", "uptime", "user"} <= set(mine.same)
    assert [word for word in mine.sides[1].prefix if word in ("unshare", "setpriv")] == []


@root
@pytest.mark.parametrize(("ids", "why"), [
    ("", "no user here has subordinate ids"), ("root:100000:65536\n", "no user here has"),
    ("gone-user:100000:65536\n", "no user here has"),
    ("nobody:100000:65536\n", "nobody cannot")])
def test_why_no_other_user_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: str, why: str,
) -> None:
    (tmp_path / "subuid").write_text(ids)
    monkeypatch.setattr(sandbox, "SUBORDINATE", (tmp_path / "subuid",))
    tmp_path.chmod(0o700)
    found = vary.variation(tmp_path, ENVIRONMENT)
    assert why in found.same["user"] and found.sides[1].user is None


def test_a_client_token_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/a.tok").write_text("secret")
    (tmp_path / "repository/a.txt").write_text("text")
    vary.copy(tmp_path / "repository", tmp_path / "copy")
    assert (tmp_path / "copy/a.tok").read_text() == ""
    assert (tmp_path / "copy/a.txt").read_text() == "text"


def test_one_processor_less_from_four_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {2, 3, 5, 7})
    found = vary.variation(tmp_path, ENVIRONMENT)
    assert found.varied["processors"] == ("4", "3") and found.varied["jobs"] == ("-j4", "-j5")
    prefix = list(found.sides[1].prefix)
    assert prefix[prefix.index("taskset"):][:3] == ["taskset", "--cpu-list", "2,3,5"]


def test_a_copy_has_the_modes_of_its_umask(found: Variation, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for name in ("out/x", ".git/config", "katagpu/__pycache__/x", "katagpu/code.py", "doitw"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(name)
    (repository / "doitw").chmod(0o755)
    (repository / "link").symlink_to("doitw")
    lock = repository / "out/recipe/1/lock.json"
    lock.parent.mkdir(parents=True)
    lock.write_text("{}")
    for side, plain, program in zip(found.sides, (0o644, 0o600), (0o755, 0o700), strict=True):
        vary.lay(repository, side, [lock])
        assert sorted(str(path.relative_to(side.tree)) for path in side.tree.rglob("*")
                      if not path.is_dir()) == ["doitw", "katagpu/code.py", "link",
                                                "out/recipe/1/lock.json"]
        assert (side.tree / "katagpu/code.py").stat().st_mode & 0o777 == plain
        assert (side.tree / "doitw").stat().st_mode & 0o777 == program
        assert (side.tree / "katagpu").stat().st_mode & 0o777 == program
