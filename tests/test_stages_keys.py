"""Which stages a change of the recipe, of the lock or of a file of the repository runs again.

Only a stage's own key is compared: inputs have the same content on both sides.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace as dataclass_replace
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import artifacts, guest, keys, recipe, request, tasks
from katagpu.lock import Deb, Lock
from katagpu.plan import Plan
from katagpu.recipe import (
    Agent,
    Capability,
    Compression,
    Headers,
    ImageFormat,
    ImageModel,
    KernelModule,
    Recipe,
    Repository,
    Service,
    ToolkitMode,
    ToolkitSource,
    Vgpu,
)
from katagpu.stages.api import Stage
from katagpu.store import Store

Change = Callable[[Recipe], Recipe]


def section(name: str, **fields: Any) -> Change:
    """A recipe with other fields in one section."""
    return lambda old: replace(old, **{name: replace(getattr(old, name), **fields)})


def deb(name: str, version: str = "1") -> Deb:
    """A locked package."""
    return Deb(package=name, version=version, architecture="amd64", url=f"http://x/{name}", size=1,
               sha256=keys.digest([name, version]))


def locked(wanted: Recipe, root: Path, **other: str) -> Lock:
    """A lock with one package for each group; `other` are other versions by group."""
    groups: dict[str, tuple[Deb, ...]] = {name: (deb(f"{name}-package", other.get(name, "1")),)
              for name in request.groups(wanted, root)}
    return Lock(recipe=wanted.name, request="", groups=groups)


def digests(stages: dict[str, Stage]) -> dict[str, str]:
    """Each stage's action digest with inputs that are always the same."""
    return {name: keys.digest(stage.key({role: f"{ref.stage}/{ref.output}"
                                         for role, ref in stage.inputs.items()}))
            for name, stage in stages.items()}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The stages whose digest differs, or that one side has not."""
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@pytest.fixture(scope="module")
def default() -> Recipe:
    """The default recipe."""
    return recipe.load("debian-trixie", keys.PACKAGE.parent)


@pytest.fixture(scope="module")
def root() -> Path:
    """The repository."""
    return keys.PACKAGE.parent


@pytest.mark.parametrize(("change", "again"), [
    (lambda old: replace(old, name="other"), {"manifest", "sbom"}),
    (section("distribution", mirror="http://elsewhere.example/debian"), set()),
    (section("driver", kernel_module=KernelModule.CLOSED),
     {"driver_modules", "rootfs", "manifest", "sbom"}),
    (section("driver", version="550.200"), {"driver_modules", "rootfs", "manifest", "sbom"}),
    (section("driver", capabilities=(Capability.COMPUTE,)), {"rootfs", "manifest"}),
    (section("kernel", headers=Headers.RPM), {"kernel", "rpm_tools", "manifest"}),
    (section("kernel", features=("drm",)), {"kernel_config", "rootfs"}),
    (section("toolkit", version="v1.18.0"), {"toolkit_source", "toolkit", "manifest"}),
    (section("image", compression=Compression.LZ4HC), {"image", "rootfs", "manifest"}),
    (section("image", level=9), {"image"}),
    (section("image", dax_header=True), {"image", "kata_config", "manifest"}),
    (section("image", verity=True), {"image", "rootfs", "kata_config", "manifest"}),
    (section("image", format=ImageFormat.EXT4, compression=Compression.NONE),
     {"image", "rootfs", "kata_config", "manifest"}),
    (section("rootfs", packages=("curl",)), set()),  # it reaches base through the lock
    (lambda old: replace(old, vgpu=Vgpu()), {"rootfs", "manifest", "sbom"}),
    (section("toolkit", source=ToolkitSource.NONE),
     {"toolkit_source", "toolkit", "driver_user", "rootfs", "image", "initrd", "initrd_config",
      "kata_config", "manifest", "sbom"}),
], ids=["name", "mirror", "flavour", "driver version", "capabilities", "headers", "features",
        "toolkit version", "compression", "level", "dax", "verity", "ext4", "packages", "vgpu",
        "no toolkit"])
def test_what_a_recipe_s_change_runs_again(
    default: Recipe, root: Path, change: Change, again: set[str],
) -> None:
    lock = locked(default, root)
    before = digests(guest.stages(default, lock, root))
    assert changed(before, digests(guest.stages(change(default), lock, root))) == again


def with_inputs(stages: dict[str, Stage]) -> dict[str, str]:
    """Each stage's digest when every change of an input changes the output too."""
    found: dict[str, str] = {}
    for name, stage in stages.items():  # inputs come first
        found[name] = keys.digest(stage.key({
            role: f"{found[ref.stage]}/{ref.output}" for role, ref in stage.inputs.items()}))
    return found


