"""A guest of real stages on toys, as `guest.py` of a toy repository: kernel, modules, an initrd.

Make, compiler, sandbox and packing are real; the kernel is `data/toykernel`, and programs are the
build host's.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

from tests import toyrepo
from tests.toyrepo import ToyRepository

GUEST = '''
"""See tests/toykernelguest.py."""

from pathlib import Path
from katagpu import guest_real, hostsetup, plan
from katagpu.stages import driver
from tests import test_toykernel, toykernelguest

plan.Build = test_toykernel.HostBuild
driver.require_modules = lambda *_where: None
hostsetup.ensure_host = lambda: None

def stages(recipe, lock, root):
    return toykernelguest.stages(guest_real.stages(recipe, lock, root), root)
'''


def stages(real: dict, root: Path) -> dict:  # type: ignore[type-arg]  # of the copy's own types
    """The stages of the toy guest, of the real ones for its recipe."""
    from katagpu import patches
    from katagpu.stages import kbuild
    from katagpu.stages.api import Ref, Stage
    from katagpu.store import Kind
    from tests import test_toykernel

    kernel = root / "toykernel"
    series = kbuild.patch_files(root, patches.Target.KERNEL)
    signing = {name: path for name, path in real["kernel_config"].files.items()
               if name.startswith("kernel-configs/signing/")}
    layers = ["base", "kernel_modules", "driver_modules"]
    found = [
        Stage(name="toolchain", title="", module="errors", make=test_toykernel.make_toolchain,
              outputs={"root": Kind.TREE}),
        Stage(name="kernel_source", title="", module="errors", make=make_source,
              outputs={"tarball": Kind.FILE},
              files={str(file.relative_to(kernel)): file for file in kernel.rglob("*")
                     if file.is_file()}),
        dataclasses.replace(real["kernel_config"], options={
            "fragments": ["own.conf", *signing]}, files={
            "own.conf": root / "own.conf", "allow": root / "allow.yaml", **signing, **series}),
        dataclasses.replace(real["kernel"], options={
            **real["kernel"].options, "package_version": "9.9.1-1"}),
        dataclasses.replace(real["driver_modules"], make=test_toykernel.make_driver, packages={},
                            options={**real["driver_modules"].options, "version": "999.1"}),
        *(real[name] for name in ("signed_kernel", "signed_driver") if name in real),
        Stage(name="base", title="", module="errors", make=make_base, outputs={"root": Kind.TREE},
              files={"word": root / "rootfs/word"}),
        dataclasses.replace(
            real["initrd"], name="image", options={**real["initrd"].options, "layers": layers},
            inputs={"base": Ref(stage="base", output="root"),
                    "tools": Ref(stage="toolchain", output="root"),
                    **{name: real["initrd"].inputs[name] for name in layers[1:]}}),
        real["kata_config"],
        Stage(name="manifest", title="", module="errors", make=make_manifest,
              outputs={"manifest": Kind.FILE},
              inputs={"image": Ref(stage="image", output="image"),
                      "vmlinuz": Ref(stage="kernel", output="vmlinuz")})]
    return {stage.name: stage for stage in found}


def make_source(build) -> None:  # type: ignore[no-untyped-def]
    """The toy as a tarball, which tells nothing of who checked it out."""
    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mode = 0o755 if member.mode & 0o100 else 0o644
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    target = build.scratch / "toy.tar"
    with tarfile.open(target, "w") as tar:
        for name, path in sorted(build.stage.files.items()):
            tar.add(path, f"linux-9.9.1/{name}", filter=plain)
    build.put_file("tarball", target)


def make_base(build) -> None:  # type: ignore[no-untyped-def]
    """A root with a program."""
    root = build.directory("root")
    (root / "usr/bin").mkdir(parents=True)
    shutil.copy(build.file("word"), root / "usr/bin/word")
    (root / "usr/bin/word").chmod(0o755)
    (root / "usr/lib/modules").mkdir(parents=True)
    for directory in (root, *root.rglob("*")):
        directory.chmod(0o755)
    build.put_tree("root", root)


def make_manifest(build) -> None:  # type: ignore[no-untyped-def]
    """The digests of what goes into it."""
    build.put_bytes("manifest", json.dumps({
        name: output.identity for name, output in build.inputs.items()}).encode())


def repository(top: Path) -> ToyRepository:
    """The toy repository with this guest."""
    from tests.test_toykernel import FRAGMENT, TOY

    toy = ToyRepository(top)
    package = toy.root / "katagpu"
    shutil.copy(toyrepo.REPOSITORY / "katagpu/guest.py", package / "guest_real.py")
    (package / "guest.py").write_text(GUEST)
    shutil.copytree(TOY, toy.root / "toykernel")
    (toy.root / "own.conf").write_text(FRAGMENT)
    (toy.root / "allow.yaml").write_text("[]\n")
    return toy
