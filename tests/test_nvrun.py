"""The test packages: their stub behaves as NVIDIA's, and unpacks what our own code unpacks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu.drivermanifest import Layout, destination
from katagpu.driverparts import CAPABILITIES, parts, select
from katagpu.runfile import RunFile, fits
from katagpu.schema import KernelModule
from tests.nvrun import debian, maker
from tests.nvrun.archive import UNCOMPRESS, Name
from tests.nvrun.toys import DECOMPRESSOR, Toy
from tests.test_runfile import tree

INSTALLER = b"""#! /bin/sh
echo "installer in $(pwd) with $*"
touch installed
exit 7
"""


def sh(path: Path, *words: str | Path, cwd: Path | None = None,
       **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a package as a user does."""
    return subprocess.run(["sh", path, *words], cwd=cwd or path.parent, text=True, timeout=120,
                          capture_output=True, env={"PATH": os.environ["PATH"], **environment})


def needs(compression: str) -> None:
    """Skip where the host lacks the decompressor that the stub calls."""
    program = UNCOMPRESS[compression].split()[0]
    if shutil.which(program) is None:
        pytest.skip(f"the host has no {program}")


# unpacking


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_the_stub_and_our_code_unpack_the_same(tmp_path: Path, compression: str) -> None:
    needs(compression)
    path = Toy(compression=compression).make(tmp_path)
    assert sh(path, "--check").stdout == "check sums and md5 sums are ok\n"
    said = sh(path, "-x", "--target", tmp_path / "by-stub")
    assert said.returncode == 0, said
    assert "Verifying archive integrity... OK" in said.stdout
    RunFile(path).extract(tmp_path / "by-us")
    assert tree(tmp_path / "by-stub") == tree(tmp_path / "by-us") != {}
    times = [{name: (tmp_path / side / name).stat().st_mtime for name in tree(tmp_path / side)}
             for side in ("by-stub", "by-us")]
    assert times[0] == times[1]


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_the_same_files_give_the_same_bytes(tmp_path: Path, compression: str) -> None:
    one = Toy(compression=compression).make(tmp_path / "one")
    two = Toy(compression=compression).make(tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    assert one.name == "NVIDIA-Linux-x86_64-550.163.01.run" and one.stat().st_mode & 0o111


def test_the_target_of_a_package_is_its_name(tmp_path: Path) -> None:
    path = Toy(compression="gzip").make(tmp_path)
    assert sh(path, "--extract-only").returncode == 0
    assert (tmp_path / "NVIDIA-Linux-x86_64-550.163.01/.manifest").is_file()
    again = sh(path, "-x")
    assert again.returncode == 1 and "already exists" in again.stdout


# answers


@pytest.mark.parametrize(("option", "answer"), [
    ("--label", "NVIDIA Accelerated Graphics Driver for Linux-x86_64 550.163.01"),
    ("--version-string", "550.163.01"), ("--pkg-version", "0"), ("--target-os", "Linux"),
    ("--target-arch", "x86_64"), ("--script", "./nvidia-installer"), ("--lsm", "no LSM"),
    ("--target-directory", "NVIDIA-Linux-x86_64-550.163.01"), ("--pkg-history", ""),
])
def test_questions(tmp_path: Path, option: str, answer: str) -> None:
    said = sh(Toy(compression="gzip").make(tmp_path), option)
    assert (said.returncode, said.stdout.strip()) == (0, answer)
    assert list(tmp_path.iterdir()) == [tmp_path / "NVIDIA-Linux-x86_64-550.163.01.run"]


def test_info_list_and_help(tmp_path: Path) -> None:
    path = Toy(compression="gzip").make(tmp_path)
    info = sh(path, "--info").stdout
    assert "Target directory  : NVIDIA-Linux-x86_64-550.163.01" in info and "gzip" in info
    listed = sh(path, "--list").stdout
    assert {line.split()[-1] for line in listed.splitlines()[1:]} >= {
        "./.manifest", "./kernel/", "./kernel/conftest.sh", "./nvidia-smi"}
    for option in ("-h", "--help", "-A", "--advanced-options"):
        assert "--extract-only" in sh(path, option).stdout


def test_the_embedded_decompressor(tmp_path: Path) -> None:
    path = Toy().make(tmp_path)
    said = subprocess.run(["sh", path, "--extract-decompress"], capture_output=True, check=True)
    assert said.stdout == DECOMPRESSOR + b"\n"
    none = sh(Toy(decompressor=b"").make(tmp_path), "--extract-decompress")
    assert "No decompressor" in none.stderr


def test_a_host_without_the_decompressor_uses_the_embedded_one(tmp_path: Path) -> None:
    needs("zstd")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "tail", "head", "cksum", "md5sum", "cut", "tar", "mktemp", "uname", "id",
                 "chown", "chmod", "mkdir", "rm", "cat", "gzip"):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
    real = shutil.which("zstd")
    path = Toy(decompressor=f'#! /bin/sh\nexec {real} "$@"\n'.encode()).make(tmp_path)
    said = sh(path, "-x", "--target", tmp_path / "out", PATH=str(tools))
    assert said.returncode == 0, said
    assert (tmp_path / "out/nvidia-smi").is_file()


