"""What a guest was made from: the materials of its provenance, out of the lock and the store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from katagpu import emulator, request, statement
from katagpu.keys import file_digest
from katagpu.lock import Deb, Lock
from katagpu.lockparts import OF_GROUP, REPOSITORY, Part
from katagpu.plan import Plan
from katagpu.schema import DriverSource, KernelSource, Recipe, ToolkitSource
from katagpu.stages.api import unpacked_tree
from katagpu.stages.sbom import unescaped
from katagpu.statement import Material, go_module, packages, purl


def of(recipe: Recipe, lock: Lock, plan: Plan, root: Path) -> list[Material]:
    """All of them, for a guest whose stages are made; `root` is the repository."""
    return [*packages(lock, lambda group, deb: _origin(recipe, group, deb)),
            *_kernel(recipe, lock, plan), *_driver(recipe, plan), *_toolkit(recipe, plan, root),
            *_agent(recipe, plan), *_signer(recipe, root)]


def _origin(recipe: Recipe, group: str, deb: Deb) -> tuple[str, str]:
    """Who a package is of, and the suite. Tools and emulator may be of another distribution."""
    if deb.archive.startswith(REPOSITORY):
        return "nvidia", ""
    others = {Part.TOOLS: request.tools_of(recipe), Part.EMULATOR: emulator.distribution(recipe)}
    distribution = others.get(OF_GROUP[group], recipe.distribution)
    return str(distribution.id), distribution.suite


def _identity(plan: Plan, stage: str, output: str) -> str:
    action = plan.action(stage)
    assert action is not None, f"{stage} is made"
    return action.outputs[output].identity


def _kernel(recipe: Recipe, lock: Lock, plan: Plan) -> Iterator[Material]:
    kernel = recipe.kernel
    version = kernel.version or ""
    if kernel.source is KernelSource.DEBIAN:
        version = lock.version("kernel_source", kernel.package or "") or version
    yield Material(name="kernel source", uri=purl("generic", "linux", version=version),
                   digest={"sha256": _identity(plan, "kernel_source", "tarball")})


def _driver(recipe: Recipe, plan: Plan) -> Iterator[Material]:
    driver = recipe.driver
    if driver.source is DriverSource.RUNFILE:
        yield Material(name="NVIDIA driver (.run)", uri=purl(
            "generic", "nvidia-driver", version=driver.version or ""),
            digest={"sha256": _identity(plan, "driver_package", "run")})


def _toolkit(recipe: Recipe, plan: Plan, root: Path) -> Iterator[Material]:
    if recipe.toolkit.source is ToolkitSource.GO:
        action = plan.action("toolkit_source")
        assert action is not None, "toolkit_source is made"
        tree = unpacked_tree(plan.store, action.outputs["modules"])
        for path in sorted(tree.rglob("@v/*.ziphash")):
            yield go_module(unescaped(str(path.parent.parent.relative_to(tree))),
                            unescaped(path.stem), path.read_text().strip())
    for deb in recipe.toolkit.debs:
        yield Material(name=Path(deb).name, digest={"sha256": file_digest(root / deb)},
                       uri=f"{statement.FILE}{Path(deb).name}")


def _signer(recipe: Recipe, root: Path) -> Iterator[Material]:
    """The certificate in the kernel; the key is nobody's matter."""
    if recipe.sign is not None:
        path = root / recipe.sign.cert
        yield Material(name="certificate of the modules' signer",
                       uri=f"{statement.FILE}{path.name}", digest={"sha256": file_digest(path)})


def _agent(recipe: Recipe, plan: Plan) -> Iterator[Material]:
    given = recipe.agent
    if given is None:
        return
    if given.release is not None and given.sha256 is not None:
        yield Material(name="kata-agent's release", uri=given.release,
                       digest={"sha256": given.sha256})
    yield Material(name="kata-agent", uri=f"{statement.FILE}kata-agent",
                   digest={"sha256": _identity(plan, "agent", "agent")})
