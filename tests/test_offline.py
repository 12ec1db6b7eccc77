"""Locks and `fetch` by whole command lines, and a build whose network is cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lockedrepo import LockedRepository, locked_repository, module_sums
from tests.toyarchive import ToyArchive, missing, served, signing_keys
from tests.toyrepo import OUT

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")
NO_NETWORK = ["unshare", *(["--map-root-user"] if os.geteuid() else []), "--net", "--"]


@pytest.fixture(scope="module")
def keys() -> Iterator[Path]:
    """Keys, made once."""
    with signing_keys() as place:
        yield place


@pytest.fixture
def repo(tmp_path: Path, site: Any, keys: Path) -> Iterator[LockedRepository]:
    """The repository, not locked."""
    with locked_repository(tmp_path, site, keys) as found:
        yield found


def cut(repo: LockedRepository, *argv: str) -> tuple[int, str]:
    """Run a command line in a network namespace with nothing in it: status, stderr."""
    if shutil.which("unshare") is None or subprocess.run(
            [*NO_NETWORK, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    environment = repo.toy.environment(TOY_PROXY=f"{repo.site.base}/proxy")
    done = subprocess.run([*NO_NETWORK, sys.executable, "-m", "katagpu", *argv], text=True,
                          cwd=repo.toy.root, env=environment, capture_output=True, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "under out"])
def test_after_fetch_everything_is_built_with_the_network_cut(
    repo: LockedRepository, committed: bool,
) -> None:
    if committed:
        repo.done("lock")
    assert "builds of it need no network" in repo.done("fetch")
    repo.toy.made()
    status, said = cut(repo, "build_image")
    assert status == 0, said
    assert {"kernel_config", "driver_user", "rootfs", "agent", "toolkit", "image",
            "manifest"} <= set(repo.toy.made())
    assert repo.path.exists() is committed
    assert (repo.toy.root / OUT / "lock.json").exists() is not committed
    asked = len(repo.site.asked)
    assert "fetch: " in repo.done("fetch")
    assert len(repo.site.asked) == asked, "there is nothing left to fetch"


def test_fetch_brings_qemu_too(repo: LockedRepository) -> None:
    repo.done("lock")
    repo.done("fetch")
    (deb,) = [deb for deb in repo.lock["parts"]["emulator"]["packages"]["emulator"]
              if deb["package"] == "qemu-system-x86"]
    assert deb["version"] == "1:11.1-1"
    assert (repo.toy.store / "blobs/sha256" / deb["sha256"]).exists()


def test_without_fetch_the_cut_network_is_a_plain_error(repo: LockedRepository) -> None:
    repo.done("lock")
    status, said = cut(repo, "build_rootfs")
    assert status == 1, said
    assert "no network" in said or "refused" in said
    assert "Traceback" not in said


def test_fetch_without_qemu_says_so(repo: LockedRepository) -> None:
    (repo.archive.root / "dists/trixie-backports/InRelease").unlink()
    (repo.archive.root / "dists/trixie-backports/Release").unlink()
    assert "without QEMU for boot checks" in repo.done("fetch")
    assert "without QEMU for boot checks" in repo.done("lock")
    assert "emulator" not in repo.lock["parts"]
    assert cut(repo, "build_image")[0] == 0


# what a lock has


def test_a_lock_has_everything(repo: LockedRepository) -> None:
    said = repo.done("lock")
    assert "recipes/debian-trixie.lock" in said
    found = repo.lock
    assert sorted(found["parts"]) == ["agent", "base", "driver", "emulator", "kernel", "toolchain",
                                      "toolkit", "tools"]
    assert repo.versions("base", "base") == ["app=1.0-1", "lib=1.0-1"]
    assert repo.versions("driver", "driver_user") == ["driver=550.163.01-1"]
    kernel = found["parts"]["kernel"]["files"]
    assert kernel["tarball"]["signer"] == repo.archive.fingerprint()
    assert kernel["tarball"]["url"] == f"{repo.site.base}/v6.x/linux-6.12.3.tar.xz"
    assert {len(file["sha256"]) for file in kernel.values()} == {64}
    assert found["parts"]["toolkit"]["modules"] == module_sums(b"toy")
    assert found["parts"]["agent"]["files"]["source"]["url"].endswith("/kata-static.tar")
    assert not (repo.toy.root / OUT / "lock.json").exists()
    repo.toy.made()
    repo.done("build_image")
    assert "toolkit_source" not in repo.toy.made(), "the modules came when the lock was made"
    assert "up to date" in repo.done("build_image")
    before = repo.path.read_bytes()
    repo.done("lock")
    assert repo.path.read_bytes() == before


def test_the_mirror_of_this_host_is_not_in_it(repo: LockedRepository) -> None:
    """`mirror: host` without an archive of the host's stands for the public address."""
    repo.edit("fallback_mirror: http://ftp.debian.org/debian",
              "fallback_mirror: http://public.example.org/debian")
    repo.edit(f"  mirror: {repo.archive.base}\n", "  mirror: host\n")
    with (repo.toy.root / "katagpu/guest.py").open("a") as guest:
        guest.write(f"request.host_archive = lambda _id: {{'': '{repo.archive.base}'}}\n")
    repo.done("lock")
    assert repo.archive.base not in repo.path.read_text().replace(repo.site.base, "")
    assert repo.lock["archives"] == {"guest": "http://public.example.org/debian"}
    repo.done("build_image")


