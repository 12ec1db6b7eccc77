"""The client token: in the image in out/ it is there, and nowhere else is a byte of it.

Images are packed with the host's tools: mke2fs and debugfs, zstd, mkfs.erofs 1.8 or newer.
Run as a script, this file is the build that the tests kill: `test_embed.py TOP`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace

if __name__ == "__main__":
    sys.path.insert(0, os.environ["REPOSITORY"])

from katagpu import disk, embed, lock, log, receipt, recipe, request, sandbox
from katagpu.context import Context
from katagpu.errors import UserError
from katagpu.keys import PACKAGE
from katagpu.plan import Plan
from katagpu.recipe import Recipe, Vgpu
from katagpu.schema import Compression, DriverSource, ImageFormat, ToolkitSource
from katagpu.stages import final, image, sbom
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind
from tests.test_filesystem import tool_version

SECRET = b"eyJhbGciOiJSUzI1NiJ9.a-secret-that-nobody-else-has.c2lnbmF0dXJl"
PLACE = "/etc/nvidia/ClientConfigToken/client_configuration_token.tok"
TOOLS = ("env", "mkfs.erofs", "mke2fs", "zstd")
IMAGE = "kata-debian-trixie-nvidia-gpu-no-driver.image"
INITRD = "kata-debian-trixie-nvidia-gpu-no-driver.initrd"
LINK = final.INITRD
TASK = "build_image"
SMALL = {"format": ImageFormat.INITRD, "compression": Compression.NONE}
EXT4 = {"format": ImageFormat.EXT4, "compression": Compression.NONE}
EROFS = {"format": ImageFormat.EROFS, "compression": Compression.NONE}
needs_ext4 = pytest.mark.skipif(shutil.which("mke2fs") is None, reason="needs mke2fs")
needs_erofs = pytest.mark.skipif(tool_version("mkfs.erofs", "-V") < (1, 8),
                                 reason="needs mkfs.erofs 1.8")


def make_tools(build: Build) -> None:
    """A root with the host's image tools and the libraries that they need."""
    top = build.directory("root")
    for tool in filter(shutil.which, TOOLS):
        program = Path(shutil.which(tool) or "").resolve()
        said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        needed = [word for line in said.splitlines() for word in line.split() if word[0] == "/"]
        # glibc opens it when a thread ends; ldd does not know.
        needed += [str(Path(word).with_name("libgcc_s.so.1")) for word in needed
                   if Path(word).with_name("libgcc_s.so.1").exists()]
        for source, place in [(program, f"usr/bin/{tool}"), *((Path(each), each.lstrip("/"))
                                                               for each in needed)]:
            (top / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, top / place)
    build.put_tree("root", top)


def make_no_tools(build: Build) -> None:
    """A root without any, for an archive that is not compressed."""
    build.put_tree("root", build.directory("root"))


def make_kernel(build: Build) -> None:
    """What a kernel puts out."""
    build.facts["release"] = "6.1-toy"
    for name, kind in build.stage.outputs.items():
        if kind is Kind.FILE:
            build.put_bytes(name, b"6.1-toy" if name == "release" else name.encode() * 99)
    modules = build.directory("modules")
    (modules / "usr/lib/modules").mkdir(parents=True)
    build.put_tree("modules", modules)


def make_base(build: Build) -> None:
    """A root with files enough to be packed."""
    top = build.directory("root")
    for name in ("etc/nvidia", "usr/bin", "var/lib"):
        (top / name).mkdir(parents=True)
    for number in range(20):
        (top / f"usr/bin/{number}").write_bytes(os.urandom(1000) * 20)
    (top / "etc/nvidia/gridd.conf").write_text("FeatureType=1\n")
    build.put_tree("root", top)


def make_rootfs(build: Build) -> None:
    """The topmost layer, with the token's place."""
    top = build.directory("layer")
    (top / "etc/nvidia/ClientConfigToken").mkdir(parents=True)
    build.put_tree("layer", top)
    build.put_bytes("report", b"every check passed\n")


def make_config(build: Build) -> None:
    """A kernel's configuration."""
    build.put_bytes("config", b"CONFIG_EROFS_FS=y\nCONFIG_BLK_DEV_INITRD=y\nCONFIG_RD_ZSTD=y\n")


