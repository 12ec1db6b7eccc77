"""Install, roll back, uninstall: what is where, what is refused, and what a kill leaves."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katagpu import kataconfig
from katagpu.errors import UserError
from katagpu.release import host, install, layout, placed
from katagpu.release.host import DROP_INS, Host
from katagpu.stages import final
from tests.release import killed, toyrelease
from tests.release.conftest import Keys

REPOSITORY = Path(__file__).parent.parent.parent
GO = "50-katagpu.toml"


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> list[Path]:
    """Three releases, the oldest first."""
    top = tmp_path_factory.mktemp("releases")
    return [toyrelease.make(top, f"1.{number}.0", keys.signer, word)
            for number, word in enumerate(("one", "two", "three"))]


@pytest.fixture
def there(tmp_path: Path) -> Host:
    """An empty host."""
    prefix = tmp_path / "host"
    prefix.mkdir()
    return Host(prefix)


def in_use(there: Host, source: str = GO) -> str | None:
    """The release that a runtime uses: all that its drop-in names is there, and of one release."""
    path = there.drop_in(source)
    if not path.exists():
        return None
    assert path.is_file() and not path.is_symlink()
    assert [one.name for one in path.parent.iterdir()] == [host.DROP_IN]
    named = re.findall(r'"(/opt/[^"]+)"', path.read_text())
    assert len(named) == 2
    found = {Path(word).parent.name for word in named}
    assert len(found) == 1, named
    word = re.search(r"toy=(\w+)", path.read_text())
    assert word is not None
    for name in named:
        assert word[1].encode() in (there.prefix / name.lstrip("/")).read_bytes()[:30]
    return found.pop()


def files(there: Host) -> list[str]:
    """Every file and link below the prefix."""
    return sorted(str(path.relative_to(there.prefix)) for path in there.prefix.rglob("*")
                  if path.is_symlink() or not path.is_dir())


def test_places_are_those_of_the_build() -> None:
    assert host.PLACE == final.PLACE
    for name, shim in ((GO, kataconfig.Shim.GO),
                       ("50-katagpu-runtime-rs.toml", kataconfig.Shim.RUST)):
        assert f"/{DROP_INS[name]}/config.d" == kataconfig.drop_in_directory(shim)
    assert host.DROP_IN == kataconfig.FILE_NAME


def test_install_switch_rollback_uninstall(there: Host, releases: list[Path], keys: Keys) -> None:
    for place in releases:
        install.install(str(place), there, key=keys.public)
        assert {in_use(there, name) for name in DROP_INS} == {place.name}
    assert there.releases() == ["toy-1.1.0", "toy-1.2.0"]  # the one before, and no more
    assert there.target("current") == "toy-1.2.0"
    current = there.home / "current"
    assert b"three" in (current / final.KERNEL).read_bytes()
    for expected in ("toy-1.1.0", "toy-1.2.0"):
        install.rollback(there)
        assert {in_use(there, name) for name in DROP_INS} == {expected}
    assert all("intact" in line or "as it was" in line for line in install.status(there))
    install.uninstall(there)
    assert files(there) == []
    assert [path.name for path in there.prefix.iterdir()] == ["opt"]
    install.uninstall(there)
    assert list(install.status(there)) == [f"nothing is installed in {there.prefix}"]


def test_others_files_stay(there: Host, releases: list[Path], keys: Keys) -> None:
    mine = there.drop_in(GO).parent / "60-mine.toml"
    kata = there.prefix / "opt/kata/share/kata-containers" / final.KERNEL
    for path in (mine, kata):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    install.install(str(releases[0]), there, key=keys.public)
    install.uninstall(there)
    assert files(there) == sorted(str(path.relative_to(there.prefix)) for path in (mine, kata))


def test_twice_is_once(there: Host, releases: list[Path], keys: Keys) -> None:
    install.install(str(releases[0]), there, key=keys.public)
    before = {name: (there.prefix / name).lstat().st_ino for name in files(there)
              if "vmlinuz" in name or ".image" in name}
    install.install(str(releases[0]), there, key=keys.public)
    assert before == {name: (there.prefix / name).lstat().st_ino for name in before}
    assert there.target("previous") is None


def test_a_damaged_release_is_said_and_mended(
    there: Host, releases: list[Path], keys: Keys,
) -> None:
    install.install(str(releases[0]), there, key=keys.public)
    image = next((there.home / "toy-1.0.0").glob("*.image"))
    image.write_bytes(b"other")
    assert f"damaged: {image.name}" in "\n".join(install.status(there))
    install.install(str(releases[0]), there, key=keys.public)
    assert in_use(there) == "toy-1.0.0"
    assert "intact" in next(iter(install.status(there)))
    install.install(str(releases[1]), there, key=keys.public)
    image.write_bytes(b"other")
    with pytest.raises(UserError, match="is damaged"):
        install.rollback(there)
    assert in_use(there) == "toy-1.1.0"


@pytest.fixture
def two(there: Host, releases: list[Path]) -> Host:
    """A host with two releases, the second in use."""
    put(there, *releases[:2])
    return there


def names_alone(there: Host, release: str) -> None:
    """Let the record of what is placed be one of an earlier version."""
    record = there.home / release / placed.RECORD
    record.write_text("".join(f"{line.split('  ')[1]}\n" for line in record.read_text().splitlines()
                              if "SHA256SUMS" not in line and "config/" not in line
                              and "->" not in line))


@pytest.mark.parametrize("old", [False, True], ids=["record", "names"])
@pytest.mark.parametrize("what", [f"config/{GO}", "config", final.KERNEL, layout.SIGNATURE])
def test_what_lacks_of_the_release_before(
    two: Host, releases: list[Path], what: str, old: bool,
) -> None:
    if old:
        names_alone(two, "toy-1.0.0")
    if old and what == layout.SIGNATURE:
        return  # nobody wrote that it was there
    assert len([line for line in install.status(two) if "(intact)" in line]) == 2
    path = two.home / "toy-1.0.0" / what
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=f"toy-1.0.0 is damaged: {what}"):
            install.rollback(two)
    assert {in_use(two, name) for name in DROP_INS} == {"toy-1.1.0"}
    put(two, releases[0])
    assert {in_use(two, name) for name in DROP_INS} == {"toy-1.0.0"}
    assert "intact" in next(iter(install.status(two)))


def test_an_edited_copy_of_a_drop_in(two: Host, releases: list[Path]) -> None:
    """The one in use is as it was placed: nobody has to move that away."""
    for release in two.releases():
        copy = two.home / release / "config" / GO
        copy.write_text(copy.read_text().replace("8192", "4096"))
    with pytest.raises(UserError, match=f"is damaged: config/{GO}"):
        install.rollback(two)
    assert f"damaged: config/{GO}" in next(iter(install.status(two)))
    put(two, releases[1])
    assert "intact" in next(iter(install.status(two)))
    put(two, releases[0])
    assert {in_use(two, name) for name in DROP_INS} == {"toy-1.0.0"}


def test_an_edited_copy_that_an_earlier_version_placed(two: Host, releases: list[Path]) -> None:
    names_alone(two, "toy-1.1.0")
    copy = two.home / "toy-1.1.0/config" / GO
    copy.write_text(copy.read_text().replace("8192", "4096"))
    put(two, releases[1])
    assert {in_use(two, name) for name in DROP_INS} == {"toy-1.1.0"}
    assert all("intact" in line or "as it was" in line for line in install.status(two))


def test_a_link_that_leads_elsewhere(two: Host, releases: list[Path]) -> None:
    link = two.home / "toy-1.1.0" / final.KERNEL
    for spoil in (link.symlink_to, link.write_text):
        link.unlink()
        spoil("elsewhere")
        assert f"damaged: {final.KERNEL}" in next(iter(install.status(two)))
        put(two, releases[1])
        assert "intact" in next(iter(install.status(two)))


def test_runtimes_are_not_left_without_a_release(two: Host) -> None:
    shutil.rmtree(two.home / "toy-1.0.0/config")
    with pytest.raises(UserError, match="no drop-in for Kata any more"):
        install.switch(two, "toy-1.0.0")
    assert {in_use(two, name) for name in DROP_INS} == {"toy-1.1.0"}
    assert two.target("next") is None


def test_a_switch_to_what_was_damaged_since_is_not_completed(
    two: Host, releases: list[Path], capfd: pytest.CaptureFixture[str],
) -> None:
    two.link("next", "toy-1.0.0")
    shutil.rmtree(two.home / "toy-1.0.0/config")
    install.recover(two)
    assert "the switch to toy-1.0.0 is not completed" in capfd.readouterr().err
    assert {in_use(two, name) for name in DROP_INS} == {"toy-1.1.0"}
    put(two, releases[0])
    assert {in_use(two, name) for name in DROP_INS} == {"toy-1.0.0"}


def test_an_older_release_is_said(two: Host, releases: list[Path], tmp_path: Path,
                                  capfd: pytest.CaptureFixture[str]) -> None:
    put(two, releases[0])
    assert "toy-1.0.0 is older than toy-1.1.0" in capfd.readouterr().err
    put(two, releases[1])
    assert "is older than" not in capfd.readouterr().err


# what is refused: nothing is changed then


def refused(there: Host, place: Path | str, key: Path | None, match: str, *,
            unverified: bool = False) -> None:
    """Installing this is refused, and leaves the host as it was."""
    before = files(there), in_use(there)
    with pytest.raises(UserError, match=match):
        install.install(str(place), there, key=key, unverified=unverified)
    assert (files(there), in_use(there)) == before


@pytest.fixture
def copy(tmp_path: Path, releases: list[Path]) -> Path:
    """A release that a test may spoil."""
    return Path(shutil.copytree(releases[1], tmp_path / "copy"))


def test_a_key_is_needed_and_the_right_one(
    there: Host, releases: list[Path], keys: Keys, other_keys: Keys, copy: Path,
) -> None:
    install.install(str(releases[0]), there, key=keys.public)
    refused(there, releases[1], None, "No public key is given")
    refused(there, releases[1], other_keys.public, "is not by the key")
    refused(there, releases[1], keys.private, "is no public key")
    refused(there, releases[1], there.prefix / "none.pem", "there is no public key")
    refused(there, there.prefix / "none", keys.public, "there is no release")
    (copy / layout.SIGNATURE).unlink()
    refused(there, copy, keys.public, "is not signed")
    install.install(str(copy), there, key=None, unverified=True)
    assert in_use(there) == "toy-1.1.0"


@pytest.mark.parametrize("name", [layout.SUMS, layout.RELEASE, "manifest-1.1.0.json",
                                  "kata-toy-nvidia-gpu-1.1.0.image", "50-katagpu-1.1.0.toml"])
def test_a_changed_file(there: Host, releases: list[Path], keys: Keys, copy: Path,
                        name: str) -> None:
    install.install(str(releases[0]), there, key=keys.public)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    refused(there, copy, keys.public, "the signature is not by|is not the file that")
    (copy / name).unlink()
    refused(there, copy, keys.public, "has no SHA256SUMS|lacks|cannot be read|is not the file")


@pytest.mark.parametrize("what", ["link", "device", "pipe", "directory", "larger"])
@pytest.mark.parametrize("name", ["kata-toy-nvidia-gpu-1.1.0.image", layout.SUMS])
def test_what_is_no_file_of_a_release(there: Host, copy: Path, keys: Keys, what: str, name: str,
                                      ) -> None:
    """Root may install what anybody put there."""
    path = copy / name
    data = path.read_bytes()
    path.unlink()
    if what in ("link", "device"):
        (copy / "other").write_bytes(data)
        path.symlink_to("/dev/zero" if what == "device" else "other")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.write_bytes(data + b"?" * (5 << 20))
    refused(there, copy, keys.public, "it is a link|is no file|it has 5302880 bytes|too large")


def test_nobody_reads_a_file_that_is_not_verified(
    there: Host, copy: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes = set()

    def digest(path: Path, real: Callable[[Path], str] = layout.digest) -> str:
        modes.update([path.stat().st_mode & 0o777] if path.name.endswith(".part") else [])
        return real(path)

    monkeypatch.setattr(layout, "digest", digest)
    install.install(str(copy), there, key=keys.public)
    assert modes == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (there.home / "toy-1.1.0").iterdir()
            if path.is_file()} == {0o644}


@pytest.mark.parametrize("below", ["opt", "opt/kata", "opt/kata/share/defaults",
                                   "opt/kata/share/kata-containers/katagpu"])
def test_a_link_that_leads_out_of_the_prefix(there: Host, releases: list[Path], tmp_path: Path,
                                             below: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = there.prefix / below
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"outside {there.prefix}: a link leads there"):
        put(there, releases[0])
    with pytest.raises(UserError, match=r"outside|nothing is installed"):
        install.rollback(there)
    assert list(elsewhere.iterdir()) == []
    link.unlink()
    link.symlink_to(there.prefix / "inside")
    (there.prefix / "inside").mkdir()
    put(there, releases[0])
    assert in_use(there) == "toy-1.0.0"


def test_what_a_killed_repair_leaves_is_swept(two: Host, releases: list[Path]) -> None:
    left = [two.home / "toy-1.0.0/.kata.image.part", two.home / f"toy-1.1.0/config/.{GO}.part"]
    for path in left:
        path.write_text("half")
    put(two, releases[1])
    assert not [name for name in files(two) if ".part" in name]


def test_a_name_that_leaves_the_directory(there: Host, copy: Path) -> None:
    text = (copy / layout.RELEASE).read_text().replace("vmlinuz-6.1-toy-1.1.0", "../../etc/passwd")
    (copy / layout.RELEASE).write_text(text)
    sums = layout.parse_sums((copy / layout.SUMS).read_bytes(), "copy")
    sums[layout.RELEASE] = layout.digest(copy / layout.RELEASE)
    (copy / layout.SUMS).write_bytes(layout.render_sums(sums))
    refused(there, copy, None, "cannot be the name of a file", unverified=True)


def test_the_same_version_with_other_content(
    there: Host, releases: list[Path], keys: Keys, tmp_path: Path,
) -> None:
    install.install(str(releases[0]), there, key=keys.public)
    other = toyrelease.make(tmp_path, "1.0.0", keys.signer, "other")
    refused(there, other, keys.public, "is installed already, with other content")


def test_a_drop_in_of_somebody_else(there: Host, releases: list[Path], keys: Keys) -> None:
    path = there.drop_in(GO)
    path.parent.mkdir(parents=True)
    path.write_text("[hypervisor.qemu]\n")
    with pytest.raises(UserError, match="is not as it was placed here"):
        install.install(str(releases[0]), there, key=keys.public)
    install.uninstall(there)
    assert path.read_text() == "[hypervisor.qemu]\n"


def test_an_edited_drop_in(there: Host, releases: list[Path], keys: Keys) -> None:
    install.install(str(releases[0]), there, key=keys.public)
    path = there.drop_in(GO)
    path.write_text(path.read_text().replace("8192", "4096"))
    with pytest.raises(UserError, match="60-mine"):
        install.install(str(releases[1]), there, key=keys.public)
    assert "not that of this release" in "\n".join(install.status(there))
    install.uninstall(there)
    assert files(there) == []


def test_nothing_to_go_back_to(there: Host, releases: list[Path], keys: Keys) -> None:
    with pytest.raises(UserError, match="nothing is installed"):
        install.rollback(there)
    assert files(there) == []
    install.install(str(releases[0]), there, key=keys.public)
    with pytest.raises(UserError, match="no release to go back to"):
        install.rollback(there)


def test_two_at_once(there: Host, releases: list[Path], keys: Keys) -> None:
    with there.alone(), pytest.raises(UserError, match="another run"):
        install.install(str(releases[0]), there, key=keys.public)


# space


SPACE = """
set -e
mount -t tmpfs -o size=2m tmpfs "$1"
"$2" "$3/katagpu-install.pyz" install "$3" --prefix "$1" --key "$4" && exit 9
test -z "$(find "$1" -mindepth 1 -not -name opt)"
"""


@pytest.mark.root
def test_not_enough_space(tmp_path: Path, keys: Keys) -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    (tmp_path / "small").mkdir()
    place = toyrelease.make(tmp_path, "1.1.0", keys.signer, size=1_500_000)
    said = subprocess.run(["unshare", "-m", "sh", "-c", SPACE, "sh", tmp_path / "small",
                           sys.executable, place, keys.public],
                          cwd=REPOSITORY, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "not enough space" in said.stderr
    assert "nothing was written" in said.stderr


def test_no_right_to_write(there: Host, releases: list[Path], keys: Keys) -> None:
    (there.prefix / "opt").write_text("a file, where a directory should be")
    with pytest.raises(UserError, match="cannot write below"):
        install.install(str(releases[0]), there, key=keys.public)


# two runtimes


def refuse(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Let these of the switches of a drop-in be refused, from 1."""
    real, count = Host._switch, iter(range(1, 100))

    def switch(self: Host, source: str, data: bytes | None) -> None:
        if next(count) in numbers:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self.drop_in(source)))
        real(self, source, data)

    monkeypatch.setattr(Host, "_switch", switch)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("old", [False, True], ids=["first", "upgrade"])
