"""The command lines of the stages, and where they run: a build whose sandbox only records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import guest, recipe
from katagpu.keys import PACKAGE
from katagpu.lock import Deb, Lock
from katagpu.run import Result
from katagpu.sandbox import Bind, Root
from katagpu.schema import Headers, ImageFormat, Recipe
from katagpu.stages import roots
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind, Output, Store

REPOSITORY = PACKAGE.parent
NONE = Lock(recipe="debian-trixie", request="", groups={})


class Recorder(Build):
    """Records what would run; `effect` stands for what the programs would leave behind."""

    def __init__(self, stage: Stage, directory: Path,
                 effect: Callable[[Recorder, Sequence[str]], None] = lambda *_: None) -> None:
        output = Output(kind=Kind.FILE, identity="0" * 64, blob="0" * 64, size=0)
        super().__init__(stage, Store(directory / "store"),
                         dict.fromkeys(stage.inputs, output), directory, directory / "log")
        self.ran: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.networks: list[bool] = []
        self.effect = effect
        self.texts: dict[str, str] = {}

    def enter(self, argv: Sequence[str], roots: Sequence[Root], *, binds: Sequence[Bind] = (),
              env: Mapping[str, str] | None = None, cwd: str = "/", network: bool = False,
              capture: bool = False, check: bool = True,
              timeout: float | None = None) -> Result:
        self.ran.append(list(argv))
        self.environments.append(dict(env or {}))
        self.networks.append(network)
        self.effect(self, argv)
        return Result(status=0, stdout=b"6.12.9-nvidia-gpu\n")

    def blob(self, name: str) -> Path:
        path = self.scratch / f"blob-{name}"
        path.write_text(self.texts.get(name, ""))
        return path

    def tree(self, name: str) -> Path:
        return self.directory(f"tree-{name}")

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
