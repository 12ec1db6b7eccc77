"""`driver: {source: runfile}` on the default guest's layers, with two real drivers.

The `.run` files are made from Debian's packages of NVIDIA's driver in NVIDIA's own format
(tests/nvrun), and so is the installer program in them, which compiles and installs for real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import guest
from katagpu.context import Context
from katagpu.errors import KatagpuError, StepError, UserError
from katagpu.lock import Lock
from katagpu.plan import Plan
from katagpu.request import request
from katagpu.resolve import resolve
from katagpu.schema import Capability, Driver, DriverSource, KernelModule, ModulesBy, Recipe
from katagpu.store import Action
from tests.nvrun import debian, maker
from tests.nvrun.archive import Name
from tests.nvrun.toys import Toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
INSTALLER = Path(maker.__file__).with_name("nvidia-installer")
NEW, OLD = "550.163.01", "535.261.03"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
MODULES = {"nvidia.ko", "nvidia-uvm.ko", "driver-headers"}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with both `.run` files."""
    place = tmp_path_factory.mktemp("runs")
    for suite in (debian.TRIXIE, debian.BOOKWORM):
        maker.build(suite, debian.CACHE, place, installer=INSTALLER)
    assert {path.name for path in place.iterdir()} == {
        f"NVIDIA-Linux-x86_64-{version}.run" for version in (NEW, OLD)}
    yield place
    for path in place.iterdir():
        path.unlink()


def wanted(context: Context, place: Path, version: str = NEW, **more: object) -> Recipe:
    """The default recipe with a driver from `place`."""
    driver = Driver(source=DriverSource.RUNFILE, version=version,
                    file=f"{place}/NVIDIA-Linux-x86_64-{{version}}.run")
    return replace(context.recipe, driver=replace(driver, **more))


def planned(context: Context, recipe: Recipe, logs: Path, lock: Lock | None = None) -> Plan:
    """A plan over the real store; the lock is the default guest's, without its driver."""
    known = lock or context.locked()
    assert known is not None
    groups = {name: debs for name, debs in known.groups.items()
              if name not in ("driver_user", "driver_source")}
    return Plan(guest.stages(recipe, replace(known, groups=groups), context.root), context.store,
                logs)


def made(plan: Plan) -> set[str]:
    """The stages that the store has."""
    return {name for name in plan.stages if plan.action(name) is not None}


