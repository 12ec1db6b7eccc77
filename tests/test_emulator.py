"""The lock of the pipeline's own QEMU, against a signed archive with backports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from katagpu import emulator, lock, recipe, request
from katagpu.emulator import EmulatorLock
from katagpu.errors import UserError
from katagpu.lock import Lock
from katagpu.schema import TOOLS, Distribution, DistributionId, Recipe
from tests.toyarchive import ToyArchive, missing, served, signing_keys

needs = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")
OLD, NEW = "1:10.0.13+ds-0+deb13u1", "1:11.1.3+ds-1~bpo13+1"


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    """Keys, made once."""
    with signing_keys() as place:
        yield place


@dataclass
class Mirror:
    """A suite and its backports at one address."""

    stable: ToyArchive
    backports: ToyArchive
    recipe: Recipe

    def publish(self, key: str = "test") -> None:
        """Sign both."""
        self.stable.publish(key)
        self.backports.publish(key)


def with_tools(wanted: Recipe, **fields: object) -> Recipe:
    """The recipe with tools of another distribution."""
    return msgspec.structs.replace(wanted, tools=msgspec.structs.replace(TOOLS, **fields))


@pytest.fixture
def plain(repository: Path) -> Recipe:
    """The default recipe."""
    return recipe.load("debian-trixie", repository)


@pytest.fixture
def mirror(keys: Path, tmp_path: Path, plain: Recipe) -> Iterator[Mirror]:
    """A mirror whose QEMU is too old, and newer with a library of its own in backports."""
    root = tmp_path / "archive"
    root.mkdir()
    stable = ToyArchive(root, keys, suite="toy")
    backports = ToyArchive(root, keys, suite="toy-backports")
    stable.add("base-files", "13.8", Essential="yes")
    stable.add("seabios", "1.16.3-2")
    stable.add("libfdt1", "1.7.2-2")
    stable.add("qemu-system-x86", OLD, Depends="libfdt1, seabios")
    backports.add("qemu-system-x86", NEW, Depends="libfdt1, seabios (>= 1.17)")
    backports.add("seabios", "1.17.0-1~bpo13+1")
    with served(stable):
        found = Mirror(stable, backports, with_tools(
            plain, suite="toy", mirror=stable.base, security_mirror=None, components=("main",),
            keyring=str(keys / "test.gpg")))
        found.publish()
        yield found


@pytest.fixture
def made(mirror: Mirror, repository: Path, tmp_path: Path) -> EmulatorLock:
    """The lock of that mirror, not made yet."""
    return EmulatorLock(mirror.recipe, repository, tmp_path / "out")


def versions(found: Lock | None) -> dict[str, str]:
    """Version by package."""
    assert found is not None
    return {deb.package: deb.version for deb in found.group(emulator.GROUP)}


@needs
def test_backports_come_first_and_the_rest_is_the_suite_s(
    made: EmulatorLock, mirror: Mirror, tmp_path: Path,
) -> None:
    assert made.find() is None
    made.make(tmp_path / "apt")
    found = made.find()
    assert versions(found) == {"base-files": "13.8", "libfdt1": "1.7.2-2", "qemu-system-x86": NEW,
                               "seabios": "1.17.0-1~bpo13+1"}
    assert found is not None
    assert made.path == tmp_path / "out/boot-lock.json"
    assert all(deb.url.startswith(mirror.stable.base) for deb in found.group(emulator.GROUP))
    assert all(len(deb.sha256) == 64 and deb.size for deb in found.group(emulator.GROUP))


@needs
def test_an_older_one_in_backports_is_taken_too(
    made: EmulatorLock, mirror: Mirror, tmp_path: Path,
) -> None:
    """As after a point release of the suite; what was asked for are backports."""
    mirror.stable.add("qemu-system-x86", "1:12.0.0", Depends="libfdt1")
    mirror.publish()
    made.make(tmp_path / "apt")
    assert versions(made.find())["qemu-system-x86"] == NEW


@needs
def test_the_suite_s_own_where_backports_do_not_have_it(
    made: EmulatorLock, mirror: Mirror, tmp_path: Path,
) -> None:
    """Whether that one has what is needed is asked of it, not of its version."""
    mirror.backports.packages.clear()
    mirror.publish()
    made.make(tmp_path / "apt")
    assert versions(made.find())["qemu-system-x86"] == OLD


@needs
def test_it_is_made_again_where_the_mirror_has_moved_on(
    made: EmulatorLock, mirror: Mirror, tmp_path: Path,
) -> None:
    made.make(tmp_path / "apt")
    mirror.backports.packages.clear()
    mirror.backports.add("qemu-system-x86", "1:11.2.0+ds-1~bpo13+1", Depends="libfdt1")
    mirror.publish()
    assert versions(made.find())["qemu-system-x86"] == NEW, "a lock holds until it is made anew"
    made.make(tmp_path / "apt")
    assert versions(made.find())["qemu-system-x86"].startswith("1:11.2.0")


@needs
def test_a_mirror_without_it(made: EmulatorLock, mirror: Mirror, tmp_path: Path) -> None:
    made.make(tmp_path / "apt")
    before = made.path.read_bytes()
    for archive in (mirror.stable, mirror.backports):
        for file in [file for file in archive.packages if file.startswith("qemu-system-x86_")]:
            del archive.packages[file]
    mirror.stable.add("qemu-system-arm", OLD)
    mirror.publish()
    with pytest.raises(UserError) as refused:
        made.make(tmp_path / "apt")
    assert refused.value.what.startswith(
        "QEMU of toy-backports cannot be had: the packages cannot be resolved:")
    assert "Unable to locate package qemu-system-x86" in refused.value.what
    assert refused.value.hint == "did you mean qemu-system-arm?"
    assert made.path.read_bytes() == before, "the lock that there was holds"


@needs
def test_one_that_cannot_be_installed(made: EmulatorLock, mirror: Mirror, tmp_path: Path) -> None:
    mirror.backports.add("qemu-system-x86", "1:11.3.0", Depends="libfdt1 (>= 2)")
    mirror.publish()
    with pytest.raises(UserError, match=r"cannot be had: .*(\n.*)*libfdt1 \(>= 2\)"):
        made.make(tmp_path / "apt")
    assert made.find() is None and not made.path.exists()


@needs
def test_a_mirror_without_backports(made: EmulatorLock, mirror: Mirror, tmp_path: Path) -> None:
    (mirror.stable.root / "dists/toy-backports/InRelease").unlink()
    (mirror.stable.root / "dists/toy-backports/Release").unlink()
    with pytest.raises(UserError, match="package lists could not be fetched") as refused:
        made.make(tmp_path / "apt")
    assert "toy-backports" in refused.value.what and refused.value.hint


@needs
def test_a_mirror_that_is_gone(
    plain: Recipe, keys: Path, repository: Path, tmp_path: Path,
) -> None:
    place = tmp_path / "archive"
    place.mkdir()
    archive = ToyArchive(place, keys)
    with served(archive):
        pass
    gone = EmulatorLock(with_tools(plain, suite="toy", mirror=archive.base, security_mirror=None,
                                   keyring=str(keys / "test.gpg")), repository, tmp_path / "out")
    with pytest.raises(UserError) as refused:
        gone.make(tmp_path / "apt")
    assert refused.value.what.startswith(
        "QEMU of toy-backports cannot be had: the package lists could not be fetched:")
    assert "Could not connect to 127.0.0.1" in refused.value.what
    assert refused.value.hint
    assert not gone.path.exists()


@needs
def test_backports_that_somebody_else_signed(
    made: EmulatorLock, mirror: Mirror, tmp_path: Path,
) -> None:
    mirror.backports.publish("other")
    with pytest.raises(UserError, match="QEMU of toy-backports cannot be had") as refused:
        made.make(tmp_path / "apt")
    assert "NO_PUBKEY" in refused.value.what
    assert not made.path.exists()


@needs
def test_a_keyring_that_is_not_there(
    made: EmulatorLock, mirror: Mirror, repository: Path, tmp_path: Path,
) -> None:
    changed = msgspec.structs.replace(mirror.recipe.tools or TOOLS, keyring="/no/keyring.gpg")
    other = EmulatorLock(msgspec.structs.replace(mirror.recipe, tools=changed), repository,
                         tmp_path / "out")
    with pytest.raises(UserError, match=r"the keyring /no/keyring.gpg of .* is not there"):
        other.make(tmp_path / "apt")


def answered(found: EmulatorLock) -> EmulatorLock:
    """The lock, made of nothing."""
    lock.write(Lock(recipe="x", request=found.identity(), groups={emulator.GROUP: ()}), found.path)
    return found


def test_a_lock_that_answers_something_else_is_none(
    plain: Recipe, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = answered(EmulatorLock(plain, repository, tmp_path))
    assert found.find() is not None
    other = EmulatorLock(with_tools(plain, suite="forky"), repository, tmp_path)
    assert other.find() is None
    monkeypatch.setattr(emulator, "PACKAGES", (*emulator.PACKAGES, "ovmf"))
    assert found.find() is None


def test_it_does_not_ask_what_the_guest_is(plain: Recipe, repository: Path, tmp_path: Path) -> None:
    """One for all drivers; the mirrors of this host are no part of it."""
    found = answered(EmulatorLock(plain, repository, tmp_path))
    changed = msgspec.structs.replace(
        plain, name="other", driver=msgspec.structs.replace(plain.driver, version="535.1"))
    assert EmulatorLock(changed, repository, tmp_path).find() == found.find()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_damaged_lock(
    plain: Recipe, repository: Path, tmp_path: Path, content: bytes,
) -> None:
    found = answered(EmulatorLock(plain, repository, tmp_path))
    found.path.write_bytes(content)
    with pytest.raises(UserError, match=r"boot-lock.json"):
        found.find()


def test_whose_backports(
    plain: Recipe, repository: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request, "host_archive", lambda _distribution: {})
    assert emulator.distribution(plain).suite == "trixie"
    ubuntu = Distribution(id=DistributionId.UBUNTU, suite="resolute", keyring="/k",
                          fallback_mirror="http://archive.ubuntu.example/ubuntu")
    of_ubuntu = msgspec.structs.replace(plain, tools=ubuntu)
    assert emulator.distribution(of_ubuntu) == TOOLS, "Ubuntu has none of QEMU"
    for wanted in (plain, of_ubuntu):
        found = emulator.archives(wanted, repository)
        assert [archive.suites for archive in found if archive.preferred] == [
            ("trixie-backports",)]
        assert found[-1].preferred and found[-1].uri == found[0].uri
        assert found[-1].keyring == found[0].keyring