def stages(chosen: Recipe) -> dict[str, Stage]:
    """Toys, with the real stages at the end: image, Kata's configuration and manifest."""
    none = lock.Lock(recipe=chosen.name, request="", groups={})
    files = dict.fromkeys(("vmlinuz", "vmlinux", "system_map", "headers", "release"), Kind.FILE)
    found = [
        Stage(name="base", title="", module="errors", make=make_base,
              outputs={"root": Kind.TREE}),
        Stage(name="imagetools", title="", module="errors",
              make=make_no_tools if chosen.image.format is ImageFormat.INITRD else make_tools,
              outputs={"root": Kind.TREE}),
        Stage(name="kernel", title="", module="errors", make=make_kernel,
              outputs={**files, "modules": Kind.TREE}),
        Stage(name="kernel_source", title="", module="errors", outputs={"tarball": Kind.FILE},
              make=lambda build: build.put_bytes("tarball", b"linux")),
        Stage(name="kernel_config", title="", module="errors", make=make_config,
              outputs={"config": Kind.FILE}),
        Stage(name="rootfs", title="", module="errors", make=make_rootfs,
              outputs={"layer": Kind.TREE, "report": Kind.FILE}),
        image.image(chosen), image.initrd(chosen), final.kata_config(chosen),
        final.initrd_config(chosen), sbom.contents_of(chosen, none),
        final.manifest(chosen, none, PACKAGE.parent)]
    return {stage.name: stage for stage in found}


def context(top: Path, *, token: bool = True,
            packing: Mapping[str, object] = SMALL) -> Context:
    """A run on toy stages; the token is top/token.tok."""
    os.environ["KATAGPU_STORE"] = str(top / "store")
    shutil.copytree(PACKAGE.parent / "recipes", top / "recipes", dirs_exist_ok=True)
    default = recipe.load("debian-trixie", PACKAGE.parent)
    chosen = replace(
        default, driver=replace(default.driver, source=DriverSource.NONE, version=None),
        toolkit=replace(default.toolkit, source=ToolkitSource.NONE, version=None),
        image=replace(default.image, **packing),
        vgpu=Vgpu(embed_token=token, token_file="token.tok" if token else None))
    made = Context(top, {}, environment={})
    made.__dict__["recipe"] = chosen
    lock.write(lock.Lock(recipe=chosen.name, request=request.identity(chosen, top), groups={}),
               made.locks.path)
    made.__dict__["plan"] = Plan(stages(chosen), made.store, made.directory / "logs")
    return made


def run(made: Context, task: str = TASK) -> None:
    """What a task does, as tasks.build has it."""
    wanted = ["image", "kata_config", "sbom", "manifest"] if task == TASK else [
        "initrd", "initrd_config"]
    for stage in wanted:
        made.ensure(stage)
    made.restore(task)
    made.finish(task, wanted)
    made.sign(task, "up to date")


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository with a token."""
    monkeypatch.setenv("KATAGPU_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(log, "record", log.Record())
    (tmp_path / "token.tok").write_bytes(SECRET)
    yield tmp_path
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    sandbox.remove(tmp_path)


def with_the_secret(top: Path, secret: bytes = SECRET) -> set[str]:
    """Every file below a directory that has the token in it, in full or as its digest."""
    import hashlib

    marks = (secret, secret[20:50], hashlib.sha256(secret).hexdigest().encode())
    return {str(path.relative_to(top)) for path in top.rglob("*")
            if path.is_file() and not path.is_symlink()
            and any(mark in path.read_bytes() for mark in marks)}


def from_initrd(archive: bytes) -> bytes:
    """The token's file of a newc archive (initramfs buffer format, kernel documentation)."""
    place = 0
    while archive[place:place + 6] == b"070701":
        fields = [int(archive[at:at + 8], 16) for at in range(place + 6, place + 110, 8)]
        size, length = fields[6], fields[11]
        name = archive[place + 110:place + 109 + length].decode()
        data = place + (110 + length + 3) // 4 * 4
        if name == PLACE[1:]:
            return archive[data:data + size]
        place = data + (size + 3) // 4 * 4
    raise AssertionError("no token in the archive")


def read(made: Context) -> bytes:
    """The token's file as the guest would read it."""
    if (made.directory / LINK).exists():
        return from_initrd((made.directory / LINK).read_bytes())
    (partition,) = disk.partitions(made.directory / IMAGE)
    system = made.directory.parent / "fs"
    with (made.directory / IMAGE).open("rb") as stream:
        stream.seek(partition.offset)
        system.write_bytes(stream.read(partition.size))
    try:
        if disk.fs_type(system) is disk.FsType.EXT4:
            return subprocess.run(["/sbin/debugfs", "-R", f"cat {PLACE}", system],
                                  capture_output=True, check=True).stdout
        target = made.directory.parent / "x"
        subprocess.run(["fsck.erofs", f"--extract={target}", system], check=True,
                       capture_output=True)
        content = (target / PLACE.lstrip("/")).read_bytes()
        shutil.rmtree(target)
        return content
    finally:
        system.unlink()


