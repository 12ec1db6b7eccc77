"""A repository beside the distribution's: real packages, signed, over HTTP on the loopback.

The repository is of NVIDIA's form: flat, its Release file without a date of expiry and with SHA-512
alone, and it holds more than a guest may take from it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import aptview, lock, resolve
from katagpu.aptview import Pin
from katagpu.errors import UserError
from katagpu.lock import Archive, Group, Repository, Request
from tests.toyarchive import ToyArchive, missing, served, signing_keys

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")

VERSIONS = ("1.16.2-1", "1.17.7-1", "1.17.8-1", "1.17.9-1", "1.18.0~rc.1-1", "1.18.0-1")
CLI = b"#!/bin/sh\necho called\n"
PIN = Pin(leader="nvidia-container-toolkit", version="1.17.8-1",
          packages=("nvidia-container-*", "libnvidia-container*"))


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    """Keys, made once."""
    with signing_keys() as place:
        yield place


@pytest.fixture(scope="module")
def debian(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToyArchive]:
    """The distribution's archive, which has the toolkit too, newer than NVIDIA's."""
    toy = ToyArchive(tmp_path_factory.mktemp("debian"), keys)
    toy.add("libc6", "2.41-1", Essential="yes")
    toy.add("libseccomp2", "2.6.0-1", Depends="libc6")
    toy.add("libcuda1", "550.163.01-1", Depends="libc6")
    toy.add("nvidia-container-toolkit", "9.9-1debian1", Depends="libc6")
    toy.publish()
    with served(toy):
        yield toy


@pytest.fixture(scope="module")
def shelf(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> ToyArchive:
    """The toolkit's four packages in many versions, and what a guest must not take from here."""
    toy = ToyArchive(tmp_path_factory.mktemp("shelf"), keys, flat=True)
    for version in VERSIONS:
        toy.add_deb("libnvidia-container1", version, {}, Depends="libc6, libseccomp2")
        toy.add_deb("libnvidia-container-tools", version, {"/usr/bin/nvidia-container-cli": CLI},
                    Depends=f"libnvidia-container1 (>= {version})")
        toy.add_deb("nvidia-container-toolkit-base", version, {"/usr/bin/nvidia-ctk": CLI})
        toy.add_deb("nvidia-container-toolkit", version,
                    {"/usr/bin/nvidia-container-runtime-hook": CLI},
                    Depends=f"nvidia-container-toolkit-base (= {version}), "
                            f"libnvidia-container-tools (>= {version})")
    toy.add_deb("libc6", "99", {}, Essential="yes")
    toy.add_deb("libseccomp2", "99", {})
    toy.add_deb("libcuda1", "999.1-1", {})
    return toy


@pytest.fixture
def nvidia(shelf: ToyArchive, tmp_path: Path) -> Iterator[ToyArchive]:
    """A repository of them for one test."""
    shutil.copytree(shelf.root, tmp_path / "nvidia")
    toy = ToyArchive(tmp_path / "nvidia", shelf.home, flat=True,
                     packages={file: dict(fields) for file, fields in shelf.packages.items()})
    toy.publish()
    with served(toy):
        yield toy


def asked(debian: ToyArchive, nvidia: ToyArchive, *pins: Pin, **more: str | None) -> Request:
    """A request for a guest with the toolkit, and a driver above it."""
    fields: dict[str, str | None] = {
        "uri": nvidia.base, "signed_by": str(nvidia.home / "test.gpg"), "fingerprint": None,
        **more}
    archive = Archive(uri=str(fields["uri"]), suites=("/",), components=(),
                      keyring=str(fields["signed_by"]))
    request = debian.request({
        "base": Group(packages=("?essential",)),
        "toolkit": Group(packages=("nvidia-container-toolkit",), on="base", repository="nvidia",
                         pins=pins or (PIN,)),
        "driver_user": Group(packages=("libcuda1",), on="toolkit")})
    return replace(request, repositories={
        "nvidia": Repository(archive=archive, fingerprint=fields["fingerprint"])})


def names(found: lock.Lock, group: str) -> list[str]:
    """`package=version` of a group."""
    return [f"{deb.package}={deb.version}" for deb in found.group(group)]


