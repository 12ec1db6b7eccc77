"""The command lines of the stages, and where they run: a build whose sandbox only records."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import artifacts, disk, guest, recipe, verity
from katagpu.errors import StepError, UserError
from katagpu.keys import PACKAGE
from katagpu.lock import Deb, Lock
from katagpu.run import Result
from katagpu.sandbox import Bind, Root
from katagpu.schema import Agent, DriverSource, Headers, ImageFormat, ImageModel, Recipe
from katagpu.stages import roots
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind, Output, Store

REPOSITORY = PACKAGE.parent
NONE = Lock(recipe="debian-trixie", request="", groups={})


class Recorder(Build):
    """Records what would run; `effect` stands for what the programs would leave behind."""

    def __init__(self, stage: Stage, directory: Path,
                 effect: Callable[[Recorder, Sequence[str]], object] = lambda *_: None) -> None:
        output = Output(kind=Kind.FILE, identity="0" * 64, blob="0" * 64, size=0)
        super().__init__(stage, Store(directory / "store"),
                         dict.fromkeys(stage.inputs, output), directory, directory / "log")
        self.ran: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.networks: list[bool] = []
        self.effect = effect
        self.texts: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        self.answer = b"6.12.9-nvidia-gpu\n"
        self.calls: list[tuple[str, list[Root], dict[str, Any]]] = []

    def enter(self, argv: Sequence[str], roots: Sequence[Root], *, binds: Sequence[Bind] = (),
              env: Mapping[str, str] | None = None, cwd: str = "/", network: bool = False,
              capture: bool = False, check: bool = True,
              timeout: float | None = None, stdin: bytes | None = None) -> Result:
        self.ran.append(list(argv))
        self.environments.append(dict(env or {}))
        self.networks.append(network)
        self.effect(self, argv)
        return Result(status=0, stdout=self.answer)

    def blob(self, name: str) -> Path:
        if name in self.files:
            return self.files[name]
        path = self.scratch / f"blob-{name}"
        path.write_text(self.texts.get(name, ""))
        return path

    def tree(self, name: str) -> Path:
        return self.directory(f"tree-{name}")

    def debs(self, group: str) -> list[Path]:
        return [self.files[group]]

    def repository(self, group: str, files: Sequence[Path] = ()) -> Path:
        return self.directory(f"repository-{group}")

    def put_file(self, name: str, path: Path) -> None:
        assert path.exists(), name
        self.outputs[name] = Output(kind=Kind.FILE, identity="", blob="", size=0)

    def put_bytes(self, name: str, data: bytes) -> None:
        self.outputs[name] = Output(kind=Kind.FILE, identity="", blob="", size=len(data))

    def put_tree(self, name: str, directory: Path, *, overlay: bool = False,
                 final: bool = False) -> None:
        assert directory.is_dir(), name
        self.outputs[name] = Output(kind=Kind.TREE, identity="", blob="", size=0)

    def inside(self, function: Callable[..., Any], roots: Sequence[Root], **arguments: Any) -> Any:
        if "target" in arguments:
            Path(arguments["target"]).touch()
        self.calls.append((function.__name__, list(roots), arguments))
        if function.__name__ == "check":
            return []
        return {"inodes": 1000, "blocks": 90000} if function.__name__ == "measure" else {}


@pytest.fixture(scope="module")
def default() -> Recipe:
    return recipe.load("debian-trixie", REPOSITORY)


def stage(chosen: Recipe, name: str, lock: Lock = NONE) -> Stage:
    return guest.stages(chosen, lock, REPOSITORY)[name]


def deb(package: str) -> Deb:
    return Deb(package=package, version="1.0", architecture="amd64", url="http://localhost/x",
               size=1, sha256="0" * 64)


NEW = [["make", "ARCH=x86_64", "run-command",
        "KBUILD_RUN_COMMAND=$(srctree)/scripts/package/mkdebian"],
       ["make", "-f", "debian/rules", "-o", "build-arch", "binary-headers"]]
OLD = [["make", "ARCH=x86_64", "-j7", "bindeb-pkg"]]


@pytest.mark.parametrize(("makefile", "packaging"), [
    ("all:\n\nPHONY += run-command\nrun-command:\n", NEW), ("all:\n", OLD)],
    ids=["6.12", "5.15"])
def test_kernel_is_built_for_x86_64_with_fixed_stamps(
        default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, makefile: str,
        packaging: list[list[str]]) -> None:
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/Makefile").write_text(makefile)
    monkeypatch.setattr("katagpu.stages.kernel.tree", lambda build: build.directory("linux"))
    monkeypatch.setattr("katagpu.stages.kernel.jobs", lambda: 7)
    monkeypatch.setattr("katagpu.check.elf.read_build_id", lambda path: "12ab")

    def effect(build: Recorder, argv: Sequence[str]) -> None:
        work = build.scratch / "area/build"
        if "olddefconfig" in argv:
            (work / ".config").write_text("CONFIG_64BIT=y\n")
            for name in ("arch/x86/boot/bzImage", "vmlinux", "System.map", "Module.symvers"):
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).touch()
        if "binary-headers" in argv or "bindeb-pkg" in argv:
            (work.parent / "linux-headers-6.12.9-nvidia-gpu_1_amd64.deb").touch()
        build.directory("out/modules/usr/lib/modules/6.12.9-nvidia-gpu")

    build = Recorder(stage(default, "kernel"), tmp_path, effect)
    build.texts["config"] = "CONFIG_64BIT=y\n"
    build.stage.make(build)
    assert build.ran == [
        ["make", "ARCH=x86_64", "-j7", "-C", "/usr/src/linux", "O=/katagpu/kernel/build",
         "olddefconfig"],
        ["make", "ARCH=x86_64", "-j7", "bzImage", "modules"],
        ["make", "ARCH=x86_64", "-j7", "-s", "kernelrelease"],
        ["make", "ARCH=x86_64", "-j7", "modules_install",
         "INSTALL_MOD_PATH=/katagpu/out/modules/usr", "INSTALL_MOD_STRIP=1", "DEPMOD=true"],
        *packaging,
    ]
    first = build.environments[0]
    assert first["KBUILD_BUILD_VERSION"] == "1" and first["KBUILD_BUILD_USER"] == "katagpu"
    assert first["PATH"].startswith("/usr/lib/ccache:")
    assert first["CCACHE_COMPILERCHECK"] == f"string:{'0' * 64}"
    assert set(build.outputs) == set(build.stage.outputs)
    record = tmp_path / "out/modules/usr/lib/modules/6.12.9-nvidia-gpu/kernel-build-id"
    assert record.read_text() == "12ab\n"
    assert build.networks == [False] * (4 + len(packaging))


def test_a_configuration_that_changes_while_building_is_an_error(
        default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katagpu.stages.kernel.tree", lambda build: build.directory("linux"))

    def effect(build: Recorder, _argv: Sequence[str]) -> None:
        (build.scratch / "area/build/.config").write_text("CONFIG_OTHER=y\n")

    build = Recorder(stage(default, "kernel"), tmp_path, effect)
    with pytest.raises(Exception, match="changed when it was built"):
        build.stage.make(build)


def test_rpm_headers_come_from_the_kernels_own_packaging(default: Recipe) -> None:
    rpm = replace(default, kernel=replace(default.kernel, headers=Headers.RPM))
    assert "headers_rpm" in stage(rpm, "kernel").outputs
    assert "headers_rpm" not in stage(default, "kernel").outputs


def package(place: Path, files: Mapping[str, bytes]) -> Path:
    """A package with these files."""
    control = place / "DEBIAN/control"
    for path, data in {control: b"Package: toy\nVersion: 1\nArchitecture: all\nDescription: toy\n"
                                b"Maintainer: nobody <nobody@localhost>\n",
                       **{place / name: data for name, data in files.items()}}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    subprocess.run(["dpkg-deb", "-Zxz", "--root-owner-group", "--build", place,
                    place.with_suffix(".deb")], check=True, capture_output=True)
    return place.with_suffix(".deb")


def tarball(files: Mapping[str, str]) -> bytes:
    """A tarball as Debian's packages have it, packed with xz."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return stream.getvalue()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_the_kernel_s_source_is_the_one_tarball_of_its_package(
        default: Recipe, tmp_path: Path) -> None:
    build = Recorder(stage(default, "kernel_source"), tmp_path)
    build.files = {"packages": package(tmp_path / "linux-source", {
        "usr/src/linux-source-6.12.tar.xz": b"source",
        "usr/src/linux-patch-6.12-rt.patch.xz": b"a patch that is not ours"})}
    build.stage.make(build)
    assert (build.ran, set(build.outputs)) == ([], {"tarball"})
    log = (tmp_path / "log").read_text()
    assert f"$ dpkg-deb --extract {tmp_path}/linux-source.deb {tmp_path}/deb" in log
    build = Recorder(stage(default, "kernel_source"), tmp_path / "empty")
    build.files = {"packages": package(tmp_path / "other", {"usr/src/config.xz": b""})}
    build.scratch.mkdir()
    with pytest.raises(StepError, match="does not contain one tarball"):
        build.stage.make(build)


