"""Each kernel feature on the default recipe's real source: nothing that it asks for is lost.

The audit of the stage is the test. Features do not exclude each other, so all fit into one kernel.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import guest, kconfig
from katagpu.context import Context
from katagpu.plan import Plan
from tests.default.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FRAGMENTS = {path.stem: path for path in sorted((ROOT / "kernel-configs/features").glob("*.conf"))}
CHOICES = [(name,) for name in FRAGMENTS] + [tuple(FRAGMENTS)]


@pytest.mark.parametrize("features", CHOICES, ids=lambda names: (
    names[0] if len(names) == 1 else "all"))
def test_what_a_feature_asks_for_is_in_the_configuration(
        context: Context, tmp_path: Path, features: tuple[str, ...]) -> None:
    recipe = replace(context.recipe, kernel=replace(context.recipe.kernel, features=features))
    locked = context.locked()
    assert locked is not None, "the default guest is not built: ./doitw build_image"
    plan = Plan(guest.stages(recipe, locked, context.root), context.store, tmp_path)
    made = plan.ensure("kernel_config")
    config = context.store.blob(made.outputs["config"].blob)
    default = context.plan.ensure("kernel_config")
    assert made.outputs["config"] != default.outputs["config"], "the feature changes nothing"
    values = kconfig.read_config(config)
    assert values["64BIT"] == "y" and "DRM_NOUVEAU" not in values
