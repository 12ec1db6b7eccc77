"""User space by the installer, at its stage: what it says is one thing, what it did another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from katagpu import sandbox
from katagpu.errors import StepError, UserError
from katagpu.schema import Capability
from tests.nvrun.machine import VERSION
from tests.toydriver import Guest, prepare

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """A guest with a toy driver."""
    yield prepare(monkeypatch, tmp_path)
    sandbox.remove(tmp_path)


def layer(guest: Guest) -> set[str]:
    """The files that ship."""
    action = guest.plan().ensure("driver_user")
    target = guest.place / "layer"
    sandbox.unpack(guest.store.blob(action.outputs["layer"].blob), target, overlay=False)
    return {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}


def test_what_ships_is_what_the_manifest_has_for_the_guest(guest: Guest) -> None:
    found = layer(guest)
    assert {f"usr/lib/x86_64-linux-gnu/libcuda.so.{VERSION}", "usr/bin/nvidia-smi",
            f"usr/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin"} <= found
    assert not [path for path in found if "uninstall" in path or "glcore" in path]
    assert not [path for path in found if "i386" in path or path.endswith(".dll")]


def test_32_bit_libraries_and_dlss_ship_when_they_are_asked_for(guest: Guest) -> None:
    guest.capabilities += [Capability.COMPAT32, Capability.NGX]
    assert {f"usr/lib/i386-linux-gnu/libcuda.so.{VERSION}",
            "usr/lib/x86_64-linux-gnu/nvidia/wine/_nvngx.dll"} <= layer(guest)


@pytest.mark.parametrize(("misbehaviour", "said", "kind"), [
    ("nothing", "log breaks off", UserError), ("no-markers", "log breaks off", UserError),
    ("markers-only", "did not install", StepError), ("errors", "in spite of errors", StepError),
    ("sigbus", "disk was full", UserError)])
def test_status_0_is_no_proof(
    guest: Guest, misbehaviour: str, said: str, kind: type[Exception],
) -> None:
    guest.files = {"misbehave": misbehaviour.encode()}
    failure = guest.refused("driver_user")
    assert said in str(failure) and isinstance(failure, kind)
    assert "nvidia-installer.log" in str(failure)
    assert (guest.place / "logs/nvidia-installer.log").exists()
