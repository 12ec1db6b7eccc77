"""Kata's own loader (Go) reads what is written for it, and merges by the rules written down here.

The module comes through the Go proxy that this machine is configured for, at the versions that can
be had there. `KATAGPU_TEST_KATA`, checkouts of Kata's repository at other releases, separated by
colons, adds those. Where there is neither, the tests skip, and the rules stand in
tests/host/test_katafiles.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu import kataconfig
from katagpu.host import katafiles
from katagpu.host.katafiles import Target
from katagpu.host.machine import Machine
from katagpu.kataconfig import Bar, KataSettings, Plug, Port, ToolkitMode
from katagpu.kataversions import Shim, Version, parse, reads_drop_ins

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DATA = Path(__file__).parent / "data" / "kata"
MAIN = Path(__file__).parent / "kataloader" / "main.go"
MODULE = "github.com/kata-containers/kata-containers/src/runtime"
# The hash is that of the module (go.sum has the same), so that a proxy cannot give another one.
MODULES = {
    "3.20.0": ("v0.0.0-20250828155603-754f07cff239",
               "h1:bRKvpDZTBY26oYsKacxxevmTMSJelWJz6+ybowBnaRc="),
    "3.7.0": ("v0.0.0-20240717205640-6aff5f300a98",
              "h1:fejtO8zU3QZq8eEl4i1Vuc1gizjjL5jDhzPV1xqXxgk="),
    "3.3.0": ("v0.0.0-20240208092920-b99f57452225",
              "h1:0Tv2ioXKmo3eh7Mhh0BPJ9eWWPQHjsrTYDt2zEyQt7A="),
}
GIVEN = [Path(word) for word in os.environ.get("KATAGPU_TEST_KATA", "").split(":") if word]
LINE = (f"root_hash={'ab' * 32},salt={'01' * 32},data_blocks=12,data_block_size=4096,"
        "hash_block_size=4096")


class Loader:
    """The program, for a release."""

    def __init__(self, version: Version, program: Path) -> None:
        self.version = version
        self.program = program

    def __call__(self, config: Path) -> subprocess.CompletedProcess[str]:
        """What it makes of a configuration file."""
        return subprocess.run([self.program, config], capture_output=True, text=True, timeout=60)

    def load(self, config: Path) -> Any:
        """The same, as data."""
        said = self(config)
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)["runtime"]


def _build(source: Path, place: Path) -> Path:
    """Build the program inside a copy of the module, whose settings `make` would generate."""
    shutil.copytree(source, place, copy_function=shutil.copyfile)
    settings = place / "pkg/katautils/config-settings.go"
    shutil.copyfile(settings.with_suffix(".go.in"), settings)
    if not (place / "vendor/github.com").is_dir():
        shutil.rmtree(place / "vendor", ignore_errors=True)  # a module has only the list in it
    (place / "cmd/loader").mkdir()
    shutil.copyfile(MAIN, place / "cmd/loader/main.go")
    needs = subprocess.run(["go", "list", "-deps", "./cmd/loader"], cwd=place, capture_output=True,
                           text=True)
    if needs.returncode:
        pytest.skip(f"what Kata's loader needs cannot be had: {needs.stderr.strip()[-300:]}")
    said = subprocess.run(["nice", "-n", "19", "go", "build", "-o", place / "loader",
                           "./cmd/loader"], cwd=place, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return place / "loader"


def _module(release: str) -> Path:
    """The module's source."""
    version, digest = MODULES[release]
    said = subprocess.run(["go", "mod", "download", "-json", f"{MODULE}@{version}"], cwd="/",
                          capture_output=True, text=True)
    found = json.loads(said.stdout or "{}")
    if said.returncode:
        pytest.skip(f"Kata {release} cannot be had: {str(found.get('Error', said.stderr))[-200:]}")
    assert found["Sum"] == digest
    return Path(found["Dir"])


def _names() -> list[str]:
    return [*MODULES, *(str(path) for path in GIVEN)]


@pytest.fixture(scope="session", params=_names(),
                ids=lambda name: Path(name).name)
