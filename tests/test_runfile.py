"""The `.run` as an archive: header, checksums, what is refused, what is unpacked."""

from __future__ import annotations

import errno
import gzip
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from katagpu import runfile, runpayload
from katagpu.errors import UserError
from katagpu.runfile import RunFile, fits, read_header
from katagpu.runpayload import Compression
from katagpu.schema import KernelModule
from tests.nvrun import archive
from tests.nvrun.archive import Member, Name
from tests.nvrun.toys import DECOMPRESSOR, GRID, HOST, Evil, Toy

VERSION = "550.163.01"
NAMED = b"targetdir=NVIDIA-Linux-x86_64-550.1"


def repacked(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change what follows line 3, and give the file the checksums of the result."""
    first, _crc, _md5, body = path.read_bytes().split(b"\n", 3)
    body = change(body)
    crc = subprocess.run(["cksum"], input=body, capture_output=True, check=True).stdout.split()[0]
    md5 = subprocess.run(["md5sum"], input=body, capture_output=True, check=True).stdout[:32]
    path.write_bytes(b"\n".join((first, b"CRCsum=" + crc, b"MD5=" + md5, body)))
    return path


def tree(directory: Path) -> dict[str, tuple[int, bytes | str]]:
    """All below a directory: mode, and bytes or a link's target."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        content: bytes | str = ""
        if path.is_symlink():
            content = str(path.readlink())
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(directory))] = (mode, content)
    return found


# headers


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_a_package_is_read_and_unpacked(tmp_path: Path, compression: str) -> None:
    toy = Toy(compression=compression)
    file = RunFile(toy.make(tmp_path))
    header = file.header
    assert (header.version, header.variant, header.architecture) == (VERSION, "", "x86_64")
    assert header.label == f"NVIDIA Accelerated Graphics Driver for Linux-x86_64 {VERSION}"
    assert header.compression is Compression(compression)
    assert not header.host
    file.verify()
    fits(file, version=VERSION, flavour=KernelModule.OPEN, capabilities=("compute", "compat32"))
    target = tmp_path / "unpacked"
    file.extract(target)
    content = toy.content()
    found = {name: data for name, (_mode, data) in tree(target).items()
             if (target / name).is_file()}
    assert found == content
    assert file.contents.sizes == {name: len(data) for name, data in content.items()}
    assert file.manifest.version == VERSION
    assert (target / "nvidia-smi").stat().st_mode & 0o7777 == 0o755
    assert (target / "LICENSE").stat().st_mode & 0o7777 == 0o444
    assert (target / "kernel").stat().st_mode & 0o7777 == 0o755
    assert (target / "LICENSE").stat().st_mtime == (target / "kernel").stat().st_mtime \
        == archive.EPOCH


HEADERS = {
    # makeself.sh 1.6.0-nv2 and -nv4 (390.157, 440.44, 460.67) write these lines in this order.
    "nv4": """#! /bin/sh
CRCsum=1234567890
MD5=0123456789abcdef0123456789abcdef
skip=22
skip_decompress=22
size_decompress=0
label="NVIDIA Accelerated Graphics Driver for Linux-x86_64 460.67"
version_string=460.67
pkg_version=0
script=./nvidia-installer
targetdir=NVIDIA-Linux-x86_64-460.67
scriptargs=""
keep=n
add_this_kernel=n
apply_patch=n
TMPROOT=${TMPDIR:=/tmp}
TARGET_OS="Linux"
TARGET_ARCH="x86_64"

#
# NVIDIA Accelerated Graphics Driver for Linux-x86_64 460.67
""",
    # Packed anew by a user: no version, no platform, a name of his own.
    "anew": """#! /bin/sh
CRCsum=4066672
MD5=00000000000000000000000000000000
skip=14
skip_decompress=14
size_decompress=0
label="NVIDIA Accelerated Graphics Driver for Linux-x86_64 550.144.02"
version_string=0
pkg_version=0
script=./nvidia-installer
targetdir=NVIDIA-Linux-x86_64-550.144.02-custom
TARGET_OS="Linux"
TARGET_ARCH="Unknown"
""",
}


