"""Trees: the same directory gives the same bytes anywhere, and comes back as it was."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from katagpu import sandbox
from katagpu.sandbox import Entry, Root
from katagpu.tree import DROPPED, EPOCH, LAID, Capture, capture, unpack

ROOT = os.geteuid() == 0
# a capability set as setcap(8) writes it: version 2, effective, cap_net_raw permitted
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


def needs_attributes(place: Path) -> None:
    """Skip where the file system has no user attributes."""
    try:
        os.setxattr(place, "user.katagpu.probe", b"")
        os.removexattr(place, "user.katagpu.probe")
    except OSError:
        pytest.skip(f"no extended attributes in {place}")


def identity(root: Path, *, overlay: bool = False, drop: tuple[str, ...] = DROPPED) -> str:
    """The identity of a directory."""
    return Capture(root, overlay=overlay, drop=drop).write(io.BytesIO())


def members(root: Path, *, overlay: bool = False,
            drop: tuple[str, ...] = DROPPED) -> dict[str, tarfile.TarInfo]:
    """What a directory's tar holds, in its order."""
    packed = io.BytesIO()
    Capture(root, overlay=overlay, drop=drop).write(packed)
    packed.seek(0)
    with tarfile.open(fileobj=packed) as tar:
        return {member.name: member for member in tar.getmembers()}


def make(root: Path, *, backwards: bool = False) -> Path:
    """A directory with one of everything that an ordinary user may make."""
    root.mkdir()
    steps: list[Callable[[], object]] = [
        lambda: (root / "bin").mkdir(mode=0o755),
        lambda: (root / "etc").mkdir(mode=0o700),
        lambda: (root / "zeta").write_text("last\n"),
        lambda: (root / "Beta").write_text("upper case sorts first\n"),
        lambda: (root / "ä").write_text("bytes sort\n"),
        lambda: (root / "link").symlink_to("bin/tool"),
        lambda: (root / "broken").symlink_to("/no/where"),
        lambda: os.mkfifo(root / "fifo", 0o640),
        lambda: (root / "empty").mkdir(),
    ]
    for step in reversed(steps) if backwards else steps:
        step()
    (root / "bin" / "tool").write_bytes(b"\x7fELF" + bytes(5000))
    (root / "bin" / "tool").chmod(0o4755)
    os.link(root / "bin" / "tool", root / "bin" / "hard")
    (root / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    for path in [*root.rglob("*"), root]:
        if not path.is_symlink() and path.name != "tool" and path.name != "hard":
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (EPOCH - 1000, EPOCH - 1000), follow_symlinks=False)
        if ROOT:
            os.chown(path, 0, 0, follow_symlinks=False)
    (root / "bin" / "tool").chmod(0o4755)
    return root


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """Such a directory."""
    return make(tmp_path / "full")


# the same bytes


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="the owners are in it")
def test_the_byte_format_is_pinned(full: Path) -> None:
    """Another digest means other bytes for every tree: raise the mechanism's number.

    Or another Python writes tar archives in another way, which must not be.
    """
    os.setxattr(full / "zeta", "user.note", b"\x00\xff")
    (full / ("n" * 150)).write_text("")
    os.utime(full / ("n" * 150), (1, 1))
    assert identity(full) == GOLDEN


GOLDEN = "071ef310b9c79d6f3cf9168401351e9e93cf5aefc052ca1773afee95340e1b89"