def test_a_mirror_that_is_written_into_the_recipe_later(
    repo: LockedRepository, tmp_path: Path,
) -> None:
    """The lock holds, and its files come from there: a snapshot, for one."""
    shutil.copytree(repo.archive.root, tmp_path / "snapshot")
    repo.done("lock")
    repo.moves_on()
    said = repo.refused("build_image")
    for package in ("app 1.0-1", "lib 1.0-1"):
        assert f"{package}: {repo.archive.base}/pool/" in said
    assert "the server does not have it (any more)" in said
    assert "KATAGPU_STORE" in said and "`distribution.mirror` in the recipe" in said
    before = repo.path.read_bytes()
    snapshot = ToyArchive(tmp_path / "snapshot", repo.archive.home)
    with served(snapshot):
        repo.edit(f"  mirror: {repo.archive.base}\n", f"  mirror: {snapshot.base}\n")
        repo.done("build_image")
    assert repo.path.read_bytes() == before


def test_a_store_that_was_kept_supplies_what_the_mirror_dropped(repo: LockedRepository) -> None:
    repo.done("lock")
    repo.done("fetch")
    repo.moves_on()
    repo.done("build_image")
    assert repo.versions("base", "base") == ["app=1.0-1", "lib=1.0-1"]


# moving parts


def without(text: str, part: str) -> list[str]:
    """The lines of a lock but those of a part, and its digest."""
    lines = text.splitlines()
    start = lines.index(f'  "{part}": {{')
    end = next(number for number in range(start, len(lines)) if lines[number].rstrip(",") == "  }")
    return [line for line in lines[:start] + lines[end + 1:] if not line.startswith(' "sha256":')]


@pytest.mark.parametrize("argv", [("--update", "toolchain"), ("update=toolchain",)])
def test_one_part_moves_and_all_else_stays(repo: LockedRepository, argv: tuple[str, ...]) -> None:
    repo.done("lock")
    before = repo.path.read_text()
    repo.moves_on()
    said = repo.done("lock", *argv)
    assert "toolchain: cc 12-1 → 13-1" in said
    assert repo.versions("toolchain", "toolchain") == ["cc=13-1"]
    after = repo.path.read_text()
    assert after != before
    assert without(after, "toolchain") == without(before, "toolchain")


def test_a_driver_moves_on_the_base_that_stays(repo: LockedRepository) -> None:
    repo.done("lock")
    repo.done("fetch")
    before = repo.path.read_text()
    repo.moves_on()
    repo.edit('version: "550.163.01"', 'version: "535.216.01"')
    said = repo.refused("build_image")
    assert "recipes/debian-trixie.lock does not answer the recipe any more: driver" in said
    assert "`./doitw recipe=debian-trixie lock update=driver` moves this" in said
    assert repo.path.read_text() == before
    repo.done("lock", "--update", "driver")
    assert repo.versions("driver", "driver_user") == ["driver=535.216.01-1"]
    assert without(repo.path.read_text(), "driver") == without(before, "driver")
    repo.done("build_image")
    assert (repo.toy.out.parent / "535.216.01/manifest.json").exists()


def test_a_part_whose_ground_moves_must_move_too(repo: LockedRepository) -> None:
    repo.done("lock")
    repo.archive.add("driver", "550.163.01-2", Depends="lib (>= 1.0-2)")
    repo.archive.add("lib", "1.0-2")
    repo.publish()
    repo.done("lock", "update=driver")
    assert repo.versions("driver", "driver_user") == ["driver=550.163.01-2", "lib=1.0-2"]
    before = repo.path.read_bytes()
    repo.moves_on()
    said = repo.refused("lock", "update=base")
    assert "driver stays, and has lib 1.0-2, older than 1.1-1 of base" in said
    assert "update=base,driver` moves both" in said
    assert repo.path.read_bytes() == before
    repo.done("lock", "update=base,driver")
    assert repo.versions("base", "base") == ["app=1.1-1", "lib=1.1-1"]
    assert repo.versions("driver", "driver_user") == ["driver=550.163.01-2"]


