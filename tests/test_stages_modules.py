"""The driver's modules from a `.run`: a toy source, compiled by the build host's own compiler."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import nvpreflight, recipe, sandbox
from katagpu.errors import UserError
from katagpu.keys import PACKAGE
from katagpu.plan import Plan
from katagpu.run import Result
from katagpu.sandbox import Root
from katagpu.schema import DriverSource
from katagpu.stages import runfile
from katagpu.stages.api import Build, Stage
from katagpu.store import Action, Kind, Store
from tests.nvrun.machine import CONFTEST, MAKEFILE, RELEASE, SOURCE
from tests.nvrun.toys import Toy

pytestmark = pytest.mark.skipif(
    any(shutil.which(name) is None for name in ("gcc", "make", "strip", "dpkg-deb")),
    reason="needs gcc, make, binutils and dpkg-deb")
ROOT = PACKAGE.parent
HEADERS = {"include/linux/kernel.h": "int toy_resize(int, int);\n", "include/linux/pci.h": "\n",
           "include/generated/autoconf.h": "\n", "include/config/kernel.release": f"{RELEASE}\n",
           "Module.symvers": "\n", "scripts/mod/modpost": "\n"}
PROGRAMS = ("gcc", "make", "ld", "sed")


class Guest:
    """What the modules are built of, and a store; all can be changed before `plan`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = Store(place / "store")
        self.headers = dict(HEADERS)
        self.programs = list(PROGRAMS)
        self.makefile = MAKEFILE.format(modules="nvidia nvidia-uvm")
        self.source = SOURCE

    def _toolchain(self, build: Build) -> None:
        root = build.directory("root")
        for name in ("etc", "usr/bin"):
            (root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / name).symlink_to(f"usr/{name}")
        for name in self.programs:  # the build host's lie over them
            (root / "usr/bin" / name).touch()
        build.put_tree("root", root)

    def _kernel(self, build: Build) -> None:
        tree = build.directory("deb")
        for name, text in {**{f"usr/src/linux-headers-{RELEASE}/{name}": text
                              for name, text in self.headers.items()},
                           "DEBIAN/control": "Package: toy\nVersion: 1\nArchitecture: all\n"
                                             "Maintainer: toy <toy@example.com>\n"
                                             "Description: toy\n"}.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        deb = build.scratch / "toy.deb"
        subprocess.run(["dpkg-deb", "--build", "-Znone", tree, deb], check=True,
                       capture_output=True)
        build.put_file("headers", deb)
        build.put_bytes("release", RELEASE.encode())

    def _package(self, build: Build) -> None:
        files = {"kernel-open/Makefile": self.makefile, "kernel-open/conftest.sh": CONFTEST,
                 "kernel-open/nvidia/nv.c": self.source}
        toy = Toy(files={name: text.encode() for name, text in files.items()})
        build.put_file("run", toy.make(build.directory("made")))

    def plan(self, *, ccache: bool = True) -> Plan:
        """The stage and those that it reads."""
        wanted = recipe.load("debian-trixie", ROOT)
        wanted = replace(wanted, driver=replace(wanted.driver, source=DriverSource.RUNFILE))
        made_of = {"headers": self.headers, "programs": self.programs, "makefile": self.makefile,
                   "source": self.source}
        stages = [Stage(name=name, title=name, module="errors", make=make, outputs=outputs,
                        options=made_of)
                  for name, make, outputs in (
                      ("toolchain", self._toolchain, {"root": Kind.TREE}),
                      ("kernel", self._kernel, {"headers": Kind.FILE, "release": Kind.FILE}),
                      ("driver_package", self._package, {"run": Kind.FILE}))]
        stages.append(runfile.modules(wanted, ROOT))
        return Plan({stage.name: stage for stage in stages}, self.store, self.place / "logs",
                    ccache=ccache)

    def refused(self) -> UserError:
        """What is said where the modules are not built; the store keeps nothing of them."""
        plan = self.plan()
        with pytest.raises(UserError) as caught:
            plan.ensure("driver_modules")
        assert caught.value.status == 1
        assert plan.action("driver_modules") is None
        return caught.value


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """A guest whose build roots have the build host's /usr over their own."""
    enter = Build.enter

    def with_usr(build: Build, argv: Sequence[str], roots: Sequence[Root], **more: Any) -> Result:
        number = len(list(build.scratch.iterdir()))
        usr = Root(lower=(Path("/usr"),), upper=build.directory(f"usr{number}"), target="/usr",
                   special=False)
        return enter(build, argv, [*roots, usr], **more)

    monkeypatch.setattr(Build, "enter", with_usr)
    monkeypatch.setattr(nvpreflight, "MODULES", 1 << 20)
    yield Guest(tmp_path)
    sandbox.remove(tmp_path)


def modules(action: Action) -> dict[str, int]:
    """The modules with their sizes, as the record has them."""
    found: dict[str, int] = action.record["modules"]
    return found


def test_modules_are_built(guest: Guest) -> None:
    action = guest.plan().ensure("driver_modules")
    assert set(modules(action)) == {"nvidia.ko", "nvidia-uvm.ko"}


# what is found out before the first compiler starts


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_the_root_has_not(guest: Guest, name: str) -> None:
    guest.programs.remove(name)
    guest.source = "#error the compiler was started\n"
    failure = guest.refused()
    assert f"the root in which the modules are built has no {name}" in failure.what
    assert "rootfs.extra_packages" in str(failure.hint)


@pytest.mark.parametrize("name", ["include/linux/kernel.h", "include/generated/autoconf.h",
                                  "Module.symvers", "scripts/mod/modpost"])
def test_headers_that_are_incomplete(guest: Guest, name: str) -> None:
    del guest.headers[name]
    guest.source = "#error the compiler was started\n"
    failure = guest.refused()
    assert f"{name} is missing" in failure.what and "build_kernel" in str(failure.hint)


def test_headers_of_another_kernel(guest: Guest) -> None:
    guest.headers["include/config/kernel.release"] = "6.1.0-other\n"
    assert f"are of kernel 6.1.0-other, the guest's is {RELEASE}" in guest.refused().what


def test_no_space_for_the_build(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvpreflight, "MODULES", 1 << 60)
    guest.source = "#error the compiler was started\n"
    failure = guest.refused()
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
    failure = guest.refused()
    assert "No space left on device" in (guest.place / "logs/driver_modules.log").read_text()
    assert "no space left in the store" in failure.what
    assert "cache:gc" in str(failure.hint) and "KATAGPU_STORE" in str(failure.hint)
    assert [path.name for path in (guest.store.root / "staging").iterdir()] == []
    guest.makefile = MAKEFILE.format(modules="nvidia nvidia-uvm")
    assert set(modules(guest.plan().ensure("driver_modules"))) == {"nvidia.ko", "nvidia-uvm.ko"}
    assert guest.store.verify() == []