def test_place_order_and_later_times_do_not_count(full: Path, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    other = make(tmp_path / "some" / "other", backwards=True)
    for number, path in enumerate([*full.rglob("*")]):
        os.utime(path, (EPOCH, EPOCH + number), follow_symlinks=False)
    for number, path in enumerate([*other.rglob("*")]):
        os.utime(path, (0, EPOCH + 10**6 + number), follow_symlinks=False)
    assert identity(full) == identity(other)


def test_the_order_of_the_directory_does_not_count(
    full: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = identity(full)
    real = os.scandir

    class Backwards:
        """A directory that is read backwards."""

        def __init__(self, path: str) -> None:
            with real(path) as scan:
                self.entries = list(scan)[::-1]

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

        def __exit__(self, *_what: object) -> None:
            """Nothing."""

    monkeypatch.setattr(os, "scandir", Backwards)
    assert identity(full) == before


def test_the_umask_does_not_count(full: Path, tmp_path: Path) -> None:
    found = []
    for number, mask in enumerate((0o000, 0o022, 0o077)):
        old = os.umask(mask)
        try:
            blob = tmp_path / f"blob{number}"
            found.append(capture(full, blob, overlay=False))
            assert unpack(blob, tmp_path / f"out{number}", overlay=False) == found[0]
            found.append(identity(tmp_path / f"out{number}"))
            assert (tmp_path / f"out{number}").stat().st_mode & 0o777 == 0o755
        finally:
            os.umask(old)
    assert len(set(found)) == 1


@pytest.mark.parametrize("change", ["content", "mode", "time", "name", "target", "attribute"])
def test_what_counts(full: Path, change: str) -> None:
    needs_attributes(full)
    before = identity(full)
    passwd = full / "etc" / "passwd"
    if change == "content":
        passwd.write_text(passwd.read_text().replace("/bin/sh", "/bin/ch"))
        os.utime(passwd, (EPOCH - 1000, EPOCH - 1000))
    elif change == "mode":
        passwd.chmod(0o640)
    elif change == "time":
        os.utime(passwd, (0, EPOCH - 999))
    elif change == "name":
        passwd.rename(full / "etc" / "passwe")
        os.utime(full / "etc", (EPOCH - 1000, EPOCH - 1000))
    elif change == "target":
        (full / "link").unlink()
        (full / "link").symlink_to("bin/toot")
        os.utime(full / "link", (EPOCH - 1000, EPOCH - 1000), follow_symlinks=False)
    else:
        os.setxattr(passwd, "user.x", b"1")
    assert identity(full) != before


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "xx_YY.UTF-8"])
def test_the_locale_does_not_count(full: Path, repository: Path, locale: str) -> None:
    (full / "\udcff\udcfe").write_text("not UTF-8\n")
    os.utime(full / "\udcff\udcfe", (EPOCH - 1000, EPOCH - 1000))
    code = "import sys, os; sys.path.insert(0, sys.argv[1]); from pathlib import Path; " \
           "from katagpu.tree import Capture; " \
           "print(Capture(Path(sys.argv[2]), overlay=False).write(open(os.devnull, 'wb')))"
    said = subprocess.run([sys.executable, "-c", code, repository, full],
                          capture_output=True, text=True, check=True,
                          env={"LC_ALL": locale}).stdout
    assert said.strip() == identity(full)


# and back


def packed(root: Path, tmp_path: Path, **form: Any) -> tuple[Path, str]:
    """A directory as a blob, and its identity."""
    blob = tmp_path / "blob"
    return blob, capture(root, blob, overlay=form.get("overlay", False),
                         final=form.get("final", False))


def test_a_tree_comes_back_as_it_was(full: Path, tmp_path: Path) -> None:
    blob, found = packed(full, tmp_path)
    assert unpack(blob, tmp_path / "out", overlay=False) == found
    out = tmp_path / "out"
    assert identity(out) == found == identity(full)
    assert (out / "bin" / "tool").stat().st_ino == (out / "bin" / "hard").stat().st_ino
    assert (out / "bin" / "tool").stat().st_mode & 0o7777 == 0o4755
    assert stat.S_ISFIFO((out / "fifo").stat().st_mode)
    assert (out / "zeta").stat().st_mtime == EPOCH - 1000


def test_hard_links_have_one_body(full: Path) -> None:
    found = members(full)
    assert found["bin/hard"].isreg() and found["bin/tool"].islnk()
    assert found["bin/tool"].linkname == "bin/hard"


def test_a_hard_link_whose_first_name_is_dropped_keeps_its_body(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "var" / "log").mkdir(parents=True)
    (root / "var" / "log" / "a").write_text("body")
    os.link(root / "var" / "log" / "a", root / "var" / "z")
    assert members(root)["var/z"].isreg()


