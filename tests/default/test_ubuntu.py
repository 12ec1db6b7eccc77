"""An Ubuntu guest, bootstrapped for real from a signed archive of Ubuntu's shape on the loopback.

Its packages are those of the default guest, some packed anew (`tests.ubuntuarchive`); its kernel is
the default guest's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import disk, guest, keys, request, resolve, sandbox
from katagpu.context import Context
from katagpu.lock import Deb, Lock
from katagpu.plan import Plan
from katagpu.sandbox import Root
from katagpu.schema import (
    TOOLS,
    DistributionId,
    DriverSource,
    KernelSource,
    Recipe,
    ToolkitSource,
)
from katagpu.stages import layers
from katagpu.stages.api import Build
from tests.toyarchive import ToyArchive, missing, served, signing_keys
from tests.ubuntuarchive import Archive, repack, ubuntu_release, unmerge

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"needs {missing()} of the host")]

COMPONENTS = ("main", "restricted", "universe", "multiverse")
CHANGES: Mapping[str, Callable[[Path], None]] = {
    "base-files": ubuntu_release, "bash": unmerge, "dbus": unmerge, "iptables": unmerge,
    "kmod": unmerge, "libc6": unmerge, "udev": unmerge}
"""What is packed anew beside chrony; a version that others name exactly stays."""
VERSIONS = {"base-files": "13.8ubuntu1", "bash": "5.2.37-2ubuntu1", "kmod": "34.2-2ubuntu1"}


@dataclass(frozen=True, kw_only=True)
class Ubuntu:
    """The archives, the lock that came from them, and the plan of the guest."""

    base: str
    lock: Lock
    plan: Plan


def blob(context: Context, deb: Deb) -> Path:
    """A package of the default guest, which its build has fetched."""
    assert context.store.has(deb.sha256, deb.size), f"{deb.package}: ./doitw build_image"
    return context.store.blob(deb.sha256)


def debian(context: Context, known: Lock, archive: Archive) -> None:
    """Debian as the default guest's lock has it: where the tools come from."""
    for deb in {one.sha256: one for group in ("stage0", "imagetools")
                for one in known.group(group)}.values():
        archive.add(blob(context, deb), deb.sha256, "trixie")
    archive.publish(["main", "contrib", "non-free", "non-free-firmware"])


def ubuntu(context: Context, known: Lock, archive: Archive, security: Archive,
           scratch: Path) -> None:
    """Ubuntu: what base and toolchain want, in three suites and two components."""
    def add(deb: Path, suite: str, component: str = "main") -> None:
        place = security if suite.endswith("-security") else archive
        place.add(deb, keys.file_digest(deb), suite, component)

    packages = {one.package: one for group in ("base", "toolchain") for one in known.group(group)}
    for name, deb in packages.items():
        path = blob(context, deb)
        if name == "chrony":
            for number, suite in (("1", "noble"), ("1.2", "noble-updates")):
                made = repack(path, scratch / suite, f"4.6.1-3ubuntu{number}")
                add(made, suite, "universe")
        elif name in CHANGES:
            version = VERSIONS.get(name, deb.version)
            add(repack(path, scratch / name, version, CHANGES[name]), "noble")
            if name == "kmod":
                add(repack(path, scratch / "fixed", f"{version}.1", unmerge), "noble-security")
        else:
            archive.add(path, deb.sha256, "noble")
    archive.publish(COMPONENTS)
    security.publish(COMPONENTS)


def recipe(default: Recipe, base: str, keyring: Path) -> Recipe:
    """A guest of that archive, with neither driver nor toolkit."""
    distribution = replace(
        default.distribution, id=DistributionId.UBUNTU, suite="noble", components=None,
        mirror=f"{base}/ubuntu", security_mirror=f"{base}/security", keyring=str(keyring))
    tools = replace(TOOLS, mirror=f"{base}/debian", security_mirror=None, keyring=str(keyring))
    return replace(
        default, distribution=distribution, tools=tools,
        kernel=replace(default.kernel, source=KernelSource.KERNEL_ORG, package=None,
                       version="6.12.30"),
        driver=replace(default.driver, source=DriverSource.NONE, version=None),
        toolkit=replace(default.toolkit, source=ToolkitSource.NONE, version=None))