def test_the_configuration_is_merged_on_nothing_and_settled(
        default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = REPOSITORY / "tests/data/toykernel"
    monkeypatch.setattr("katagpu.stages.config.tree", lambda build: toy)
    fragment = tmp_path / "mine.conf"
    fragment.write_text("CONFIG_PCI=y\n")
    real = stage(default, "kernel_config")
    own = dataclasses.replace(real, options={"fragments": ["base/mine.conf"]},
                              files={**real.files, "base/mine.conf": fragment})

    def effect(build: Recorder, argv: Sequence[str]) -> None:
        if "olddefconfig" in argv:
            (build.directory("build") / ".config").write_text("CONFIG_64BIT=y\nCONFIG_PCI=y\n")

    build = Recorder(own, tmp_path, effect)
    build.stage.make(build)
    source, out = "/usr/src/linux", "/katagpu/kernel/build"
    assert build.ran == [
        ["make", "-C", source, f"O={out}", "ARCH=x86_64", "outputmakefile"],
        [f"{source}/scripts/kconfig/merge_config.sh", "-n", "-O", out,
         "/katagpu/fragments/00-mine.conf"],
        ["make", "-C", source, f"O={out}", "ARCH=x86_64", "olddefconfig"]]
    assert all(env == {"ARCH": "x86_64"} for env in build.environments)
    assert set(build.outputs) == {"config"}
    names = list(real.options["fragments"])
    assert names == sorted(names) and names[0] == "kernel-configs/base/10-build.conf"


def test_an_agent_is_read_out_of_an_image_by_the_image_tools(
        default: Recipe, tmp_path: Path) -> None:
    image = tmp_path / "kata.image"
    plan = disk.layout(64 << 20)
    (tmp_path / "fs").write_bytes(bytes(1080) + b"\x53\xef" + bytes(2966))  # ext4's magic
    disk.write(image, plan, [tmp_path / "fs"], disk_signature=1)
    build = Recorder(
        stage(replace(default, agent=Agent(image=str(image))), "agent"), tmp_path,
        lambda build, _argv: shutil.copy("/bin/true", build.directory("agent") / "dumped"))
    build.stage.make(build)
    assert build.ran == [["debugfs", "-R", f'dump /usr/bin/kata-agent "{tmp_path}/agent/dumped"',
                          f"{image}?offset={plan.partitions[0].offset}"]]
    assert set(build.outputs) == {"agent"} and build.facts["needed"] == ["libc.so.6"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_driver_modules_are_compiled_against_the_headers_alone(
        default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katagpu.stages.driver.jobs", lambda: 7)
    # There is no root; what is asked of one is test_nvpreflight.py's.
    monkeypatch.setattr("katagpu.stages.driver.require_modules", lambda *_where: None)
    chosen = replace(default, driver=replace(default.driver, version="999.1"))  # has no patches

    def effect(build: Recorder, argv: Sequence[str]) -> None:
        if argv[0] == "make":
            source = build.scratch / "driver-source"
            assert (source / "conftest.sh").read_text() == "# probes\n"
            for name in ("nvidia", "nvidia-uvm"):
                (source / f"{name}.ko").write_text(name)

    build = Recorder(stage(chosen, "driver_modules"), tmp_path, effect)
    release = build.texts["release"] = "6.12.9-nvidia-gpu"
    place = f"usr/src/linux-headers-{release}"
    (tmp_path / "log").touch()
    build.files = {
        "source": package(tmp_path / "source", {"usr/src/nvidia-open-kernel.tar.xz": tarball({
            f"modules/nvidia-open-kernel/{name}": "# probes\n" for name in (
                "conftest.sh", "Kbuild")})}),
        "headers": package(tmp_path / "linux-headers", {
            f"{place}/include/config/auto.conf": b"#\nCONFIG_SMP=y\nCONFIG_A=toy\n",
            f"{place}/Module.symvers": b"exports\n"})}
    build.stage.make(build)
    assert build.ran == [
        ["make", "ARCH=x86_64", "-j7", f"SYSSRC=/{place}", f"SYSOUT=/{place}", "CC=gcc",
         "NV_EXCLUDE_KERNEL_MODULES=nvidia-peermem nvidia-drm nvidia-modeset", "modules"],
        ["strip", "--strip-debug", "--", "nvidia-uvm.ko", "nvidia.ko"]]
    first = build.environments[0]
    assert first["KBUILD_BUILD_VERSION"] == "1" and first["PATH"].startswith("/usr/lib/ccache:")
    modules = tmp_path / "modules/usr/lib/modules" / release
    assert {path.name for path in (modules / "kernel/drivers/video").iterdir()} == {
        "nvidia.ko", "nvidia-uvm.ko"}
    assert build.facts["times"].keys() == {"conftest", "compile"}
    record = [line.split() for line in (modules / "driver-headers").read_text().splitlines()]
    assert record == [[hashlib.sha256(data).hexdigest(), name] for name, data in (
        ("settings", b"CONFIG_A=toy\nCONFIG_SMP=y\n"), ("Module.symvers", b"exports\n"))]


@pytest.mark.parametrize("slim", [False, True])
def test_roots_come_from_the_local_repository_alone(tmp_path: Path, slim: bool) -> None:
    lock = Lock(recipe="x", request="", groups={"base": (deb("apt"), deb("bash"))})
    build = Recorder(roots.root(lock, "base", "base", slim=slim), tmp_path)
    build.stage.make(build)
    (argv,) = build.ran
    assert argv[:4] == ["mmdebstrap", "--mode=root", "--format=directory", "--variant=custom"]
    assert "--include=apt,bash" in argv
    assert argv[-2:] == ["/katagpu/target", "deb [trusted=yes] copy:/katagpu/repository ./"]
    assert ("--dpkgopt=path-include=/usr/share/doc/*/copyright" in argv) is slim
    hooks = [word for word in argv if "-hook=" in word]
    assert "--setup-hook=for name in bin sbin lib lib64;" in hooks[0]
    assert len(hooks) == (3 if slim else 1)  # only a root without manuals lacks their directory
    assert build.networks == [False]


class Failing(Recorder):
    """A build whose Go finds no space, wherever that is."""

    def enter(self, *_words: Any, **_more: Any) -> Result:
        self.log.write_text("go: writing /katagpu/modules/x.zip: no space left on device\n")
        return Result(status=1, stdout=b"")


def test_modules_that_find_no_space_in_the_store(
        default: Recipe, tmp_path: Path, tiny: Callable[[int], Path]) -> None:
    for directory, full in ((tmp_path, False), (tiny(4 << 20), True)):
        build = Failing(stage(default, "toolkit_source"), directory)
        build.store.prepare()
        with pytest.raises(UserError, match="modules cannot be fetched") as failure:
            build.stage.make(build)
        assert (f"no space is left in the store {build.store.root}" in str(failure.value)) is full
        assert ("./doitw cache:gc" in str(failure.value)) is full
        assert ("is the Go proxy reachable?" in str(failure.value)) is not full


def test_toolkit_network_is_for_fetching_alone(default: Recipe, tmp_path: Path) -> None:
    version = default.toolkit.version
    packages = [f"github.com/NVIDIA/nvidia-container-toolkit/cmd/{name}@{version}"
                for name in ("nvidia-ctk", "nvidia-cdi-hook", "nvidia-container-runtime-hook")]
    fetch = Recorder(stage(default, "toolkit_source"), tmp_path / "fetch")
    fetch.scratch.mkdir()
    fetch.stage.make(fetch)
    assert fetch.ran == [["go", "install", "-n", *packages]]
    assert fetch.networks == [True]
    build = Recorder(stage(default, "toolkit"), tmp_path / "build")
    build.scratch.mkdir()
    build.stage.make(build)
    assert build.networks == [False]
    assert build.ran[0][:2] == ["go", "install"] and build.ran[0][3:] == packages
    assert "-z,lazy" in build.ran[0][2]
    env = build.environments[0]
    assert env["GOPROXY"] == "file:///katagpu/modules" and env["GOTOOLCHAIN"] == "local"
    assert env["CGO_ENABLED"] == "1" and "-trimpath" in env["GOFLAGS"]


@pytest.mark.parametrize(("image", "program"), [
    (ImageFormat.EROFS, "mkfs.erofs"), (ImageFormat.EXT4, "mke2fs"),
])
def test_image_is_packed_from_the_merged_tree(default: Recipe, tmp_path: Path, image: ImageFormat,
                                              program: str) -> None:
    from katagpu.schema import Compression

    packing = Compression.ZSTD if image is ImageFormat.EROFS else Compression.NONE
    chosen = replace(default, image=replace(default.image, format=image, compression=packing))

    def effect(build: Recorder, _argv: Sequence[str]) -> None:
        (build.directory("packed") / "fs").write_bytes(bytes(4096))

    build = Recorder(stage(chosen, "image"), tmp_path, effect)
    build.stage.make(build)
    (argv,) = build.ran
    assert program in argv
    assert "/katagpu/tree" in argv and "/katagpu/out/fs" in argv
    assert set(build.outputs) == {"image", "sizes", "files"}


def test_the_driver_s_disk_is_verified_over_its_whole_first_partition(
        default: Recipe, tmp_path: Path) -> None:
    split = replace(default, image=replace(default.image, model=ImageModel.EXTENSION))
    packed = 130 << 20

    def effect(build: Recorder, argv: Sequence[str]) -> None:
        if "mkfs.erofs" in argv:
            with (build.directory("packed") / "fs").open("wb") as stream:
                stream.truncate(packed)
        else:
            (build.directory("packed") / "hashes").write_bytes(b"tree")

    build = Recorder(stage(split, "extension"), tmp_path, effect)
    build.answer = (f"Data blocks: 34048\nData block size: 4096\nHash block size: 4096\n"
                    f"Salt: {'01' * 32}\nRoot hash: {'ab' * 32}\n").encode()
    build.stage.make(build)
    erofs, format_ = build.ran
    assert "mkfs.erofs" in erofs and "-zzstd,level=3" in erofs
    assert "-Enoinline_data" not in erofs
    data, hashes = disk.layout(disk.erofs_size(packed, hashed=True), hashed=True).partitions
    salt = verity.salt("0" * 64)
    assert format_ == ["veritysetup", "format", "--no-superblock", "--hash=sha256",
                       "--data-block-size=4096", "--hash-block-size=4096",
                       f"--data-blocks={data.size // 4096}", f"--salt={salt}",
                       "/katagpu/out/fs", "/katagpu/out/hashes"]
    assert (tmp_path / "packed/fs").stat().st_size == data.size
    image = tmp_path / "packed/disk.img"
    assert disk.partitions(image) == [data, hashes] and data.boot
    with image.open("rb") as stream:
        stream.seek(hashes.offset)
        assert stream.read(5) == b"tree\0"
    assert set(build.outputs) == {"image", "verity", "sizes", "files"}


@pytest.mark.parametrize("dax", [False, True])
@pytest.mark.parametrize("image", [ImageFormat.EROFS, ImageFormat.EXT4])
def test_an_image_with_a_hash_tree(default: Recipe, tmp_path: Path, image: ImageFormat, dax: bool,
                                   ) -> None:
    from katagpu.schema import Compression

    packing = Compression.ZSTD if image is ImageFormat.EROFS else Compression.NONE
    chosen = replace(default, image=replace(default.image, format=image, compression=packing,
                                            verity=True, dax_header=dax))
    packed = 199 << 20  # with Kata's own rules the two partition tables would not agree

    def effect(build: Recorder, argv: Sequence[str]) -> None:
        if argv[0] == "veritysetup":
            (build.directory("packed") / "hashes").write_bytes(b"tree")
        else:
            with (build.directory("packed") / "fs").open("wb") as stream:
                stream.truncate(packed)

    build = Recorder(stage(chosen, "image"), tmp_path, effect)
    build.answer = (f"Data blocks: 51200\nData block size: 4096\nHash block size: 4096\n"
                    f"Salt: {'01' * 32}\nRoot hash: {'ab' * 32}\n").encode()
    build.stage.make(build)
    data, hashes = disk.partitions(tmp_path / "packed/disk.img")
    assert data.boot and data.offset == (3 << 20 if dax else 1 << 20)
    assert hashes.size >= verity.tree_size(data.size // verity.BLOCK)
    assert f"--data-blocks={data.size // 4096}" in build.ran[-1]
    assert disk.has_dax_header(tmp_path / "packed/disk.img") is dax
    assert set(build.outputs) == {"image", "verity", "sizes", "files"}
    names = {artifact.name for artifact in artifacts.of(chosen, "build_image")}
    assert "root_hash_nvidia-gpu.txt" in names
    # An initrd of the same guest has none.
    assert set(stage(chosen, "initrd").outputs) == {"image", "sizes", "files"}
    assert not stage(chosen, "initrd_config").inputs


def test_the_driver_s_disk_is_indexed_in_place_and_checked_where_it_is_mounted(
        default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katagpu.check.elf.read_build_id", lambda path: "12ab")
    split = replace(default, image=replace(default.image, model=ImageModel.EXTENSION))
    build = Recorder(stage(split, "extension_root"), tmp_path)
    build.texts["release"] = "6.12.9-nvidia-gpu"
    build.stage.make(build)
    place = "/katagpu/extension"
    assert build.ran == [
        ["ldconfig", "-n", f"{place}/usr/lib/x86_64-linux-gnu"], ["ldconfig", "-r", place],
        ["rm", "-rf", f"{place}/var/cache"], ["depmod", "--basedir", place, "6.12.9-nvidia-gpu"]]
    (harvest, merged, given), (check, roots, facts) = build.calls
    assert (harvest, check) == ("harvest", "check")
    names = [path.name for path in merged[0].lower]
    assert names == [f"tree-{name}" for name in (
        "driver_modules", "kernel_modules", "driver_user", "toolkit", "base")]
    assert [Path(layer).name for layer in given["layers"]] == [
        "tree-toolkit", "tree-driver_user", "tree-driver_modules"]
    assert given["whole"] == []
    guest_root, mounted = roots
    assert [path.name for path in guest_root.lower] == [
        "tree-rootfs", "tree-kernel_modules", "tree-extension_tools", "tree-base"]
    assert mounted.target == "/run/kata-extensions/gpu"
    assert mounted.lower == (tmp_path / "extension",)
    assert facts["facts"]["extension"] == mounted.target
    assert facts["facts"]["driver"]["version"] == "550.163.01"


def test_of_a_run_file_the_disk_has_all_that_the_manifest_chose(
        default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katagpu.check.elf.read_build_id", lambda path: "12ab")
    split = replace(default, image=replace(default.image, model=ImageModel.EXTENSION),
                    driver=replace(default.driver, source=DriverSource.RUNFILE))
    build = Recorder(stage(split, "extension_root"), tmp_path)
    build.texts["release"] = "6.12.9-nvidia-gpu"
    build.stage.make(build)
    (_harvest, _merged, given), _check = build.calls
    assert [Path(layer).name for layer in given["whole"]] == ["tree-driver_user"]


def test_the_base_is_rendered_and_checked_without_its_driver(
        default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katagpu.check.elf.read_build_id", lambda path: "12ab")
    split = replace(default, image=replace(default.image, model=ImageModel.EXTENSION))
    build = Recorder(stage(split, "rootfs"), tmp_path)
    build.stage.make(build)
    (_lay, _roots, given), (_check, _plain, facts) = build.calls
    assert given["variables"]["driver_root"] == "/run/kata-extensions/gpu"
    assert given["variables"]["driver_version"] == ""
    assert facts["facts"]["driver"] is None
    assert facts["facts"]["extension"] == "/run/kata-extensions/gpu"


@pytest.mark.parametrize("missing", ["RD_ZSTD", "BLK_DEV_INITRD", None])
def test_an_initrd_that_the_kernel_cannot_unpack_is_not_made(
        default: Recipe, tmp_path: Path, missing: str | None) -> None:
    """The recipe's own format is erofs, which is all that the checks of its root look at."""
    def effect(build: Recorder, argv: Sequence[str]) -> None:
        (build.directory("packed") / "initrd.zst").write_bytes(b"packed")

    build = Recorder(stage(default, "initrd"), tmp_path, effect)
    symbols = [name for name in ("RD_ZSTD", "BLK_DEV_INITRD") if name != missing]
    build.texts["config"] = "".join(f"CONFIG_{name}=y\n" for name in symbols)
    with tarfile.open(build.directory("packed") / "tree.tar", "w"):
        pass
    if missing is None:
        build.stage.make(build)
        assert [argv[0] for argv in build.ran] == ["zstd"]
        return
    with pytest.raises(StepError, match=f"initrd .zstd.*CONFIG_{missing} is not set"):
        build.stage.make(build)
    assert not build.ran and not build.calls


def test_the_initrd_of_a_guest_with_an_image_has_drop_ins_of_its_own(
        default: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    written: dict[str, bytes] = {}
    chosen = replace(default, image=replace(default.image, dax_header=True))
    build = Recorder(stage(chosen, "initrd_config"), tmp_path)
    monkeypatch.setattr(build, "put_bytes", written.__setitem__)
    build.stage.make(build)
    for text in written.values():
        table = tomllib.loads(text.decode())["hypervisor"]["qemu"]
        assert table["initrd"] == (
            "/opt/kata/share/kata-containers/kata-containers-nvidia-gpu-initrd.img")
        assert table["image"] == "" and table["disable_image_nvdimm"] is True
    named = {artifact.name: artifact.link for artifact in artifacts.of(chosen, "build_initrd")}
    assert {"50-katagpu-initrd.toml", "50-katagpu-initrd-runtime-rs.toml"} <= set(named)
    assert "kata-containers-nvidia-gpu-initrd.img" in named.values()


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("model", list(ImageModel))
def test_drop_ins_for_both_runtimes(default: Recipe, tmp_path: Path, model: ImageModel,
                                    measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    written: dict[str, bytes] = {}
    chosen = replace(default, image=replace(default.image, model=model, verity=measured))
    build = Recorder(stage(chosen, "kata_config"), tmp_path)
    monkeypatch.setattr(build, "put_bytes", written.__setitem__)
    line = str(verity.Verity(root_hash="ab" * 32, salt="01" * 32, data_blocks=9))
    of_image = str(verity.Verity(root_hash="cd" * 32, salt="23" * 32, data_blocks=7))
    build.texts |= {"verity": f"{line}\n", "image_verity": f"{of_image}\n"}
    build.stage.make(build)
    tables = {name: tomllib.loads(text.decode())["hypervisor"]["qemu"]
              for name, text in written.items()}
    assert "reconnect_timeout_ms" in written["config_rs"].decode()
    assert "hot_plug_vfio" in tables["config"] and "hot_plug_vfio" not in tables["config_rs"]
    place = "/opt/kata/share/kata-containers"
    for table in tables.values():
        assert table["kernel_verity_params"] == (of_image if measured else "")
        if model is ImageModel.EXTENSION:
            assert table["image"] == f"{place}/kata-containers-nvidia.img"
            assert table["guest_extension_images"] == [{
                "name": "gpu", "verity_params": line, "path":
                f"{place}/kata-debian-trixie-nvidia-gpu-extension-550.163.01.image"}]
        else:
            assert table["image"] == f"{place}/kata-containers-nvidia-gpu.img"
            assert not table.get("guest_extension_images")
