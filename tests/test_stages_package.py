"""The stage of a `.run` file: where it comes from, and what is refused there."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import recipe
from katagpu.errors import UserError
from katagpu.keys import PACKAGE
from katagpu.lock import Lock
from katagpu.plan import Plan
from katagpu.schema import Driver, DriverSource, Recipe
from katagpu.stages import package
from katagpu.store import Store
from tests.nvrun.archive import Name
from tests.nvrun.toys import HOST, Evil, Toy

ROOT = PACKAGE.parent
VERSION = "550.163.01"


def wanted(**driver: Any) -> Recipe:
    """The default guest with a driver from a `.run` file."""
    section = Driver(source=DriverSource.RUNFILE, version=VERSION, **driver)
    return replace(recipe.load("debian-trixie", ROOT), driver=section)


def ensure(tmp_path: Path, pins: dict[str, str] | None = None, **driver: Any) -> Store:
    """Make the stage; `driver` are fields of the recipe's section, `pins` the lock's digests."""
    lock = Lock(recipe="toy", request="", groups={}, downloads=pins or {})
    stage = package.package(wanted(**driver), lock, ROOT)
    store = Store(tmp_path / "store")
    Plan({stage.name: stage}, store, tmp_path / "logs").ensure(stage.name)
    return store


def refused(tmp_path: Path, pins: dict[str, str] | None = None, **driver: Any) -> str:
    """What is said where the stage ends with exit status 1; nothing of the file is kept."""
    with pytest.raises(UserError) as failure:
        ensure(tmp_path, pins, **driver)
    assert failure.value.status == 1
    assert list((tmp_path / "store/blobs/sha256").iterdir()) == []
    return str(failure.value)


def page(site: Any, path: Path) -> str:
    """Serve a file."""
    return str(site.add(path.name, path.read_bytes()))


# where it comes from


def test_a_file_and_an_address_with_a_digest(tmp_path: Path, site: Any) -> None:
    path = Toy().make(tmp_path)
    digest = sha256(path.read_bytes()).hexdigest()
    assert ensure(tmp_path / "one", file=str(path), sha256=digest).has(digest)
    assert ensure(tmp_path / "two", url=page(site, path), sha256=digest).has(digest)


def test_an_address_without_the_file(tmp_path: Path, site: Any) -> None:
    said = refused(tmp_path, url=f"{site.base}/gone.run", sha256="0" * 64)
    assert f"{site.base}/gone.run: status 404" in said and f"driver {VERSION}" in said
    assert "the recipe has its address and its digest" in said and "lock" not in said


def test_a_file_that_was_replaced(tmp_path: Path, site: Any) -> None:
    said = refused(tmp_path, url=page(site, Toy().make(tmp_path)), sha256="0" * 64)
    assert "is not what was asked for" in said and "mend them there" in said
    assert "lock" not in said


def test_without_a_digest_it_is_what_the_lock_has(tmp_path: Path, site: Any) -> None:
    path = Toy().make(tmp_path)
    url, digest = page(site, path), sha256(path.read_bytes()).hexdigest()
    assert ensure(tmp_path / "one", {url: digest}, url=url).has(digest)
    said = refused(tmp_path / "two", {url: "0" * 64}, url=url)
    assert "is not what was asked for" in said and "`./doitw lock` takes the file" in said


# what does not fit


@pytest.mark.parametrize(("toy", "said"), [
    (Toy(name=Name(version=VERSION, architecture="aarch64")), "is for Linux on aarch64"),
    (Toy(name=Name(version=VERSION, variant="-vgpu-kvm"), add=HOST), "is a package for vGPU hosts"),
    (Toy(add=HOST), "is a package for vGPU hosts"),
    (Toy(name=Name(version="550.90.07")), "the recipe asks for 550.163.01"),
    (Toy(flavours=("kernel",)), "has no open kernel modules"),
    (Toy(cut=100), "is cut off"), (Toy(flip=700), "altered or damaged"),
    (Toy(files={".manifest": b"nonsense\n"}), "does not start with 8 lines"),
    (Toy(members=Evil.PARENT.value), "'./../evil'"),
    (Toy(members=Evil.LINK_ABSOLUTE.value), "'./evil'"),
    (Toy(members=Evil.CHARACTER_DEVICE.value), "'./evil'"),
])
def test_a_package_that_does_not_fit_ends_here(tmp_path: Path, toy: Toy, said: str) -> None:
    assert said in refused(tmp_path, file=str(toy.make(tmp_path)))
