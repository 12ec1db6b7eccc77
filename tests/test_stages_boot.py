"""The boot check as a stage: what runs it again, and what it leaves."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace as changed_section

from katagpu import guest, keys, recipe
from katagpu.boot import system, table
from katagpu.boot.qemu import Qemu
from katagpu.errors import StepError
from katagpu.kataconfig import KataSettings, render_drop_in
from katagpu.lock import Lock
from katagpu.plan import Plan
from katagpu.schema import Agent, ImageModel, Recipe
from katagpu.stages import boot
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, Store
from tests.boot.scripted import RELEASE
from tests.test_stages_keys import Change, chained, changed, deb, locked, section

REPOSITORY = keys.PACKAGE.parent
OF_CHECK = {"boot_check", "checked_manifest"}


def never() -> Qemu:
    raise AssertionError("a key needs no QEMU")


@pytest.fixture(scope="module")
def default() -> Recipe:
    """The default recipe."""
    return recipe.load("debian-trixie", REPOSITORY)


def stages(wanted: Recipe, emulator: Lock | None = None, *, lesser: bool = False,
           versions: Mapping[str, str] | None = None) -> dict[str, Stage]:
    """The stages of a guest and of its boot check; `versions` are those of locked packages."""
    found = guest.stages(wanted, locked(wanted, REPOSITORY, **(versions or {})), REPOSITORY)
    return {**found, **guest.boot_stages(wanted, emulator, never, lesser=lesser)}


def of_check(before: Mapping[str, Stage], after: Mapping[str, Stage]) -> set[str]:
    """Of the stages that only boot tasks have, those that run again when inputs change too."""
    mine = {"boot_parts", "boot_check", "checked_manifest", "emulator"}
    return changed(chained(dict(before)), chained(dict(after))) & mine


# what changes the key, and what does not


def test_which_qemu_boots_it_is_no_part_of_the_key(default: Recipe) -> None:
    """Neither whether there is a lock of our own, nor which packages are in it."""
    def emulator(version: str) -> Lock:
        return Lock(recipe="", request="", groups={"emulator": (deb("qemu", version),)})

    without, old, new = (stages(default, lock) for lock in (None, emulator("1"), emulator("2")))
    assert of_check(without, old) == {"emulator"} == of_check(old, new)
    assert "qemu" not in keys.canonical(old["boot_check"].key({}) | {"code": ""}).decode()


def test_the_lesser_check_has_a_result_of_its_own(default: Recipe) -> None:
    assert of_check(stages(default), stages(default, lesser=True)) == OF_CHECK


@pytest.mark.parametrize("change", [
    section("boot_check", device="2335"), section("boot_check", bar1_gib=64),
    section("boot_check", boot0="ffffffff"), section("boot_check", boot42="ffffffff"),
    section("boot_check", memory=4096), section("image", level=9),
    section("image", dax_header=True), section("driver", version="550.200"),
    section("kernel", features=("drm",)), section("image", model=ImageModel.EXTENSION),
    lambda old: changed_section(old, name="other"),
], ids=["device", "bar", "boot0", "boot42", "memory", "level", "dax", "driver", "kernel",
        "extension", "name"])
def test_what_runs_it_again(default: Recipe, change: Change) -> None:
    assert of_check(stages(default), stages(change(default))) == OF_CHECK


def test_a_changed_check_of_the_recipe_builds_nothing_again(default: Recipe) -> None:
    before, after = stages(default), stages(section("boot_check", memory=4096)(default))
    assert changed(chained(before), chained(after)) == OF_CHECK


def test_an_agent_runs_it_again(default: Recipe, tmp_path: Path) -> None:
    (tmp_path / "agent").write_text("one")
    with_agent = changed_section(default, agent=Agent(file=str(tmp_path / "agent")))
    assert of_check(stages(default), stages(with_agent)) == OF_CHECK


@pytest.mark.parametrize(("group", "again"), [
    ("base", OF_CHECK), ("driver_user", OF_CHECK), ("driver_source", OF_CHECK),
    ("imagetools", {"boot_parts", *OF_CHECK}), ("toolchain", {"boot_parts", *OF_CHECK})])
def test_a_new_package_runs_it_again(default: Recipe, group: str, again: set[str]) -> None:
    assert of_check(stages(default), stages(default, versions={group: "2"})) == again


def test_a_mirror_does_not(default: Recipe) -> None:
    elsewhere = section("distribution", mirror="http://elsewhere.example/debian")(default)
    assert of_check(stages(default), stages(elsewhere)) == set()


def test_its_code_is_that_of_all_checks(default: Recipe) -> None:
    code = stages(default)["boot_check"].key({})["code"]
    assert {f"boot.{name}" for name in (
        "agent", "channel", "diagnosis", "gpu", "gpus", "kata", "report", "runner", "session",
        "system", "table", "toolkit", "vfiouser", "vm", "vsock")} | {"check.dlopen"} <= set(code)


@pytest.mark.parametrize("name", ["probe/main.go", "probe/shell.go", "probe/go.mod", "mock/load.c",
                                  "mock/nvml.c"])
def test_the_parts_in_the_guest_are_made_again_for_their_sources(
    default: Recipe, tmp_path: Path, name: str,
) -> None:
    before = stages(default)
    parts = before["boot_parts"]
    assert name in parts.files
    shutil.copyfile(parts.files[name], tmp_path / "file")
    with (tmp_path / "file").open("a") as stream:
        stream.write("// a comment\n")
    after = before | {"boot_parts": replace(parts, files={
        **parts.files, name: tmp_path / "file"})}
    assert changed(chained(before), chained(after)) == {"boot_parts", *OF_CHECK}


@pytest.mark.parametrize("model", list(ImageModel))
def test_what_is_checked(default: Recipe, model: ImageModel) -> None:
    """The kernel, image and configuration that users get, by their stages."""
    check = stages(section("image", model=model)(default))["boot_check"]
    refs = {role: (ref.stage, ref.output) for role, ref in check.inputs.items()}
    assert refs | {"vmlinuz": ("kernel", "vmlinuz"), "image": ("image", "image"),
                   "kata_config": ("kata_config", "config")} == refs
    assert ("extension" in refs) is (model is ImageModel.EXTENSION)
    assert check.options["split"] is (model is ImageModel.EXTENSION)


# the stage itself, with a program where QEMU would be


def toy(name: str, **outputs: bytes) -> Stage:
    """A stage that puts out these bytes."""
    def make(build: Build) -> None:
        for output, data in outputs.items():
            build.put_bytes(output, data)

    return Stage(name=name, title="", module="errors", make=make,
                 outputs=dict.fromkeys(outputs, Kind.FILE))


@pytest.fixture
def plan(default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The real check of a guest of toy stages; QEMU is what `tmp_path/what` names."""
    monkeypatch.setattr(table, "TABLE", {
        table.COLD: (system.ready, system.release), table.HOT: (system.ready, system.units)})
    drop_in = render_drop_in(KataSettings(kernel="/k", image="/i"))

    def qemu() -> Qemu:
        what = (tmp_path / "what").read_text()
        return Qemu(argv=(sys.executable, str(REPOSITORY / "tests/boot/fakeqemu.py"), what),
                    env={"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
                    version="11.1.3", vfio_user=True, why="a test", identity=what)

    small = section("boot_check", memory=512)(default)
    return Plan({
        "kernel": toy("kernel", vmlinuz=b"k", vmlinux=Path(sys.executable).read_bytes(),
                      release=RELEASE.encode()),
        "kernel_config": toy("kernel_config", config=b"CONFIG_A=y\n"),
        "image": toy("image", image=b"image"),
        "kata_config": toy("kata_config", config=drop_in.encode()),
        "boot_parts": toy("boot_parts", probe=b"p", load=b"l", nvml=b"n"),
        "manifest": toy("manifest", manifest=b'{"recipe": "toy"}'),
        "boot_check": boot.check(small, qemu), "checked_manifest": boot.record(),
    }, Store(tmp_path / "store"), tmp_path / "logs")


def test_a_guest_that_passes(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "what").write_text("answers")
    action = plan.ensure("checked_manifest")
    manifest = json.loads(plan.store.sound(action.outputs["manifest"].blob).read_text())
    assert manifest["recipe"] == "toy"
    boot_check = manifest["boot_check"]
    assert boot_check["passed"] and boot_check["counts"] == {
        "passed": 4, "failed": 0, "skipped": 0}
    assert boot_check["checks"] == {
        "cold-plug: ready": "passed", "cold-plug: release": "passed",
        "hot-plug: ready": "passed", "hot-plug: units": "passed"}
    made = plan.action("boot_check")
    assert made is not None
    junit = plan.store.sound(made.outputs["junit"].blob).read_bytes()
    assert len(list(ElementTree.fromstring(junit).iter("testcase"))) == 4
    assert b"4 checks passed" in plan.store.sound(made.outputs["log"].blob).read_bytes()
    # It is proven: another QEMU, which would not even start, is not asked.
    (tmp_path / "what").unlink()
    plan.forget()
    assert plan.ensure("boot_check") == made


def test_a_guest_that_does_not_pass(plan: Plan, tmp_path: Path) -> None:
    """The error says why; all that is known is kept beside the logs, and nothing in the store."""
    (tmp_path / "what").write_text("panics")
    with pytest.raises(StepError, match="did not pass its boot check") as failure:
        plan.ensure("checked_manifest")
    said = str(failure.value)
    assert "x cold-plug: ready" in said and "cause: the kernel finds no root" in said
    assert "\n- " not in said, "what had nothing to look at is in the log"
    logs = tmp_path / "logs/boot"
    assert str(logs) in said
    assert {"junit.xml", "report.json", "report.txt", "cold-plug-serial.log",
            "hot-plug-serial.log", "cold-plug-qemu.log"} <= {path.name for path in logs.iterdir()}
    assert json.loads((logs / "report.json").read_text())["passed"] is False
    assert "release" in (logs / "report.txt").read_text()
    assert plan.action("boot_check") is None
    # The guest is mended: it is asked again.
    (tmp_path / "what").write_text("answers")
    plan.ensure("checked_manifest")


def test_the_facts_of_a_stage(plan: Plan, default: Recipe, tmp_path: Path) -> None:
    for name in plan.needs("boot_check"):
        plan.ensure(name)
    known = plan.stages["boot_check"]
    for split in (False, True):
        inputs = dict(plan.inputs("boot_check"))
        inputs["extension"] = inputs["probe"]
        stage = replace(known, options=dict(known.options) | {"split": split, "toolkit": "hook"},
                        inputs=dict(known.inputs) | {"extension": Ref(stage="boot_parts",
                                                                      output="probe")})
        build = Build(stage, plan.store, inputs, tmp_path, tmp_path / "log")
        found = boot.guest(build)
        assert (found.facts.release, found.facts.driver) == (RELEASE, default.driver.version)
        assert found.facts.hook == (
            "/usr/share/oci/hooks/prestart/nvidia-container-toolkit.sh")
        assert found.facts.verity is split and not found.facts.measured
        assert [name for name, _path in found.extensions] == (["gpu"] if split else [])
        assert found.facts.extension == ("/run/kata-extensions/gpu" if split else None)
        assert not found.configuration.nvdimm and set(found.helpers) == {
            "load", "libnvidia-ml.so.1"}
