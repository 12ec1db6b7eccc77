"""What users get wrong, and what machines do: one clear error, status 1, nothing half-made."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katagpu import recipe, request
from katagpu.errors import UserError
from katagpu.lock import Deb
from katagpu.plan import Plan
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind, Store
from tests.toyarchive import ToyArchive, missing, served, signing_keys
from tests.toyrepo import RECIPE, ToyRepository


@pytest.fixture
def toy(tmp_path: Path) -> ToyRepository:
    """A copy of the repository with toy stages."""
    return ToyRepository(tmp_path)


def refused(toy: ToyRepository, *argv: str, **environment: str) -> str:
    """The command line ends with status 1 and one error, without a traceback; what it said."""
    status, _out, err = toy.run(*argv, **environment)
    assert status == 1, err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(("argv", "said"), [
    (["recipe=NOPE", "build_image"], "there is no recipe 'NOPE'; known: debian-trixie"),
    (["recipe=debian-trxie"], "did you mean"),
    (["recipe=../x", "build_image"], "there is no recipe '../x'"),
    (["foo=1", "build_image"], "unknown parameter foo=\n  hint: known: all, ccache,"),
    (["recipie=ubuntu-lts", "build_image"], "did you mean 'recipe'?"),
    (["EXTRA_PKGS=gcc make", "build_image"], 'it goes in front: EXTRA_PKGS="gcc make" ./doitw'),
    (["KATAGPU_STORE=/x", "build_image"], 'it goes in front: KATAGPU_STORE="/x" ./doitw'),
    *(([f"{word}=no", task], f"{word}=no: this is neither 0 nor 1\n  hint: {word}=1, or {word}=0")
      for word, task in (("ccache", "build_image"), ("unverified", "install"), ("all", "bench"),
                         ("licensed", "publish"), ("unsigned", "release"), ("draft", "lock"))),
    (["driver=abc", "build_image"], "this is not a version of the NVIDIA driver"),
    (["nonsense"], "there is no task 'nonsense'"),
    (["biuld_image"], "did you mean build_image?"),
    (["cache:lst"], "did you mean cache:list?"),
    (["why", "nonsense"], "there is no task or stage 'nonsense'"),
    (["why", "kernle"], "did you mean kernel?"),
    (["--bogus"], "option --bogus not recognized\n  hint: ./doitw help run"),
    (["list", "--bogus"], "option --bogus not recognized\n  hint: ./doitw help list"),
    (["help", "--bogus"], "option --bogus not recognized\n  hint: ./doitw help help"),
    (["list", "build_imag"], "there is no task 'build_imag'\n  hint: did you mean build_image?"),
    (["help", "relase"], "there is no task 'relase'\n  hint: did you mean release?"),
    (["hlep"], "did you mean help?"),
    (["-n", "x"], "option -n: 'x' is not a number\n  hint: ./doitw help run"),
    (["list", "--sort=x"], "option --sort: 'x' is none of 'name', 'definition'\n"),
    (["install", "--bogus"], "install: option --bogus not recognized\n  hint: ./doitw help inst"),
    (["lock", "--update"], "lock: option --update needs a value\n  hint: ./doitw help lock"),
    (["key=x", "to=y", "why", "kernel_config"], "key= is no parameter of why\n  hint: leave it"),
    (["licensed=1"], "licensed= is no parameter of build_image\n"),
    (["build_image", "nonsense"], "there is no task 'nonsense'"),
])
def test_command_lines(toy: ToyRepository, argv: list[str], said: str) -> None:
    assert said in refused(toy, *argv)
    assert toy.made() == []


def test_extra_packages_that_are_no_names(toy: ToyRepository) -> None:
    assert "EXTRA_PKGS: 'gcc;' cannot be" in refused(toy, "build_image", EXTRA_PKGS="gcc; make")


@pytest.mark.parametrize(("old", "new", "said"), [
    ("kernel_module: open", "kernel_modul: open", "kernel_module"),
    ("kernel_module: open", "kernel_module: opened", "opened"),
    ("features: []", "features: 3", "features"),
    ('version: "550.163.01"', "version: 550.163", "version"),
    ("format: erofs", "format: [erofs", "this is not YAML"),
    ("name: debian-trixie", "name: other", "not the file's name"),
    ("agent: null", "agent: {file: /nowhere/kata-agent}", "/nowhere/kata-agent"),
])
def test_recipes(toy: ToyRepository, old: str, new: str, said: str) -> None:
    path = toy.root / "recipes" / f"{RECIPE}.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    err = refused(toy, "build_image")
    assert said in err
    assert f"recipes/{RECIPE}.yaml:" in err  # and the line


def test_a_lock_that_was_damaged(toy: ToyRepository) -> None:
    (toy.out / "lock.json").write_text("<<<<<<< HEAD")
    err = refused(toy, "build_image")
    assert "lock.json is not a lock" in err
    assert "./doitw lock" in err


def test_a_host_that_lacks_a_program(toy: ToyRepository) -> None:
    err = refused(toy, "build_image", TOY_LACKS="no-such-package", KATAGPU_NO_INSTALL="1")
    assert "the build host lacks no-such-package" in err
    assert "apt-get install -y --no-install-recommends no-such-package" in err
    assert toy.made() == []


def set_archive(toy: ToyRepository, uri: str, keyring: Path) -> None:
    """Let the recipe's packages come from this archive, and forget the lock."""
    path = toy.root / "recipes" / f"{RECIPE}.yaml"
    lines = []
    for line in path.read_text().splitlines():
        word = line.strip().split(":")[0]
        new = {"mirror": uri, "security_mirror": "null", "keyring": keyring}.get(word)
        lines.append(f"  {word}: {new}" if new else line)
    path.write_text("\n".join(lines) + "\n")
    (toy.out / "lock.json").unlink()


