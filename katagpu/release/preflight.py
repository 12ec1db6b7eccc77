"""What a release asks of the repository and the recipe before anything is built for it."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from katagpu import log, parameters, run
from katagpu.errors import UserError
from katagpu.plan import Plan
from katagpu.schema import Recipe

SHOWN = 5  # changed files in a message
INPUTS = ("hooks", "katagpu", "kernel-configs", "keys", "patches", "recipes", "rootfs")
"""What is read by builds: nothing in it may be hidden from git."""
NOWHERE = "tag:katagpu,2025:repository"
"""The URI of a repository without a public address."""
_REMOTE = re.compile(r"(?:(?P<scheme>https|http|ssh|git)://)?(?:[^@/]*@)?(?P<host>[^/:@]+)"
                     r"(?(scheme)(?P<port>:\d+)?/|:(?!/))(?P<path>[^\s?#]+)")


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
    _must_be_committed(root)
    if recipe.agent is None and not parameters.flag(values, "no_agent"):
        raise UserError(f"{recipe.name} has no kata-agent: Kata cannot use this guest",
                        hint="name one in the recipe's `agent:`; no_agent=1 releases it without")
    return commit


def unchanged(root: Path, commit: str) -> None:
    """Raise `UserError` where the repository is not, or no longer, at this commit alone.

    What a build read was there when it read it: this is asked again after each.
    """
    now = _git(root, "rev-parse", "--verify", "HEAD").strip()
    if now != commit:
        raise UserError(f"the repository was at {commit[:12]} when this release began, and is at "
                        f"{now[:12]} now", hint="run it again, and leave the repository alone")
    _must_be_committed(root)


def _must_be_committed(root: Path) -> None:
    changed = _git(root, "status", "--porcelain", "--untracked-files=all").splitlines()
    there = [name for name in INPUTS if (root / name).exists()]
    ignored = _git(root, "status", "--porcelain", "--untracked-files=all", "--ignored=matching",
                   "--", *there).splitlines() if there else []
    changed += [line for line in ignored if line.startswith("!! ") and not _is_no_input(line[3:])]
    if changed:
        shown = ", ".join(line[3:] for line in changed[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise UserError(f"the repository has changes that are not committed: {shown}{more}",
                        hint="commit or remove them (git status --ignored)")


def _is_no_input(name: str) -> bool:
    """Is an ignored file one of which no stage makes anything? Tokens are of `katagpu.embed`."""
    path = Path(name.strip('"'))
    return "__pycache__" in path.parts or path.suffix == ".pyc" or (
        path.suffix == ".tok" and path.parts[0] != "rootfs")


def repository(root: Path) -> str:
    """The URI of the repository: its remote `origin` where that has a public form, else a tag.

    Over SSH, and with `.git` at its end, it is the same repository, and a release of it has the
    same bytes. Who may read it is left out.
    """
    address = _git(root, "config", "--default", "", "--get", "remote.origin.url").strip()
    found = _REMOTE.fullmatch(address)
    if found is None or "." not in found["host"]:
        return NOWHERE
    port = found["port"] or "" if found["scheme"] in ("https", "http") else ""
    return f"git+https://{found['host']}{port}/{found['path'].strip('/').removesuffix('.git')}"


def signed(plan: Plan, root: Path, recipe: Recipe) -> None:
    """Verify every module that is released, and that the kernel trusts their signer alone.

    The guest's own checks did so when it was made; this is about what the store has now. Raises
    `UserError` naming the modules.
    """
    if recipe.sign is None:
        return
    from katagpu import modsig
    from katagpu.check.signed import trusted

    signer = modsig.certificate(root / recipe.sign.cert)
    kernel = plan.action("kernel")
    assert kernel is not None, "the guest is built"
    wrong = []
    if trusted(plan.store.sound(kernel.outputs["vmlinux"].blob)) != signer.der:
        wrong.append(f"vmlinux: trusts another certificate than that of {signer.subject}")
    count = 0
    for name in ("signed_kernel", "signed_driver"):
        action = plan.action(name) if name in plan.stages else None
        if action is not None:
            for path, module in _modules(plan.store.sound(action.outputs["modules"].blob)):
                count += 1
                try:
                    modsig.verify(module, signer)
                except modsig.Unsigned as why:
                    wrong.append(f"{path} {why}")
    if wrong:
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError("this guest must not be released:\n  " + "\n  ".join(wrong[:SHOWN]) + more,
                        hint="./doitw cache:verify, then ./doitw build_image")
    log.note(f"{count} modules are signed by {signer.subject}, whom the kernel trusts")


def _modules(tree: Path) -> Iterator[tuple[str, bytes]]:
    """The modules in a stored tree: their paths and contents."""
    import zstandard

    with tree.open("rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as plain, \
            tarfile.open(fileobj=plain, mode="r|") as tar:
        for member in tar:
            data = tar.extractfile(member) if member.isreg() else None
            if data is not None and member.name.endswith(".ko"):
                yield f"/{member.name}", data.read()


def _git(root: Path, *words: str) -> str:
    # A clone belongs to its user, and who builds may be root: its Python is being run in any case.
    argv: Sequence[str | Path] = ["git", "-c", f"safe.directory={root.resolve()}",
                                  "--no-optional-locks", "-C", root, *words]
    found = run.run(argv, capture=True, check=False)
    if found.status != 0:
        raise UserError(f"a release is of a commit, and git says: "
                        f"{found.stderr.decode(errors='replace').strip()}",
                        hint="release from a clone of the repository")
    return found.stdout.decode(errors="replace")