def test_a_runtime_that_cannot_be_switched_keeps_the_other_back(
    there: Host, releases: list[Path], monkeypatch: pytest.MonkeyPatch, number: int, old: bool,
) -> None:
    put(there, *releases[:1] if old else ())
    before = {in_use(there, name) for name in DROP_INS}
    with monkeypatch.context() as refusing:
        refuse(refusing, number)
        with pytest.raises(UserError, match="cross-device") as raised:
            put(there, releases[1])
        assert "what was there before is still in use" in str(raised.value)
    assert {in_use(there, name) for name in DROP_INS} == before == {"toy-1.0.0" if old else None}
    assert there.target("next") is None and there.target("current") == (
        "toy-1.0.0" if old else None)
    assert not [name for name in files(there) if name.endswith(".part")]
    put(there, releases[1])
    assert {in_use(there, name) for name in DROP_INS} == {"toy-1.1.0"}
    nothing_is_left(there)


def test_where_the_way_back_is_refused_too_the_next_run_goes_on(
    there: Host, releases: list[Path], monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(there, releases[0])
    with monkeypatch.context() as refusing:
        refuse(refusing, 2, 3)
        with pytest.raises(UserError, match="cross-device"):
            put(there, releases[1])
    use_is_whole(there, {"toy-1.0.0", "toy-1.1.0"})
    assert "interrupted: the switch to toy-1.1.0" in next(iter(install.status(there)))
    install.rollback(there)  # completes it, then goes back
    assert {in_use(there, name) for name in DROP_INS} == {"toy-1.0.0"}


MOUNTED = """
set -e
second="$1/$4/config.d"
cp -r "$second" "$1/kept"
mount -t tmpfs tmpfs "$second"
cp "$1/kept/"* "$second"
"$2" "$3/katagpu-install.pyz" install "$3" --prefix "$1" --unverified && exit 9
cmp "$1/kept/"* "$second/"*
"""


@pytest.mark.root
def test_a_drop_in_directory_that_is_a_mount_of_its_own(
    there: Host, releases: list[Path],
) -> None:
    """As where a configuration is mounted into a node: no rename leads there."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    put(there, releases[0])
    said = subprocess.run(
        ["unshare", "-m", "sh", "-c", MOUNTED, "sh", there.prefix, sys.executable, releases[1],
         list(DROP_INS.values())[1]], cwd=REPOSITORY, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "cross-device" in said.stderr and "Traceback" not in said.stderr
    assert {in_use(there, name) for name in DROP_INS} == {"toy-1.0.0"}
    assert there.target("next") is None


# kills


@pytest.fixture
def quick() -> Iterator[Host]:
    """An empty host in memory: a busy disk is slow to sync, and a kill asks nothing of it."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        prefix = Path(name) / "host"
        prefix.mkdir()
        yield Host(prefix)


def use_is_whole(there: Host, allowed: set[str | None]) -> None:
    """Each runtime uses one of these releases, and all of it."""
    for name in DROP_INS:
        assert in_use(there, name) in allowed


def put(there: Host, *places: Path) -> None:
    """Install these, one after the other."""
    for place in places:
        install.install(str(place), there, key=None, unverified=True)


def nothing_is_left(there: Host) -> None:
    """Uninstall it, and see."""
    install.uninstall(there)
    assert files(there) == []


def copies(there: Host, number: int) -> Host:
    """Another host with the same on it."""
    prefix = there.prefix.with_name(f"host-{number}")
    shutil.copytree(there.prefix, prefix, symlinks=True)
    return Host(prefix)


@pytest.mark.parametrize("old", [None, "toy-1.0.0"], ids=["first", "upgrade"])
def test_install_killed_at_each_change(
    quick: Host, releases: list[Path], old: str | None,
) -> None:
    if old is not None:
        put(quick, releases[0])
    apart = 0
    for number in range(1, 200):
        one = copies(quick, number)
        status = killed.run(number, "install", str(releases[2]), "--unverified", "--prefix",
                            str(one.prefix))
        use_is_whole(one, {old, "toy-1.2.0"})
        apart += len({in_use(one, name) for name in DROP_INS}) > 1
        if status == 0:
            break
        assert status == -signal.SIGKILL
        list(install.status(one))
        other = copies(one, 1000 + number)
        put(one, releases[2])  # the next run is the same, or another one
        use_is_whole(one, {"toy-1.2.0"})
        assert one.target("current") == "toy-1.2.0"
        assert one.target("previous") == old
        put(other, releases[1])
        use_is_whole(other, {"toy-1.1.0"})
        for again in (one, other):
            assert not [name for name in files(again) if ".part" in name or ".gone" in name]
            nothing_is_left(again)
    assert number > 30
    assert apart == 1, "nothing but a rename is between the two runtimes"


@pytest.mark.parametrize("command", ["rollback", "uninstall"])
def test_others_killed_at_each_change(quick: Host, releases: list[Path], command: str) -> None:
    put(quick, *releases[:2])
    left: set[str | None] = {"toy-1.0.0" if command == "rollback" else None}
    for number in range(1, 200):
        one = copies(quick, number)
        status = killed.run(number, command, "--prefix", str(one.prefix))
        use_is_whole(one, {"toy-1.1.0", *left})
        if status == 0:
            break
        assert status == -signal.SIGKILL
        other = copies(one, 1000 + number)
        put(one, releases[2])
        use_is_whole(one, {"toy-1.2.0"})
        for again in (one, other):
            nothing_is_left(again)
    assert number > 8
    use_is_whole(one, left)
