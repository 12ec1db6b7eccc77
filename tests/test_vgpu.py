"""vGPU guests: the recipe's section, the guest's files, and the program that lays out the token."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import recipe, vgpu
from katagpu.errors import UserError
from katagpu.guestfiles import Entry, Kind, render
from katagpu.keys import PACKAGE
from katagpu.recipe import Recipe, Vgpu, problems
from katagpu.schema import FeatureType
from katagpu.stages import rootfs

SANDBOX = "/etc/systemd/system/run-kata\\x2dcontainers-sandbox-shm.mount.wants"
PROGRAM = "/usr/libexec/katagpu/client-token"
CONFIG = "/etc/nvidia/gridd.conf"
UNIT = "/etc/systemd/system/nvidia-gridd.service"
REFRESH = "/usr/lib/systemd/system/nvidia-refresh.service"


@pytest.fixture(scope="module")
def default() -> Recipe:
    """The default recipe."""
    return recipe.load("debian-trixie", PACKAGE.parent)


def rendered(default: Recipe, section: Vgpu | None) -> dict[str, Entry]:
    """The guest's files of a recipe with this section."""
    return {entry.path: entry for entry in render({
        "toolkit_mode": "cdi", "drm": False, "driver_layout": "plain",
        "driver_version": "550.163.01", "services": [], "driver_root": "",
        "multiarch": "x86_64-linux-gnu",
        "vgpu": vgpu.settings(replace(default, vgpu=section))})
        if entry.kind is not Kind.REMOVE}


# --- the recipe ----------------------------------------------------------------------------------


def load(tmp_path: Path, section: str, source: str = "debian") -> Recipe:
    """The default recipe with this section at its end."""
    (tmp_path / "recipes").mkdir(exist_ok=True)
    (tmp_path / "token.tok").write_text("secret")
    text = (PACKAGE.parent / "recipes/debian-trixie.yaml").read_text()
    text = text.replace("source: debian\n  version", f"source: {source}\n  version")
    (tmp_path / "recipes/debian-trixie.yaml").write_text(text + section)
    return recipe.load("debian-trixie", tmp_path)


def test_a_vgpu_guest_needs_nvidia_s_own_package(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, "vgpu: {}\n")
    said = str(caught.value)
    assert "vgpu: a vGPU guest needs NVIDIA's GRID guest driver" in said
    assert "source: debian}` has none" in said and "source: runfile" in said
    assert ".yaml:44: " in said


@pytest.mark.parametrize(("section", "message"), [
    ("{feature_type: 3}", "vgpu.feature_type: 3 is not valid here"),
    ("{feature: 1}", "there is no such field"),
    ("{server_address: 'a b'}", "'a b' is not valid here"),
    ("{server_address: a, server_port: 0}", "server_port"),
    ("{license_interval: 5}", "license_interval"),
])
def test_values_are_checked(tmp_path: Path, section: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, f"vgpu: {section}\n")
    assert message in str(caught.value)


@pytest.mark.parametrize(("section", "field", "message"), [
    (Vgpu(backup_server_address="b"), "backup_server_address", "belongs to `server_address`"),
    (Vgpu(license_interval=10), "license_interval", "belongs to `server_address`"),
    (Vgpu(server_address="a", embed_token=True, token_file="token.tok"), "embed_token",
     "two licence servers"),
    (Vgpu(embed_token=True), "embed_token", "needs `token_file`"),
    (Vgpu(token_file="token.tok"), "token_file", "would not be used"),
    (Vgpu(embed_token=True, token_file="gone.tok"), "token_file", "there is no file"),
    (Vgpu(embed_token=True, token_file="token.tok"), "", ""),
    (Vgpu(server_address="a", backup_server_address="b", license_interval=10), "", ""),
    (Vgpu(feature_type=FeatureType.COMPUTE), "", ""),
])
def test_what_no_schema_can_say(
    default: Recipe, tmp_path: Path, section: Vgpu, field: str, message: str,
) -> None:
    (tmp_path / "token.tok").write_text("secret")
    found = [(steps, what) for steps, what, _hint in problems(
        replace(default, vgpu=section), default.name, tmp_path) if steps[0] == "vgpu"]
    assert found[0][0] == ("vgpu",)  # the driver, which the default recipe takes from Debian
    assert [steps for steps, _what in found[1:]] == ([("vgpu", field)] if field else [])
    assert all(message in what for _steps, what in found[1:])