# the installer


def test_the_installer_runs_in_the_unpacked_files(tmp_path: Path) -> None:
    path = Toy(compression="gzip", installer=INSTALLER).make(tmp_path)
    work = tmp_path / "tmp"
    said = sh(path, "--silent", "-k", "6.12", TMPDIR=str(work))
    assert said.returncode == 7
    assert f"installer in {work}/selfgz" in said.stdout
    assert "/NVIDIA-Linux-x86_64-550.163.01 with --silent -k 6.12\n" in said.stdout
    assert list(work.iterdir()) == []
    kept = sh(path, "--keep", "--tmpdir", work)
    assert kept.returncode == 7 and f"with --tmpdir {work}\n" in kept.stdout
    assert (tmp_path / "NVIDIA-Linux-x86_64-550.163.01/installed").exists()


def test_extracting_runs_nothing(tmp_path: Path) -> None:
    path = Toy(compression="gzip", installer=INSTALLER).make(tmp_path)
    assert sh(path, "-x", "--target", tmp_path / "out").returncode == 0
    assert not (tmp_path / "out/installed").exists()


# exit statuses


@pytest.mark.parametrize("toy", [Toy(cut=1), Toy(flip=700), Toy(flip=700, compression="xz")])
def test_2_for_wrong_checksums(tmp_path: Path, toy: Toy) -> None:
    path = toy.make(tmp_path)
    said = sh(path, "--check")
    assert said.returncode == 2 and said.stdout.startswith("Error in checksums ")
    for words in (("-x",), ()):
        said = sh(path, *words, "--target", tmp_path / "out")
        assert said.returncode == 2 and "Error in check sums " in said.stdout
        assert list((tmp_path / "out").iterdir()) == []
        (tmp_path / "out").rmdir()
    # The variable turns off the CRC, and not the MD5.
    said = sh(path, "-x", SETUP_NOCHECK="1")
    assert said.returncode == 2 and "Error in md5 sums " in said.stdout


def test_1_for_what_the_user_can_mend(tmp_path: Path) -> None:
    path = Toy(compression="gzip", installer=INSTALLER).make(tmp_path)
    assert sh(path, "--target").returncode == 1
    assert sh(path, "--tmpdir").returncode == 1
    other = Toy(compression="gzip", name=Name(version="550.163.01", architecture="aarch64"),
                installer=INSTALLER).make(tmp_path)
    said = sh(other)
    assert said.returncode == 1 and "intended for the Linux-aarch64 platform" in said.stdout
    assert sh(other, "-x").returncode == 0  # unpacking it is allowed


