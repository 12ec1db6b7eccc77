"""What a release asks of the repository and the recipe before anything is built for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from katagpu import run
from katagpu.errors import UserError
from katagpu.schema import Recipe

SHOWN = 5  # changed files in a message


def committed_lock(root: Path, recipe_name: str) -> Path | None:
    """The recipe's lock, where there is one and git has it."""
    path = root / "recipes" / f"{recipe_name}.lock"
    known = _git(root, "ls-files", "--", str(path.relative_to(root)))
    return path if path.is_file() and known.strip() else None


def check(root: Path, recipe: Recipe, values: Mapping[str, str],
          environment: Mapping[str, str]) -> str:
    """The commit that is released. Raises `UserError` with the reason why it must not be.

    `values` are the parameters of the command line.
    """
    for given, name in ((values.get("driver"), "driver="),
                        (environment.get("EXTRA_PKGS", "").strip(), "EXTRA_PKGS")):
        if given:
            raise UserError(f"{name} is set: a release is of a recipe as it is committed",
                            hint="write it into the recipe, or into another recipe")
    commit = _git(root, "rev-parse", "--verify", "HEAD").strip()
    if committed_lock(root, recipe.name) is None:
        raise UserError(f"{recipe.name} has no committed lock: nobody could build this release "
                        "again", hint="./doitw lock, then commit "
                        f"recipes/{recipe.name}.lock")
    changed = _git(root, "status", "--porcelain").splitlines()
    if changed:
        shown = ", ".join(line[3:] for line in changed[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(f"the repository has changes that are not committed: {shown}{more}",
                        hint="commit or remove them (git status)")
    if recipe.agent is None and values.get("no_agent", "0") == "0":
        raise UserError(f"{recipe.name} has no kata-agent: Kata cannot use this guest",
                        hint="name one in the recipe's `agent:`; no_agent=1 releases it without")
    return commit


def _git(root: Path, *words: str) -> str:
    argv: Sequence[str | Path] = ["git", "-C", root, *words]
    found = run.run(argv, capture=True, check=False)
    if found.status != 0:
        raise UserError(f"a release is of a commit, and git says: "
                        f"{found.stderr.decode(errors='replace').strip()}",
                        hint="release from a clone of the repository")
    return found.stdout.decode(errors="replace")
