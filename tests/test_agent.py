"""The agent's sources: a file, a release tarball, guest images and initrds, each a small real one.

Host tools: mke2fs and debugfs (package e2fsprogs, on every Debian); mkfs.erofs and dump.erofs 1.8
or newer (package erofs-utils of trixie) for the erofs images, skipped without them.
"""

import io
import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard

from katagpu import agent, disk, newc
from katagpu.agent import Agent, Kind
from katagpu.disk import MIB
from katagpu.errors import StepError, UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSION = f"4.1.0-{COMMIT}"

needs_ext4 = pytest.mark.skipif(shutil.which("debugfs") is None, reason="needs e2fsprogs")


def can_cat() -> bool:
    if shutil.which("dump.erofs") is None or shutil.which("mkfs.erofs") is None:
        return False
    told = subprocess.run(["dump.erofs", "--help"], capture_output=True)
    return b"--cat" in told.stdout + told.stderr


needs_erofs = pytest.mark.skipif(not can_cat(), reason="needs erofs-utils 1.8")


def tool(argv: Sequence[str], *, source: Path, scratch: Path) -> bytes:
    done = subprocess.run(argv, capture_output=True)
    if done.returncode:
        raise StepError(done.stderr.decode())
    return done.stdout


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """A real dynamic program, with what the agent's strings look like behind it."""
    path = tmp_path / "agent"
    path.write_bytes(Path("/bin/true").read_bytes() + b"kata-agent0.0.1" + VERSION.encode()
                     + COMMIT.encode())
    return path


@pytest.fixture
def tree(tmp_path: Path, binary: Path) -> Path:
    root = tmp_path / "tree"
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/sbin").mkdir()
    shutil.copy(binary, root / "usr/bin/kata-agent")
    shutil.copy("/bin/true", root / "usr/sbin/init")
    return root


def provide(tmp_path: Path, source: Path) -> Agent:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return agent.provide(source, tmp_path / "taken", scratch=scratch, tool=tool)


def ext4_image(tmp_path: Path, tree: Path, *, dax: bool = False) -> Path:
    content, image = tmp_path / "content", tmp_path / "guest.img"
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, content, "8M"], check=True)
    disk.write(image, disk.layout(12 * MIB, dax=dax), [content], disk_signature=1)
    return image


def erofs_image(tmp_path: Path, tree: Path) -> Path:
    content, image = tmp_path / "content", tmp_path / "guest.img"
    subprocess.run(["mkfs.erofs", "--quiet", "-zlz4hc", content, tree], check=True,
                   stdout=subprocess.DEVNULL)
    disk.write(image, disk.layout(disk.erofs_size(content.stat().st_size)), [content],
               disk_signature=1)
    return image


def initrd(tree: Path) -> bytes:
    tar, out = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.add(tree, arcname=".")
    newc.write(lambda: io.BytesIO(tar.getvalue()), out, time=0)
    return out.getvalue()


