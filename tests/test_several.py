"""`driver=all`: a guest with each driver of a recipe, what they share made once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from katagpu.errors import UserError
from katagpu.several import Guests
from tests.toyrepo import ToyRepository

OWN = {"driver_modules", "driver_user", "rootfs", "image", "sbom", "manifest"}
SHARED = {"kata_config", "kernel", "kernel_config", "toolkit"}
DIRECTORY = "out/debian-trixie"


@pytest.fixture
def toy(tmp_path: Path) -> ToyRepository:
    """A copy of the repository whose recipe lists a second driver."""
    toy = ToyRepository(tmp_path)
    toy.list_driver("535.216.01")
    return toy


def image(place: Path) -> bytes:
    """The bytes of a guest's image."""
    return (place / "kata-containers-nvidia-gpu.img").read_bytes()


def summary(said: str) -> list[list[str]]:
    """The lines of the summary, as words."""
    return [line.split() for line in said.partition(" with each driver of ")[2].splitlines()[1:3]]


def test_each_guest_is_built_and_what_they_share_once(toy: ToyRepository) -> None:
    status, _out, err = toy.run("driver=all", "build_image")
    assert status == 0, err
    made = toy.made()
    assert {name for name in made if made.count(name) == 2} == OWN
    assert {name for name in made if made.count(name) == 1} == SHARED
    assert "another build is making it" not in err
    other = toy.out.parent / "535.216.01"
    assert image(toy.out) != image(other)
    assert (other / "vmlinuz-6.1-toy").read_bytes() == (toy.out / "vmlinuz-6.1-toy").read_bytes()
    assert err.count("build_image with each driver of debian-trixie:") == 1
    assert summary(err) == [
        ["550.163.01", "built", *size(toy.out), f"{DIRECTORY}/550.163.01/"],
        ["535.216.01", "built", *size(other), f"{DIRECTORY}/535.216.01/"]]
    assert err.count("To use it with Kata Containers") == 1


def size(place: Path) -> list[str]:
    """The size of an image as the summary has it."""
    return [f"{len(image(place)) / 1000:.1f}", "kB"]


def test_one_guest_s_build_is_a_hit_for_all(toy: ToyRepository) -> None:
    assert toy.run("build_image")[0] == 0
    toy.made()
    status, _out, err = toy.run("driver=all")
    assert status == 0
    assert sorted(toy.made()) == sorted(OWN)
    assert [line[:2] for line in summary(err)] == [["550.163.01", "up"], ["535.216.01", "built"]]
    said = toy.run("driver=535.216.01")[2]
    assert said == f"build_image: up to date in {DIRECTORY}/535.216.01/\n"


def test_nothing_to_do_is_said_for_each_and_is_quick(toy: ToyRepository) -> None:
    assert toy.run("driver=all")[0] == 0
    toy.made()
    assert toy.run("-n1", "driver=all")[2] == toy.run("driver=all")[2]
    started = time.monotonic()
    status, out, err = toy.run("driver=all", "build_image")
    took = time.monotonic() - started
    assert (status, out, toy.made()) == (0, "", [])
    assert err.splitlines()[0] == "build_image with each driver of debian-trixie:"
    assert [line[1:4] for line in summary(err)] == [["up", "to", "date"]] * 2
    assert took < 2  # a receipt: an interpreter's start
    (toy.out.parent / "535.216.01/manifest.json").unlink()
    status, _out, err = toy.run("driver=all", "build_image")
    assert [line[:2] for line in summary(err)] == [["550.163.01", "up"], ["535.216.01", "built"]]


@pytest.mark.parametrize(("kind", "status"), [("user", 1), ("step", 2)])
@pytest.mark.parametrize("processes", ["-n0", "-n3"])
def test_a_guest_that_fails_does_not_hide_the_others(
    toy: ToyRepository, kind: str, status: int, processes: str,
) -> None:
    fail = f"{kind}:driver_modules@550.163.01"
    found, _out, err = toy.run(processes, "driver=all", TOY_FAIL=fail)
    assert found == status
    assert err.count("error: ") == 1
    assert "error: driver_modules@550.163.01: " in err
    assert "Traceback" not in err
    assert summary(err)[0] == ["550.163.01", "failed"]
    assert summary(err)[1][:2] == ["535.216.01", "built"]
    assert not (toy.out / "manifest.json").exists()
    assert (toy.out.parent / "535.216.01/manifest.json").exists()
    toy.made()
    assert toy.run("driver=all")[0] == 0
    assert sorted(toy.made()) == sorted(OWN - {"driver_user"})


def test_what_all_share_fails_once(toy: ToyRepository) -> None:
    status, _out, err = toy.run("driver=all", TOY_FAIL="step:kernel")
    assert status == 2
    assert err.count("the step broke") == 1
    assert summary(err) == [["550.163.01", "failed"], ["535.216.01", "failed"]]


