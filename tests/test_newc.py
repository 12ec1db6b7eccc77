"""Initramfs archives. Host tools: cpio for one test, skipped without it."""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from katagpu import newc
from katagpu.errors import UserError

TIME = 1_700_000_000


def member(name: str, kind: bytes = tarfile.REGTYPE, *, data: bytes = b"", link: str = "",
           mode: int = 0o644, owner: tuple[int, int] = (0, 0), capability: bool = False,
           ) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode, info.size = kind, link, mode, len(data)
    info.uid, info.gid = owner
    info.mtime = 2_000_000_000
    if capability:
        info.pax_headers = {"SCHILY.xattr.security.capability": "\x01"}
    return info, data


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> Callable[[], IO[bytes]]:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return lambda: io.BytesIO(raw.getvalue())


TREE = archive(
    member("bin", tarfile.DIRTYPE, mode=0o755),
    member("bin/a", data=b"hello", mode=0o4755, owner=(1234, 56)),
    member("bin/b", tarfile.LNKTYPE, link="bin/a", mode=0o4755, owner=(1234, 56)),
    member("bin/l", tarfile.SYMTYPE, link="a", mode=0o777),
    member("bin/ping", data=b"ping", capability=True),
    member("null", tarfile.CHRTYPE),
)


def packed(tree: Callable[[], IO[bytes]] = TREE) -> tuple[bytes, list[str]]:
    out = io.BytesIO()
    lost = newc.write(tree, out, time=TIME)
    return out.getvalue(), lost


def test_same_tree_same_bytes_and_lost_capabilities_are_told() -> None:
    data, lost = packed()
    assert data == packed()[0]
    assert lost == ["bin/ping"]
    assert len(data) % 4 == 0


def test_header_fields() -> None:
    data, _ = packed()
    head = data.index(b"bin/a\0") - newc.HEADER
    fields = [int(data[head + 6 + 8 * at:head + 14 + 8 * at], 16) for at in range(13)]
    assert data[head:head + 6] == b"070701"
    assert fields[1:7] == [0o104755, 1234, 56, 2, TIME, 5]
    assert fields[11] == 6


def test_init_is_added_unless_there_is_one() -> None:
    data, _ = packed()
    assert b"init\0\0/lib/systemd/systemd" in data
    own, _ = packed(archive(member("init", data=b"mine", mode=0o755)))
    assert b"systemd" not in own
    assert dict(newc.read(io.BytesIO(own), ["init"])) == {"init": b"mine"}


def test_read_finds_files_with_data() -> None:
    data, _ = packed()
    assert dict(newc.read(io.BytesIO(data), ["bin/a", "bin/ping", "none"])) == {
        "bin/a": b"hello", "bin/ping": b"ping"}


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
def test_cpio_unpacks_it(tmp_path: Path) -> None:
    tree = archive(*[(info, data) for info, data in (
        member("d", tarfile.DIRTYPE, mode=0o755), member("d/a", data=b"hello"),
        member("d/b", tarfile.LNKTYPE, link="d/a"), member("d/l", tarfile.SYMTYPE, link="a"),
        member("d/z", data=b"zzz"))])
    subprocess.run(["cpio", "--extract", "--quiet", "--no-absolute-filenames"], check=True,
                   input=packed(tree)[0], cwd=tmp_path)
    assert (tmp_path / "d/a").read_bytes() == b"hello"
    assert (tmp_path / "d/a").samefile(tmp_path / "d/b")
    assert (tmp_path / "d/l").readlink() == Path("a")
    assert (tmp_path / "d/z").read_bytes() == b"zzz"
    assert (tmp_path / "init").readlink() == Path("/lib/systemd/systemd")


def test_damaged_archives() -> None:
    data, _ = packed()
    with pytest.raises(UserError, match="truncated"):
        dict(newc.read(io.BytesIO(data[:300]), ["bin/a"]))
    with pytest.raises(UserError, match="not a newc"):
        dict(newc.read(io.BytesIO(b"x" * 200), ["bin/a"]))