@pytest.mark.parametrize("mode", list(ToolkitMode))
def test_a_new_toolkit_from_apt_remakes_what_stands_on_it(
    default: Recipe, root: Path, mode: ToolkitMode,
) -> None:
    chosen = section("toolkit", source=ToolkitSource.APT, version="1.17.8-1", mode=mode)(default)
    before = guest.stages(chosen, locked(chosen, root), root)
    assert "toolkit_source" not in before
    after = guest.stages(chosen, locked(chosen, root, toolkit="2"), root)
    assert changed(digests(before), digests(after)) == {"toolkit", "manifest", "sbom"}
    assert changed(with_inputs(before), with_inputs(after)) == {
        "toolkit", "driver_user", "rootfs", "image", "initrd", "manifest", "sbom"}


def test_services_are_a_layer_on_the_driver(default: Recipe, root: Path) -> None:
    chosen = replace(default, services=(Service.FABRICMANAGER,),
                     nvidia_repository=Repository(uri="http://x/", signed_by="k"))
    without = guest.stages(default, locked(default, root), root)
    stages = guest.stages(chosen, locked(chosen, root), root)
    below = [ref.stage for role, ref in stages["services"].inputs.items() if role != "stage0"]
    assert below == ["base", "toolkit", "driver_user"]
    assert changed(with_inputs(without), with_inputs(stages)) == {
        "services", "rootfs", "image", "initrd", "manifest", "sbom"}
    layers = stages["image"].options["layers"]
    assert layers.index("services") == layers.index("driver_user") + 1
    after = guest.stages(chosen, locked(chosen, root, services="2"), root)
    assert changed(digests(stages), digests(after)) == {"services", "manifest", "sbom"}


def test_a_client_token_runs_nothing_again(default: Recipe, root: Path) -> None:
    lock = locked(default, root)
    without, with_token = (digests(guest.stages(replace(default, vgpu=section), lock, root))
                           for section in (Vgpu(), Vgpu(embed_token=True, token_file="/a.tok")))
    assert changed(without, with_token) == set()


@pytest.mark.parametrize(("group", "again"), [
    ("stage0", {"stage0"}), ("toolchain", {"toolchain"}), ("imagetools", {"imagetools"}),
    ("base", {"base", "manifest", "sbom"}),
    ("driver_user", {"driver_user", "manifest", "sbom"}),
    ("driver_source", {"driver_modules"}), ("kernel_source", {"kernel_source"}),
])
def test_what_a_new_package_runs_again(
    default: Recipe, root: Path, group: str, again: set[str],
) -> None:
    before = digests(guest.stages(default, locked(default, root), root))
    after = digests(guest.stages(default, locked(default, root, **{group: "2"}), root))
    assert changed(before, after) == again


@pytest.mark.parametrize(("pattern", "again"), [
    ("rootfs/**/*.service*", {"rootfs"}),
    ("kernel-configs/base/*.conf", {"kernel_config"}),
    ("kernel-configs/features/*.conf", set()),
    ("kernel-configs/allow.yaml", {"kernel_config"}),
    ("patches/driver-open/*.patch", {"driver_modules"}),
    ("patches/driver-closed/*.yaml", set()),
    ("README.md", set()), ("docs/*.md", set()), ("dodo.py", set()), ("recipes/*.yaml", set()),
])
def test_what_an_edited_file_runs_again(
    default: Recipe, root: Path, tmp_path: Path, pattern: str, again: set[str],
) -> None:
    copy = tmp_path / "copy"
    for name in ("rootfs", "hooks", "kernel-configs", "patches", "recipes", "docs"):
        shutil.copytree(root / name, copy / name)
    for name in ("README.md", "dodo.py"):
        shutil.copy(root / name, copy / name)
    lock = locked(default, copy)
    before = digests(guest.stages(default, lock, copy))
    files = sorted(path for path in copy.glob(pattern) if path.is_file())
    if not files:
        pytest.skip(f"there is no {pattern}")
    with files[0].open("a") as stream:
        stream.write("\n# a comment\n")
    assert changed(before, digests(guest.stages(default, lock, copy))) == again


