"""What a change rebuilds and what not, asked of the store that holds the default build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import guest
from katagpu.context import Context
from katagpu.lock import Lock
from katagpu.plan import Plan
from katagpu.schema import Recipe
from tests.closedguest import Closed


@pytest.fixture
def repository(context: Context, tmp_path: Path) -> Path:
    """A copy of what stages read of the repository."""
    for name in ("recipes", "kernel-configs", "patches", "rootfs", "hooks", "keys"):
        shutil.copytree(context.root / name, tmp_path / name)
    return tmp_path


def misses(context: Context, recipe: Recipe, root: Path, lock: Lock | None = None) -> set[str]:
    """Stages of the image that would be made: misses, and those that wait for one."""
    found = lock or context.locked()
    assert found is not None
    plan = Plan(guest.stages(recipe, found, root), context.store, context.directory / "logs")
    return {stage for stage in plan.closure("manifest") if plan.reason(stage) != "hit"}


def test_the_same_repository_elsewhere_is_a_hit(context: Context, repository: Path) -> None:
    assert misses(context, context.recipe, repository) == set()


def test_a_file_of_rootfs_compiles_nothing(context: Context, repository: Path) -> None:
    unit = next((repository / "rootfs").rglob("*.service"))
    unit.write_text(unit.read_text() + "# changed\n")
    assert misses(context, context.recipe, repository) == {"rootfs", "image", "sbom", "manifest"}


def test_the_other_flavour_keeps_kernel_roots_base_and_toolkit(
        context: Context, closed: Closed) -> None:
    made = misses(context, closed.recipe, context.root, closed.lock)
    assert made <= {"driver_modules", "rootfs", "image", "sbom", "manifest"}
    assert not made or "rootfs" in made


def test_an_image_option_packs_only(context: Context) -> None:
    recipe = context.recipe
    other = replace(recipe, image=replace(recipe.image, level=9))
    assert misses(context, other, context.root) <= {"image", "sbom", "manifest"}


def test_a_comment_in_a_fragment_stops_at_the_configuration(
        context: Context, repository: Path) -> None:
    fragment = next(iter(sorted((repository / "kernel-configs/base").glob("*.conf"))))
    fragment.write_text(fragment.read_text() + "# a remark\n")
    found = context.locked()
    assert found is not None
    plan = Plan(guest.stages(context.recipe, found, repository), context.store,
                context.directory / "logs")
    before = context.plan.action("kernel_config")
    after = plan.ensure("kernel_config")
    assert before is not None and after.outputs == before.outputs
    assert plan.reason("kernel") == "hit"


def test_packages_of_one_run_have_a_lock_of_their_own(context: Context) -> None:
    extra = Context(context.root, {}, environment={"EXTRA_PKGS": "make gcc"})
    same = Context(context.root, {}, environment={"EXTRA_PKGS": " gcc  make"})
    other = Context(context.root, {}, environment={"EXTRA_PKGS": "gcc"})
    assert extra.locks.path == same.locks.path
    assert len({context.locks.path, extra.locks.path, other.locks.path}) == 3
