"""`diff` on real builds: the default guest with itself, and with that of the other module."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from msgspec.structs import replace

from katagpu import artifacts, compare, compare_text, finished, guest
from katagpu.artifacts import Outcome
from katagpu.compare import How
from katagpu.context import Context
from katagpu.filelist import Kind
from katagpu.finished import Finished
from katagpu.plan import Plan
from katagpu.sandbox import Root
from katagpu.stages.api import Build
from tests.closedguest import Closed

PLACE = "kernel/drivers/video"
TREE = "/katagpu/tree"
QUICK = 2  # seconds


def test_the_default_guest_with_itself(context: Context) -> None:
    started = time.monotonic()
    builds = [finished.read(context.directory, name) for name in ("one", "two")]
    found = compare.compare(*builds)
    assert list(compare_text.text(found)) == ["one → two", "Nothing differs."]
    assert time.monotonic() - started < QUICK
    assert found.lacks == ()


def test_the_list_of_files_is_the_guest(
        context: Context, guest: tuple[Build, Root]) -> None:
    build, root = guest
    files = finished.read(context.directory, "it").files or {}
    roots = [Root(lower=(build.tree("tools"),), upper=build.directory("find")),
             Root(lower=root.lower, special=False, target=TREE)]
    said = build.enter(["find", TREE, "-mindepth", "1", "-printf", r"%P\t%y %m %U %G\n"], roots,
                       capture=True).stdout.decode()
    inside = dict(line.split("\t", 1) for line in said.splitlines())
    letters = {Kind.FILE: "f", Kind.DIRECTORY: "d", Kind.LINK: "l"}
    assert inside == {path: f"{letters[entry.kind]} {entry.mode:o} {entry.uid} {entry.gid}"
                      for path, entry in files.items() if path}
    entry = files["usr/bin/nvidia-ctk"]
    said = build.enter(["sha256sum", f"{TREE}/usr/bin/nvidia-ctk"], roots,
                       capture=True).stdout.decode()
    assert said.split()[0] == entry.content


def variant(context: Context, closed: Closed, scratch: Path) -> Finished | None:
    """The guest with the closed module, if that was compiled once."""
    plan = Plan(guest.stages(closed.recipe, closed.lock, context.root), context.store,
                scratch / "logs")
    if plan.action("driver_modules") is None:
        return None
    plan.ensure("manifest")
    Outcome(scratch / "closed", plan).restore(artifacts.of(closed.recipe, "build_image"))
    return finished.read(scratch / "closed", "closed")


def test_the_default_guest_with_a_variant(
        context: Context, closed: Closed, tmp_path: Path) -> None:
    default = finished.read(context.directory, "open")
    other = variant(context, closed, tmp_path)
    if other is None:  # compiling it is not this test's business: packages alone
        packages = {**default.manifest.packages, "libc6": "0", "more": "1"}
        other = dataclasses.replace(default, manifest=replace(default.manifest, packages=packages))
        found = compare.compare(default, other)
        assert [change.name for change in found.packages] == ["libc6", "more"]
        assert found.files == ()
        return
    found = compare.compare(default, other)
    assert [(change.name, change.after) for change in found.facts] == [
        ("driver.kernel_module", "closed")]
    assert (found.packages, found.config) == ((), ())
    assert {part.name for part in found.parts if not part.same} == {
        "image", "sizes", "files", "sbom_spdx", "sbom_cyclonedx", "licences"}
    files = {change.path: change for change in found.files or ()}
    release = default.manifest.kernel_release
    module = files[f"usr/lib/modules/{release}/{PLACE}/nvidia.ko"]
    assert module.how is How.CHANGED and "content" in module.what
    assert all(change.how is How.CHANGED for change in files.values())
    assert sum(change.delta for change in files.values()) == sum(
        size.delta for size in found.sizes or ())
