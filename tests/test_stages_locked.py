"""Stages of a guest whose lock names files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import driverfile, guest, kernelorg, keys, recipe
from katagpu.errors import UserError
from katagpu.lock import File, Lock, Pins
from katagpu.schema import Agent, DriverSource, KernelSource, Recipe
from katagpu.stages import locked
from katagpu.stages.api import Stage

BARE = Lock(recipe="toy", request="", groups={})
ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def plain(repository: Path) -> Recipe:
    """The default recipe with a kernel of kernel.org and a `.run` by its version alone."""
    found = recipe.load("debian-trixie", repository)
    return replace(
        found, kernel=replace(found.kernel, source=KernelSource.KERNEL_ORG, package=None,
                              version="6.12.30"),
        driver=replace(found.driver, source=DriverSource.RUNFILE, version="580.95.05"))


def pinned(**files: File) -> Lock:
    """A lock of these files, by names with `__` for the slash."""
    return replace(BARE, pins=Pins(files={
        name.replace("__", "/"): file for name, file in files.items()}))


def stages(plain: Recipe, lock: Lock, root: Path) -> dict[str, Stage]:
    """The guest's stages with a lock."""
    return guest.stages(plain, lock, root)


def test_a_release_of_kernel_org_is_a_download(plain: Recipe, repository: Path) -> None:
    lock = pinned(kernel__tarball=File(sha256=ONE, size=1, url="https://elsewhere/x.tar.xz"),
                  kernel__signature=File(sha256=TWO, size=1))
    before = stages(plain, BARE, repository)
    after = stages(plain, lock, repository)
    assert before["kernel_source"].network and not after["kernel_source"].network
    tarball, signature = kernelorg.urls("6.12.30")
    assert after["kernel_source"].downloads == {"tarball": (tarball, ONE),
                                                "signature": (signature, TWO)}
    own = replace(plain, kernel=replace(plain.kernel, releases="https://mirror.example.org/linux"))
    moved = stages(own, lock, repository)["kernel_source"]
    assert moved.downloads["tarball"][0].startswith("https://mirror.example.org/linux/v6.x/")
    assert moved.key({}) == after["kernel_source"].key({}), "the address is no part of it"
    assert set(after) == set(before)


def test_a_run_file_is_a_download(plain: Recipe, repository: Path) -> None:
    url = driverfile.addresses(plain)[1]
    file = File(sha256=ONE, size=1, url=url)
    lock = replace(pinned(driver__run=file), downloads={url: ONE})
    assert stages(plain, BARE, repository)["driver_package"].downloads["run"][1] is None
    assert stages(plain, lock, repository)["driver_package"].downloads["run"] == (url, ONE)
    mirror = replace(plain, driver=replace(plain.driver, url="https://mirror.example.org/x.run"))
    moved = stages(mirror, lock, repository)["driver_package"]
    assert moved.downloads["run"] == ("https://mirror.example.org/x.run", ONE)


def test_go_modules_are_in_the_key(plain: Recipe, repository: Path) -> None:
    lock = replace(BARE, pins=Pins(modules={"example.org/a v1": "h1:a="}))
    other = replace(BARE, pins=Pins(modules={"example.org/a v1": "h1:b="}))
    assert len({keys.digest(stages(plain, each, repository)["toolkit_source"].key({}))
                for each in (BARE, lock, other)}) == 3
    assert stages(plain, lock, repository)["toolkit"] == \
        stages(plain, BARE, repository)["toolkit"]


def test_without_a_committed_lock_nothing_differs(plain: Recipe, repository: Path) -> None:
    found = list(stages(plain, BARE, repository).values())
    assert locked.pinned(found, BARE, repository) == found


def test_a_file_of_the_recipe_that_is_another_now(plain: Recipe, tmp_path: Path) -> None:
    agent = tmp_path / "kata-agent"
    agent.write_bytes(b"one")
    digest = hashlib.sha256(b"one").hexdigest()
    lock = pinned(agent__source=File(sha256=digest, size=3, path="kata-agent"))
    own = replace(plain, agent=Agent(file="kata-agent"))
    assert own.agent is not None
    assert locked.pinned([], lock, tmp_path) == []
    agent.write_bytes(b"two")
    with pytest.raises(UserError, match="kata-agent is not the file that was locked") as refused:
        locked.pinned([], lock, tmp_path)
    assert refused.value.hint == ("put the locked file back, or take this one: "
                                  "`./doitw recipe=toy lock update=agent`")
    agent.unlink()
    with pytest.raises(UserError, match="No such file"):
        locked.pinned([], lock, tmp_path)


def test_go_s_sums(tmp_path: Path) -> None:
    """Those of github.com/pkg/errors v0.9.1, as everybody's go.sum has them."""
    place = tmp_path / "github.com/pkg/errors/@v"
    place.mkdir(parents=True)
    (place / "v0.9.1.mod").write_text("module github.com/pkg/errors\n")
    (place / "v0.9.1.ziphash").write_text("h1:FEBLx1zS214owpjy7qsBeixbURkuhQAwrK5UwLGTwt4=")
    (place / "list").write_text("v0.9.1\n")
    escaped = tmp_path / "github.com/!n!v!i!d!i!a/x/@v"
    escaped.mkdir(parents=True)
    (escaped / "v1.0.0-!r!c1.mod").write_text("module x\n")
    found = locked.sums(tmp_path)
    assert found["github.com/pkg/errors v0.9.1/go.mod"] == \
        "h1:bwawxfHBFNV+L2hUp1rHADufV3IMtnDRdf1r5NINEl0="
    assert found["github.com/pkg/errors v0.9.1"] == \
        "h1:FEBLx1zS214owpjy7qsBeixbURkuhQAwrK5UwLGTwt4="
    assert "github.com/NVIDIA/x v1.0.0-RC1/go.mod" in found
    assert "github.com/NVIDIA/x v1.0.0-RC1" not in found
    assert list(found) == sorted(found)
