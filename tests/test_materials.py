"""The materials of a provenance: of the default guest, and of one with files of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import guest, keys, lockparts, materials, recipe, request
from katagpu.lock import Deb, Lock
from katagpu.plan import Plan
from katagpu.schema import Agent, DriverSource, KernelSource, Recipe, Sign, ToolkitSource
from katagpu.stages.api import Build, Stage
from katagpu.store import Kind, Store

from .test_gobuildinfo import SUM

ROOT = keys.PACKAGE.parent
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
RELEASE = "https://example.invalid/kata-static.tar.zst"


def modules(build: Build) -> None:
    """A file system proxy with one module."""
    place = build.directory("proxy") / "x.example/!tool/@v"
    place.mkdir(parents=True)
    (place / "v1.0.0.ziphash").write_text(SUM)
    build.put_tree("modules", build.directory("proxy"))


def toy(name: str, output: str) -> Stage:
    """A stage that puts its name out."""
    return Stage(name=name, title="", module="errors", outputs={output: Kind.FILE},
                 make=lambda build: build.put_bytes(output, name.encode()))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan whose stages are made."""
    stages = [toy("kernel_source", "tarball"), toy("driver_package", "run"), toy("agent", "agent"),
              Stage(name="toolkit_source", title="", module="errors", make=modules,
                    outputs={"modules": Kind.TREE})]
    made = Plan({stage.name: stage for stage in stages}, Store(tmp_path / "store"),
                tmp_path / "logs")
    for stage in stages:
        made.ensure(stage.name)
    return made


def known(chosen: Recipe, plan: Plan, root: Path = ROOT) -> dict[str, dict[str, str]]:
    source = Deb(package="linux-source-6.12", version="6.12.9-1", architecture="all", url="",
                 size=1, sha256="1" * 64)
    lock = Lock(recipe=chosen.name, request="", groups={"kernel_source": (source,)})
    return {each.uri: dict(each.digest) for each in materials.of(chosen, lock, plan, root)}


@pytest.fixture
def default() -> Recipe:
    """The default recipe."""
    return recipe.load("debian-trixie", ROOT)


def test_of_the_default_recipe(default: Recipe, plan: Plan) -> None:
    action = plan.action("kernel_source")
    assert action is not None
    assert known(default, plan) == {
        "pkg:deb/debian/linux-source-6.12@6.12.9-1?arch=all&distro=trixie": {"sha256": "1" * 64},
        "pkg:generic/linux@6.12.9-1": {"sha256": action.outputs["tarball"].identity},
        "pkg:golang/x.example/Tool@v1.0.0": {"dirHash": EMPTY}}


def test_packages_of_another_distribution_than_the_guest(plan: Plan) -> None:
    """Ubuntu's guests are made with Debian's tools, and some packages are NVIDIA's."""
    chosen = recipe.load("ubuntu-lts", ROOT)
    archives = {"stage0": "tools", "imagetools": "tools", "emulator": "tools", "base": "guest",
                "toolchain": "guest", "services": f"{lockparts.REPOSITORY}nvidia"}
    lock = Lock(recipe=chosen.name, request="", groups={
        group: (Deb(package=group, version="1", architecture="amd64", url="", size=1,
                    sha256=f"{number:064x}", archive=archive),)
        for number, (group, archive) in enumerate(archives.items())})
    found = {each.uri for each in materials.of(chosen, lock, plan, ROOT)}
    guest, suite = chosen.distribution.suite, request.tools_of(chosen).suite
    assert {uri for uri in found if uri.startswith("pkg:deb/")} == {
        *(f"pkg:deb/debian/{name}@1?arch=amd64&distro={suite}"
          for name in ("stage0", "imagetools", "emulator")),
        *(f"pkg:deb/ubuntu/{name}@1?arch=amd64&distro={guest}" for name in ("base", "toolchain")),
        "pkg:deb/nvidia/services@1?arch=amd64"}


def test_of_files_and_releases(default: Recipe, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "toolkit.deb").write_text("deb")
    chosen = replace(
        default, kernel=replace(default.kernel, source=KernelSource.KERNEL_ORG, package=None,
                                version="6.12.30"),
        driver=replace(default.driver, source=DriverSource.RUNFILE),
        toolkit=replace(default.toolkit, source=ToolkitSource.DEBS, debs=("toolkit.deb",)),
        agent=Agent(release=RELEASE, sha256="2" * 64))
    found = known(chosen, plan, tmp_path)
    assert found["pkg:generic/linux@6.12.30"] and found["pkg:generic/nvidia-driver@550.163.01"]
    assert found["tag:katagpu,2025:file/toolkit.deb"] == {
        "sha256": keys.file_digest(tmp_path / "toolkit.deb")}
    assert found[RELEASE] == {"sha256": "2" * 64} and found["tag:katagpu,2025:file/kata-agent"]


def test_of_signed_modules(default: Recipe, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("certificate")
    chosen = replace(default, sign=Sign(key="/nowhere/key.pem", cert="cert.pem"))
    assert known(chosen, plan, tmp_path)["tag:katagpu,2025:file/cert.pem"] == {
        "sha256": keys.file_digest(tmp_path / "cert.pem")}
    assert "key.pem" not in str(known(chosen, plan, tmp_path))


def test_the_stages_that_it_asks_for_exist(default: Recipe) -> None:
    stages = guest.stages(replace(default, agent=Agent(file=__file__)), Lock(
        recipe="", request="", groups={}), ROOT)
    for name, output in (("kernel_source", "tarball"), ("toolkit_source", "modules"),
                         ("agent", "agent")):
        assert output in stages[name].outputs