def files(context: Context, action: Action, output: str) -> set[str]:
    """The paths of the files in a tree."""
    import tarfile

    import zstandard

    blob = context.store.blob(action.outputs[output].blob)
    with blob.open("rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as plain, \
            tarfile.open(fileobj=plain, mode="r|") as tar:
        return {member.name.removeprefix("./") for member in tar if not member.isdir()}


def test_a_driver_bump_compiles_the_driver_alone(
        context: Context, runs: Path, tmp_path: Path) -> None:
    first = planned(context, wanted(context, runs), tmp_path)
    first.ensure("image")
    second = planned(context, wanted(context, runs, OLD), tmp_path)
    driver = {"driver_package", "driver_modules", "driver_user", "rootfs", "image"}
    others = set(second.closure("image")) - driver
    assert others <= made(second), "nothing but the driver is made again"
    second.ensure("image")
    modules = files(context, second.ensure("driver_modules"), "modules")
    assert {Path(name).name for name in modules} == MODULES

    again = planned(context, wanted(context, runs), tmp_path)
    assert {"driver_package", "driver_modules", "driver_user", "rootfs", "image"} <= made(again)
    assert again.ensure("image") == first.ensure("image")


def test_the_real_modules_are_the_same_when_they_are_compiled_again(
        context: Context, runs: Path, tmp_path: Path) -> None:
    """With the compiler's cache off; what the store has may have come out of it."""
    plan = planned(context, wanted(context, runs), tmp_path)
    made = plan.ensure("driver_modules")
    again = Plan(plan.stages, context.store, tmp_path / "again", ccache=False)
    key = again.key("driver_modules")
    assert key is not None
    assert again._make("driver_modules", key, "compared").outputs == made.outputs


def test_what_ships_is_of_the_capabilities(context: Context, runs: Path, tmp_path: Path) -> None:
    plan = planned(context, wanted(context, runs), tmp_path)
    plan.ensure("rootfs")
    action = plan.ensure("driver_user")
    found = files(context, action, "layer")
    for library in ("cuda", "nvidia-nvvm", "nvidia-ptxjitcompiler", "nvidia-ml", "nvidia-cfg"):
        assert f"{LIBRARIES}/lib{library}.so.{NEW}" in found
    assert f"usr/lib/firmware/nvidia/{NEW}/gsp_ga10x.bin" in found
    assert {"usr/bin/nvidia-smi", "usr/bin/nvidia-persistenced"} <= found
    assert any(name.endswith("/LICENSE") for name in found)
    for left in ("nvidia-installer", "nvidia-uninstall", "libnvcuvid", "nvidia-modprobe", ".1.gz",
                 "usr/src/", "var/", "README"):
        assert not [name for name in found if left in name], left
    parts = json.loads(context.store.blob(action.outputs["parts"].blob).read_text())
    shipped, left_out = (sum(part["size"] for part in parts[name]) for name in ("shipped", "left"))
    assert 100_000_000 < shipped < 400_000_000 and left_out > 50_000_000


def test_less_is_asked_for_and_less_ships(context: Context, runs: Path, tmp_path: Path) -> None:
    plan = planned(context, wanted(context, runs, capabilities=(Capability.UTILITY,)), tmp_path)
    found = files(context, plan.ensure("driver_user"), "layer")
    assert f"{LIBRARIES}/libnvidia-ml.so.{NEW}" in found
    assert not [name for name in found if "libcuda" in name or "nvvm" in name]


@pytest.fixture(scope="session")
def built(context: Context, runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan in which nvidia-installer compiles the modules, as in the guide."""
    recipe = wanted(context, runs, modules_by=ModulesBy.INSTALLER,
                    kernel_module=KernelModule.CLOSED)
    recipe = replace(recipe, rootfs=replace(recipe.rootfs,
                                            extra_packages=("gcc", "make", "curl", "gnupg")))
    place = tmp_path_factory.mktemp("installer")
    with context.store.lock("resolve"):
        lock = resolve(request(recipe, context.root), context.store.root / "apt")
    known = context.locked()
    assert known is not None
    # the rest of the lock as the default guest's, so that its roots are hits
    groups = {**known.groups, "driver_build": lock.groups["driver_build"]}
    return planned(context, recipe, place, replace(known, groups=groups))


def test_the_installer_compiles_the_modules_itself(context: Context, built: Plan) -> None:
    built.ensure("rootfs")  # with all consistency checks
    action = built.ensure("driver_user")
    assert "driver_modules" not in built.stages
    assert {Path(name).name for name in files(context, action, "modules")} == MODULES
    layer = files(context, action, "layer")
    assert not [name for name in layer if "gcc" in name or "headers" in name or ".ko" in name]


def toy(place: Path, **more: object) -> Path:
    """A small package with the real installer program and toy files."""
    made: Path = Toy(installer=INSTALLER.read_bytes(), **more).make(place)  # type: ignore[arg-type]
    return made


def refused(plan: Plan, stage: str) -> KatagpuError:
    """What is said when a stage fails; the store keeps nothing of it."""
    with pytest.raises(KatagpuError) as caught:
        plan.ensure(stage)
    assert plan.action(stage) is None
    return caught.value


@pytest.mark.parametrize(("misbehaviour", "what"), [
    ("nothing", "log breaks off"), ("no-markers", "log breaks off"),
    ("markers-only", "did not install"),
    ("errors", "in spite of errors"), ("sigbus", "disk was full"),
])
def test_status_0_is_no_proof(context: Context, tmp_path: Path, misbehaviour: str,
                              what: str) -> None:
    toy(tmp_path, files={"misbehave": misbehaviour.encode()})
    failure = refused(planned(context, wanted(context, tmp_path), tmp_path / "logs"), "driver_user")
    assert what in str(failure)
    assert "nvidia-installer.log" in str(failure)
    assert (tmp_path / "logs/nvidia-installer.log").exists()


def test_an_installer_that_hangs_is_ended(context: Context, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("katagpu.stages.installer.TIMEOUT", 20.0)
    toy(tmp_path, files={"misbehave": b"hang"})
    failure = refused(planned(context, wanted(context, tmp_path), tmp_path / "logs"), "driver_user")
    assert "did not end within 20 s" in str(failure)


def test_a_toy_package_installs(context: Context, tmp_path: Path) -> None:
    toy(tmp_path)
    plan = planned(context, wanted(context, tmp_path), tmp_path / "logs")
    found = files(context, plan.ensure("driver_user"), "layer")
    assert f"{LIBRARIES}/libcuda.so.{NEW}" in found


def test_what_does_not_fit_is_refused_before_anything_runs(
        context: Context, tmp_path: Path) -> None:
    path = toy(tmp_path)
    whole = path.read_bytes()
    logs = tmp_path / "logs"
    path.write_bytes(whole[:-1000])
    failure = refused(planned(context, wanted(context, tmp_path), logs), "driver_package")
    assert isinstance(failure, UserError) and "cut off" in str(failure)
    path.write_bytes(whole)
    other = wanted(context, tmp_path, sha256="0" * 64)
    assert "the recipe's is 000000" in str(refused(planned(context, other, logs),
                                                  "driver_package"))
    only_closed = toy(tmp_path / "closed", flavours=("kernel",)).parent
    plan = planned(context, wanted(context, only_closed), logs)
    assert "has no open kernel modules" in str(refused(plan, "driver_modules"))


def test_a_compile_error_ends_it_at_once(context: Context, tmp_path: Path) -> None:
    error = "nv-pci.c:237:9: error: too few arguments to function 'pci_resize_resource'"
    toy(tmp_path, name=Name(version="550.90.07"), files={
        "kernel/Makefile": f'modules:\n\t@echo "{error}"; exit 1\n'.encode()})
    recipe = wanted(context, tmp_path, "550.90.07", kernel_module=KernelModule.CLOSED)
    plan = planned(context, recipe, tmp_path / "logs")
    failure = refused(plan, "driver_modules")
    assert isinstance(failure, StepError) and error in str(failure)
    assert "too old for kernel" in str(failure) and "patches/driver-" in str(failure)


def test_a_driver_too_old_for_the_kernel_is_not_even_planned(
        context: Context, tmp_path: Path) -> None:
    toy(tmp_path, name=Name(version="535.43.02"))
    with pytest.raises(UserError, match=r"does not build for kernel 6\.12"):
        planned(context, wanted(context, tmp_path, "535.43.02"), tmp_path / "logs")