def test_a_token_in_the_image_and_a_root_hash(default: Recipe, tmp_path: Path) -> None:
    (tmp_path / "token.tok").write_text("secret")
    wanted = replace(default, image=replace(default.image, verity=True),
                     vgpu=Vgpu(embed_token=True, token_file="token.tok"))
    found = [what for steps, what, _hint in problems(wanted, default.name, tmp_path)
             if steps == ("vgpu", "embed_token")]
    assert len(found) == 1 and "another root hash" in found[0]


def test_a_package_without_the_licence_client_is_refused() -> None:
    vgpu.require_grid(is_grid=True, package="x.run")
    with pytest.raises(UserError, match=r"x\.run is no GRID guest driver") as caught:
        vgpu.require_grid(is_grid=False, package="x.run")
    assert "-grid.run" in str(caught.value)


def test_keys_know_the_settings_and_nothing_of_the_token(default: Recipe, tmp_path: Path) -> None:
    def options(section: Vgpu | None) -> Any:
        return rootfs.rootfs(replace(default, vgpu=section), PACKAGE.parent).options["vgpu"]

    assert options(None) is None
    assert options(Vgpu()) != options(Vgpu(feature_type=FeatureType.COMPUTE))
    with_token = Vgpu(embed_token=True, token_file=str(tmp_path / "secret.tok"))
    assert options(with_token) == options(Vgpu())


# --- the guest's files ---------------------------------------------------------------------------


def test_other_guests_have_none_of_it(default: Recipe) -> None:
    with_it, without = rendered(default, Vgpu()), rendered(default, None)
    assert set(with_it) - set(without) == {
        CONFIG, UNIT, PROGRAM, "/etc/nvidia/ClientConfigToken",
        "/etc/dbus-1/system.d/nvidia-grid.conf", "/etc/ld.so.conf.d/nvidia-gridd.conf",
        "/etc/systemd/system/nvidia-topologyd.service",
        "/usr/lib/systemd/system/nvidia-token.service",
        "/usr/lib/systemd/system/nvidia-licence.service",
        "/etc/systemd/system/kata-containers.target.wants/nvidia-topologyd.service",
        "/etc/systemd/system/kata-containers.target.wants/nvidia-gridd.service",
        f"{SANDBOX}/nvidia-licence.service"}
    assert set(without) < set(with_it)
    assert "nvidia-gridd.service\n" in with_it[REFRESH].content.decode()
    assert "gridd" not in without[REFRESH].content.decode()
    assert with_it[PROGRAM].mode == 0o755


def settings(entries: dict[str, Entry]) -> list[str]:
    """The lines of gridd.conf that set something."""
    return [line for line in entries[CONFIG].content.decode().splitlines()
            if line and not line.startswith("#")]


def test_gridd_conf_has_what_the_recipe_says(default: Recipe) -> None:
    assert settings(rendered(default, Vgpu(feature_type=FeatureType.WORKSTATION))) == [
        "FeatureType=2", "EnableUI=FALSE"]
    assert settings(rendered(default, Vgpu(
        feature_type=FeatureType.UNLICENSED, server_address="a.example", server_port=7071,
        backup_server_address="10.0.0.2", license_interval=60))) == [
            "FeatureType=0", "EnableUI=FALSE", "ServerAddress=a.example", "ServerPort=7071",
            "BackupServerAddress=10.0.0.2", "BackupServerPort=7070", "LicenseInterval=60"]


def test_the_client_waits_for_a_token_unless_a_server_is_named(default: Recipe) -> None:
    condition = "ConditionPathExistsGlob=/etc/nvidia/ClientConfigToken/*.tok"
    assert condition in rendered(default, Vgpu())[UNIT].content.decode()
    assert condition not in rendered(default, Vgpu(server_address="a"))[UNIT].content.decode()


# --- the program that lays out the token ---------------------------------------------------------


