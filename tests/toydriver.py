"""A `.run` of toy sources, in roots that have the build host's /usr over their own."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import nvpreflight, recipe
from katagpu.errors import KatagpuError
from katagpu.keys import PACKAGE
from katagpu.plan import Plan
from katagpu.run import Result
from katagpu.sandbox import Root
from katagpu.schema import Capability, DriverSource
from katagpu.stages import installer, runfile
from katagpu.stages.api import Build, Ref, Stage
from katagpu.store import Kind, Store
from tests.nvrun.machine import CONFTEST, MAKEFILE, PROGRAMS, RELEASE, SOURCE, STAND_IN
from tests.nvrun.toys import Toy

ROOT = PACKAGE.parent
HEADERS = {"include/linux/kernel.h": "int toy_resize(int, int);\n", "include/linux/pci.h": "\n",
           "include/generated/autoconf.h": "\n", "include/config/kernel.release": f"{RELEASE}\n",
           "include/config/auto.conf": "\n", "Module.symvers": "\n", ".config": "\n",
           "scripts/mod/modpost": "\n"}
TOOLS = ("gcc", "make", "ld", "sed", "ldconfig", "grep", "dmesg", "tail", *PROGRAMS)


class Guest:
    """What the driver is made of, and a store; all can be changed before `plan`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = Store(place / "store")
        self.headers = dict(HEADERS)
        self.programs = list(TOOLS)
        self.makefile = MAKEFILE.format(modules="nvidia nvidia-uvm")
        self.source = SOURCE
        self.files: Mapping[str, bytes] = {}
        self.capabilities = [Capability.COMPUTE, Capability.UTILITY]

    def _root(self, build: Build) -> None:
        root = build.directory("root")
        for name in ("etc", "usr/bin", "var/log", "var/lib", "var/cache/ldconfig"):
            (root / name).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / name).symlink_to(f"usr/{name}")
        (root / "etc/ld.so.conf").write_text("/usr/lib/x86_64-linux-gnu\n")
        for name in self.programs:  # what is run are the build host's, which lie over them
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
        toy = Toy(installer=STAND_IN.read_bytes(),
                  files={**{name: text.encode() for name, text in files.items()}, **self.files})
        build.put_file("run", toy.make(build.directory("made")))

    def plan(self, *, ccache: bool = True) -> Plan:
        """The driver's stages, and those that they read."""
        wanted = recipe.load("debian-trixie", ROOT)
        wanted = replace(wanted, driver=replace(
            wanted.driver, source=DriverSource.RUNFILE, capabilities=tuple(self.capabilities)))
        made_of = {"headers": self.headers, "programs": self.programs, "makefile": self.makefile,
                   "source": self.source,
                   "files": {name: data.hex() for name, data in self.files.items()}}
        stages = [Stage(name=name, title=name, module="errors", make=make, outputs=outputs,
                        options=made_of)
                  for name, make, outputs in (
                      ("toolchain", self._root, {"root": Kind.TREE}),
                      ("base", self._root, {"root": Kind.TREE}),
                      ("kernel", self._kernel, {"headers": Kind.FILE, "release": Kind.FILE}),
                      ("driver_package", self._package, {"run": Kind.FILE}))]
        stages += [runfile.modules(wanted, ROOT),
                   installer.user(wanted, ROOT, {"below0": Ref(stage="base", output="root")})]
        return Plan({stage.name: stage for stage in stages}, self.store, self.place / "logs",
                    ccache=ccache)

    def refused(self, stage: str = "driver_modules") -> KatagpuError:
        """What is said where a stage fails; the store keeps nothing of it."""
        plan = self.plan()
        with pytest.raises(KatagpuError) as caught:
            plan.ensure(stage)
        assert plan.action(stage) is None
        return caught.value


def prepare(monkeypatch: pytest.MonkeyPatch, place: Path) -> Guest:
    """A guest below `place`. What programs write to /usr is in the root's upper directory."""
    stubs = place / "stubs"
    for name in PROGRAMS:
        (stubs / "sbin").mkdir(parents=True, exist_ok=True)
        (stubs / "sbin" / name).write_text("#!/bin/sh\n")
        (stubs / "sbin" / name).chmod(0o755)
    enter = Build.enter

    def with_usr(build: Build, argv: Sequence[str], roots: Sequence[Root], **more: Any) -> Result:
        assert roots[0].upper is not None
        (roots[0].upper / "usr").mkdir(exist_ok=True)
        usr = Root(lower=(stubs, Path("/usr")), upper=roots[0].upper / "usr", target="/usr",
                   special=False)
        return enter(build, argv, [roots[0], usr, *roots[1:]], **more)

    monkeypatch.setattr(Build, "enter", with_usr)
    monkeypatch.setattr(nvpreflight, "MODULES", 1 << 20)
    monkeypatch.setattr(nvpreflight, "HEADLESS", 1 << 20)
    return Guest(place)