def test_1_where_nothing_may_be_executed(tmp_path: Path, tiny: Callable[[int], Path]) -> None:
    place = tiny(1 << 20)
    if subprocess.run(["mount", "-o", "remount,noexec", place], capture_output=True).returncode:
        pytest.skip("needs root, to mount without exec")
    said = sh(Toy(compression="gzip").make(tmp_path), "-x", TMPDIR=str(place))
    assert said.returncode == 1 and "is not executable" in said.stdout


def test_143_and_15_for_a_full_disk(tmp_path: Path, tiny: Callable[[int], Path]) -> None:
    place = tiny(256 * 1024)
    path = Toy(compression="gzip", files={"big": os.urandom(1 << 20)}).make(tmp_path)
    said = sh(path, "-x", "--target", place / "out")
    assert said.returncode in (-15, 143)
    assert (place / "out").is_dir()
    shutil.rmtree(place / "out")
    assert sh(path, TMPDIR=str(place)).returncode == 15
    assert [path.name[:6] for path in place.iterdir()] == ["selfgz"]


# real drivers


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("suite", "compression"), [(debian.TRIXIE, "zstd"),
                                                    (debian.BOOKWORM, "gzip")],
                         ids=["trixie", "bookworm"])
def test_a_real_driver(tmp_path: Path, suite: debian.Suite, compression: str) -> None:
    """From Debian's packages: fetched, packed, checked and unpacked both ways, parts measured."""
    needs(compression)
    path = maker.build(suite, debian.CACHE, tmp_path / "one", compression=compression)
    file = RunFile(path)
    file.verify()
    fits(file, version=None, flavour=KernelModule.OPEN)
    fits(file, version=None, flavour=KernelModule.CLOSED)
    assert file.header.version.startswith(f"{suite.branch}.")
    assert sh(path, "--check").returncode == 0
    assert sh(path, "-x", "--target", tmp_path / "by-stub").returncode == 0
    file.extract(tmp_path / "by-us")
    listing = ["find", ".", "-type", "f", "-printf", "%P %m %s %T@\n", "-o",
               "-printf", "%P %y %m\n"]
    names = [sorted(subprocess.run(listing, cwd=tmp_path / side, text=True, check=True,
                                   capture_output=True).stdout.splitlines()[1:])
             for side in ("by-stub", "by-us")]
    assert names[0] == names[1] and len(names[0]) > 700
    subprocess.run(["diff", "--recursive", "--brief", tmp_path / "by-stub", tmp_path / "by-us"],
                   check=True)
    version = file.header.version
    chosen = select(file.manifest, ("compute", "utility"))
    assert chosen.notes == ()
    there = {str(destination(entry, Layout(version=version))) for entry in chosen.shipped}
    assert {f"/usr/lib/x86_64-linux-gnu/libcuda.so.{version}", "/usr/bin/nvidia-smi",
            "/usr/lib/x86_64-linux-gnu/libnvidia-nvvm.so.4", "/usr/bin/nvidia-persistenced",
            f"/usr/lib/firmware/nvidia/{version}/gsp_ga10x.bin"} <= there
    for entry in chosen.shipped:
        assert entry.target is not None or (tmp_path / "by-us" / entry.file).is_file()
    some = sum(part.size for part in parts(chosen.shipped, file.contents.sizes))
    every = select(file.manifest, CAPABILITIES)
    assert 100e6 < some < sum(part.size for part in parts(every.shipped, file.contents.sizes))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_driver_with_graphics_is_the_same_twice(tmp_path: Path) -> None:
    one = maker.build(debian.BOOKWORM, debian.CACHE, tmp_path / "one", graphics=True)
    two = maker.build(debian.BOOKWORM, debian.CACHE, tmp_path / "two", graphics=True)
    assert subprocess.run(["cmp", one, two]).returncode == 0
    found = RunFile(one)
    screen = {entry.name for entry in select(found.manifest, ("graphics", "compute")).shipped}
    assert {"nvidia_icd.json", f"libGLX_nvidia.so.{found.header.version}"} <= screen
