"""The list of a guest's files: canonical, complete, and read by others."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from katagpu import filelist, packing
from katagpu.filelist import Entry, Kind

ODD = "a b\\#*?[\x07\né\udcff"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with every type of file that an ordinary user can make, and odd names."""
    top = tmp_path / "tree"
    (top / "usr/bin").mkdir(parents=True)
    (top / "usr/bin/tool").write_text("tool")
    (top / "usr/bin/tool").chmod(0o4755)
    (top / "usr-x").write_text("")
    (top / "link").symlink_to("usr/bin/../bin/tool here")
    (top / "odd").mkdir()
    (top / "odd" / ODD).write_text("odd")
    os.mkfifo(top / "pipe")
    top.chmod(0o755)
    return top


def by_path(top: Path) -> dict[str, Entry]:
    """The entries by path."""
    return {entry.path: entry for entry in filelist.scan(top)}


def test_what_is_known_of_each_entry(tree: Path) -> None:
    found = by_path(tree)
    assert list(found) == ["", "link", "odd", f"odd/{ODD}", "pipe", "usr", "usr-x", "usr/bin",
                           "usr/bin/tool"]
    tool = found["usr/bin/tool"]
    assert (tool.kind, tool.mode, tool.size) == (Kind.FILE, 0o4755, 4)
    assert tool.content == subprocess.run(
        ["sha256sum"], input=b"tool", capture_output=True, check=True).stdout.decode().split()[0]
    assert (tool.uid, tool.gid) == (os.getuid(), os.getgid())
    link = found["link"]
    assert (link.kind, link.content, link.size) == (Kind.LINK, "usr/bin/../bin/tool here", 0)
    assert found["pipe"].kind is Kind.FIFO
    assert found[""].kind is Kind.DIRECTORY


def test_what_is_written_is_read(tree: Path) -> None:
    entries = [*filelist.scan(tree), Entry(path="dev", kind=Kind.CHARACTER, mode=0o600, uid=1,
                                           gid=2, content="1,3")]
    data = filelist.render(entries)
    assert list(filelist.parse(data)) == entries
    assert data.isascii()
    assert len(data.splitlines()) == len(entries) + 1
    assert b"./dev type=char mode=0600 uid=1 gid=2 device=linux,1,3\n" in data
    assert data.startswith(b"#mtree\n. type=dir mode=0755 ")


def test_the_same_tree_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    other.chmod(0o755)
    for name in ("pipe", "odd", "usr-x", "usr", "link"):  # in another order, at another time
        subprocess.run(["cp", "-a", tree / name, other / name], check=True)
    os.utime(other / "usr/bin/tool", (0, 0))
    assert filelist.render(filelist.scan(other)) == filelist.render(filelist.scan(tree))
    (other / "usr/bin/tool").write_text("tOol")
    assert filelist.render(filelist.scan(other)) != filelist.render(filelist.scan(tree))


def test_a_survey_writes_the_list_and_sums_the_parts(tree: Path, tmp_path: Path) -> None:
    (tree / "usr/share/doc").mkdir(parents=True)
    (tree / "usr/share/doc/copyright").write_text("ten bytes\n")
    (tree / "usr/bin/nvidia-smi").write_text("x" * 500)
    (tree / "usr/bin/linked").hardlink_to(tree / "usr/bin/nvidia-smi")
    target = tmp_path / "files"
    assert list(packing.survey(tree, str(target)).items()) == [
        ("distribution", 507), ("NVIDIA user space: nvidia-smi", 500), ("licences", 10)]
    assert target.read_bytes() == filelist.render(filelist.scan(tree))


def test_extended_attributes(tree: Path) -> None:
    try:
        os.setxattr(tree / "usr/bin/tool", "user.word", b"\x01a b")
        os.setxattr(tree / "usr/bin/tool", "user.overlay.opaque", b"y")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    entry = by_path(tree)["usr/bin/tool"]
    assert entry.attributes == "user.word:01612062"
    assert list(filelist.parse(filelist.render([entry]))) == [entry]


@pytest.mark.parametrize("data", [
    b"", b"{}", b"#mtree\n./a type=file", b"#mtree\n./a type=file mode=0644\n",
    b"#mtree\n./a type=sock mode=0644 uid=0 gid=0\n", b"#mtree\n./a type=file mode=9 uid=0 gid=0\n",
    b"#mtree\n\n", b"#mtree\n./a type\n",
])
def test_what_is_no_list(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"line 2 is not an entry|begin and end"):
        list(filelist.parse(data))


def test_libarchive_reads_it(tree: Path, tmp_path: Path) -> None:
    name = ctypes.util.find_library("archive")
    if name is None:
        pytest.skip("needs libarchive of the host")
    library = ctypes.CDLL(name)
    for function in ("archive_read_new", "archive_entry_pathname", "archive_entry_symlink"):
        getattr(library, function).restype = ctypes.c_void_p
    library.archive_entry_size.restype = ctypes.c_int64
    path = tmp_path / "files.mtree"
    path.write_bytes(filelist.render(filelist.scan(tree)))
    archive = ctypes.c_void_p(library.archive_read_new())
    library.archive_read_support_format_all(archive)
    assert library.archive_read_open_filename(archive, os.fsencode(path), 10240) == 0
    entry, found = ctypes.c_void_p(), {}
    while library.archive_read_next_header(archive, ctypes.byref(entry)) == 0:
        word = ctypes.string_at(library.archive_entry_pathname(entry))
        link = library.archive_entry_symlink(entry)
        found[os.fsdecode(word).removeprefix(".").removeprefix("/")] = (
            library.archive_entry_perm(entry), library.archive_entry_size(entry),
            ctypes.string_at(link).decode() if link else "")
    library.archive_read_free(archive)
    assert found == {one.path: (one.mode, one.size,
                                one.content if one.kind is Kind.LINK else "")
                     for one in filelist.scan(tree)}


@pytest.mark.skipif(shutil.which("mtree") is None, reason="needs mtree of the host")
def test_mtree_verifies_a_tree_by_it(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "files.mtree"
    path.write_bytes(filelist.render(filelist.scan(tree)))
    assert subprocess.run(["mtree", "-p", tree, "-f", path]).returncode == 0
    (tree / "usr/bin/tool").write_text("tOol")
    assert subprocess.run(["mtree", "-p", tree, "-f", path]).returncode != 0