@pytest.mark.parametrize(("name", "version", "variant", "crc", "md5"), [
    ("nv4", "460.67", "", 1234567890, "0123456789abcdef0123456789abcdef"),
    ("anew", "550.144.02", "-custom", 4066672, None),
])
def test_headers_of_nvidia_s_makeself(
    tmp_path: Path, name: str, version: str, variant: str, crc: int, md5: str | None,
) -> None:
    path = tmp_path / "x.run"
    path.write_bytes(HEADERS[name].encode() + gzip.compress(b"tar"))
    header = read_header(path)
    assert (header.version, header.variant, header.crc, header.md5) == (version, variant, crc, md5)
    assert (header.os, header.architecture) == ("Linux", "x86_64")
    assert header.script == "./nvidia-installer"
    assert path.read_bytes()[header.payload:header.payload + 2] == b"\x1f\x8b"
    assert path.read_bytes()[:header.body].count(b"\n") == 3


@pytest.mark.parametrize("decompressor", [b"", DECOMPRESSOR, b"\n" * 70000, bytes(range(256)) * 99])
def test_lines_of_an_embedded_program_count(tmp_path: Path, decompressor: bytes) -> None:
    """NVIDIA's skip counts lines through a binary; `tail` is what the stub uses."""
    path = Toy(decompressor=decompressor).make(tmp_path)
    header = read_header(path)
    skip = path.read_text("latin-1").split("skip=")[1].split("\n")[0]
    tail = subprocess.run(["tail", "-n", f"+{skip}", path], capture_output=True, check=True)
    assert path.read_bytes()[header.payload:] == tail.stdout
    RunFile(path).verify()