def test_where_the_repository_is_does_not_matter(
    default: Recipe, root: Path, tmp_path: Path,
) -> None:
    copy = tmp_path / "elsewhere"
    for name in ("rootfs", "hooks", "kernel-configs", "patches"):
        shutil.copytree(root / name, copy / name)
    lock = locked(default, root)
    assert changed(digests(guest.stages(default, lock, root)),
                   digests(guest.stages(default, lock, copy))) == set()


def test_an_agent_is_in_its_own_key_by_content(
    default: Recipe, root: Path, tmp_path: Path,
) -> None:
    lock = locked(default, root)
    agent = tmp_path / "kata-agent"
    agent.write_text("one")
    with_agent = replace(default, agent=Agent(file=str(agent)))
    before = digests(guest.stages(default, lock, root))
    first = digests(guest.stages(with_agent, lock, root))
    assert changed(before, first) == {"agent", "rootfs", "manifest", "sbom"}
    agent.write_text("two")
    assert changed(first, digests(guest.stages(with_agent, lock, root))) == {"agent"}


def test_extra_packages_are_a_layer_below_the_driver_only(default: Recipe, root: Path) -> None:
    lock = locked(default, root)
    extra = section("rootfs", extra_packages=("gcc", "make"))(default)
    again = changed(digests(guest.stages(default, lock, root)),
                    digests(guest.stages(extra, lock, root)))
    assert again == {"build_layer", "driver_modules"}


def test_no_key_has_an_address_or_a_path(default: Recipe, root: Path) -> None:
    """The same lock made elsewhere is the same action."""
    for name, stage in guest.stages(default, locked(default, root), root).items():
        text = keys.canonical(stage.key({})).decode()
        assert "http://x/" not in text, name
        assert str(root) not in text, name


def test_a_stage_s_code_is_in_its_key_and_its_title_is_not(default: Recipe, root: Path) -> None:
    stage = guest.stages(default, locked(default, root), root)["image"]
    key = stage.key({})
    assert stage.module in key["code"]
    assert dataclass_replace(stage, title="other words").key({}) == key
    assert dataclass_replace(stage, module="stages.final").key({}) != key


def test_only_the_toolkit_s_source_has_the_network(default: Recipe, root: Path) -> None:
    stages = guest.stages(default, locked(default, root), root)
    assert [name for name, stage in stages.items() if stage.network] == ["toolkit_source"]


@pytest.mark.parametrize("headers", list(Headers))
@pytest.mark.parametrize("task", ["build_kernel", "build_headers", "build_image", "build_initrd"])
def test_artifacts_are_outputs_of_their_stages(
    default: Recipe, root: Path, headers: Headers, task: str,
) -> None:
    chosen = replace(default, kernel=replace(default.kernel, headers=headers))
    stages = guest.stages(chosen, locked(default, root), root)
    wanted = artifacts.of(chosen, task)
    assert all(artifact.output in stages[artifact.stage].outputs for artifact in wanted)
    packages = {artifact.output for artifact in wanted if artifact.name.startswith("linux-headers")}
    if task in ("build_headers", "build_image"):
        output = "headers_rpm" if headers is Headers.RPM else "headers"
        assert packages == {output}
        assert stages["manifest"].inputs["headers"].output == output


@pytest.mark.parametrize("format_", list(ImageFormat))
@pytest.mark.parametrize("task", list(tasks.STAGES))
def test_a_task_makes_the_stages_of_its_artifacts(
    default: Recipe, root: Path, format_: ImageFormat, task: str, tmp_path: Path,
) -> None:
    chosen = replace(default, image=replace(default.image, format=format_))
    plan = Plan(guest.stages(chosen, locked(default, root), root), Store(tmp_path), tmp_path)
    made = {stage for name in tasks.STAGES[task] for stage in plan.closure(name)}
    assert {artifact.stage for artifact in artifacts.of(chosen, task)} <= made


# --- the driver on a disk of its own --------------------------------------------------------------


BASE_STAGES = {"stage0", "toolchain", "imagetools", "base", "extension_tools", "kernel_source",
               "kernel_config", "kernel", "toolkit_source", "toolkit", "rootfs", "image"}
OF_DRIVER = {"driver_modules", "driver_user", "extension_root", "extension", "kata_config",
             "manifest", "sbom"}