class Guest:
    """A fake guest: the program with a directory for "/" and a mount that only says."""

    def __init__(self, top: Path, program: str) -> None:
        self.root = top / "guest"
        self.place = self.root / "etc/nvidia/ClientConfigToken"
        self.shared = self.root / "run/kata-containers/shared/containers"
        for directory in (self.place, self.shared, self.root / "sys/block", self.root / "dev"):
            directory.mkdir(parents=True)
        fake = top / "mount"
        fake.write_text(f'#!/bin/sh\necho "$@" >>{top}/mounts\n')
        fake.chmod(0o755)
        self.mounts = top / "mounts"
        self.program = top / "client-token"
        assert program.count("mount -") == 3
        self.program.write_text(program.replace("mount -", f"{fake} -"))

    def disk(self, name: str, serial: str, partition: str = "") -> None:
        """A block device with this serial, which the kernel shows without a newline."""
        place = self.root / "sys/block" / name
        place.mkdir()
        (place / "serial").write_text(serial)
        if partition:
            (place / partition).mkdir()

    def share(self, directory: str) -> Path:
        """A token among the sandbox's mounts."""
        place = self.shared / directory / "ClientConfigToken"
        place.mkdir(parents=True)
        (place / "client_configuration_token_1.tok").write_text("secret")
        return place

    def run(self, *words: str) -> list[str]:
        """What it mounts."""
        found = subprocess.run(["sh", self.program, *words], capture_output=True, text=True,
                               env={"KATAGPU_GUEST_ROOT": str(self.root)}, timeout=20)
        assert found.returncode == 0, found.stderr
        assert "secret" not in found.stdout + found.stderr
        return self.mounts.read_text().splitlines() if self.mounts.exists() else []


@pytest.fixture
def guest(tmp_path: Path, default: Recipe) -> Guest:
    """The fake guest."""
    return Guest(tmp_path, rendered(default, Vgpu())[PROGRAM].content.decode())


def test_no_token_is_no_failure(guest: Guest) -> None:
    assert guest.run() == []


@pytest.mark.parametrize(("name", "partition", "device"), [
    ("vdb", "", "vdb"), ("vdb", "vdb1", "vdb1"), ("nvme0n1", "", "nvme0n1"),
    ("nvme0n1", "nvme0n1p1", "nvme0n1p1"), ("nvme0n1", "nvme0n11", "nvme0n1"),
    ("vdb", "vdbp1", "vdb")])
def test_a_disk_is_known_by_its_serial(guest: Guest, name: str, partition: str,
                                       device: str) -> None:
    guest.disk("vda", "other")
    guest.disk(name, "extension-vgputoken", partition)
    place = guest.root / "dev" / device
    assert guest.run() == [f"-t erofs -o ro,nodev,nosuid,noexec {place} {guest.place}"]


@pytest.mark.parametrize("serial", ["extension-vgputoken2", "vgputoken", "extension-gpu", ""])
def test_other_disks_are_left_alone(guest: Guest, serial: str) -> None:
    guest.disk("vdb", serial)
    assert guest.run() == []


@pytest.mark.parametrize("directory", ["sandbox-mounts", "passthrough/sandbox-mounts"])
def test_the_shared_directory_of_either_runtime(guest: Guest, directory: str) -> None:
    source = guest.share(directory)
    assert guest.run() == [f"--bind {source} {guest.place}",
                           f"-o remount,bind,ro,nodev,nosuid,noexec {guest.place}"]


def test_a_directory_without_a_token_does_not_count(guest: Guest) -> None:
    (guest.share("sandbox-mounts") / "client_configuration_token_1.tok").unlink()
    assert guest.run() == []
    source = guest.share("passthrough/sandbox-mounts")
    assert guest.run()[0] == f"--bind {source} {guest.place}"


def test_a_container_s_own_directory_does_not_count(guest: Guest) -> None:
    guest.share("0123abc/rootfs/sandbox-mounts")
    assert guest.run() == []


def test_a_token_that_is_there_stays(guest: Guest) -> None:
    (guest.place / "client_configuration_token_0.tok").write_text("secret")
    guest.disk("vdb", "extension-vgputoken")
    guest.share("sandbox-mounts")
    assert guest.run() == []


def test_it_waits_for_name_servers_and_not_for_ever(guest: Guest) -> None:
    resolv = guest.root / "etc/resolv.conf"
    resolv.touch()
    assert guest.run("wait-for-names") == []
    resolv.write_text("nameserver 10.0.0.1\n")
    before = os.times().elapsed
    guest.run("wait-for-names")
    assert os.times().elapsed - before < 1.5


def test_the_recipe_is_of_a_vgpu_guest() -> None:
    found = recipe.load("vgpu-grid", PACKAGE.parent)
    assert found.vgpu == Vgpu() and "-grid.run" in (found.driver.file or "")
