"""Kata's own loader in Rust (src/libs/kata-types) reads what is written for it, by the same rules.

The crate is published nowhere: `KATAGPU_TEST_KATA` has checkouts of Kata's repository (4.0 or
newer), separated by colons. What it depends on comes from the registry that cargo is configured
for. Where there is neither, the rules stand in tests/host/test_katafiles.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu import kataconfig
from katagpu.host import katafiles, tomlwriter
from katagpu.host.katafiles import Target
from katagpu.host.machine import Machine
from katagpu.kataconfig import Extension, KataSettings, Plug, Port, ToolkitMode
from katagpu.kataversions import Shim, Version, parse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
CRATE = "src/libs/kata-types"
GIVEN = [Path(word) for word in os.environ.get("KATAGPU_TEST_KATA", "").split(":")
         if word and "[workspace" in ((Path(word) / "Cargo.toml").read_text()
                                      if (Path(word) / "Cargo.toml").exists() else "")]
LINE = (f"root_hash={'ab' * 32},salt={'01' * 32},data_blocks=12,data_block_size=4096,"
        "hash_block_size=4096")
LOADER = """\
[package]
name = "loader"
version = "0.1.0"
edition = "2021"

[dependencies]
kata-types = { path = "../src/libs/kata-types" }
serde_json = "1"
"""


def _workspace(source: Path, place: Path) -> None:
    """The crate alone, without what only its tests and other platforms take."""
    shutil.copytree(source / CRATE, place / CRATE)
    manifest = tomllib.loads((place / CRATE / "Cargo.toml").read_text())
    del manifest["dev-dependencies"]
    gone = [name for name, needs in manifest["dependencies"].items()
            if isinstance(needs, dict) and (needs.get("optional") or "path" in needs)]
    for name in gone:
        del manifest["dependencies"][name]
    manifest["features"] = {"default": [], "enable-vendor": [], "safe-path": [],
                            "devicemapper": []}
    manifest.pop("target", None)
    (place / CRATE / "Cargo.toml").write_text(tomlwriter.dumps(manifest))
    shared = tomllib.loads((source / "Cargo.toml").read_text())["workspace"]["dependencies"]
    wanted = [name for name, needs in manifest["dependencies"].items()
              if isinstance(needs, dict) and needs.get("workspace")]
    (place / "Cargo.toml").write_text(tomlwriter.dumps({"workspace": {
        "resolver": "2", "members": ["loader", CRATE],
        "dependencies": {name: shared[name] for name in wanted}}}))
    (place / "loader/src").mkdir(parents=True)
    (place / "loader/Cargo.toml").write_text(LOADER)
    shutil.copyfile(HERE / "kataloader/main.rs", place / "loader/src/main.rs")


@pytest.fixture(scope="session", params=GIVEN or [Path()],
                ids=lambda path: path.name or "none")
def loader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
           ) -> Iterator[tuple[Version, Path]]:
    """The release, and the program."""
    if not GIVEN:
        pytest.skip("KATAGPU_TEST_KATA names no checkout of Kata 4")
    if shutil.which("cargo") is None:
        pytest.skip("cargo is not installed")
    place = tmp_path_factory.mktemp("rust")
    _workspace(request.param, place)
    said = subprocess.run(["nice", "-n", "19", "cargo", "build"], cwd=place, capture_output=True,
                          text=True)
    if said.returncode:
        pytest.skip(f"Kata's loader cannot be built: {said.stderr.strip()[-300:]}")
    yield parse((request.param / "VERSION").read_text()), place / "target/debug/loader"
    shutil.rmtree(place)


class Kata:
    """An installation for the Rust runtime, with files for all that its configuration names."""

    def __init__(self, root: Path, version: Version, program: Path) -> None:
        self.root, self.program = root, program
        config = root / "runtimes/gpu/configuration.toml"
        self.drop_ins = config.parent / "config.d"
        self.drop_ins.mkdir(parents=True)
        text = (HERE / "data/kata/rs-4.1.toml").read_text()
        for word in {*re.findall(r'"(/opt/kata/[^"]+)"', text), "/kernel", "/image", "/disk"}:
            path = root / word.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("something")
        config.write_text(text.replace("/opt/kata", f"{root}/opt/kata"))
        self.target = Target(Shim.RUST, version, str(config))

    def place(self, text: str, name: str = "50-katagpu.toml") -> None:
        """A drop-in."""
        (self.drop_ins / name).write_text(text)

    def settings(self, **changes: Any) -> KataSettings:
        values: dict[str, Any] = {"shim": Shim.RUST, "version": self.target.version,
                                  "kernel": f"{self.root}/kernel", "image": f"{self.root}/image",
                                  **changes}
        return KataSettings(**values)

    def run(self) -> subprocess.CompletedProcess[str]:
        """Load it."""
        return subprocess.run([self.program, self.target.config], capture_output=True, text=True,
                              timeout=60)

    def load(self) -> Any:
        """What the runtime gets."""
        said = self.run()
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)


@pytest.fixture
def kata(loader: tuple[Version, Path], tmp_path: Path) -> Kata:
    return Kata(tmp_path, *loader)


@pytest.mark.parametrize("changes", [
    {}, {"ports": 3}, {"plug": Plug.HOT}, {"port": Port.SWITCH, "plug": Plug.HOT, "ports": 2},
    {"toolkit_mode": ToolkitMode.HOOK}, {"kernel_verity_params": LINE}, {"default_memory": 4096},
    {"dax_header": True}], ids=lambda changes: ",".join(changes) or "default")
def test_the_loader_takes_what_is_written(kata: Kata, changes: dict[str, Any]) -> None:
    wanted = kata.settings(**changes)
    kata.place(kataconfig.render_drop_in(wanted))
    found = kata.load()
    table = found["hypervisor"]["qemu"]
    for key, value in kataconfig.tables(wanted)["hypervisor.qemu"].items():
        assert table[key] == value, key
    assert table["guest_extension_images"] == []
    assert table["path"] == f"{kata.root}/opt/kata/bin/qemu-system-x86_64-no-shared-fs"
    assert found["agent"]["kata"]["reconnect_timeout_ms"] == kataconfig.TIMEOUT_S * 1000
    # It is written in seconds, and kept in milliseconds.
    assert found["agent"]["kata"]["create_container_timeout"] == kataconfig.TIMEOUT_S * 1000
    for key, value in kataconfig.tables(wanted)["runtime"].items():
        assert found["runtime"][key] == value, key


def test_a_driver_on_a_disk_of_its_own(kata: Kata) -> None:
    disk = Extension(name="gpu", path=f"{kata.root}/disk", verity_params=LINE)
    kata.place(kataconfig.render_drop_in(kata.settings(extensions=(disk,))))
    (found,) = kata.load()["hypervisor"]["qemu"]["guest_extension_images"]
    assert found == {"name": "gpu", "path": disk.path, "verity_params": LINE}


def test_our_rules_are_the_loader_s(kata: Kata) -> None:
    kata.place('[hypervisor.qemu]\nkernel_params = "x=1"\ndefault_memory = 1024\n'
               "enable_annotations = ['a']\nno_such = 1\nhotplug_vfio_on_root_bus = true\n",
               "60-mine.toml")
    kata.place("[hypervisor.qemu]\ndefault_memory = 3000\n[runtime]\nno_such = 1\n", "7.conf")
    kata.place("[hypervisor.qemu]\ndefault_memory = 5000\n", "5-early")
    table = kata.load()["hypervisor"]["qemu"]
    ours = katafiles.effective(Machine(), kata.target)
    assert ours.problems == ()  # this runtime ignores what it does not know there
    for key in ("kernel_params", "default_memory", "enable_annotations", "machine_type"):
        assert table[key] == ours.table("hypervisor.qemu")[key], key
    assert table["default_memory"] == 3000


def test_an_unknown_key_of_the_agent_stops_it(kata: Kata) -> None:
    kata.place("[agent.kata]\ndial_timeout = 45\n")
    said = kata.run()
    assert said.returncode == 1 and "dial_timeout" in said.stderr


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_what_is_no_regular_file_stops_it(kata: Kata, kind: str) -> None:
    if kind == "link":
        (kata.root / "elsewhere").write_text("")
        (kata.drop_ins / "60-link.toml").symlink_to(kata.root / "elsewhere")
    else:
        (kata.drop_ins / "backup").mkdir()
    assert kata.run().returncode == 1
    assert len(katafiles.effective(Machine(), kata.target).problems) == 1