@pytest.mark.parametrize("absent", ["535.216.01", "550.163.01"])
def test_a_driver_that_the_archive_lacks(toy: ToyRepository, absent: str) -> None:
    for path in toy.out.parent.glob("*/lock.json"):
        path.unlink()
    status, _out, err = toy.run("driver=all", TOY_ABSENT=absent)
    assert status == 1, err
    assert err.count("error: ") == 1
    assert f"error: lock@{absent}: the archive lacks {absent}\n  hint: another one" in err
    ended = {words[0]: words[1] for words in summary(err)}
    assert ended.pop(absent) == "failed"
    assert list(ended.values()) == ["built"]
    assert set(toy.made()) == OWN | SHARED
    status, _out, err = toy.run("driver=all", "lock", TOY_ABSENT=absent)
    assert (status, err.count("error: ")) == (1, 1)
    assert toy.run("driver=all", "lock", TOY_ABSENT="999")[0] == 0


def test_no_driver_can_be_resolved(toy: ToyRepository) -> None:
    for path in toy.out.parent.glob("*/lock.json"):
        path.unlink()
    status, _out, err = toy.run("driver=all", TOY_ABSENT="nvidia")  # in all packages' names
    assert (status, err.count("error: ")) == (1, 1)
    assert [words[1] for words in summary(err)] == ["failed", "failed"]
    assert not toy.made()


def test_two_failures_are_both_said_and_the_worse_is_the_status(toy: ToyRepository) -> None:
    status, _out, err = toy.run(
        "driver=all", TOY_FAIL="step:driver_modules@535.216.01,user:driver_modules@550.163.01")
    assert status == 2, err
    assert "error: driver_modules@550.163.01: the user can mend it" in err
    assert "error: driver_modules@535.216.01: the step broke" in err
    assert err.count("error: ") == 2


def test_each_guest_has_a_build_record_of_its_own(toy: ToyRepository) -> None:
    assert toy.run("driver=all")[0] == 0
    for version in ("550.163.01", "535.216.01"):
        record = json.loads((toy.out.parent / version / "build-record.json").read_bytes())
        names = [step["stage"] for step in record["steps"] if "stage" in step]
        assert sorted(names) == sorted(OWN | SHARED)
        assert record["driver"] == version
        made = {step["stage"] for step in record["steps"] if not step.get("hit")}
        assert made >= OWN | SHARED


def test_why_names_the_guest_of_what_differs(toy: ToyRepository) -> None:
    assert toy.run("driver=all")[0] == 0
    status, out, _err = toy.run("driver=all", "why", "image")
    lines = out.splitlines()
    assert status == 0
    assert len(lines) == len(set(lines))
    assert {"kernel: hit", "image@550.163.01: hit", "image@535.216.01: hit"} <= set(lines)


def test_other_tasks_take_all_too(toy: ToyRepository) -> None:
    status, _out, err = toy.run("driver=all", "build_kernel")
    assert (status, toy.made()) == (0, ["kernel_config", "kernel"])
    assert summary(err)[0] == ["550.163.01", "built", f"{DIRECTORY}/550.163.01/"]


@pytest.mark.parametrize("task", ["bench", "boot_shell", "reproduce"])
def test_what_is_done_with_one_guest_builds_none_before_it_refuses(
    toy: ToyRepository, task: str,
) -> None:
    for words in ([], ["recipe=debian-trixie"]):
        status, _out, err = toy.run("driver=all", *words, task)
        assert status == 1
        assert f"error: {task}: this is done with one guest" in err
        assert f"hint: ./doitw {' '.join([*words, 'driver=VERSION', task])}\n" in err
    assert toy.made() == []


def test_a_listed_section_is_taken_whole(toy: ToyRepository) -> None:
    (guest,) = Guests(toy.root, {"driver": "535.216.01"}, {}).contexts
    assert guest.recipe.driver.version == "535.216.01"
    assert guest.directory == toy.out.parent / "535.216.01"
    assert [context.recipe.driver.version for context in Guests(
        toy.root, {"driver": "all"}, {}).contexts] == ["550.163.01", "535.216.01"]


def test_a_recipe_without_a_driver(toy: ToyRepository) -> None:
    path = toy.root / "recipes/debian-trixie.yaml"
    text = path.read_text().partition("\nother_drivers:")[0]
    path.write_text(text.replace('  source: debian\n  version: "550.163.01"', "  source: none"))
    with pytest.raises(UserError, match="driver=all: the recipe 'debian-trixie' has no driver"):
        Guests(toy.root, {"driver": "all"}, {})
    status, _out, err = toy.run("driver=all")
    assert (status, err.count("error: "), "Traceback" in err) == (1, 1, False)