def loader(request: pytest.FixtureRequest,
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """Kata's loader, of each release that can be had."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    place = tmp_path_factory.mktemp("kata")
    name = request.param
    source = _module(name) if name in MODULES else Path(name) / "src/runtime"
    version = parse(name if name in MODULES else (Path(name) / "VERSION").read_text())
    program = _build(source, place / "source")
    shutil.move(program, place / "loader")
    shutil.rmtree(place / "source")
    yield Loader(version, place / "loader")
    shutil.rmtree(place)


class Kata:
    """An installation: a configuration in Kata's shape, and files for all that it names."""

    def __init__(self, root: Path, loader: Loader) -> None:
        self.root = root
        self.version = loader.version
        self.config = root / "opt/kata/runtimes/gpu/configuration.toml"
        self.drop_ins = self.config.parent / "config.d"
        self.drop_ins.mkdir(parents=True)
        text = (DATA / ("go-4.1.toml" if self.version >= (3, 29) else
                        "go-3.7.toml" if self.version >= (3, 2) else "go-2.4.toml")).read_text()
        for name in ("kernel", "image", "disk"):
            self.file(name)
        for word in {part for part in text.split('"') if part.startswith("/opt/kata/")}:
            path = root / word.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("something")
        self.config.write_text(text.replace("/opt/kata", f"{root}/opt/kata"))

    def file(self, name: str) -> str:
        """A file of the guest."""
        path = self.root / name
        path.write_text("something")
        return str(path)

    @property
    def target(self) -> Target:
        """The runtime."""
        return Target(Shim.GO, self.version, str(self.config))

    def place(self, text: str, name: str = "50-katagpu.toml") -> None:
        """A drop-in; where Kata reads none, the merged configuration takes the file's place."""
        if reads_drop_ins(Shim.GO, self.version):
            (self.drop_ins / name).write_text(text)
        else:
            from katagpu.host import tomlwriter

            values = katafiles.loads(self.config.read_text())
            katafiles.merge(values, katafiles.loads(text))
            self.config.write_text(tomlwriter.dumps(values))


@pytest.fixture
def kata(loader: Loader, tmp_path: Path) -> Kata:
    """One, for the release of the loader."""
    return Kata(tmp_path, loader)


def settings(kata: Kata, **changes: Any) -> KataSettings:
    values: dict[str, Any] = {
        "version": kata.version, "kernel": f"{kata.root}/kernel", "image": f"{kata.root}/image",
        "rootfs_type": "erofs" if kata.version >= (3, 1) else "ext4", **changes}
    return KataSettings(**values)


@pytest.mark.parametrize("changes", [
    {}, {"ports": 3}, {"plug": Plug.HOT}, {"bar": Bar.SMALL},
    {"bar": Bar.SMALL, "plug": Plug.HOT, "port": Port.BRIDGE}, {"port": Port.SWITCH, "ports": 2},
    {"toolkit_mode": ToolkitMode.HOOK}, {"kernel_verity_params": LINE},
    {"dax_header": True, "default_memory": 4096, "extra_kernel_params": ("agent.log=debug",)}],
    ids=lambda changes: ",".join(changes) or "default")
def test_the_loader_takes_what_is_written(kata: Kata, loader: Loader,
                                          changes: dict[str, Any]) -> None:
    if changes.get("port") is Port.SWITCH and kata.version < (3, 6):
        pytest.skip("no switch ports before 3.6")
    wanted = settings(kata, **changes)
    kata.place(kataconfig.render_drop_in(wanted))
    found = loader.load(kata.config)
    guest = found["HypervisorConfig"]
    assert (guest["KernelPath"], guest["ImagePath"]) == (wanted.kernel, wanted.image)
    assert guest["InitrdPath"] == ""
    assert guest["HypervisorMachineType"] == "q35"
    assert guest["MemorySize"] == wanted.default_memory
    assert guest["DisableImageNvdimm"] is not wanted.dax_header
    params = [pair["Key"] + ("=" + pair["Value"] if pair["Value"] else "")
              for pair in guest["KernelParams"]]
    ours = [*kataconfig.KERNEL_PARAMS, *wanted.extra_kernel_params]
    assert [word for word in params if word in ours] == ours
    assert "agent.hotplug_timeout=20" not in params  # the base's string is replaced
    hook = wanted.toolkit_mode is ToolkitMode.HOOK
    assert guest["GuestHookPath"] == (kataconfig.HOOK_PATH if hook else "")
    assert found["SandboxCgroupOnly"] is True
    plugged(wanted, guest)
    if kata.version >= (3, 1):
        assert guest["RootfsType"] == "erofs"
    if kata.version >= (3, 27):
        assert guest["KernelVerityParams"] == wanted.kernel_verity_params
    if kata.version >= (3, 4):
        assert found["CreateContainerTimeout"] == kataconfig.TIMEOUT_S


def plugged(wanted: KataSettings, guest: Any) -> None:
    """The ports are as they were asked for, in the names of that release."""
    if wanted.version < (3, 2):
        assert guest["HotplugVFIOOnRootBus"] is (wanted.bar is Bar.LARGE)
        assert guest["PCIeRootPort"] == (wanted.ports if wanted.bar is Bar.LARGE else 0)
        return
    cold, hot = guest["ColdPlugVFIO"], guest["HotPlugVFIO"]
    assert (cold, hot) == ((str(wanted.port), "no-port") if wanted.plug is Plug.COLD
                           else ("no-port", str(wanted.port)))
    if wanted.version >= (3, 6):
        switch = wanted.port is Port.SWITCH
        assert guest["PCIeRootPort"] == (0 if switch else wanted.ports)
        assert guest["PCIeSwitchPort"] == (wanted.ports if switch else 0)


def test_an_initrd(kata: Kata, loader: Loader) -> None:
    kata.place(kataconfig.render_drop_in(settings(kata, image=None, initrd=f"{kata.root}/image")))
    guest = loader.load(kata.config)["HypervisorConfig"]
    assert (guest["InitrdPath"], guest["ImagePath"]) == (f"{kata.root}/image", "")


def test_a_driver_on_a_disk_of_its_own(kata: Kata, loader: Loader) -> None:
    if kata.version < (4, 0):
        pytest.skip("no extensions before 4.0")
    disk = kataconfig.Extension(name="gpu", path=f"{kata.root}/disk", verity_params=LINE)
    kata.place(kataconfig.render_drop_in(settings(kata, extensions=(disk,))))
    (found,) = loader.load(kata.config)["HypervisorConfig"]["GuestExtensionImages"]
    assert list(found.values()) == ["gpu", f"{kata.root}/disk", LINE]


def test_the_part_of_the_host_alone(kata: Kata, loader: Loader) -> None:
    kata.place(kataconfig.render_drop_in(settings(kata)))
    kata.place(kataconfig.render_tables(kataconfig.host_tables(settings(kata, ports=2))),
               "55-katagpu-host.toml")
    guest = loader.load(kata.config)["HypervisorConfig"]
    assert guest["ImagePath"] == f"{kata.root}/image"
    plugged(settings(kata, ports=2), guest)


def test_our_rules_are_the_loader_s(kata: Kata, loader: Loader) -> None:
    if not reads_drop_ins(Shim.GO, kata.version):
        pytest.skip("no drop-ins before 2.5")
    kata.place(kataconfig.render_drop_in(settings(kata)))
    kata.place('[hypervisor.qemu]\nkernel_params = "x=1"\nvirtio_fs_extra_args = ["a"]\n'
               "default_memory = 1024\n[runtime]\nsandbox_cgroup_only = false\n", "60-mine.toml")
    kata.place("[hypervisor.qemu]\ndefault_memory = 3000\n", "7.conf")  # any name is read
    kata.place("[hypervisor.qemu]\ndefault_memory = 5000\n", "5-early")
    guest = (found := loader.load(kata.config))["HypervisorConfig"]
    ours = katafiles.effective(Machine(), kata.target)
    table = ours.table("hypervisor.qemu")
    assert guest["MemorySize"] == table["default_memory"] == 3000
    params = {pair["Key"]: pair["Value"] for pair in guest["KernelParams"]}
    assert params["x"] == "1" and "cgroup_no_v1" not in params
    assert table["kernel_params"] == "x=1"
    assert guest["VirtioFSExtraArgs"] == table["virtio_fs_extra_args"] == ["a"]
    assert guest["VirtioFSDaemon"] == table["virtio_fs_daemon"]
    assert found["SandboxCgroupOnly"] is ours.table("runtime")["sandbox_cgroup_only"] is False


def test_a_key_that_is_not_known_stops_it(kata: Kata, loader: Loader) -> None:
    if not reads_drop_ins(Shim.GO, kata.version):
        pytest.skip("no drop-ins before 2.5")
    old = "hotplug_vfio_on_root_bus" if kata.version >= (3, 2) else "cold_plug_vfio"
    value = "true" if kata.version >= (3, 2) else '"root-port"'
    kata.place(f"[hypervisor.qemu]\n{old} = {value}\n")
    said = loader(kata.config)
    assert said.returncode == 1
    assert old in said.stderr
    (problem,) = katafiles.effective(Machine(), kata.target).problems
    assert old in problem[0]


def test_an_unknown_key_in_the_main_file_is_ignored(kata: Kata, loader: Loader) -> None:
    text = kata.config.read_text()
    kata.config.write_text(text.replace("[hypervisor.qemu]", "[hypervisor.qemu]\nno_such = 1"))
    assert loader(kata.config).returncode == 0


def test_a_link_in_config_d_is_read_and_a_directory_stops_it(kata: Kata, loader: Loader) -> None:
    if not reads_drop_ins(Shim.GO, kata.version):
        pytest.skip("no drop-ins before 2.5")
    (kata.root / "elsewhere").write_text("[hypervisor.qemu]\ndefault_memory = 1234\n")
    (kata.drop_ins / "60-link.toml").symlink_to(kata.root / "elsewhere")
    assert loader.load(kata.config)["HypervisorConfig"]["MemorySize"] == 1234
    assert katafiles.effective(Machine(), kata.target).table("hypervisor.qemu")[
        "default_memory"] == 1234
    (kata.drop_ins / "backup").mkdir()
    assert loader(kata.config).returncode == 1
    assert len(katafiles.effective(Machine(), kata.target).problems) == 1


def test_links_to_the_main_file_are_followed(kata: Kata, loader: Loader) -> None:
    kata.place(kataconfig.render_drop_in(settings(kata)))
    link = kata.root / "etc/configuration.toml"
    link.parent.mkdir()
    link.symlink_to(kata.config)
    assert loader.load(link)["HypervisorConfig"]["ImagePath"] == f"{kata.root}/image"