@pytest.mark.parametrize("packing", [
    pytest.param(EXT4, marks=needs_ext4),
    pytest.param({**EXT4, "dax_header": True}, marks=needs_ext4),
    pytest.param(EROFS, marks=needs_erofs),
    pytest.param({**EROFS, "dax_header": True}, marks=needs_erofs),
], ids=["ext4", "ext4 dax", "erofs", "erofs dax"])
def test_the_token_is_in_the_image_and_nowhere_else(top: Path, packing: dict[str, object]) -> None:
    made = context(top, packing=packing)
    run(made)
    place = made.directory / IMAGE
    assert read(made) == SECRET
    assert place.stat().st_mode & 0o777 == 0o600
    assert (made.directory / final.IMAGE).readlink() == Path(IMAGE)
    assert with_the_secret(top) == {"token.tok", str(place.relative_to(top))}
    assert {path.name for path in made.directory.iterdir()} == {
        IMAGE, final.IMAGE, embed.STATE, embed.NOTICE, ".restored.json", "50-katagpu.toml",
        "50-katagpu-runtime-rs.toml", "build-record.json",
        "checks.txt", "config-6.1-toy", "files.mtree", "linux-headers-6.1-toy.deb", "licences.txt",
        "lock.json", "logs", "manifest.json", "sbom.cdx.json", "sbom.spdx.json", "sizes.json",
        "System.map-6.1-toy", "vmlinux-6.1-toy",
        "vmlinux-nvidia-gpu.container", "vmlinuz-6.1-toy", "vmlinuz-nvidia-gpu.container"}
    assert not list((top / "store/staging").iterdir())
    assert made.complete(TASK)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
def test_an_initrd_takes_it_too(top: Path) -> None:
    made = context(top, packing=EXT4)
    run(made, "build_initrd")
    place = made.directory / "kata-debian-trixie-nvidia-gpu-no-driver.initrd"
    said = subprocess.run(["zstd", "--decompress", "--stdout", place], capture_output=True,
                          check=True).stdout
    assert from_initrd(said) == SECRET
    assert place.stat().st_mode & 0o777 == 0o600
    assert with_the_secret(top) <= {"token.tok", str(place.relative_to(top))}
    assert not list(made.directory.glob(f"{embed.SCRATCH}*"))


def test_the_manifest_says_so_and_is_true(top: Path) -> None:
    from katagpu.keys import file_digest

    made = context(top)
    run(made)
    manifest = json.loads((made.directory / "manifest.json").read_bytes())
    assert manifest[embed.MARKER] is True
    assert manifest["parts"]["image"]["sha256"] == file_digest(made.directory / INITRD)
    run(context(top, token=False))
    manifest = json.loads((made.directory / "manifest.json").read_bytes())
    assert embed.MARKER not in manifest
    assert manifest["parts"]["image"]["sha256"] == file_digest(made.directory / INITRD)


def test_without_it_the_image_is_the_stores_again(top: Path) -> None:
    """And the stages are the same: nothing is made again for a token."""
    plain = context(top, token=False)
    run(plain)
    before = (plain.directory / INITRD).read_bytes()
    actions = sorted((top / "store/actions").iterdir())
    run(context(top))
    assert (plain.directory / INITRD).read_bytes() != before
    assert sorted((top / "store/actions").iterdir()) == actions
    assert not context(top, token=False).complete(TASK)
    run(context(top, token=False))
    assert (plain.directory / INITRD).read_bytes() == before
    assert (plain.directory / INITRD).stat().st_mode & 0o777 == 0o644
    assert with_the_secret(top) == {"token.tok"}
    assert not context(top).complete(TASK)


def test_what_is_there_stays_until_something_differs(top: Path) -> None:
    made = context(top)
    run(made)
    before = receipt.mark(made.directory / INITRD)
    again = context(top)
    assert again.complete(TASK)
    run(again)
    assert receipt.mark(made.directory / INITRD) == before
    other = SECRET.replace(b"nobody", b"no-one")
    (top / "token.tok").write_bytes(other)
    assert not context(top).complete(TASK)
    run(context(top))
    assert read(made) == other
    assert with_the_secret(top) == set()
    (made.directory / LINK).unlink()
    assert not context(top).complete(TASK)
    run(context(top))
    assert (made.directory / LINK).exists()
    with (made.directory / INITRD).open("r+b") as stream:
        stream.write(b"x")
    assert not context(top).complete(TASK)
    run(context(top))
    assert read(made) == other