def fails(request: Request, tmp_path: Path) -> str:
    """Resolving fails, and the user can mend it: with which words."""
    with pytest.raises(UserError) as failure:
        resolve.resolve(request, tmp_path / "apt")
    assert failure.value.status == 1
    return str(failure.value)


def test_all_packages_are_of_the_one_version_and_the_rest_is_the_distribution_s(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    found = resolve.resolve(asked(debian, nvidia), tmp_path / "apt")
    assert names(found, "base") == ["libc6=2.41-1"]
    assert names(found, "toolkit") == [
        "libnvidia-container-tools=1.17.8-1", "libnvidia-container1=1.17.8-1",
        "libseccomp2=2.6.0-1", "nvidia-container-toolkit=1.17.8-1",
        "nvidia-container-toolkit-base=1.17.8-1"]
    assert names(found, "driver_user") == ["libcuda1=550.163.01-1"]


def test_each_package_is_locked_with_its_address_and_digest(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    found = resolve.resolve(asked(debian, nvidia), tmp_path / "apt")
    origins = {deb.package: deb.url for deb in found.group("toolkit")}
    file = "nvidia-container-toolkit_1.17.8-1_amd64.deb"
    assert origins["nvidia-container-toolkit"] == f"{nvidia.base}/{file}"
    assert origins["libseccomp2"].startswith(debian.base)
    deb = next(deb for deb in found.group("toolkit") if deb.package == "nvidia-container-toolkit")
    assert (deb.sha256, str(deb.size)) == (nvidia.packages[file]["SHA256"],
                                           nvidia.packages[file]["Size"])


def test_the_newest_is_the_repository_s_newest_and_stays_in_the_lock(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    request = asked(debian, nvidia, replace(PIN, version=None))
    assert "nvidia-container-toolkit=1.18.0-1" in names(
        resolve.resolve(request, tmp_path / "apt"), "toolkit")
    nvidia.add_deb("nvidia-container-toolkit", "1.18.1-1", {})
    nvidia.publish()
    assert names(resolve.resolve(request, tmp_path / "apt"), "toolkit") == [
        "nvidia-container-toolkit=1.18.1-1"]


def test_a_repository_with_suites_and_components(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    nvidia.flat = False
    for package in nvidia.packages.values():
        package["Filename"] = package["Filename"].removeprefix("./")
    nvidia.publish()
    request = asked(debian, nvidia)
    archive = replace(request.repositories["nvidia"].archive, suites=("toy",), components=("main",))
    found = resolve.resolve(replace(request, repositories={"nvidia": Repository(archive=archive)}),
                         tmp_path / "apt")
    (deb,) = (deb for deb in found.group("toolkit") if deb.package == "nvidia-container-toolkit")
    assert deb.url == f"{nvidia.base}/nvidia-container-toolkit_1.17.8-1_amd64.deb"


def test_two_pins_of_one_repository_have_each_their_version(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    nvidia.add_deb("nvidia-fabricmanager-550", "550.54.15-1", {}, Depends="libc6")
    nvidia.add_deb("nvidia-fabricmanager-550", "550.163.01-1", {}, Depends="libc6")
    nvidia.add_deb("nvidia-fabricmanager-550", "550.200-1", {}, Depends="libc6")
    nvidia.add_deb("datacenter-gpu-manager-4-core", "1:4.5.2-1", {}, Depends="libc6 (>= 2.17)")
    nvidia.publish()
    request = asked(debian, nvidia)
    services = Group(packages=("nvidia-fabricmanager-550", "datacenter-gpu-manager-4-core"),
                     on="driver_user", repository="nvidia", pins=(
        Pin(leader="nvidia-fabricmanager-550", packages=("nvidia-fabricmanager-550",),
            version="550.163.01-*"),
        Pin(leader="datacenter-gpu-manager-4-core", packages=("datacenter-gpu-manager-4-*",))))
    found = resolve.resolve(replace(request, groups={**request.groups, "services": services}),
                         tmp_path / "apt")
    assert names(found, "services") == ["datacenter-gpu-manager-4-core=1:4.5.2-1",
                                        "nvidia-fabricmanager-550=550.163.01-1"]
    assert "nvidia-container-toolkit=1.17.8-1" in names(found, "toolkit")


# what the repository does not have


@pytest.mark.parametrize(("version", "near"), [
    ("1.17.10-1", "1.17.7-1, 1.17.8-1, 1.17.9-1, 1.18.0~rc.1-1, 1.18.0-1"),
    ("1.0-1", "1.16.2-1, 1.17.7-1, 1.17.8-1"), ("2.0-1", "1.17.9-1, 1.18.0~rc.1-1, 1.18.0-1"),
    ("550.163.01-*", "1.17.9-1, 1.18.0~rc.1-1, 1.18.0-1"),
])
def test_a_version_that_is_not_there(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path, version: str, near: str,
) -> None:
    said = fails(asked(debian, nvidia, replace(PIN, version=version)), tmp_path)
    assert f"{nvidia.base} has no nvidia-container-toolkit {version.removesuffix('-*')}\n" in said
    assert said.endswith(f"nearest: {near}")


@pytest.mark.parametrize(("leader", "cure"), [
    ("nvidia-container-tolkit", "it has nvidia-container-toolkit"),
    ("nothing-like-it", "the guest's distribution and architecture"),
])
def test_a_package_that_is_not_there(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path, leader: str, cure: str,
) -> None:
    said = fails(asked(debian, nvidia, replace(PIN, leader=leader)), tmp_path)
    assert f"{nvidia.base} has no package {leader}" in said and cure in said


def test_an_index_without_sha256(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    for package in nvidia.packages.values():
        del package["SHA256"]
    nvidia.publish()
    assert "has no SHA256 of libnvidia-container1" in fails(asked(debian, nvidia), tmp_path)


def test_a_dependency_that_only_the_repository_could_fulfil(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    """It would be taken from where it must not come from."""
    nvidia.add_deb("nvidia-container-toolkit", "1.20-1", {}, Depends="libc6 (>= 99)")
    nvidia.publish()
    said = fails(asked(debian, nvidia, replace(PIN, version="1.20-1")), tmp_path)
    assert "nvidia-container-toolkit : Depends: libc6 (>= 99)" in said


def test_nearest_in_an_empty_list() -> None:
    assert aptview.nearest("1", []) == []


# keys


def armored(toy: ToyArchive, key: str, target: Path) -> str:
    """A public key as text."""
    target.write_text(toy.gpg("--armor", "--export", key))
    return str(target)


def test_a_key_in_armor_with_its_fingerprint(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    key = armored(nvidia, "test", tmp_path / "key.asc")
    request = asked(debian, nvidia, signed_by=key, fingerprint=nvidia.fingerprint().lower())
    assert "nvidia-container-toolkit=1.17.8-1" in names(
        resolve.resolve(request, tmp_path / "apt"), "toolkit")
    assert not (tmp_path / "apt/repositories/nvidia/keyring.gpg").read_bytes().startswith(b"-----")


def test_a_key_from_a_url(debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path) -> None:
    armored(nvidia, "test", nvidia.root / "gpgkey")
    request = asked(debian, nvidia, signed_by=f"{nvidia.base}/gpgkey",
                    fingerprint=nvidia.fingerprint())
    assert "nvidia-container-toolkit=1.17.8-1" in names(
        resolve.resolve(request, tmp_path / "apt"), "toolkit")


def test_the_url_has_another_key_today(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    """The repository is signed by it too: who can replace one can replace the other."""
    armored(nvidia, "other", nvidia.root / "gpgkey")
    nvidia.publish(key="other")
    said = fails(asked(debian, nvidia, signed_by=f"{nvidia.base}/gpgkey",
                       fingerprint=nvidia.fingerprint()), tmp_path)
    assert f"the key at {nvidia.base}/gpgkey is not the recipe's" in said
    assert nvidia.fingerprint() in said and nvidia.fingerprint("other") in said


def test_of_many_keys_the_one_with_the_fingerprint_counts(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    both = tmp_path / "both.gpg"
    nvidia.gpg("--output", both, "--export", "test", "other")
    nvidia.publish(key="other")
    request = asked(debian, nvidia, signed_by=str(both), fingerprint=nvidia.fingerprint())
    assert "the repository's own key" in fails(request, tmp_path)
    trusting = asked(debian, nvidia, signed_by=str(both),
                     fingerprint=nvidia.fingerprint("other"))
    assert names(resolve.resolve(trusting, tmp_path / "other"), "toolkit")


def test_a_url_without_a_fingerprint(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    said = fails(asked(debian, nvidia, signed_by=f"{nvidia.base}/gpgkey"), tmp_path)
    assert "has no fingerprint in the recipe" in said


def test_a_key_that_is_not_at_the_url(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    said = fails(asked(debian, nvidia, signed_by=f"{nvidia.base}/gone",
                       fingerprint=nvidia.fingerprint()), tmp_path)
    assert f"{nvidia.base}/gone" in said and "404" in said


def test_a_wrong_key(debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path) -> None:
    nvidia.publish(key="other")
    said = fails(asked(debian, nvidia), tmp_path)
    assert nvidia.base in said and "NO_PUBKEY" in said and "the repository's own key" in said


def test_the_distribution_s_key_does_not_sign_the_repository(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    """Each keyring is for its own archive alone."""
    other = tmp_path / "other.gpg"
    nvidia.gpg("--output", other, "--export", "other")
    said = fails(asked(debian, nvidia, signed_by=str(other)), tmp_path)
    assert nvidia.base in said and "NO_PUBKEY" in said


def test_an_expired_key(debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path) -> None:
    nvidia.gpg("--faked-system-time", "20200101T000000!", "--quick-gen-key", "old", "ed25519",
               "sign", "1y")
    nvidia.gpg("--faked-system-time", "20200102T000000!", "--local-user", "old", "--yes",
               "--output", nvidia.root / "InRelease", "--clearsign", nvidia.root / "Release")
    key = armored(nvidia, "old", tmp_path / "old.asc")
    said = fails(asked(debian, nvidia, signed_by=key, fingerprint=nvidia.fingerprint("old")),
                 tmp_path)
    assert nvidia.base in said and "the key that signs this archive has expired" in said


def test_a_repository_that_is_not_signed(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    (nvidia.root / "InRelease").unlink()
    said = fails(asked(debian, nvidia), tmp_path)
    assert nvidia.base in said and "is not signed" in said


def test_an_altered_index(debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path) -> None:
    index = nvidia.root / "Packages"
    index.write_bytes(index.read_bytes().replace(b"1.17.8-1", b"6.66.6-6"))
    assert "Hash Sum mismatch" in fails(asked(debian, nvidia), tmp_path)


@pytest.mark.parametrize(("content", "why"), [
    (b"", "it is empty"), (b"<html>sorry</html>", "not in OpenPGP's format"),
    (b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmDMEZ/!!\n-----END PGP", "armor is damaged"),
])
def test_a_file_that_is_no_key(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path, content: bytes, why: str,
) -> None:
    (tmp_path / "key").write_bytes(content)
    said = fails(asked(debian, nvidia, signed_by=str(tmp_path / "key")), tmp_path)
    assert "is not an OpenPGP public key" in said and why in said


def test_half_a_key_and_a_secret_one(
    debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path,
) -> None:
    key = tmp_path / "key"
    key.write_bytes((nvidia.home / "test.gpg").read_bytes()[:-7])
    assert "ends in the middle" in fails(asked(debian, nvidia, signed_by=str(key)), tmp_path)
    key.unlink()
    nvidia.gpg("--output", key, "--export-secret-keys", "test")
    assert "it is a secret key" in fails(asked(debian, nvidia, signed_by=str(key)), tmp_path)


def test_no_server(debian: ToyArchive, nvidia: ToyArchive, tmp_path: Path) -> None:
    said = fails(asked(debian, nvidia, uri="http://127.0.0.1:9/"), tmp_path)
    assert "could not be fetched" in said and "is the network there?" in said


def test_the_packages_are_real(nvidia: ToyArchive, tmp_path: Path) -> None:
    """The toy is what `dpkg` calls a package, with a program in it that runs."""
    deb = nvidia.root / "libnvidia-container-tools_1.17.8-1_amd64.deb"
    subprocess.run(["dpkg-deb", "--extract", deb, tmp_path / "x"], check=True)
    done = subprocess.run([tmp_path / "x/usr/bin/nvidia-container-cli"], capture_output=True)
    assert done.stdout == b"called\n"
