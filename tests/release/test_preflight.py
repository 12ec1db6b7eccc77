"""What a release asks of the repository and the recipe."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from katagpu import recipe
from katagpu.errors import UserError
from katagpu.release import preflight
from katagpu.schema import Agent, Recipe

NAME = "debian-trixie"


def git(root: Path, *words: str) -> str:
    """Run git there, as nobody in particular."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    return subprocess.run(
        ["git", "-C", root, "-c", "user.name=T", "-c", "user.email=t@example.invalid", *words],
        check=True, capture_output=True, text=True).stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a recipe and its lock, committed."""
    root = tmp_path / "repository"
    (root / "recipes").mkdir(parents=True)
    shutil.copy(Path(__file__).parent.parent.parent / f"recipes/{NAME}.yaml", root / "recipes")
    (root / f"recipes/{NAME}.lock").write_text("a lock\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    return root


@pytest.fixture
def with_agent(root: Path) -> Recipe:
    """The recipe, with an agent."""
    from msgspec.structs import replace

    return replace(recipe.load(NAME, root), agent=Agent(file="agent"))


def test_a_clean_repository(root: Path, with_agent: Recipe) -> None:
    assert preflight.check(root, with_agent, {}, {}) == git(root, "rev-parse", "HEAD").strip()


def test_no_agent(root: Path) -> None:
    found = recipe.load(NAME, root)
    with pytest.raises(UserError, match="no kata-agent"):
        preflight.check(root, found, {}, {})
    preflight.check(root, found, {"no_agent": "1"}, {})


def test_no_lock_or_one_that_git_does_not_know(root: Path, with_agent: Recipe) -> None:
    lock = root / f"recipes/{NAME}.lock"
    assert preflight.committed_lock(root, NAME) == lock
    git(root, "rm", "-q", "--cached", str(lock))
    git(root, "commit", "-qm", "no lock")
    for _ in range(2):
        assert preflight.committed_lock(root, NAME) is None
        with pytest.raises(UserError, match="no committed lock"):
            preflight.check(root, with_agent, {}, {})
        lock.unlink(missing_ok=True)


def test_changes(root: Path, with_agent: Recipe) -> None:
    for number in range(7):
        (root / f"new-{number}").touch()
    with pytest.raises(UserError, match=r"not committed: new-0, .*new-4 and 2 more"):
        preflight.check(root, with_agent, {}, {})
    git(root, "clean", "-fdq")
    with (root / f"recipes/{NAME}.lock").open("a") as stream:
        stream.write("edited by hand\n")
    with pytest.raises(UserError, match=rf"not committed: recipes/{NAME}\.lock"):
        preflight.check(root, with_agent, {}, {})


def test_what_is_not_as_committed(root: Path, with_agent: Recipe) -> None:
    with pytest.raises(UserError, match="driver= is set"):
        preflight.check(root, with_agent, {"driver": "1.2"}, {})
    with pytest.raises(UserError, match="EXTRA_PKGS is set"):
        preflight.check(root, with_agent, {}, {"EXTRA_PKGS": "vim"})


def test_no_repository(root: Path, with_agent: Recipe) -> None:
    shutil.rmtree(root / ".git")
    with pytest.raises(UserError, match="not a git repository"):
        preflight.check(root, with_agent, {}, {})