ODD = ["new\nline", "\udcff\udcfe", "n" * 255, "ä" * 60, "-rf", " space ", "tab\t", "a\\b", "'\"",
       "*", "=", "%41", "100%"]


def test_odd_names_come_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    deep = root / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    for name in ODD:
        (deep / name).write_text(repr(name))
        (root / name).symlink_to(name)
        os.link(deep / name, root / f"{name[:200]}.hard")
    blob, found = packed(root, tmp_path)
    assert unpack(blob, tmp_path / "out", overlay=False) == found
    assert identity(tmp_path / "out") == found
    for name in ODD:
        assert (tmp_path / "out" / deep.relative_to(root) / name).read_text() == repr(name)


TARGETS = ["./x", "a//b", "dir/", "../up/", "/", ".", "..", "//x", "x" * 300, "\udcff"]


def test_targets_of_symbolic_links_are_not_tidied(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for number, target in enumerate(TARGETS):
        os.symlink(target, root / str(number))  # noqa: PTH211 (a Path tidies)
    blob, found = packed(root, tmp_path)
    assert unpack(blob, tmp_path / "out", overlay=False) == found
    assert [os.readlink(tmp_path / "out" / str(number))  # noqa: PTH115 (a Path tidies)
            for number in range(len(TARGETS))] == TARGETS


def test_attributes_come_back(full: Path, tmp_path: Path) -> None:
    needs_attributes(full)
    values = {"user.text": "ä".encode(), "user.binary": bytes(range(256)), "user.empty": b"",
              "user.lines": b"1\n2=3\n"}
    for name, value in values.items():
        os.setxattr(full / "zeta", name, value)
        os.setxattr(full / "bin", name, value)
    os.setxattr(full / "zeta", "user.overlay.origin", b"left out")
    blob, found = packed(full, tmp_path)
    assert unpack(blob, tmp_path / "out", overlay=False) == found
    for name in ("zeta", "bin"):
        out = tmp_path / "out" / name
        assert {key: os.getxattr(out, key) for key in os.listxattr(out)
                if key.startswith("user.")} == values


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="needs root")
def test_capabilities_come_back_and_the_hosts_labels_do_not(full: Path, tmp_path: Path) -> None:
    plain = identity(full)
    os.setxattr(full / "zeta", "trusted.note", b"the host's")
    assert identity(full) == plain
    os.setxattr(full / "bin" / "hard", "security.capability", CAPABILITY)
    blob, found = packed(full, tmp_path)
    assert found != plain
    assert unpack(blob, tmp_path / "out", overlay=False) == found
    assert os.getxattr(tmp_path / "out" / "bin" / "hard", "security.capability") == CAPABILITY
    assert identity(tmp_path / "out") == found


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="needs root")
def test_owners_and_devices_come_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "far").write_text("")
    os.chown(root / "far", 3_000_000_000, 2_097_152)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 70000))
    blob, found = packed(root, tmp_path)
    assert unpack(blob, tmp_path / "out", overlay=False) == found
    far = (tmp_path / "out" / "far").stat()
    assert (far.st_uid, far.st_gid) == (3_000_000_000, 2_097_152)
    assert (tmp_path / "out" / "disk").stat().st_rdev == os.makedev(259, 70000)
    assert identity(tmp_path / "out") == found


def test_a_sparse_file_has_the_bytes_of_a_full_one(tmp_path: Path) -> None:
    for name in ("sparse", "dense"):
        (tmp_path / name).mkdir()
    with (tmp_path / "sparse" / "disk").open("wb") as stream:
        stream.truncate(1 << 20)
        stream.seek(512 << 10)
        stream.write(b"data")
    (tmp_path / "dense" / "disk").write_bytes((tmp_path / "sparse" / "disk").read_bytes())
    assert identity(tmp_path / "sparse") == identity(tmp_path / "dense")


def test_sockets_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path / "root")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("sock")
        assert members(tmp_path / "root") == {}


# the blob is storage only