def test_no_network(toy: ToyRepository, tmp_path: Path) -> None:
    (tmp_path / "empty.gpg").touch()
    set_archive(toy, "http://127.0.0.1:9/debian", tmp_path / "empty.gpg")
    err = refused(toy, "build_image")
    assert "the package lists could not be fetched" in err
    assert "is the network there?" in err
    assert not (toy.out / "lock.json").exists()
    assert toy.made() == []


def test_a_keyring_that_is_not_there(toy: ToyRepository, tmp_path: Path) -> None:
    set_archive(toy, "http://127.0.0.1:9/debian", tmp_path / "none.gpg")
    err = refused(toy, "build_image")
    assert f"the keyring {tmp_path}/none.gpg of http://127.0.0.1:9/debian is not there" in err
    assert "debian-archive-keyring" in err


@pytest.fixture
def archive(tmp_path: Path, repository: Path) -> Iterator[ToyArchive]:
    """An archive that has every package of the default recipe."""
    if missing():
        pytest.skip(f"needs {missing()} of the host")
    with signing_keys() as keys:
        archive = ToyArchive(tmp_path / "archive", keys, suite="trixie")
        archive.root.mkdir()
        archive.add("core", "1", Essential="yes")
        groups = request.groups(recipe.load(RECIPE, repository), repository).values()
        for name in sorted({package.split("=")[0] for group in groups for package in group.packages
                            if package[0] != "?"}):
            driver = any(f"{name}=" in package for group in groups for package in group.packages)
            archive.add(name, "550.163.01-2" if driver else "1")
        archive.publish()
        with served(archive):
            yield archive


def test_an_unknown_driver_version_lists_those_that_exist(
    toy: ToyRepository, archive: ToyArchive,
) -> None:
    set_archive(toy, archive.base, archive.home / "test.gpg")
    err = refused(toy, "driver=999.1", "build_image")
    assert "999.1" in err
    assert "in: 550.163.01-2" in err
    status, _out, err = toy.run("build_image")
    assert status == 0, err
    assert "out/debian-trixie/550.163.01/lock.json" in err