def test_the_same_token_makes_the_same_bytes(top: Path) -> None:
    made = context(top)
    run(made)
    before = (made.directory / INITRD).read_bytes()
    (made.directory / INITRD).unlink()
    os.utime(top / "token.tok", (1, 1))
    run(context(top))
    assert (made.directory / INITRD).read_bytes() == before


def test_a_receipt_ends_with_the_token(top: Path) -> None:
    made = context(top)
    run(made)
    (signed,) = (top / "out/.receipts").iterdir()
    assert receipt.holds(signed) == "up to date"
    (top / "token.tok").write_bytes(SECRET + b"\n")
    assert receipt.holds(signed) is None


def test_a_link_to_the_token_is_followed(top: Path) -> None:
    (top / "token.tok").rename(top / "first.tok")
    (top / "token.tok").symlink_to("first.tok")
    made = context(top)
    run(made)
    (signed,) = (top / "out/.receipts").iterdir()
    assert read(made) == SECRET
    (top / "second.tok").write_bytes(b"another")
    (top / "token.tok").unlink()
    (top / "token.tok").symlink_to("second.tok")
    assert receipt.holds(signed) is None
    run(context(top))
    assert read(made) == b"another"


@pytest.fixture
def both(top: Path) -> Path:
    """The results with an image and an initrd that have the token."""
    run(context(top, packing=EXT4))
    made = context(top, packing=EXT4)
    run(made, "build_initrd")
    return made.directory


needs_both = pytest.mark.skipif(shutil.which("mke2fs") is None or shutil.which("zstd") is None,
                                reason="needs mke2fs and zstd")


@needs_both
def test_a_notice_names_what_must_not_be_published(top: Path, both: Path) -> None:
    notice = both / embed.NOTICE
    assert notice.stat().st_mode & 0o777 == 0o644
    assert IMAGE in notice.read_text() and INITRD in notice.read_text()
    with pytest.raises(UserError) as caught:
        embed.refuse(both)
    assert IMAGE in str(caught.value) and INITRD in str(caught.value)
    assert "manifest.json" not in str(caught.value)
    copy = top / "copy"  # as `cp out/*` makes it
    shutil.copytree(both, copy, symlinks=True, ignore=shutil.ignore_patterns(".*"))
    with pytest.raises(UserError, match=INITRD):
        embed.refuse(copy)
    (copy / embed.NOTICE).write_bytes(b"")
    with pytest.raises(UserError, match="a file there"):
        embed.refuse(copy)
    (copy / embed.NOTICE).unlink()
    embed.refuse(copy)


def test_the_notice_has_its_mode_whatever_the_umask(top: Path) -> None:
    old = os.umask(0o077)
    try:
        made = context(top)
        run(made)
    finally:
        os.umask(old)
    assert (made.directory / embed.NOTICE).stat().st_mode & 0o777 == 0o644


def test_a_notice_that_is_gone_comes_back(top: Path) -> None:
    made = context(top)
    run(made)
    (signed,) = (top / "out/.receipts").iterdir()
    before = receipt.mark(made.directory / INITRD)
    (made.directory / embed.NOTICE).unlink()
    assert receipt.holds(signed) is None and not context(top).complete(TASK)
    run(context(top))
    with pytest.raises(UserError, match=INITRD):
        embed.refuse(made.directory)
    assert receipt.mark(made.directory / INITRD) == before


@needs_both
@pytest.mark.parametrize("task", [TASK, "build_initrd", "build_kernel", "install_driver"])
def test_any_next_task_without_it_removes_all(top: Path, both: Path, task: str) -> None:
    (both / IMAGE).chmod(0o644)  # so that a hypervisor can read it
    made = context(top, token=False, packing=EXT4)
    assert not made.complete(task)
    for stage in ("image", "kata_config", "manifest", "initrd"):
        made.ensure(stage)
    made.restore(task)
    made.sign(task, "up to date")
    embed.refuse(both)
    assert embed.settled(both)
    assert with_the_secret(top) == {"token.tok"}
    assert (both / IMAGE).exists() == (both / final.IMAGE).is_symlink() == (task == TASK)
    assert (both / INITRD).exists() == (both / LINK).is_symlink() == (task == "build_initrd")
    assert made.complete(task)


