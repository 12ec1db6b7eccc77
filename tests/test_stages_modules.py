"""The driver's modules from a `.run`: a toy source, compiled by the build host's own compiler."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from katagpu import nvpreflight, sandbox
from katagpu.errors import UserError
from katagpu.store import Action, Store
from tests.nvrun.machine import MAKEFILE, RELEASE, SOURCE
from tests.toydriver import Guest, prepare

pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("gcc", "make", "strip", "dpkg-deb")),
    reason="needs gcc, make, binutils and dpkg-deb")


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """A guest with a toy driver."""
    yield prepare(monkeypatch, tmp_path)
    sandbox.remove(tmp_path)


def refused(guest: Guest) -> UserError:
    """What the user is told to mend."""
    failure = guest.refused()
    assert isinstance(failure, UserError) and failure.status == 1
    return failure


def modules(action: Action) -> dict[str, int]:
    """The modules with their sizes, as the record has them."""
    found: dict[str, int] = action.record["modules"]
    return found


def test_modules_are_built(guest: Guest) -> None:
    action = guest.plan().ensure("driver_modules")
    assert set(modules(action)) == {"nvidia.ko", "nvidia-uvm.ko"}


# what is found out before the first compiler starts


@pytest.mark.parametrize("name", ["gcc", "make", "ld", "sed"])
def test_a_program_that_the_root_has_not(guest: Guest, name: str) -> None:
    guest.programs.remove(name)
    guest.source = "#error the compiler was started\n"
    failure = refused(guest)
    assert f"the root in which the modules are built has no {name}" in failure.what
    assert "rootfs.extra_packages" in str(failure.hint)


@pytest.mark.parametrize("name", ["include/linux/kernel.h", "include/generated/autoconf.h",
                                  "Module.symvers", "scripts/mod/modpost"])
def test_headers_that_are_incomplete(guest: Guest, name: str) -> None:
    del guest.headers[name]
    guest.source = "#error the compiler was started\n"
    failure = refused(guest)
    assert f"{name} is missing" in failure.what and "build_kernel" in str(failure.hint)


def test_headers_of_another_kernel(guest: Guest) -> None:
    guest.headers["include/config/kernel.release"] = "6.1.0-other\n"
    assert f"are of kernel 6.1.0-other, the guest's is {RELEASE}" in refused(guest).what


def test_no_space_for_the_build(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvpreflight, "MODULES", 1 << 60)
    guest.source = "#error the compiler was started\n"
    failure = refused(guest)
    assert "the driver needs" in failure.what and "cache:gc" in str(failure.hint)


# the same again


def test_the_same_source_gives_the_same_modules(guest: Guest, tmp_path: Path) -> None:
    """Compiled twice, in other places and without ccache."""
    one = guest.plan(ccache=False).ensure("driver_modules")
    guest.store = Store(tmp_path / "deeper/and/elsewhere")
    two = guest.plan(ccache=False).ensure("driver_modules")
    assert one.outputs["modules"] == two.outputs["modules"]
    guest.source = SOURCE.replace("(1, 2)", "(2, 1)")
    other = guest.plan(ccache=False).ensure("driver_modules")
    assert other.outputs["modules"] != one.outputs["modules"], "a difference would be seen"


# a disk that is full


@pytest.mark.root
def test_the_disk_fills_up_while_the_compiler_writes(
    guest: Guest, tiny: Callable[[int], Path],
) -> None:
    """Space that was there when it was asked for, and went meanwhile: a real ENOSPC, in make."""
    guest.store = Store(tiny(24 << 20))
    guest.makefile += "modules: filler\nfiller:\n\tcat /dev/zero > filler\n"
    failure = refused(guest)
    assert "No space left on device" in (guest.place / "logs/driver_modules.log").read_text()
    assert "no space left in the store" in failure.what
    assert "cache:gc" in str(failure.hint) and "KATAGPU_STORE" in str(failure.hint)
    assert [path.name for path in (guest.store.root / "staging").iterdir()] == []
    guest.makefile = MAKEFILE.format(modules="nvidia nvidia-uvm")
    assert set(modules(guest.plan().ensure("driver_modules"))) == {"nvidia.ko", "nvidia-uvm.ko"}
    assert guest.store.verify() == []