@pytest.fixture(scope="module")
def built(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ubuntu]:
    """The archives served, the recipe resolved, and the stages planned."""
    known = context.locked()
    assert known is not None
    top = tmp_path_factory.mktemp("ubuntu")
    with signing_keys() as place:
        server = ToyArchive(top / "served", place)
        server.root.mkdir()
        debian(context, known, Archive(server.root / "debian", server, "Debian"))
        ubuntu(context, known, Archive(server.root / "ubuntu", server, "Ubuntu"),
               Archive(server.root / "security", server, "Ubuntu"), top / "packing")
        with served(server):
            wanted = recipe(context.recipe, server.base, place / "test.gpg")
            found = resolve.resolve(request.request(wanted, context.root), top / "apt")
            mine = guest.stages(wanted, found, context.root)
            stages = {**context.plan.stages, **{name: mine[name] for name in (
                "stage0", "base", "rootfs", "image")}}
            yield Ubuntu(base=server.base, lock=found,
                         plan=Plan(stages, context.store, top / "logs"))


def test_each_root_comes_from_its_own_archive(built: Ubuntu) -> None:
    for group, place in (("stage0", "debian"), ("imagetools", "debian"), ("toolchain", "ubuntu")):
        assert {deb.url.split("/")[3] for deb in built.lock.group(group)} - {"security"} == {place}
    assert built.lock.version("base", "chrony") == "4.6.1-3ubuntu1.2"  # -updates, universe
    assert built.lock.version("base", "kmod") == "34.2-2ubuntu1.1"  # -security
    assert built.lock.version("base", "bash") == "5.2.37-2ubuntu1"


def test_stage0_is_the_default_guests(context: Context, built: Ubuntu) -> None:
    """One bootstrap for all guests: what another archive gives by another address is the same."""
    assert built.plan.key("stage0") == context.plan.key("stage0")


@pytest.fixture(scope="module")
def root(context: Context, built: Ubuntu) -> Iterator[tuple[Build, Root]]:
    """The guest's root; its checks have passed then."""
    built.plan.ensure("rootfs")
    stage = built.plan.stages["image"]
    inputs = {}
    for role, ref in stage.inputs.items():
        action = built.plan.action(ref.stage)
        assert action is not None
        inputs[role] = action.outputs[ref.output]
    with context.store.staging("tests", sandbox.remove) as scratch:
        build = Build(stage, context.store, inputs, scratch, scratch / "log")
        yield build, Root(lower=layers.stack(build), upper=build.directory("guest"))


def inside(root: tuple[Build, Root], script: str) -> list[str]:
    """The lines that a shell in the guest says."""
    build, guest_root = root
    return build.enter(["sh", "-euc", script], [guest_root],
                       capture=True).stdout.decode().splitlines()


def test_the_base_is_ubuntu_with_merged_directories(root: tuple[Build, Root]) -> None:
    assert "ID=ubuntu" in inside(root, "cat /etc/os-release")
    assert inside(root, "readlink /bin /sbin /lib /lib64") == [
        "usr/bin", "usr/sbin", "usr/lib", "usr/lib64"]
    # These packages bring files by their old places, and both lead to one file.
    assert inside(root, "stat --format=%i /bin/bash /usr/bin/bash | uniq | wc -l") == ["1"]
    assert inside(root, "dpkg -S /bin/bash /lib/x86_64-linux-gnu/libc.so.6") == [
        "bash: /bin/bash", "libc6:amd64: /lib/x86_64-linux-gnu/libc.so.6"]
    assert inside(root, "dpkg --audit") == []


def test_modules_of_the_kernel_are_found(root: tuple[Build, Root]) -> None:
    (release,) = inside(root, "ls /lib/modules")
    assert inside(root, f"modprobe --set-version {release} --show-depends ext4") == [
        "builtin ext4"]


def test_katas_misspelt_call_restores_tables(root: tuple[Build, Root]) -> None:
    said = inside(root, "ip6tables-save --version; ip6tables-save --wait 5 --version")
    assert said[0].startswith("ip6tables-save v") and said[1].startswith("ip6tables-restore v")


def test_the_units_are_sound(root: tuple[Build, Root]) -> None:
    build, guest_root = root
    done = build.enter(["systemd-analyze", "verify", "--man=no", "kata-containers.target",
                        "nvidia-refresh.path"], [guest_root], capture=True, check=False)
    assert done.status == 0, build.log.read_text()[-2000:]


def test_the_image_is_packed_by_debians_tools(built: Ubuntu) -> None:
    image = built.plan.store.blob(built.plan.ensure("image").outputs["image"].blob)
    (partition,) = disk.partitions(image)
    assert disk.fs_type(image, partition.offset) is disk.FsType.EROFS