@needs_both
def test_a_file_that_was_changed_stays_and_is_named(top: Path, both: Path) -> None:
    with (both / INITRD).open("ab") as stream:
        stream.write(b"x")
    made = context(top, token=False, packing=EXT4)
    run(made)
    assert (both / INITRD).exists()
    with pytest.raises(UserError, match=INITRD) as caught:
        embed.refuse(both)
    assert IMAGE not in str(caught.value)
    assert not context(top, token=False, packing=EXT4).complete(TASK)
    assert all(receipt.holds(signed) is None for signed in (top / "out/.receipts").iterdir())
    (both / embed.STATE).unlink()
    run(context(top, token=False, packing=EXT4))
    with pytest.raises(UserError, match=INITRD):
        embed.refuse(both)
    run(context(top, token=False, packing=EXT4), "build_initrd")  # in its place
    embed.refuse(both)
    assert with_the_secret(top) == {"token.tok"}


@needs_both
def test_what_has_an_older_token_is_not_forgotten(top: Path, both: Path) -> None:
    (top / "token.tok").write_bytes(b"another")
    run(context(top, packing=EXT4))
    assert not context(top, packing=EXT4).complete("build_initrd")
    with pytest.raises(UserError, match=INITRD):
        embed.refuse(both)
    run(context(top, token=False, packing=EXT4))
    assert embed.settled(both) and not (both / INITRD).exists()


def test_a_receipt_without_it_ends_where_a_token_is_embedded(top: Path) -> None:
    """As by another recipe of the same name, whose results are in the same directory."""
    made = context(top, token=False)
    run(made)
    (signed,) = (top / "out/.receipts").iterdir()
    assert receipt.holds(signed) == "up to date"
    (made.directory / embed.NOTICE).touch()
    assert receipt.holds(signed) is None


def test_an_unfit_token_leaves_no_notice(top: Path) -> None:
    (top / "token.tok").write_bytes(b"")
    with pytest.raises(UserError, match="holds no client token"):
        run(context(top))
    assert embed.settled(context(top).directory)


@pytest.mark.parametrize("content", [b"", b" \n", b"x" * (embed.LARGEST + 1), None])
def test_an_unfit_token_is_refused(tmp_path: Path, content: bytes | None) -> None:
    token = tmp_path / "token.tok"
    if content is not None:
        token.write_bytes(content)
    with pytest.raises(UserError) as caught:
        embed.token_layer(tmp_path / "layer", token)
    assert "token.tok" in str(caught.value) and "xxx" not in str(caught.value)
    assert not (tmp_path / "layer").exists()


def test_the_layer_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "token.tok").write_bytes(SECRET)
    old = os.umask(0)
    try:
        layer = embed.token_layer(tmp_path / "layer", tmp_path / "token.tok")
    finally:
        os.umask(old)
    place = layer / PLACE.lstrip("/")
    assert place.stat().st_mode & 0o777 == 0o600
    assert [path.stat().st_mode & 0o777 for path in (place.parent, layer / "etc", layer)] == [
        0o700, 0o755, 0o755]


def start(top: Path) -> subprocess.Popen[bytes]:
    """The build of a token's image, in a process of its own."""
    environment = {**os.environ, "REPOSITORY": str(PACKAGE.parent)}
    return subprocess.Popen([sys.executable, __file__, str(top)], env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_killed_run_leaves_nothing_open_and_nothing_for_long(top: Path) -> None:
    run(context(top, token=False))
    out = context(top).directory
    seen = 0
    for pause in (0.0, 0.02, 0.06, 0.15):
        process = start(top)
        deadline = time.monotonic() + 60
        while not list(out.glob(f"{embed.SCRATCH}*/packed")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.2)  # what it started ends with it
        if len(with_the_secret(top)) > 1:
            with pytest.raises(UserError, match=INITRD):
                embed.refuse(out)
        for left in out.glob(f"{embed.SCRATCH}*"):
            seen += 1
            assert left.stat().st_mode & 0o777 == 0o700
            written = [path for path in (left / "packed").rglob("*") if path.is_file()]
            assert all(path.stat().st_mode & 0o077 == 0 for path in written)
        elsewhere = {path for path in with_the_secret(top)
                     if embed.SCRATCH not in path and path != "token.tok"}
        assert elsewhere <= {str((out / INITRD).relative_to(top))}
    assert seen
    run(context(top, token=False))
    assert not list(out.glob(f"{embed.SCRATCH}*"))
    assert with_the_secret(top) == {"token.tok"} and embed.settled(out)
    run(context(top))
    assert with_the_secret(top) == {"token.tok", str((out / INITRD).relative_to(top))}


if __name__ == "__main__":
    run(context(Path(sys.argv[1])))
