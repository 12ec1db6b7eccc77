"""Locks of a recipe's guests: what they share is resolved once, against a signed archive."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katagpu import apt, lock, request, resolve
from katagpu.errors import UserError
from katagpu.lock import Group, Lock
from katagpu.locks import SHARED, Locks
from katagpu.schema import Recipe
from katagpu.several import Guests
from tests.toyarchive import ToyArchive, missing, served, signing_keys

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    """Keys, made once."""
    with signing_keys() as place:
        yield place


def toy_groups(recipe: Recipe, _root: Path) -> dict[str, Group]:
    """A toolchain, a base, a driver on the base, and perhaps a layer on the toolchain."""
    found = {"toolchain": Group(packages=("cc",)), "base": Group(packages=("app",))}
    if recipe.rootfs.extra_packages:
        found["build_layer"] = Group(packages=recipe.rootfs.extra_packages, on="toolchain")
    version = recipe.driver.version
    return found | {"driver_user": Group(packages=(f"driver={version}*",), on="base"),
                    "driver_source": Group(packages=(f"driver-source={version}*",), alone=True)}


@pytest.fixture
def archive(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyArchive]:
    """An archive with an application on a library, a compiler, and two versions of a driver."""
    (tmp_path / "archive").mkdir()
    toy = ToyArchive(tmp_path / "archive", keys)
    toy.add("lib", "1.0-1", Provides="lib-abi (= 1)")
    toy.add("app", "1.0-1", Depends="lib")
    toy.add("cc", "12-1", Installed_Size="7", Depends="lib\n (>= 1)")
    toy.add("make", "4-1", Depends="cc")
    for version in ("550.1", "535.2"):
        toy.add("driver", f"{version}-1", Depends="lib-abi, lib (>= 1)")
        toy.add("driver-source", f"{version}-1")
    toy.publish()
    monkeypatch.setattr(request, "groups", toy_groups)
    monkeypatch.setenv("KATAGPU_STORE", str(tmp_path / "store"))
    with served(toy):
        monkeypatch.setattr(request, "archives", lambda *_: toy.request({}).archives[lock.GUEST])
        yield toy


@pytest.fixture
def root(tmp_path: Path, repository: Path) -> Path:
    """A repository whose recipe lists two drivers."""
    top = tmp_path / "repository"
    (top / "recipes").mkdir(parents=True)
    text = (repository / "recipes/debian-trixie.yaml").read_text()
    (top / "recipes/debian-trixie.yaml").write_text(
        text.replace("550.163.01", "550.1")
        + '\nother_drivers:\n  - {source: debian, version: "535.2"}\n')
    return top


Ask = Callable[..., Guests]


@pytest.fixture
def ask(root: Path, archive: ToyArchive) -> Ask:
    """The guests of a command line with this driver, in a process of its own."""
    del archive

    def guests(driver: str | None = None, **environment: str) -> Guests:
        return Guests(root, {"driver": driver} if driver else {}, environment)

    return guests


def locks(guests: Guests) -> list[Lock]:
    """The locks of all guests, which have one."""
    found = [context.locked() for context in guests.contexts]
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


def versions(found: Lock, group: str) -> list[str]:
    """`package=version` of a group."""
    return [f"{deb.package}={deb.version}" for deb in found.group(group)]


def moves_on(archive: ToyArchive) -> None:
    """The archive drops what it had for newer versions, as mirrors do; drivers stay."""
    for file in [file for file in archive.packages if file.startswith(("lib_", "app_", "cc_"))]:
        del archive.packages[file]
    archive.add("lib", "1.1-1", Provides="lib-abi (= 1)")
    archive.add("app", "1.1-1", Depends="lib")
    archive.add("cc", "13-1")
    archive.publish()


def test_a_driver_of_another_day_stands_on_the_same_base(archive: ToyArchive, ask: Ask) -> None:
    ask().lock(anew=False)
    (first,) = locks(ask())
    assert versions(first, "driver_user") == ["driver=550.1-1"]
    moves_on(archive)
    ask("535.2").lock(anew=False)
    (second,) = locks(ask("535.2"))
    assert second.group("base") == first.group("base")
    assert second.group("toolchain") == first.group("toolchain")
    assert versions(second, "driver_user") == ["driver=535.2-1"]
    assert versions(second, "driver_source") == ["driver-source=535.2-1"]
    assert locks(ask()) == [first]


def test_what_a_driver_needs_newer_than_the_base_has_comes_with_it(
    archive: ToyArchive, ask: Ask,
) -> None:
    ask().lock(anew=False)
    archive.add("driver", "560.1-1", Depends="lib (>= 1.1)")
    archive.add("driver-source", "560.1-1")
    moves_on(archive)
    ask("560.1").lock(anew=False)
    (found,) = locks(ask("560.1"))
    assert versions(found, "base") == ["app=1.0-1", "lib=1.0-1"]
    assert versions(found, "driver_user") == ["driver=560.1-1", "lib=1.1-1"]


def test_lock_resolves_anew_and_the_other_guests_follow(archive: ToyArchive, ask: Ask) -> None:
    for driver in (None, "535.2"):
        ask(driver).lock(anew=False)
    moves_on(archive)
    assert versions(locks(ask())[0], "base") == ["app=1.0-1", "lib=1.0-1"]
    ask().lock(anew=True)
    (first,) = locks(ask())
    assert versions(first, "base") == ["app=1.1-1", "lib=1.1-1"]
    assert ask("535.2").contexts[0].locked() is None
    ask("535.2").lock(anew=False)
    (second,) = locks(ask("535.2"))
    assert second.group("base") == first.group("base")


def test_all_resolves_what_is_shared_once(
    archive: ToyArchive, ask: Ask, monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolved: list[tuple[str, ...]] = []
    group = resolve._group

    def counted(apt: apt.Apt, wanted: lock.Request, one: Group, below: dict[str, str],
                ) -> tuple[lock.Deb, ...]:
        resolved.append(one.packages)
        return group(apt, wanted, one, below)

    monkeypatch.setattr(resolve, "_group", counted)
    assert ask("all").lock(anew=False) == []
    drivers = [(f"{name}={version}*",) for version in ("550.1", "535.2")
               for name in ("driver", "driver-source")]
    assert resolved == [("cc",), ("app",), *drivers]
    found = locks(ask("all"))
    assert found[0].group("base") == found[1].group("base")
    assert locks(ask()) == found[:1] and locks(ask("535.2")) == found[1:]
    assert ask("all").lock(anew=False) == [] and len(resolved) == 6
    moves_on(archive)
    assert ask("all").lock(anew=True) == [] and len(resolved) == 12
    assert {version for one in locks(ask("all")) for version in versions(one, "base")} == {
        "app=1.1-1", "lib=1.1-1"}


def test_guests_that_were_locked_apart_come_together(
    archive: ToyArchive, ask: Ask, root: Path,
) -> None:
    ask().lock(anew=False)
    (root / "out/debian-trixie" / SHARED).unlink()
    (root / "out/debian-trixie/550.1/lock.json").rename(root / "kept.json")
    moves_on(archive)
    ask("535.2").lock(anew=False)
    (root / "kept.json").rename(root / "out/debian-trixie/550.1/lock.json")
    assert ask("all").locked() is False
    ask("all").lock(anew=False)
    found = locks(ask("all"))
    assert found[0].group("base") == found[1].group("base")


def test_locks_that_were_kept_alone_and_differ_come_together(
    archive: ToyArchive, ask: Ask, root: Path,
) -> None:
    place = root / "out/debian-trixie"
    ask().lock(anew=False)
    (first,) = locks(ask())
    (place / "550.1/lock.json").rename(root / "kept.json")
    moves_on(archive)
    (place / SHARED).unlink()
    ask("535.2").lock(anew=False)
    (place / SHARED).unlink()
    (root / "kept.json").rename(place / "550.1/lock.json")
    assert locks(ask())[0].group("base") != locks(ask("535.2"))[0].group("base")
    assert ask("all").locked() is False
    ask("all").lock(anew=False)
    found = locks(ask("all"))
    assert found[0] == first
    assert found[1].group("base") == first.group("base")


def test_a_driver_that_the_archive_lacks_keeps_no_other_from_its_lock(
    archive: ToyArchive, ask: Ask,
) -> None:
    for file in [file for file in archive.packages if file.startswith("driver_550")]:
        del archive.packages[file]
    archive.publish()
    guests = ask("all")
    (refusal,) = guests.lock(anew=False)
    assert "the archive has driver in: 535.2-1" in str(refusal)
    assert guests.contexts[0].refused is refusal
    assert guests.contexts[0].locked() is None
    assert guests.contexts[1].locked() is not None
    with pytest.raises(UserError, match=r"550\.1"):
        _ = guests.contexts[0].plan


def test_a_lock_that_was_kept_alone_is_the_base_of_others(
    archive: ToyArchive, ask: Ask, root: Path, capfd: pytest.CaptureFixture[str],
) -> None:
    ask().lock(anew=False)
    (first,) = locks(ask())
    (root / "out/debian-trixie" / SHARED).unlink()
    assert locks(ask()) == [first]
    moves_on(archive)
    # What the archive has no more of is installed, but what it provides is not known.
    archive.add("driver", "560.1-1", Depends="lib (>= 1)")
    archive.add("driver-source", "560.1-1")
    archive.publish()
    ask("560.1").lock(anew=False)
    (second,) = locks(ask("560.1"))
    assert second.group("base") == first.group("base")
    assert versions(second, "driver_user") == ["driver=560.1-1"]
    assert "other versions now of app, lib" in capfd.readouterr().err
    assert locks(ask()) == [first]


def test_extra_packages_stand_on_the_same_toolchain(archive: ToyArchive, ask: Ask) -> None:
    ask().lock(anew=False)
    (plain,) = locks(ask())
    # What is there already is not installed again.
    ask(EXTRA_PKGS="cc make").lock(anew=False)
    (extra,) = locks(ask(EXTRA_PKGS="cc make"))
    assert versions(extra, "build_layer") == ["make=4-1"]
    moves_on(archive)  # a newer compiler than the kernel's would be none for its modules
    ask(EXTRA_PKGS="make cc").lock(anew=False)
    (extra,) = locks(ask(EXTRA_PKGS="make cc"))
    assert versions(extra, "build_layer") == ["make=4-1"]
    assert all(extra.group(name) == plain.group(name) for name in plain.groups)
    assert locks(ask()) == [plain]


def test_what_is_known_needs_no_network(archive: ToyArchive, ask: Ask, root: Path) -> None:
    ask().lock(anew=False)
    before = locks(ask())
    shutil.rmtree(root / "out/debian-trixie/550.1")
    shutil.rmtree(archive.root)
    ask().lock(anew=False)
    assert locks(ask()) == before


def test_a_refusal_leaves_what_was_resolved_before(archive: ToyArchive, ask: Ask) -> None:
    ask().lock(anew=False)
    before = locks(ask())
    (archive.root / "dists/toy/InRelease").unlink()
    with pytest.raises(UserError, match="no longer signed"):
        ask().lock(anew=True)
    assert locks(ask()) == before


def test_a_damaged_record_is_named(archive: ToyArchive, ask: Ask, root: Path) -> None:
    del archive
    ask().lock(anew=False)
    (root / "out/debian-trixie" / SHARED).write_text("{")
    with pytest.raises(UserError, match=r"resolved\.json is not a lock"):
        ask().locked()


def test_places(ask: Ask, root: Path) -> None:
    plain: Locks = ask().contexts[0].locks
    assert plain.files() == [root / "out/debian-trixie/550.1/lock.json",
                             root / "out/debian-trixie/resolved.json"]
    assert ask(EXTRA_PKGS="make gcc").contexts[0].locks.path == ask(
        EXTRA_PKGS=" gcc  make").contexts[0].locks.path != plain.path