@pytest.fixture(scope="module")
def split(default: Recipe) -> Recipe:
    """The default recipe with the driver on a disk of its own."""
    return section("image", model=ImageModel.EXTENSION)(default)


def chained(stages: dict[str, Stage]) -> dict[str, str]:
    """Each stage's action digest where every input's content changes with the stage's digest."""
    found: dict[str, str] = {}
    for name, stage in stages.items():
        # An input that does not come before its reader is a KeyError here.
        found[name] = keys.digest(stage.key({role: f"{found[ref.stage]}/{ref.output}"
                                             for role, ref in stage.inputs.items()}))
    return found


@pytest.mark.parametrize("change", [
    section("driver", version="550.200"), section("driver", kernel_module=KernelModule.CLOSED),
    section("driver", capabilities=(Capability.COMPUTE,))], ids=["version", "flavour", "libraries"])
def test_another_driver_leaves_the_base_as_it_is(
    split: Recipe, root: Path, change: Change,
) -> None:
    before = chained(guest.stages(split, locked(split, root), root))
    assert set(before) == BASE_STAGES | OF_DRIVER
    other = change(split)
    lock = locked(other, root, driver_user="2", driver_source="2")
    again = changed(before, chained(guest.stages(other, lock, root)))
    assert again == OF_DRIVER


def test_a_single_image_is_made_again_for_another_driver(default: Recipe, root: Path) -> None:
    """The counterpart: the test above sees a change where there is one."""
    before = chained(guest.stages(default, locked(default, root), root))
    after = chained(guest.stages(default, locked(default, root, driver_source="2"), root))
    assert {"rootfs", "image", "initrd"} <= changed(before, after)


def test_both_models_share_all_that_takes_long(
    default: Recipe, split: Recipe, root: Path,
) -> None:
    one = chained(guest.stages(default, locked(default, root), root))
    two = chained(guest.stages(split, locked(split, root), root))
    assert changed(one, two) == {"extension_tools", "rootfs", "image", "initrd", "initrd_config",
                                 "extension_root", "extension", "kata_config", "manifest", "sbom"}


@pytest.mark.parametrize(("change", "again"), [
    (section("image", level=9), {"image", "extension"}),
    (section("image", dax_header=True), {"image", "kata_config", "manifest"}),
    (section("image", verity=True), {"image", "rootfs", "kata_config", "manifest"}),
    (section("image", compression=Compression.LZ4HC),
     {"image", "rootfs", "extension_root", "extension", "manifest"}),
    # The disk stays erofs, with the compressor that it had.
    (section("image", format=ImageFormat.EXT4, compression=Compression.NONE),
     {"image", "rootfs", "kata_config", "manifest"}),
    (lambda old: replace(old, name="other"), {"kata_config", "manifest", "sbom"}),
], ids=["level", "dax", "verity", "compression", "ext4", "name"])
def test_what_a_change_of_the_image_runs_again(
    split: Recipe, root: Path, change: Change, again: set[str],
) -> None:
    lock = locked(split, root)
    assert changed(digests(guest.stages(split, lock, root)),
                   digests(guest.stages(change(split), lock, root))) == again


@pytest.mark.parametrize("task", [task for task in tasks.STAGES if task != "build_initrd"])
def test_artifacts_of_both_disks_are_made_by_their_tasks(
    split: Recipe, root: Path, task: str, tmp_path: Path,
) -> None:
    stages = guest.stages(split, locked(split, root), root)
    plan = Plan(stages, Store(tmp_path), tmp_path)
    made = {stage for name in tasks.STAGES[task] for stage in plan.closure(name)}
    wanted = artifacts.of(split, task)
    assert {artifact.stage for artifact in wanted} <= made
    assert all(artifact.output in stages[artifact.stage].outputs for artifact in wanted)


def test_names_of_the_two_disks(split: Recipe) -> None:
    named = {artifact.name: artifact.link for artifact in artifacts.of(split, "build_image")}
    assert named["kata-debian-trixie-nvidia-gpu-base.image"] == "kata-containers-nvidia.img"
    assert named["kata-debian-trixie-nvidia-gpu-extension-550.163.01.image"] == (
        "kata-containers-nvidia-gpu-extension.img")
    assert "kata-debian-trixie-nvidia-gpu-550.163.01.image" not in named