def test_two_builds_without_a_lock_resolve_once(
    toy: ToyRepository, archive: ToyArchive,
) -> None:
    set_archive(toy, archive.base, archive.home / "test.gpg")
    processes = [toy.start(["build_image"]) for _ in range(2)]
    said = "".join(process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert said.count("./doitw lock draft=1 resolves anew") == 1
    status, _out, err = toy.run("lock", "draft=1")
    assert (status, err.count("./doitw lock draft=1 resolves anew")) == (0, 1)


def test_a_misspelt_extra_package(toy: ToyRepository, archive: ToyArchive) -> None:
    set_archive(toy, archive.base, archive.home / "test.gpg")
    assert "did you mean bison?" in refused(toy, "lock", EXTRA_PKGS="bisno")


def test_an_archive_that_others_signed(toy: ToyRepository, archive: ToyArchive) -> None:
    archive.publish(key="other")
    set_archive(toy, archive.base, archive.home / "test.gpg")
    assert "keyring does not sign this archive" in refused(toy, "lock")


def test_a_superseded_package_is_named_with_the_cure(tmp_path: Path, site: object) -> None:
    def make(build: Build) -> None:
        build.debs("packages")

    gone = Deb(package="libc6", version="2.41-12", architecture="amd64", size=3, sha256="0" * 64,
               url=f"{site.base}/pool/libc6_2.41-12_amd64.deb")  # type: ignore[attr-defined]
    stage = Stage(name="base", title="", module="errors", make=make, outputs={"root": Kind.TREE},
                  packages={"packages": (gone,)})
    store = Store(tmp_path / "store")
    with pytest.raises(UserError) as failure:
        Plan({"base": stage}, store, tmp_path / "logs").ensure("base")
    said = str(failure.value)
    assert "libc6 2.41-12" in said
    assert "404" in said
    assert "./doitw lock" in said
    assert list((store.root / "blobs/sha256").iterdir()) == []


# the store and the disk


def test_a_full_disk(tmp_path: Path, tiny: Callable[[int], Path]) -> None:
    toy = ToyRepository(tmp_path)
    toy.store = tiny(300 * 1024)
    err = refused(toy, "-n0", "build_image")
    assert "no space left" in err
    assert "./doitw cache:gc" in err
    assert not (toy.out / "manifest.json").exists()
    toy.store = tmp_path / "larger"
    assert toy.run()[0] == 0


def test_a_read_only_store(tmp_path: Path, tiny: Callable[[int], Path]) -> None:
    """What it has is used; what it lacks cannot be made, and nothing else is touched."""
    toy = ToyRepository(tmp_path)
    toy.store = tiny(16 << 20)
    assert toy.run()[0] == 0
    toy.made()
    subprocess.run(["mount", "-o", "remount,ro", toy.store], check=True)
    (toy.out / "manifest.json").unlink()
    status, _out, err = toy.run()
    assert status == 0, err
    assert (toy.out / "manifest.json").exists()
    assert toy.run("why", "build_image")[0] == 0
    (toy.root / "rootfs/word").write_text("other")
    err = refused(toy, "build_image")
    assert "Read-only file system" in err
    assert "KATAGPU_STORE" in err
    assert toy.made() == []


def test_out_removed_altogether(toy: ToyRepository) -> None:
    """The lock goes with it, so that resolving comes first: here it has nowhere to ask."""
    assert toy.run()[0] == 0
    toy.made()
    set_archive(toy, "http://127.0.0.1:9/debian", Path(__file__))
    shutil.rmtree(toy.root / "out")
    assert "could not be fetched" in refused(toy, "build_image")
    assert toy.made() == []


def test_a_store_that_is_a_file(toy: ToyRepository) -> None:
    toy.store.write_text("")
    assert "KATAGPU_STORE" in refused(toy, "build_image")