@pytest.mark.parametrize("size", [0, 1, 2, 255, 256, 65535, 65536, (1 << 20) - 1, (1 << 20) + 7])
def test_the_crc_is_that_of_cksum(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    path = tmp_path / "x"
    path.write_bytes(b"abc" + data)
    said = subprocess.run(["cksum"], input=data, capture_output=True, check=True).stdout
    assert runfile._checksums(path, 3)[0] == int(said.split()[0])


# files that are not one


@pytest.mark.parametrize(("content", "said", "cure"), [
    (b"", "is empty", "fetch the file again"),
    (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page", "in a browser"),
    (b"\n\n  <HTML>\n<head>", "is a web page", "login"),
    (b"\x7fELF\x02\x01", "is not a .run file of NVIDIA", "NVIDIA-Linux-<architecture>"),
    (b"#!/bin/sh\necho hello\n", "is not a .run file of NVIDIA", "NVIDIA-Linux-<architecture>"),
    (b"#!/bin/sh\n# This script was generated using Makeself 2.4.0\nlabel=\"CUDA Toolkit\"\n",
     "is CUDA's toolkit, not the driver", "NVIDIA-Linux-<architecture>"),
    (b"#!/bin/sh\n# This script was generated using Makeself 2.3.0\nlabel=\"A game\"\n",
     "but not one of NVIDIA's driver (A game)", "NVIDIA-Linux-<architecture>"),
    (b"#! /bin/sh\nskip=30\n%s\n" % NAMED, "is cut off", "fetch the file"),
    (b"#! /bin/sh\nskip=4\n%s\n" % NAMED, "is cut off", "fetch the file"),
    (b"#! /bin/sh\nskip=4\n%s\nBZh91AY" % NAMED, "425a68", "gzip, xz, zstd"),
    (b"#! /bin/sh\nskip=1\n%s\nx" % NAMED, "not one of NVIDIA's", "is named"),
    (b"#! /bin/sh\nskip=$(id)\n%s\nx" % NAMED, "not one of NVIDIA's", "is named"),
])
def test_what_is_no_package(tmp_path: Path, content: bytes, said: str, cure: str) -> None:
    path = tmp_path / "x.run"
    path.write_bytes(content)
    with pytest.raises(UserError) as failure:
        RunFile(path)
    assert said in failure.value.what
    assert cure in str(failure.value.hint)


def test_no_file_and_a_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.run", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            RunFile(path)


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
@pytest.mark.parametrize("cut", [1, 100, 1500])
def test_a_truncated_file(tmp_path: Path, compression: str, cut: int) -> None:
    file = RunFile(Toy(compression=compression, cut=cut).make(tmp_path))
    with pytest.raises(UserError, match="CRC and MD5 are not what") as failure:
        file.verify()
    # Where only the compressor's last bytes are missing, the tar itself is whole.
    assert "is cut off" in failure.value.what or cut == 1
    assert "remove it, and fetch" in str(failure.value.hint)


def test_cut_off_before_the_archive(tmp_path: Path) -> None:
    path = Toy().make(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="is cut off: it has fewer than"):
        RunFile(path)


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
@pytest.mark.parametrize("place", [9, 700, 2500])
def test_one_wrong_bit(tmp_path: Path, compression: str, place: int) -> None:
    file = RunFile(Toy(compression=compression, flip=place).make(tmp_path))
    with pytest.raises(UserError, match=r"CRC and MD5 are not what its first lines say"):
        file.verify()


def test_a_change_in_the_script(tmp_path: Path) -> None:
    path = Toy().make(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"usage()", b"usagE()", 1))
    with pytest.raises(UserError, match="altered or damaged"):
        RunFile(path).verify()


@pytest.mark.parametrize(("old", "wrong"), [(b"CRCsum=", "CRC"), (b"MD5=", "MD5")])
def test_one_checksum_of_two(tmp_path: Path, old: bytes, wrong: str) -> None:
    path = Toy().make(tmp_path)
    data = path.read_bytes()
    at = data.index(old) + len(old)
    path.write_bytes(data[:at] + (b"1" if data[at:at + 1] != b"1" else b"2") + data[at + 1:])
    with pytest.raises(UserError, match=f"altered or damaged: {wrong} are not"):
        RunFile(path).verify()


def test_without_checksums(tmp_path: Path) -> None:
    path = Toy().make(tmp_path)
    lines = path.read_bytes().split(b"\n", 3)
    path.write_bytes(b"\n".join((lines[0], b"CRCsum=0000000000", b"MD5=" + b"0" * 32, lines[3])))
    with pytest.raises(UserError, match="carries no checksum"):
        RunFile(path).verify()


@pytest.mark.parametrize("compression", ["gzip", "xz", "zstd"])
def test_damage_that_the_checksums_cover(tmp_path: Path, compression: str) -> None:
    """A file that was broken when it was packed."""
    path = Toy(compression=compression).make(tmp_path)
    offset = read_header(path).payload - read_header(path).body

    def damage(body: bytes) -> bytes:
        return body[:offset + 40] + bytes(64) + body[offset + 104:]

    file = RunFile(repacked(path, damage))
    file.verify()
    with pytest.raises(UserError, match="is damaged") as failure:
        file.extract(tmp_path / "target")
    assert "compare its SHA-256" in str(failure.value.hint)
    assert not (tmp_path / "target").exists()


# members


@pytest.mark.parametrize("evil", list(Evil))
def test_members_that_no_package_has(tmp_path: Path, evil: Evil) -> None:
    """Refused by name before the first file is written, though they come last."""
    path = Toy(members=evil.value).make(tmp_path / "in")
    file = RunFile(path)
    file.verify()
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(UserError) as failure:
        file.extract(place / "target")
    assert repr(evil.value[-1].name.rstrip("/") or "./")[1:-1] in failure.value.what
    assert "nothing of it is unpacked" in failure.value.what
    assert "fetch it from NVIDIA" in str(failure.value.hint)
    assert list(place.iterdir()) == []
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("evil", list(Evil))
def test_members_are_judged_again_when_they_are_written(tmp_path: Path, evil: Evil) -> None:
    """Where another file took the place of the one that was looked at."""
    good = RunFile(Toy().make(tmp_path / "good"))
    bad = RunFile(Toy(members=evil.value).make(tmp_path / "bad"))
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(UserError, match="is refused"):
        runpayload.unpack(bad.payload, good.contents, place / "target")
    assert list(place.iterdir()) == []


def test_links_that_stay_inside_are_kept(tmp_path: Path) -> None:
    members = (
        Member(name="./kernel/up", kind=tarfile.SYMTYPE, link="../nvidia-smi"),
        Member(name="./beside", kind=tarfile.SYMTYPE, link="./kernel/Kbuild"),
        Member(name="./hard", kind=tarfile.LNKTYPE, link="./nvidia-smi"),
        Member(name="./kernel", kind=tarfile.DIRTYPE, mode=0o2755),
        Member(name="./", kind=tarfile.DIRTYPE, mode=0o700),
    )
    RunFile(Toy(members=members).make(tmp_path)).extract(tmp_path / "target")
    target = tmp_path / "target"
    assert (target / "kernel/up").read_text() == (target / "nvidia-smi").read_text()
    assert (target / "beside").read_text() == "# kernel/Kbuild\n"
    assert (target / "hard").stat().st_ino == (target / "nvidia-smi").stat().st_ino
    assert (target / "kernel").stat().st_mode & 0o7777 == 0o755  # set-group-id is not kept


def test_nvidia_modprobe_comes_without_its_set_user_id_bit(tmp_path: Path) -> None:
    member = Member(name="./nvidia-modprobe", mode=0o4755)
    toy = Toy(files={"nvidia-modprobe": None}, members=(member,))
    RunFile(toy.make(tmp_path)).extract(tmp_path / "target")
    assert (tmp_path / "target/nvidia-modprobe").stat().st_mode & 0o7777 == 0o755


def test_files_without_entries_for_their_directories(tmp_path: Path) -> None:
    toy = Toy(members=(Member(name="./deep/er/file", content=b"x"),))
    RunFile(toy.make(tmp_path)).extract(tmp_path / "target")
    assert (tmp_path / "target/deep/er/file").read_bytes() == b"x"


def test_nothing_of_the_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    path = Toy(installer=f"#! /bin/sh\ntouch {marker}\n".encode()).make(tmp_path)
    call = f"$(touch${{IFS}}{marker})".encode()
    plain = f"targetdir=NVIDIA-Linux-x86_64-{VERSION}\n".encode()
    repacked(path, lambda body: body.replace(plain, plain[:-1] + b"-" + call + b"\n").replace(
        b'label="', b'label="' + call))
    for module, name in ((subprocess, "Popen"), (os, "system"), (os, "posix_spawn"),
                         (os, "execve"), (os, "fork")):
        monkeypatch.setattr(module, name, lambda *_words, **_more: pytest.fail("a program ran"))
    file = RunFile(path)
    file.verify()
    fits(file, version=VERSION)
    file.extract(tmp_path / "target")
    assert str(marker) in file.header.variant and str(marker) in file.header.label
    assert not marker.exists()


# space


def test_a_disk_that_is_too_small(tmp_path: Path, tiny: Callable[[int], Path]) -> None:
    place = tiny(64 * 1024)
    file = RunFile(Toy(files={"big": bytes(100_000)}).make(tmp_path))
    with pytest.raises(UserError, match=r"unpack NVIDIA.*needs 7\d\d\.\d kB") as failure:
        file.extract(place / "target")
    assert "cache:gc" in str(failure.value.hint)
    assert list(place.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(
    tmp_path: Path, tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = tiny(512 * 1024)
    file = RunFile(Toy(files={"big": random.Random(1).randbytes(1_000_000)}).make(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 40))
    with pytest.raises(UserError, match="no space to unpack"):
        file.extract(place / "target")
    assert list(place.iterdir()) == []


def test_a_failure_of_another_kind_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = RunFile(Toy().make(tmp_path))

    def fail(*_words: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "utime", fail)
    with pytest.raises(OSError, match="input/output error"):
        file.extract(tmp_path / "target")
    assert not (tmp_path / "target").exists()


# what fits


def misfit(toy: Toy, place: Path, **wanted: object) -> UserError:
    """The refusal of a toy."""
    file = RunFile(toy.make(place))
    file.verify()
    with pytest.raises(UserError) as failure:
        fits(file, **{"version": toy.name.version, **wanted})  # type: ignore[arg-type]
    return failure.value


def test_another_architecture(tmp_path: Path) -> None:
    toy = Toy(name=Name(version=VERSION, architecture="aarch64"))
    said = misfit(toy, tmp_path)
    assert "is for Linux on aarch64, the guest is Linux on x86_64" in said.what
    assert f"take NVIDIA-Linux-x86_64-{VERSION}.run" in str(said.hint)
    fits(RunFile(toy.make(tmp_path)), version=VERSION, architecture="aarch64")


@pytest.mark.parametrize(("toy", "sign"), [
    (Toy(name=Name(version=VERSION, variant="-vgpu-kvm")), "x86_64-550.163.01-vgpu-kvm"),
    (Toy(name=Name(version=VERSION, variant="-vgpu-xen")), "-vgpu-xen"),
    (Toy(name=Name(version=VERSION, variant="-grid-vgpu-kvm")), "-grid-vgpu-kvm"),
    (Toy(files={"is_vgpu_host_package.txt": b""}), "is_vgpu_host_package.txt"),
    (Toy(modules=("nvidia", "nvidia-vgpu-vfio")), "module nvidia-vgpu-vfio"),
    (Toy(add=HOST[:1]), "nvidia-vgpud"),
    (Toy(add=HOST[1:2]), "nvidia-vgpu-mgr"),
    (Toy(add=HOST[2:]), f"libnvidia-vgpu.so.{VERSION}"),
])
def test_a_vgpu_host_s_package(tmp_path: Path, toy: Toy, sign: str) -> None:
    """Renamed ones too: NVIDIA's own label does not say what the package is."""
    said = misfit(toy, tmp_path)
    assert "is a package for vGPU hosts" in said.what and sign in said.what
    assert "-grid.run" in str(said.hint)


def test_a_vgpu_guest_s_package(tmp_path: Path) -> None:
    toy = Toy(name=Name(version=VERSION, variant="-grid"), add=GRID)
    file = RunFile(toy.make(tmp_path))
    assert not file.header.host
    fits(file, version=VERSION)


def test_another_version(tmp_path: Path) -> None:
    said = misfit(Toy(), tmp_path, version="535.261.03")
    assert "is driver 550.163.01, the recipe asks for 535.261.03" in said.what
    fits(RunFile(Toy().make(tmp_path)), version=None)


def test_name_and_manifest_that_differ(tmp_path: Path) -> None:
    other = Toy(name=Name(version="535.261.03")).content()[".manifest"]
    said = misfit(Toy(files={".manifest": other}), tmp_path)
    assert f"says version {VERSION}, its .manifest says 535.261.03" in said.what


def test_a_flavour_that_the_branch_lacks(tmp_path: Path) -> None:
    toy = Toy(name=Name(version="510.54"), flavours=("kernel",))
    said = misfit(toy, tmp_path, flavour=KernelModule.OPEN)
    assert "driver 510.54 has no open kernel modules" in said.what
    assert "515" in said.what and "closed" in str(said.hint)
    fits(RunFile(toy.make(tmp_path)), version=None, flavour=KernelModule.CLOSED)
    only = Toy(flavours=("kernel-open",))
    assert "(it has: open)" in misfit(only, tmp_path, flavour=KernelModule.CLOSED).what


def test_compat32_without_such_files(tmp_path: Path) -> None:
    toy = Toy(name=Name(version=VERSION, variant="-no-compat32"), compat32=False)
    said = misfit(toy, tmp_path, capabilities=("compute", "compat32"))
    assert "has no 32-bit libraries" in said.what
    fits(RunFile(toy.make(tmp_path)), version=None, capabilities=("compute",))


def test_a_package_that_lacks_files(tmp_path: Path) -> None:
    gone: dict[str, bytes | None] = {"nvidia-smi": None, f"libcuda.so.{VERSION}": None}
    said = misfit(Toy(files=gone), tmp_path)
    assert "lacks 2 of the files in its .manifest, for example" in said.what


@pytest.mark.parametrize(("toy", "said"), [
    (Toy(files={".manifest": None}), r"has no \.manifest in it"),
    (Toy(files={".manifest": b"nonsense\n"}), "does not start with 8 lines"),
])
def test_a_package_without_a_manifest(tmp_path: Path, toy: Toy, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fits(RunFile(toy.make(tmp_path)), version=None)