def release(*members: tuple[str, bytes | str]) -> bytes:
    """A tarball; a `str` is the target of a symbolic link."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo("./opt/kata/share/kata-containers/" + name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def test_from_a_file(tmp_path: Path, binary: Path) -> None:
    taken = provide(tmp_path, binary)
    assert taken.path.read_bytes() == binary.read_bytes()
    assert os.access(taken.path, os.X_OK)
    assert taken.version == VERSION
    assert taken.needed == ("libc.so.6",)
    assert taken.interpreter == "/lib64/ld-linux-x86-64.so.2"
    assert taken.origin == str(binary)


@needs_ext4
@pytest.mark.parametrize("dax", [False, True])
def test_from_an_ext4_image(tmp_path: Path, tree: Path, binary: Path, dax: bool) -> None:
    image = ext4_image(tmp_path, tree, dax=dax)
    taken = provide(tmp_path, image)
    assert taken.path.read_bytes() == binary.read_bytes()
    assert taken.origin == f"{image}: usr/bin/kata-agent"


@needs_erofs
def test_from_an_erofs_image(tmp_path: Path, tree: Path, binary: Path) -> None:
    taken = provide(tmp_path, erofs_image(tmp_path, tree))
    assert taken.path.read_bytes() == binary.read_bytes()


@needs_erofs
def test_erofs_without_agent_and_damaged(tmp_path: Path, tree: Path) -> None:
    (tree / "usr/bin/kata-agent").unlink()
    image = erofs_image(tmp_path, tree)
    with pytest.raises(UserError, match="no kata-agent inside"):
        provide(tmp_path, image)
    data = bytearray(image.read_bytes())
    data[MIB + 1028:MIB + 1100] = b"\xff" * 72
    image.write_bytes(data)
    with pytest.raises(StepError):
        provide(tmp_path, image)


@needs_ext4
def test_agent_as_init(tmp_path: Path, tree: Path, binary: Path) -> None:
    (tree / "usr/bin/kata-agent").rename(tree / "usr/sbin/init")
    taken = provide(tmp_path, ext4_image(tmp_path, tree))
    assert taken.path.read_bytes() == binary.read_bytes()
    assert taken.origin.endswith("usr/sbin/init")


@needs_ext4
def test_another_init_is_no_agent(tmp_path: Path, tree: Path) -> None:
    (tree / "usr/bin/kata-agent").unlink()
    with pytest.raises(UserError, match=r"no kata-agent inside \(looked for usr/bin/kata-agent"):
        provide(tmp_path, ext4_image(tmp_path, tree))


@pytest.mark.parametrize("pack", [bytes, lzma.compress, zstandard.compress])
def test_from_an_initrd(tmp_path: Path, tree: Path, binary: Path, pack: type[bytes]) -> None:
    source = tmp_path / "initrd"
    source.write_bytes(pack(initrd(tree)))
    assert agent.kind(source) is Kind.INITRD
    taken = provide(tmp_path, source)
    assert taken.path.read_bytes() == binary.read_bytes()
    assert taken.origin == f"{source}: usr/bin/kata-agent"


@needs_ext4
@pytest.mark.parametrize("pack", [lzma.compress, zstandard.compress])
def test_from_a_release(tmp_path: Path, tree: Path, binary: Path, pack: type[bytes]) -> None:
    image = ext4_image(tmp_path, tree).read_bytes()
    source = tmp_path / "kata-static-4.1.0-amd64.tar.any"
    source.write_bytes(pack(release(
        ("kata-containers.img", "kata-ubuntu-noble.image"), ("other", b"x"),
        ("kata-ubuntu-noble.image", image), ("kata-confidential.image", b"damaged"))))
    taken = provide(tmp_path, source)
    assert taken.path.read_bytes() == binary.read_bytes()
    assert taken.origin.endswith("kata-ubuntu-noble.image: usr/bin/kata-agent")


def test_release_falls_back_to_its_initrd_or_takes_a_bare_agent(
        tmp_path: Path, tree: Path, binary: Path) -> None:
    source = tmp_path / "kata-static.tar"
    source.write_bytes(release(("kata-containers.img", b"damaged"),
                               ("kata-alpine-3.18.initrd", initrd(tree)),
                               ("kata-containers-initrd.img", "kata-alpine-3.18.initrd")))
    assert provide(tmp_path, source).path.read_bytes() == binary.read_bytes()
    source.write_bytes(release(("kata-containers.img", b"x"),
                               ("bin/kata-agent", binary.read_bytes())))
    assert provide(tmp_path, source).origin.endswith("bin/kata-agent")


def test_release_without_agent(tmp_path: Path) -> None:
    source = tmp_path / "kata-static.tar"
    source.write_bytes(release(("vmlinux", b"x")))
    with pytest.raises(UserError, match=r"no kata-agent inside .and no guest image"):
        provide(tmp_path, source)
    source.write_bytes(release(("kata-containers.img", "gone"), ("a.image", b"junk")))
    with pytest.raises(UserError, match="neither an ELF file"):
        provide(tmp_path, source)


def test_bad_sources(tmp_path: Path, binary: Path) -> None:
    source = tmp_path / "source"
    whole = release(("bin/kata-agent", os.urandom(9728)))
    cases: list[tuple[bytes, str]] = [
        (b"#!/bin/sh\n", "neither an ELF file"), (b"", "neither an ELF file"),
        (b"\x7fELF", "not a whole ELF file"), (whole[:4000], "damaged"),
        (lzma.compress(whole)[:4000], "damaged"), (zstandard.compress(whole)[:4000], "damaged"),
        (b"070701" + b"0" * 200, "no kata-agent|not a newc|truncated"),
        (bytes(510) + b"\x55\xaa" + bytes(512), "partition table is empty"),
        (b"XFSB" + bytes(4096), "xfs, which cannot be read"),
    ]
    elf = bytearray(binary.read_bytes())
    elf[18] = 0xB7
    cases.append((bytes(elf), "not a program for x86-64 .EM_AARCH64"))
    for data, message in cases:
        source.write_bytes(data)
        with pytest.raises(UserError, match=message):
            provide(tmp_path, source)
        assert not list(tmp_path.glob("taken*"))
    with pytest.raises(UserError, match="no such file"):
        provide(tmp_path, tmp_path / "absent")


def test_commands(tmp_path: Path) -> None:
    """What a `Tool` is asked to run, for an image whose root file system starts at 3 MiB."""
    asked: list[list[str]] = []

    def record(argv: Sequence[str], *, source: Path, scratch: Path) -> bytes:
        asked.append(list(argv))
        return b""

    content, image, scratch = (tmp_path / name for name in ("content", "image", "scratch"))
    scratch.mkdir()
    for magic in (b"\x53\xef", b""), (b"", b"\xe2\xe1\xf5\xe0"):
        content.write_bytes((bytes(1024) + magic[1]).ljust(1080, b"\0") + magic[0] + bytes(99))
        disk.write(image, disk.layout(6 * MIB, dax=True), [content], disk_signature=1)
        with pytest.raises(UserError, match="no kata-agent inside"):
            agent.provide(image, tmp_path / "taken", scratch=scratch, tool=record)
    assert asked[0] == ["debugfs", "-R", f'dump /usr/bin/kata-agent "{scratch}/dumped"',
                        f"{image}?offset=3145728"]
    assert asked[3] == ["dump.erofs", "--offset=3145728", "--path=/usr/bin/kata-agent", "--cat",
                        str(image)]
