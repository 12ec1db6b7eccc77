"""The default guest with the driver on a disk of its own."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from katagpu import disk, guest, recipe, sandbox
from katagpu.context import Context
from katagpu.lock import Deb, Lock
from katagpu.plan import Plan
from katagpu.sandbox import Bind, Root
from katagpu.schema import Recipe
from katagpu.stages import repository
from katagpu.stages.api import Build
from katagpu.store import Output

NAME = "split"
SHARED = {"stage0", "toolchain", "imagetools", "base", "kernel_source", "kernel_config", "kernel",
          "toolkit_source", "toolkit", "driver_user", "driver_modules"}


def extension_tools(context: Context, lock: Lock) -> tuple[Deb, ...]:
    """What apt would add to the base for cryptsetup-bin: the image tools have the same packages."""
    known = {deb.package: deb for deb in lock.group("imagetools")}
    base = {deb.package for deb in lock.group("base")}
    waiting, found = ["cryptsetup-bin"], dict[str, Deb]()
    while waiting:
        name = waiting.pop()
        if name in base or name in found or name not in known:
            continue
        found[name] = known[name]
        control = repository.control_of(context.store.sound(known[name].sha256))
        for field in ("Depends", "Pre-Depends"):
            waiting += re.findall(r"(?:^|[,|])\s*([a-z0-9.+-]+)", control.get(field, ""))
    return tuple(sorted(found.values(), key=lambda deb: deb.package))


@dataclass(frozen=True, kw_only=True)
class Split:
    """The recipe in both disks: its plan, and how to run tools on what it makes."""

    recipe: Recipe
    lock: Lock
    plan: Plan
    build: Build
    place: Path

    def output(self, stage: str, name: str) -> Output:
        """An output of a stage that is made."""
        return self.plan.ensure(stage).outputs[name]

    def blob(self, stage: str, name: str = "image") -> Path:
        """A file that a stage made."""
        return self.plan.store.sound(self.output(stage, name).blob)

    def tool(self, *argv: str, binds: tuple[Bind, ...] = (), check: bool = True) -> int:
        """The status of a program of the image tools."""
        tools = Root(lower=(self.build.tree("tools"),), upper=self.build.directory("tools"))
        return self.build.enter(argv, [tools], binds=binds, check=check).status

    def part(self, stage: str, number: int) -> Path:
        """A partition of a stage's disk, as a file of its own."""
        image = self.blob(stage)
        found = disk.partitions(image)[number - 1]
        target = self.place / f"{stage}-{number}"
        if not target.exists():
            with image.open("rb") as source, target.open("wb") as sink:
                source.seek(found.offset)
                sink.write(source.read(found.size))
        return target

    def files(self, stage: str) -> Path:
        """The root of a stage's disk, read back out of its file system."""
        target = self.place / f"{stage}-files"
        if not target.exists():
            target.mkdir()
            self.tool("fsck.erofs", "--extract=/katagpu/files", "--force", "--overwrite",
                      "/katagpu/part", binds=(
                          Bind(source=target, target="/katagpu/files", writable=True),
                          Bind(source=self.part(stage, 1), target="/katagpu/part")))
        return target


@contextlib.contextmanager
def split(context: Context, root: Path) -> Iterator[Split]:
    """A recipe file beside the default one, planned with the default's lock."""
    shutil.copytree(context.root / "kernel-configs", root / "kernel-configs")
    (root / "recipes").mkdir()
    text = (context.root / "recipes/debian-trixie.yaml").read_text()
    (root / "recipes" / f"{NAME}.yaml").write_text(
        text.replace("name: debian-trixie", f"name: {NAME}").replace(
            "\nimage:\n", "\nimage:\n  model: extension\n"))
    chosen = recipe.load(NAME, root)
    known = context.locked()
    assert known is not None
    lock = replace(known, groups={**known.groups,
                                  "extension_tools": extension_tools(context, known)})
    plan = Plan(guest.stages(chosen, lock, context.root), context.store, root / "logs")
    assert {name for name in SHARED if plan.reason(name) != "hit"} == set()
    action = plan.ensure("imagetools")
    stage = plan.stages["extension"]
    with context.store.staging("tests", sandbox.remove) as scratch:
        build = Build(stage, context.store, {"tools": action.outputs["root"]}, scratch,
                      scratch / "log")
        yield Split(recipe=chosen, lock=lock, plan=plan, build=build,
                    place=build.directory("place"))
