"""What a release asks of the repository and the recipe."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from katagpu import recipe
from katagpu.errors import UserError
from katagpu.release import preflight
from katagpu.schema import Agent, Recipe
from tests.test_statement import URI

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


@pytest.mark.parametrize("how", ["exclude", "gitignore", "untracked", "directory"])
def test_inputs_that_git_does_not_show(root: Path, with_agent: Recipe, how: str) -> None:
    hidden = root / "rootfs/etc/hidden.conf"
    if how == "untracked":
        git(root, "config", "status.showUntrackedFiles", "no")
    elif how == "gitignore":
        (root / ".gitignore").write_text("*.conf\n/out/\n")
        git(root, "add", "-A")
        git(root, "commit", "-qm", "ignore")
    else:
        (root / ".git/info/exclude").write_text("hidden.conf\n" if how == "exclude" else "rootfs\n")
    preflight.check(root, with_agent, {}, {})
    hidden.parent.mkdir(parents=True)
    hidden.touch()
    with pytest.raises(UserError, match=r"not committed: rootfs/"):
        preflight.check(root, with_agent, {}, {})


def test_what_no_build_reads_may_be_ignored(root: Path, with_agent: Recipe) -> None:
    (root / ".gitignore").write_text("__pycache__/\n*.pyc\n*.tok\n/out/\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "ignore")
    for name in ("katagpu/__pycache__/a.pyc", "recipes/client.tok", "out/image", "katagpu/b.pyc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    preflight.check(root, with_agent, {}, {})
    (root / "rootfs").mkdir()
    (root / "rootfs/client.tok").touch()
    with pytest.raises(UserError, match=r"not committed: rootfs/client\.tok"):
        preflight.check(root, with_agent, {}, {})


def test_what_changed_meanwhile(root: Path, with_agent: Recipe) -> None:
    commit = preflight.check(root, with_agent, {}, {})
    preflight.unchanged(root, commit)
    (root / "more").touch()
    with pytest.raises(UserError, match="not committed: more"):
        preflight.unchanged(root, commit)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "more")
    with pytest.raises(UserError, match=f"was at {commit[:12]} when this release began"):
        preflight.unchanged(root, commit)


@pytest.mark.root
def test_the_clone_of_another_user(root: Path, with_agent: Recipe) -> None:
    """As with sudo in a clone of one's own."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for path in (root, *root.rglob("*")):
        os.chown(path, 1234, 1234)
    assert len(preflight.check(root, with_agent, {}, {})) == 40
    assert {path.stat().st_uid for path in root.rglob("*")} == {1234}, "nothing becomes root's"


@pytest.mark.parametrize(("address", "uri"), [
    ("https://git.example/group/guests.git", "git+https://git.example/group/guests"),
    ("https://user:word@git.example:8443/guests/", "git+https://git.example:8443/guests"),
    ("git@git.example:group/guests.git", "git+https://git.example/group/guests"),
    ("ssh://git@git.example:2222/group/guests.git", "git+https://git.example/group/guests"),
    ("/srv/guests.git", preflight.NOWHERE), ("file:///srv/guests.git", preflight.NOWHERE),
    ("../guests", preflight.NOWHERE), ("box:guests", preflight.NOWHERE), ("", preflight.NOWHERE),
    ("https://git.example/guests?token=word", preflight.NOWHERE)])
def test_the_repository_s_uri(root: Path, address: str, uri: str) -> None:
    if address:
        git(root, "remote", "add", "origin", address)
    assert preflight.repository(root) == uri
    assert URI.fullmatch(uri) and "word" not in uri