def test_update_of_nothing(repo: LockedRepository) -> None:
    said = repo.refused("lock", "update=driver")
    assert "recipes/debian-trixie.lock is not there" in said
    repo.done("lock")
    said = repo.refused("lock", "--update", "drivr")
    assert "no part 'drivr'" in said and "agent, base, driver, emulator" in said
    assert "leave out update=" in repo.refused("driver=535.216.01", "lock", "update=driver")


def test_draft_is_under_out(repo: LockedRepository) -> None:
    assert "to be committed" in repo.done("lock", "draft=1")
    assert not repo.path.exists() and (repo.toy.root / OUT / "lock.json").exists()
    repo.done("lock")
    assert "is what builds take" in repo.refused("lock", "draft=1")


# other guests


def test_other_guests_stand_on_it_and_leave_it_alone(repo: LockedRepository) -> None:
    repo.done("lock")
    repo.done("fetch")
    before = repo.path.read_bytes()
    repo.moves_on()
    said = repo.done("driver=535.216.01", "build_image")
    place = repo.toy.out.parent / "535.216.01"
    assert f"out/debian-trixie/{place.name}/lock.json" in said
    assert '"1.1-1"' not in (place / "lock.json").read_text()
    repo.done("build_rootfs", EXTRA_PKGS="cc make")
    (extra,) = repo.toy.out.glob("lock-*.json")
    assert '"make"' in extra.read_text() and '"13-1"' not in extra.read_text()
    assert repo.path.read_bytes() == before
    repo.edit('agent: {', 'other_drivers: [{source: debian, version: "535.216.01"}]\nagent: {')
    said = repo.done("driver=all", "build_image")
    assert "550.163.01  built" in said
    repo.done("driver=all", "lock")
    assert repo.path.read_bytes() == before
    repo.done("lock")
    assert repo.versions("base", "base") == ["app=1.1-1", "lib=1.1-1"]
    repo.done("driver=535.216.01", "build_image")
    assert '"1.1-1"' in (place / "lock.json").read_text(), "it follows the lock"


# what is wrong


def test_a_lock_that_was_edited(repo: LockedRepository) -> None:
    repo.done("lock")
    repo.done("build_image")
    good = repo.path.read_text()
    repo.path.write_text(good.replace('"version": "1.0-1"', '"version": "1.0-2"', 1))
    for argv in (["build_image"], ["fetch"], ["lock", "update=base"], ["why"]):
        said = repo.refused(*argv)
        assert "recipes/debian-trixie.lock was edited by hand" in said
        assert "git checkout" in said
    assert repo.run("list")[0] == 0
    repo.done("lock")
    assert repo.path.read_text() == good
    assert "up to date" in repo.done("build_image")


def test_a_lock_of_another_recipe(repo: LockedRepository) -> None:
    repo.done("lock")
    path = repo.toy.root / "recipes/other.yaml"
    path.write_text((repo.toy.root / "recipes/debian-trixie.yaml").read_text().replace(
        "name: debian-trixie", "name: other"))
    shutil.copy(repo.path, path.with_suffix(".lock"))
    said = repo.refused("recipe=other", "build_image")
    assert "recipes/other.lock is the lock of another recipe, 'debian-trixie'" in said
    assert "`./doitw recipe=other lock` makes the lock of other" in said


def test_a_file_that_changed_at_the_mirror(repo: LockedRepository) -> None:
    repo.done("lock")
    path = repo.archive.root / "pool/app_1.0-1_amd64.deb"
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    said = repo.refused("build_rootfs")
    assert "app 1.0-1" in said and "pool/app_1.0-1_amd64.deb" in said
    assert "expected sha256" in said


def test_a_go_module_that_changed_at_the_proxy(repo: LockedRepository) -> None:
    repo.done("lock")
    shutil.rmtree(repo.toy.store)
    repo.site.add("proxy/v1.mod", b"toz")
    said = repo.refused("fetch")
    assert "Go modules are not those that were locked" in said
    assert "github.com/NVIDIA/toy v1: expected h1:toy, got h1:toz" in said
    assert "update=toolkit" in said


def test_a_kernel_that_changed_at_its_server(repo: LockedRepository, page: Any) -> None:
    repo.done("lock")
    shutil.rmtree(repo.toy.store)
    repo.site.add("v6.x/linux-6.12.3.tar.xz", page(body=b"another"))
    said = repo.refused("build_kernel")
    assert "linux-6.12.3.tar.xz" in said and "expected sha256" in said