def test_the_identity_does_not_know_the_compressor(full: Path, tmp_path: Path) -> None:
    plain = io.BytesIO()
    found = Capture(full, overlay=False).write(plain)
    assert hashlib.sha256(plain.getvalue()).hexdigest() == found
    for threads in (0, 1, 4):
        assert capture(full, tmp_path / f"t{threads}", overlay=False, threads=threads) == found
    for level in (1, 19):
        blob = tmp_path / f"l{level}"
        blob.write_bytes(zstandard.ZstdCompressor(level=level).compress(plain.getvalue()))
        assert unpack(blob, tmp_path / f"out{level}", overlay=False) == found


def test_a_damaged_blob_has_another_identity_and_raises_nothing(
    full: Path, tmp_path: Path,
) -> None:
    (full / "random").write_bytes(random.Random(1).randbytes(3000))
    blob, found = packed(full, tmp_path)
    good = blob.read_bytes()
    bits = [*range(0, 80, 3), *random.Random(2).sample(range(len(good) * 8), 25)]
    damaged = [good[:at] + bytes([good[at] ^ (1 << bit % 8)]) + good[at + 1:]
               for bit in bits for at in [bit // 8]]
    damaged += [b"", good[:3], good[:-1], good[:len(good) // 2], b"no zstd at all" * 100]
    for number, data in enumerate(damaged):
        blob.write_bytes(data)
        target = tmp_path / f"out{number}"
        if unpack(blob, target, overlay=False) == found:  # a bit that means nothing
            assert identity(target) == found
        shutil.rmtree(target)
    blob.write_bytes(good[:len(good) // 2])
    assert unpack(blob, tmp_path / "out", overlay=False) != found


def test_another_whole_tree_has_another_identity(full: Path, tmp_path: Path) -> None:
    _blob, found = packed(full, tmp_path)
    (full / "zeta").write_text("LAST\n")
    other, _ = packed(full, tmp_path)
    assert unpack(other, tmp_path / "out", overlay=False) != found


# what is left out


def test_what_differs_from_run_to_run_is_dropped(tmp_path: Path) -> None:
    root = tmp_path / "root"
    gone = ["dev/null", "proc/1/stat", "run/lock/x", "tmp/x", "etc/hostname", "etc/passwd-",
            "var/log/apt/term.log", "var/lib/dpkg/status-old", "var/lib/dpkg/lock-frontend",
            "usr/lib/python3/__pycache__/a.cpython.pyc", "usr/lib/b.pyc",
            "var/cache/ldconfig/aux-cache", "etc/apt/sources.list.d/x.list"]
    kept = ["etc/passwd", "etc/hostname.d/x", "var/lib/dpkg/status", "usr/lib/b.py",
            "var/lib/dpkg/info/x.list", "home/tmp/x", "usr/dev/x"]
    for name in [*gone, *kept]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = members(root)
    assert [name for name in gone if name in found] == []
    assert [name for name in kept if name not in found] == []
    for name in ("dev", "proc", "run", "tmp", "var/log"):
        assert found[name].isdir(), "the mount points stay"
    assert "usr/lib/python3/__pycache__" not in found


def test_what_the_guest_gets_again_is_kept_in_the_final_layer_only(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    for name in LAID:
        (root / name).write_text("the guest's")
    (root / "etc" / "shadow-").write_text("x")
    blob, _found = packed(root, tmp_path)
    unpack(blob, tmp_path / "plain", overlay=False)
    assert list((tmp_path / "plain" / "etc").iterdir()) == []
    blob, _found = packed(root, tmp_path, final=True)
    unpack(blob, tmp_path / "final", overlay=False)
    assert sorted(f"etc/{path.name}" for path in (tmp_path / "final" / "etc").iterdir()) == \
        sorted(LAID)


def test_the_machine_id_is_an_empty_file(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "machine-id").write_text("0123456789abcdef\n")
    found = members(root)["etc/machine-id"]
    assert found.isreg() and found.size == 0


# layers


def test_a_file_that_looks_like_a_whiteout_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / ".wh.file").write_text("")
    with pytest.raises(OSError, match="a layer cannot hold a file of this name"):
        identity(root)


CHANGES = """
set -e
cd "$1"
rm gone
rm -r replaced
mkdir replaced
echo new > replaced/new
mkdir -p replaced/deep
rm directory/inner
rm -r whole
echo changed > changed
ln kept hard
ln -s kept soft
mkdir -m 700 secret
mv moved new-name
rm -r file-now
echo file > file-now
rm now-directory
mkdir now-directory
rm "odd
name"
chmod 600 mode
"""

SNAPSHOT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from katagpu.tree import Capture
print(Capture(Path(sys.argv[2]), overlay=False, drop=()).write(open("/dev/null", "wb")))
"""


def lower(place: Path) -> Path:
    """A directory to make changes on."""
    place.mkdir()
    for name in ("gone", "kept", "changed", "moved", "now-directory", "odd\nname", "mode"):
        (place / name).write_text(name)
    for name in ("replaced", "replaced/deep", "directory", "whole", "file-now"):
        (place / name).mkdir()
        (place / name / "inner").write_text(name)
    return place


def view(roots: Root, scratch: Path, repository: Path) -> str:
    """The identity of a stack of layers as a program sees it."""
    scratch.mkdir()
    entry = Entry(argv=(), roots=(), scratch=scratch)
    entry = Entry(argv=[sys.executable, "-I", "-c", SNAPSHOT, str(repository), str(entry.mount)],
                  roots=[roots], scratch=scratch, stay=True)
    return sandbox.enter(entry, capture=True).stdout.decode().strip()


def test_a_layer_is_the_same_below_as_it_was_on_top(tmp_path: Path, repository: Path) -> None:
    sandbox.probe()
    below, upper, scratch = lower(tmp_path / "lower"), tmp_path / "upper", tmp_path / "scratch"
    scratch.mkdir()
    mount = Entry(argv=(), roots=(), scratch=scratch).mount
    sandbox.enter(Entry(argv=["sh", "-c", CHANGES, "sh", str(mount)], scratch=scratch, stay=True,
                        roots=[Root(lower=(below,), upper=upper, special=False)]))
    blob = tmp_path / "blob"
    form = sandbox.Form(overlay=True)
    found = sandbox.capture(upper, blob, form)
    layer = tmp_path / "layer"
    assert sandbox.unpack(blob, layer, overlay=True) == found

    on_top = Root(lower=(below,), upper=upper, special=False)
    under = Root(lower=(layer, below), special=False)
    seen = view(on_top, tmp_path / "one", repository)
    assert view(under, tmp_path / "two", repository) == seen
    assert seen != view(Root(lower=(below,), special=False), tmp_path / "three", repository)

    again = tmp_path / "again"
    assert sandbox.capture(layer, again, form) == found, "and a layer's capture is the layer"
    plain = tmp_path / "plain"
    assert sandbox.unpack(blob, plain, overlay=False) == found
    assert {path.name for path in plain.rglob(".wh.*")} >= {".wh.gone", ".wh.whole", ".wh.inner",
                                                           ".wh..wh..opq", ".wh.odd\nname"}
    assert not [path for path in plain.rglob("*") if stat.S_ISCHR(path.lstat().st_mode)]
    for path in (upper, layer, plain):
        sandbox.remove(path)
        assert not path.exists()


@pytest.mark.root
@pytest.mark.skipif(not ROOT, reason="needs root")
def test_markers_of_an_upper_directory_become_whiteouts(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    (upper / "d").mkdir(parents=True)
    os.mknod(upper / "gone", stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(upper / "d" / "gone", stat.S_IFCHR, os.makedev(0, 0))
    (upper / "d" / "new").write_text("")
    os.setxattr(upper / "d", "user.overlay.opaque", b"y")
    found = members(upper, overlay=True)
    assert list(found) == ["d", "d/.wh..wh..opq", ".wh.gone", "d/.wh.gone", "d/new"]
    marker = found[".wh.gone"]
    assert marker.isreg() and (marker.size, marker.mode, marker.uid, marker.mtime) == (
        0, 0o644, 0, EPOCH)
    assert not found["d"].pax_headers, "an overlay's own attributes stay out"
    assert members(upper)["gone"].ischr(), "without `overlay` a device is a device"
