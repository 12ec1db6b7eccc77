"""The licence client's checks, on the toy guest."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from katagpu import guestfiles
from katagpu.guestfiles import Kind

from .toys import LIB, Toy, cache_entries, ldconfig, library, program

TOKEN = "etc/nvidia/ClientConfigToken"
CONFIG = "etc/nvidia/gridd.conf"
VARIABLES = {"toolkit_mode": "none", "drm": False, "driver_layout": "plain",
             "driver_version": "550.163.01", "multiarch": "x86_64-linux-gnu",
             "services": [], "driver_root": "", "vgpu": {
                 "feature_type": 1, "server_address": None, "server_port": None,
                 "backup_server_address": None, "backup_server_port": None,
                 "license_interval": None}}


@pytest.fixture
def vgpu(toy: Toy) -> Toy:
    """The toy guest with the real guest files of a vGPU guest, and a toy nvidia-gridd."""
    wanted = ("gridd", "nvidia-token", "nvidia-licence", "client-token", "ClientConfigToken")
    guestfiles.lay([entry for entry in guestfiles.render(VARIABLES)
                    if any(word in entry.path for word in wanted)
                    and entry.kind is not Kind.REMOVE], toy.root)
    for name in ("nvidia-gridd", "systemctl"):
        shutil.copy(toy.root / "usr/bin/kmod", toy.root / "usr/bin" / name)
    return toy


def test_a_sound_vgpu_guest_has_no_findings(vgpu: Toy) -> None:
    assert vgpu.find(vgpu=True) == []


def test_other_guests_need_none_of_it(toy: Toy) -> None:
    assert toy.ids(vgpu=False) == set()
    assert toy.ids(vgpu=True) == {"vgpu-config", "vgpu-daemon"}


@pytest.mark.parametrize(("text", "sound"), [
    ("FeatureType=4\n# a word\n\nEnableUI=FALSE\n", True),
    ("FeatureType = 0\nServerAddress=licence.example\nServerPort=7070\n", True),
    ("FeatureType=1\nLicenseInterval=10\nLingerInterval=0\n", True),
    ("FeatureType=3\n", False),
    ("EnableUI=FALSE\n", False),
    ("FeatureType=1\nFeatureType=2\n", False),
    ("FeatureType=1\nServerPort=0\n", False),
    ("FeatureType=1\nServerPort=70 70\n", False),
    ("FeatureType=1\nServerAddress=\n", False),
    ("FeatureType=1\nServerAddress=a b\n", False),
    ("FeatureType=1\nLicenseInterval=9\n", False),
    ("FeatureType=1\nEnableUI=yes\n", False),
    ("FeatureType=1\nFeatureTyp=1\n", False),
    ("[section]\nFeatureType=1\n", False),
])
def test_gridd_conf(vgpu: Toy, text: str, sound: bool) -> None:
    (vgpu.root / CONFIG).write_text(text)
    assert vgpu.ids(vgpu=True) == (set() if sound else {"vgpu-config"})


@pytest.mark.parametrize("path", [
    "usr/bin/nvidia-gridd",
    "etc/systemd/system/kata-containers.target.wants/nvidia-gridd.service",
    "etc/systemd/system/run-kata\\x2dcontainers-sandbox-shm.mount.wants/nvidia-licence.service",
])
def test_what_the_client_needs(vgpu: Toy, path: str) -> None:
    (vgpu.root / path).unlink()
    assert "vgpu-daemon" in vgpu.ids(vgpu=True)


def test_a_masked_unit_is_not_enabled(vgpu: Toy) -> None:
    unit = vgpu.root / "etc/systemd/system/nvidia-gridd.service"
    unit.unlink()
    unit.symlink_to("/dev/null")
    assert "vgpu-daemon" in vgpu.ids(vgpu=True)


def test_the_token_has_a_place(vgpu: Toy) -> None:
    (vgpu.root / TOKEN).rmdir()
    assert vgpu.ids(vgpu=True) == {"vgpu-daemon"}


def test_gridd_is_a_program(vgpu: Toy) -> None:
    (vgpu.root / "usr/bin/nvidia-gridd").write_text("#!/bin/sh\n")
    assert "vgpu-daemon" in vgpu.ids(vgpu=True)


def test_the_libraries_of_older_clients_are_found_in_their_directory(vgpu: Toy) -> None:
    """libFlxCore lies in a directory that only the guest's ld.so.conf.d names."""
    root = vgpu.root
    core = root / LIB / "nvidia/gridd/libFlxCore64.so.2019.04"
    core.parent.mkdir(parents=True)
    library(core, core.name, version="V1")
    (root / "usr/bin/nvidia-gridd").unlink()
    program(root / "usr/bin/nvidia-gridd", core, call="f_v")
    assert "elf-needed" in vgpu.ids(vgpu=True)  # until ldconfig has run
    ldconfig(root, {**cache_entries(root), core.name: f"/{LIB}/nvidia/gridd/{core.name}"})
    assert vgpu.ids(vgpu=True) == set()
    core.unlink()
    assert "elf-needed" in vgpu.ids(vgpu=True)


@pytest.mark.parametrize("path", [
    f"{TOKEN}/client_configuration_token_01-02-2026.tok", f"{TOKEN}/x", f"{TOKEN}/deep/x.tok",
    "root/client_configuration_token_01-02-2026.tok"])
@pytest.mark.parametrize("is_vgpu", [False, True])
def test_no_guest_is_stored_with_a_token(vgpu: Toy, path: str, is_vgpu: bool) -> None:
    place = vgpu.root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a secret")
    found = vgpu.find(vgpu=is_vgpu)
    assert {finding.check for finding in found} == {"vgpu-no-token"}
    assert "a secret" not in str(found)
    place.unlink()
    place.symlink_to(Path("/run/token"))
    assert {finding.check for finding in vgpu.find(vgpu=is_vgpu)} == {"vgpu-no-token"}
