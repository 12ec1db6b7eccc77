"""User space from a `.run` file: NVIDIA's own installer, run in the guest's root.

The installer sees the guest with the headers of the guest's kernel, an empty list of loaded
modules, no PCI bus and no network. What it leaves is not shipped as it is: the files that the
driver's manifest has for the recipe's capabilities are taken out of it, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from katagpu import (
    drivermanifest,
    driverparts,
    harvest,
    log,
    nvinstaller,
    nvoutcome,
    nvpreflight,
    nvsupported,
)
from katagpu.drivermanifest import Manifest
from katagpu.errors import StepError, TookTooLong
from katagpu.keys import digest
from katagpu.run import PATH, Result, run
from katagpu.sandbox import Bind, Root
from katagpu.schema import KernelModule, ModulesBy, Recipe
from katagpu.stages import runfile
from katagpu.stages.api import Build, Ref, Stage, jobs
from katagpu.stages.driver import TARGETS, excluded, put
from katagpu.stages.kbuild import STAMPS, patch, patch_files
from katagpu.stages.layers import RUN, stack
from katagpu.store import Kind

MODULE = "stages.installer"
PACKAGE = "/katagpu/driver"
BUILT = "/katagpu/modules"
LOG = "nvidia-installer.log"  # beside the logs of the stages
TIMEOUT = 3600.0  # seconds; with all modules to compile it took 4 minutes on two cores


def user(recipe: Recipe, root: Path, below: Mapping[str, Ref]) -> Stage:
    """Run the installer on top of `below` (the guest's layers under the driver, lowest first).

    `root` is the repository.
    """
    driver = recipe.driver
    inputs: dict[str, Ref] = {**below, "run": RUN,
                              "release": Ref(stage="kernel", output="release")}
    outputs = {"layer": Kind.TREE, "parts": Kind.FILE, "supported": Kind.FILE}
    options: dict[str, Any] = {
        "layers": list(below), "version": driver.version,
        "capabilities": sorted(str(name) for name in driver.capabilities),
        "documentation": driver.documentation, "modules_by": str(driver.modules_by)}
    files: dict[str, Path] = {}
    if driver.modules_by is ModulesBy.INSTALLER:
        options |= {"flavour": str(driver.kernel_module), "excluded": excluded(recipe)}
        files = patch_files(root, TARGETS[driver.kernel_module])
        inputs |= {"headers": Ref(stage="kernel", output="headers"),
                   "toolchain": Ref(stage="toolchain", output="root"),
                   "driver_build": Ref(stage="driver_build", output="layer")}
        outputs["modules"] = Kind.TREE
    return Stage(name="driver_user", title="NVIDIA user space by nvidia-installer", module=MODULE,
                 make=make_user, outputs=outputs, options=options, inputs=inputs, files=files)


class _Compiler:
    """What the installer compiles with: headers and compiler over the guest, ccache, our patches.

    `own` is what lies over the unpacked package at `tree`.
    """

    def __init__(self, build: Build, tree: Path, own: Path, request: nvinstaller.Request) -> None:
        headers = build.directory("headers")
        run(["dpkg-deb", "--extract", build.blob("headers"), headers], log=build.log)
        modules = headers / "usr/lib/modules" / request.release
        modules.mkdir(parents=True, exist_ok=True)
        place = f"usr/src/linux-headers-{request.release}"
        self.headers = headers / place
        if (headers / "lib").is_dir():  # a directory here would hide the guest's link
            shutil.rmtree(headers / "lib")
        (modules / "build").symlink_to(f"/{place}")
        (modules / "kernel").mkdir(exist_ok=True)  # without it modules are put into ./video
        self.layers = (headers, build.tree("driver_build"))
        # the compiler is in the guest's layers, and not in the toolchain
        compiler = digest([build.inputs[name].identity
                           for name in (*build.options["layers"], "driver_build")])
        self.binds, env = build.compiler_cache("driver", compiler)
        self.env = {**env, **STAMPS, "PATH": f"/usr/lib/ccache:{PATH}"}
        directory = runfile.DIRECTORIES[request.flavour]
        run(["cp", "--recursive", "--preserve=mode,timestamps", "--reflink=auto",
             tree / directory, own / directory], log=build.log)
        patch(build, TARGETS[request.flavour], request.version, self.headers, own / directory)


def make_user(build: Build) -> None:
    """Run the installer, judge what came of it, and take out what ships."""
    tree = runfile.unpacked(build)
    manifest = drivermanifest.parse((tree / drivermanifest.FILE).read_text())
    selection = _selection(build, tree, manifest)
    request = _request(build, manifest, selection)
    upper, own = build.directory("upper"), build.directory("package")
    with_compiler = _Compiler(build, tree, own, request) if request.builds else None
    below = with_compiler.layers if with_compiler else ()
    guest = Root(lower=(*below, *stack(build)), upper=upper)
    nvpreflight.require(nvpreflight.preflight(nvpreflight.Plan(
        version=request.version, release=request.release, flavour=request.flavour,
        flavours=request.flavours, layers=guest.lower, space=build.scratch,
        builds=request.builds,
        headless=not (request.opengl or request.compat32))))
    package = Root(lower=(tree,), upper=own, target=PACKAGE, special=False)
    _run(build, [guest, package], with_compiler, request)
    taken = _take(build, guest, upper, selection)
    if with_compiler is not None:
        _take_modules(build, guest, upper, request, with_compiler.headers)
    build.put_bytes("parts", json.dumps(_parts(tree, selection), indent=1).encode())
    listed = tree / nvsupported.FILE
    build.put_bytes("supported", json.dumps(
        nvsupported.ids(listed.read_text()) if listed.exists() else []).encode())
    build.put_tree("layer", taken)


def _selection(build: Build, tree: Path, manifest: Manifest) -> driverparts.Selection:
    """The entries of the manifest that ship; the licence always does."""
    found = driverparts.select(
        manifest, build.options["capabilities"], documentation=build.options["documentation"],
        filelist_json=_filelist(tree))
    licence = tuple(entry for entry in found.left
                    if entry.type == "DOCUMENTATION" and entry.name == "LICENSE")
    for line in found.notes:
        log.note(f"driver_user: {line}")
    return dataclasses.replace(found, shipped=(*found.shipped, *licence))


def _request(build: Build, manifest: Manifest,
             selection: driverparts.Selection) -> nvinstaller.Request:
    options, shipped = build.options, selection.shipped
    # Where it compiles nothing, any flavour that the package has will do.
    flavour = options.get("flavour") or sorted(manifest.flavours or {KernelModule.CLOSED})[0]
    return nvinstaller.Request(
        version=options["version"], release=build.blob("release").read_text(),
        flavour=KernelModule(flavour), flavours=manifest.flavours,
        builds=options["modules_by"] == ModulesBy.INSTALLER,
        drm="nvidia-drm" not in options.get("excluded", ()),
        opengl=any(entry.opengl for entry in shipped),
        display=any(entry.type in drivermanifest.X_MODULES for entry in shipped),
        wine=any(entry.type == "WINE_LIB" for entry in shipped),
        compat32=any(entry.compat32 for entry in shipped), jobs=jobs(),
        host_release=os.uname().release)


def _run(build: Build, roots: Sequence[Root], compiler: _Compiler | None,
         request: nvinstaller.Request) -> None:
    """Ask the installer for its options, run it, and raise unless it did all that was wanted."""
    def enter(argv: Sequence[str], **more: Any) -> Result:
        return build.enter(argv, roots, binds=compiler.binds if compiler else [],
                           env=compiler.env if compiler else {}, cwd=PACKAGE, check=False, **more)

    listed = nvinstaller.supported(enter(nvinstaller.HELP, capture=True).stdout.decode())
    for line in nvinstaller.left_out(listed, request):
        log.note(f"driver_user: {line}")
    before = build.log.stat().st_size
    status: int | None = None  # it did not end
    with contextlib.suppress(TookTooLong):
        status = enter(nvinstaller.command(listed, request), timeout=TIMEOUT).status
    said = build.log.read_bytes()[before:].decode(errors="replace")
    text = build.inside(harvest.read, roots[:1], path=request.log)
    build.log.with_name(LOG).write_text(text)
    verdict = nvoutcome.judge(nvoutcome.Outcome(
        status=status, log=text, said=said, version=request.version, release=request.release,
        flavour=request.flavour, seconds=TIMEOUT))
    _require(build, verdict)


def _require(build: Build, verdict: nvoutcome.Verdict) -> None:
    if not verdict.ok:
        failure = verdict.error()
        failure.what += f"\n  the installer's whole log: {build.log.with_name(LOG)}"
        raise failure


def _take(build: Build, guest: Root, upper: Path, selection: driverparts.Selection) -> Path:
    """Take what ships out of the overlay. Raises `StepError` when the installer left out a file."""
    layout = drivermanifest.Layout(version=build.options["version"])
    places = {str(place): entry for entry in selection.shipped
              if (place := drivermanifest.destination(entry, layout)) is not None}
    # of a type that is not known here, wherever the installer put them
    strange = {entry.name: entry for entry in selection.shipped
               if drivermanifest.destination(entry, layout) is None}
    found = build.inside(harvest.find, [guest], upper=str(upper), names=sorted(strange))
    places |= {path: strange[name] for name, paths in found.items() for path in paths}
    target = build.directory("taken")
    answer = build.inside(harvest.take, [guest], upper=str(upper), target=str(target),
                          wanted=list(places))
    lost = [path for path in answer["missing"] if places[path].target is None
            and places[path].type != drivermanifest.ONLY_WITH_X]
    lost += [name for name, entry in strange.items() if name not in found and not entry.target]
    if lost:
        raise StepError(f"nvidia-installer did not install {len(lost)} files that its manifest has "
                        f"for this guest: {', '.join(lost[:6])}",
                        hint=f"its log: {build.log.with_name(LOG)}")
    return target


def _parts(tree: Path, selection: driverparts.Selection) -> dict[str, Any]:
    """Bytes and files by purpose: of what ships, and of what was left out."""
    filelist = _filelist(tree)
    sizes = {str(path.relative_to(tree)): path.stat().st_size
             for path in tree.rglob("*") if path.is_file() and not path.is_symlink()}
    found = {name: driverparts.parts(entries, sizes, filelist_json=filelist)
             for name, entries in (("shipped", selection.shipped), ("left", selection.left))}
    shipped, left = (sum(part.size for part in parts if part.name != "kernel module source")
                     for parts in found.values())
    log.note(f"driver_user: {log.size(shipped)} of {log.size(shipped + left)} ship")
    return {name: [dataclasses.asdict(part) for part in parts] for name, parts in found.items()}


def _filelist(tree: Path) -> str | None:
    """NVIDIA's own list of what each file is for, where the package has one."""
    path = tree / drivermanifest.FILELIST
    return path.read_text() if path.exists() else None


def _take_modules(build: Build, guest: Root, upper: Path, request: nvinstaller.Request,
                  headers: Path) -> None:
    """The modules that the installer compiled: stripped, and without those not asked for."""
    # kernel/drivers/video, or video where the guest has no modules of its kernel's
    found = build.inside(harvest.modules, [guest], path=f"/usr/lib/modules/{request.release}")
    wanted = [path for path in found if Path(path).stem not in build.options["excluded"]]
    target = build.directory("built")
    build.inside(harvest.take, [guest], upper=str(upper), target=str(target), wanted=wanted)
    flat = build.directory("flat")
    built = [path.rename(flat / path.name) for path in sorted(target.rglob("*.ko"))]
    tools = [Root(lower=(build.tree("toolchain"),), upper=build.directory("strip"))]
    binds = [Bind(source=flat, target=BUILT, writable=True)]
    vermagic = {}
    for path in built:
        told = build.enter(["modinfo", "--field", "vermagic", f"./{path.name}"], tools, binds=binds,
                           cwd=BUILT, capture=True)
        vermagic[path.stem] = told.stdout.decode().strip()
    expected = ["nvidia", "nvidia-uvm",
                *(["nvidia-modeset", "nvidia-drm"] if request.drm else [])]
    _require(build, nvoutcome.judge_modules(expected, vermagic, request.release))
    build.enter(["strip", "--strip-debug", "--", *(path.name for path in built)], tools,
                binds=binds, cwd=BUILT)
    put(build, built, request.release, headers)


