"""The tasks about releases: make one, publish it, install it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from katagpu import log, parameters, tasks
from katagpu.errors import StepError, UserError
from katagpu.tasks import ROOT, Task

if TYPE_CHECKING:
    from katagpu.context import Context
    from katagpu.lock import Lock
    from katagpu.release.assemble import Order, Piece
    from katagpu.release.host import Host
    from katagpu.release.signing import Signer
    from katagpu.statement import Built


def _context() -> Context:
    from katagpu.current import guests

    if guests().all:
        raise UserError("releases and reproductions are of one guest", hint="leave driver= away")
    return guests().contexts[0]


def _top() -> Path:
    return ROOT / "out" / "release"


def release() -> Task:
    """Make a release of the recipe."""

    def make() -> None:
        from katagpu.release import assemble, layout, preflight, signing

        context = _context()
        values = context.values
        version = layout.version(_needed(context, "version", "X.Y.Z"))
        commit = preflight.check(ROOT, context.recipe, values, context.environment)
        signer = signing.choose(values, parameters.caller())
        log.say(f"> {context.recipe.name} has to pass its boot check")
        tasks.call(["python", "-m", "katagpu", f"recipe={context.recipe.name}", "ccache=0",
                    "boot_check"], "there is no release of a guest that fails")
        context.forget()
        preflight.unchanged(ROOT, commit)
        with log.step(f"release {context.recipe.name} {version}"):
            place = assemble.make(order(context, version, commit, signer), _top(),
                                  confirm=lambda: preflight.unchanged(ROOT, commit))
        if signer is None:
            log.warn("this release is not signed, as was asked for")
        shown = os.path.relpath(place)
        log.say(f"in {shown}/; next: ./doitw publish to=oci://REGISTRY/REPOSITORY:{version}")

    return tasks.plain(make, "make a signed release: release version=X.Y.Z key=PRIVATE.pem")


def order(context: Context, version: str, commit: str, signer: Signer | None) -> Order:
    """What is released of a guest that is built and checked. Raises `UserError`, `StepError`."""
    from katagpu import embed
    from katagpu.release import assemble, preflight

    recipe, lock = context.recipe, context.locked()
    embed.refuse(context.directory)
    if lock is None or context.booting.checked() is None or not context.complete(tasks.DEFAULT):
        raise StepError("the build changed while it was released", hint="run it again")
    preflight.signed(context.plan, context.root, recipe)
    return assemble.Order(
        recipe=recipe.name, version=version, signer=signer, pieces=list(pieces(context)),
        licensed=recipe.vgpu is not None, built=_built(context, lock, commit, version))


def _built(context: Context, lock: Lock, commit: str, version: str) -> Built:
    """What a release was made from: the commit, and all that the lock and the store know."""
    from msgspec import to_builtins

    from katagpu import materials
    from katagpu.release import preflight
    from katagpu.statement import Built, Material

    recipe, plan = context.recipe, context.plan
    repository = Material(uri=preflight.repository(context.root), name="repository",
                          digest={"gitCommit": commit})
    actions = {stage: plan.digest(stage) or "" for stage in plan.closure("manifest")}
    return Built(recipe=to_builtins(recipe), actions=actions, overrides={"version": version},
                 materials=[repository, *materials.of(recipe, lock, plan, context.root)])


def pieces(context: Context) -> Iterator[Piece]:
    """All that the build and its check left, and what each is in the manifest."""
    from katagpu import artifacts
    from katagpu.release.assemble import Piece
    from katagpu.stages import final

    action = context.plan.action("kernel")
    assert action is not None, "the build is complete"
    known = {(ref.stage, ref.output): name for name, ref in {**final.PARTS, **final.DISK}.items()}
    for item in (*context.artifacts(tasks.DEFAULT), *artifacts.BOOT_CHECK):
        name = item.name.format(release=action.record["release"])
        part = known.get((item.stage, item.output))
        if item.name.startswith("linux-headers-"):
            part = "headers"
        yield Piece(path=context.directory / name, link=item.link, part=part)


def reproduce() -> Task:
    """Build twice, and compare."""

    def compare(context: Context) -> None:
        from katagpu import reproduce

        stages = [name for task in reproduce.TASKS for name in tasks.STAGES[task]
                  if name in context.plan.stages]
        result = reproduce.reproduce(context, list(dict.fromkeys(stages)))
        log.say(f"every output is the same in both builds: {os.path.relpath(result)}")

    return tasks.of_one("reproduce", compare,
                        "build twice with everything varied, and compare every output", "_lock")


def publish() -> Task:
    """Publish a release."""

    def push() -> None:
        from katagpu.release import assemble, layout
        from katagpu.release import publish as publishing

        context = _context()
        to = _needed(context, "to", "oci://REGISTRY/REPOSITORY:TAG, or a directory")
        recipe = context.recipe.name
        versions = assemble.made(_top(), recipe)
        if not versions and "version" not in context.values:
            raise UserError(f"there is no release of {recipe} in {os.path.relpath(_top())}",
                            hint="./doitw release version=X.Y.Z")
        version = layout.version(context.values.get("version") or versions[-1])
        publishing.publish(_top() / f"{recipe}-{version}", parameters.place(to),
                           licensed=parameters.flag(context.values, "licensed"))

    return tasks.plain(push, "publish a release: to=oci://REGISTRY/REPOSITORY:TAG, or to=DIRECTORY")


def install() -> Task:
    """Install a release on this host, or below a prefix."""

    def place(rollback: bool, status: bool) -> None:
        from katagpu.release import install as installing

        context, host = _context(), _host()
        if rollback:
            installing.rollback(host)
        elif status:
            for line in installing.status(host):
                sys.stdout.write(line + "\n")
        else:
            key = context.values.get("key")
            unverified = parameters.flag(context.values, "unverified")
            if key and unverified:
                raise UserError("key= and unverified=1 are given, and only one can be meant",
                                hint="key= alone verifies the release by that key")
            installing.install(
                parameters.place(_needed(
                    context, "from", "a release's directory, or oci://REGISTRY/REPOSITORY:TAG")),
                host, key=parameters.path(key) if key else None, unverified=unverified)

    return tasks.plain(
        place, "install a release on a host that runs Kata: from=… key=PUBLIC.pem (prefix=/)",
        params=[{"name": name, "long": name, "type": bool, "default": False, "help": what}
                for name, what in (("rollback", "go back to the release before"),
                                   ("status", "say what is installed, and whether it is intact"))])


def uninstall() -> Task:
    """Remove what was installed."""

    def remove() -> None:
        from katagpu.release import install as installing

        installing.uninstall(_host())

    return tasks.plain(remove, "remove what install placed (prefix=/)")


def _host() -> Host:
    from katagpu.release.host import Host

    return Host(parameters.path(_context().values.get("prefix", "/")))


def _needed(context: Context, name: str, what: str) -> str:
    """A parameter that has to be given."""
    found = context.values.get(name)
    if not found:
        raise UserError(f"{name}= is not given", hint=f"{name}={what}")
    return found
