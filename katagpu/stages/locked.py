"""Stages of a guest whose lock names files too: these files, and no others, whoever has them.

What comes out is what comes out without such a lock; it is only known before.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from katagpu import kernelorg, keys
from katagpu.errors import UserError
from katagpu.lock import File, Lock
from katagpu.stages import toolkit
from katagpu.stages.api import Build, Stage

MODULE = "stages.locked"
TARBALL, SIGNATURE, RUN = "kernel/tarball", "kernel/signature", "driver/run"


def pinned(stages: Sequence[Stage], lock: Lock, root: Path) -> list[Stage]:
    """The stages with what the lock pins. Raises `UserError` for a local file that is another."""
    files, modules = lock.pins.files, lock.pins.modules
    _same(files, lock.recipe, root)
    found = []
    for stage in stages:
        if stage.name == "kernel_source" and stage.network and TARBALL in files:
            stage = _kernel(stage, files)
        elif stage.name == "driver_package" and "run" in stage.downloads and RUN in files:
            url, digest = stage.downloads["run"]  # none: the recipe's address is a newer one
            stage = dataclasses.replace(stage, downloads={
                "run": (url, digest or files[RUN].sha256)})
        elif stage.name == "toolkit_source" and modules:
            stage = dataclasses.replace(stage, module=MODULE, make=make_modules,
                                        options={**stage.options, "sums": dict(modules)})
        found.append(stage)
    return found


def _same(files: Mapping[str, File], recipe: str, root: Path) -> None:
    for name, file in files.items():
        if file.path is not None:
            digest = keys.readable_digest(root / file.path)
            if digest != file.sha256:
                part = name.split("/")[0]
                raise UserError(f"{file.path} is not the file that was locked\n"
                                f"  expected sha256 {file.sha256}\n  got             {digest}",
                                hint="put the locked file back, or take this one: "
                                     f"`./doitw recipe={recipe} lock update={part}`")


def _kernel(stage: Stage, files: Mapping[str, File]) -> Stage:
    version = stage.options["version"]
    tarball, signature = kernelorg.urls(version, stage.options["releases"])
    return dataclasses.replace(
        stage, module=MODULE, make=make_kernel, network=False, options={"version": version},
        downloads={"tarball": (tarball, files[TARBALL].sha256),
                   "signature": (signature, files[SIGNATURE].sha256)})


def make_kernel(build: Build) -> None:
    """The locked release; its signature is verified once more, with the keys of today."""
    pins = build.directory("keys")
    for name, path in build.stage.files.items():
        (pins / name).write_bytes(path.read_bytes())
    place = build.directory("release")
    version = build.options["version"]
    tarball, signature = place / f"linux-{version}.tar.xz", place / f"linux-{version}.tar.sign"
    for path, name in ((tarball, "tarball"), (signature, "signature")):
        path.write_bytes(build.download(name).read_bytes())
    build.facts["signed_by"] = kernelorg.verify(tarball, signature, pins)
    build.put_file("tarball", tarball)


# Go modules


def make_modules(build: Build) -> None:
    """The modules as Go brings them, where each is what the lock says."""
    toolkit.make_source(build)
    locked = build.options["sums"]
    wrong = [f"{module}: expected {locked.get(module, 'none')}, got {found}"
             for module, found in sums(build.directory("proxy")).items()
             if locked.get(module) != found]
    if wrong:
        shown = "\n  ".join(wrong[:5]) + (f"\n  and {len(wrong) - 5} more" if wrong[5:] else "")
        raise UserError(f"Go modules are not those that were locked:\n  {shown}", hint=(
            "where a proxy altered them, use another GOPROXY; another Go may need other modules "
            "of the toolkit: `./doitw lock update=toolkit` takes what it needs"))


def sums(proxy: Path) -> dict[str, str]:
    """Go's checksums of the modules in a file system proxy, as go.sum has them (go help goproxy).

    That of a go.mod file is made here (`Hash1` of golang.org/x/mod/sumdb/dirhash).
    """
    found = {}
    for path in sorted(proxy.rglob("@v/*.mod")):
        module = _unescaped(f"{path.parent.parent.relative_to(proxy)}") + " " \
            + _unescaped(path.stem)
        line = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  go.mod\n"
        summed = base64.b64encode(hashlib.sha256(line.encode()).digest()).decode()
        found[f"{module}/go.mod"] = f"h1:{summed}"
        whole = path.with_suffix(".ziphash")
        if whole.exists():
            found[module] = whole.read_text().strip()
    return dict(sorted(found.items()))


def _unescaped(name: str) -> str:
    """`!x` is `X`, so that names differ on file systems that know no case."""
    return re.sub("!([a-z])", lambda match: match[1].upper(), name)
