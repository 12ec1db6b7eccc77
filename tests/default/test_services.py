"""`services: [fabricmanager, dcgm]` from a signed repository on the loopback, of NVIDIA's form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import guest, lock, request, resolve, sandbox
from katagpu.context import Context
from katagpu.errors import UserError
from katagpu.lock import Group, Lock
from katagpu.plan import Plan
from katagpu.schema import Recipe, Repository, Service
from tests.toyarchive import ToyArchive, missing, served, signing_keys

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()),
                                                   reason=f"needs {missing()} of the host")]
DRIVER = "550.163.01"
PROGRAM = b"#!/bin/sh\n"


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[ToyArchive]:
    """NVIDIA's daemons in two versions of each, of which one fits the driver."""
    with signing_keys() as home:
        (tmp_path / "archive").mkdir()
        toy = ToyArchive(tmp_path / "archive", home, flat=True)
        for version in (f"{DRIVER}-1", "550.200-1"):
            toy.add_deb("nvidia-fabricmanager-550", version, {"/usr/bin/nv-fabricmanager": PROGRAM})
            toy.add_deb("libnvidia-nscq-550", version, {"/usr/bin/nscq-of-550": PROGRAM})
        toy.add_deb("datacenter-gpu-manager-4-core", "1:4.2.3-2",
                    {"/usr/bin/nv-hostengine": PROGRAM, "/usr/share/doc/dcgm/README": b"x"})
        toy.publish()
        with served(toy):
            yield toy


def locked(context: Context, archive: ToyArchive, directory: Path,
           signer: str = "test") -> tuple[Recipe, Lock]:
    """The default recipe with both daemons, and its lock; `signer` is whose key the recipe has."""
    key = directory / "key.asc"
    key.write_text(archive.gpg("--armor", "--export", signer))
    recipe = replace(context.recipe, services=(Service.FABRICMANAGER, Service.DCGM),
                     nvidia_repository=Repository(uri=archive.base, signed_by=str(key)))
    wanted = request.request(recipe, directory)
    only = replace(wanted, archives={lock.GUEST: ()}, groups={
        "base": Group(), "driver_user": Group(on="base"), "services": wanted.groups["services"]})
    found = resolve.resolve(only, directory / "apt").group("services")
    known = context.locked()
    assert known is not None
    return recipe, replace(known, groups={**known.groups, "services": found})


def test_the_daemons_that_fit_the_driver_are_installed_over_it(
        context: Context, archive: ToyArchive, tmp_path: Path) -> None:
    recipe, found = locked(context, archive, tmp_path)
    assert {f"{deb.package}={deb.version}" for deb in found.group("services")} == {
        f"nvidia-fabricmanager-550={DRIVER}-1", f"libnvidia-nscq-550={DRIVER}-1",
        "datacenter-gpu-manager-4-core=1:4.2.3-2"}
    plan = Plan(guest.stages(recipe, found, context.root), context.store, tmp_path / "logs")
    action = plan.ensure("services")
    target = tmp_path / "layer"
    sandbox.unpack(context.store.blob(action.outputs["layer"].blob), target, overlay=False)
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert {"usr/bin/nv-fabricmanager", "usr/bin/nv-hostengine", "usr/bin/nscq-of-550"} <= files
    assert not [name for name in files if name.endswith("dcgm/README")], "as all documentation"
    status = (target / "var/lib/dpkg/status").read_text()
    for package in ("nvidia-fabricmanager-550", "datacenter-gpu-manager-4-core"):
        assert f"Package: {package}\nStatus: install ok installed\n" in status
    sandbox.remove(target)


def test_a_repository_that_another_key_signs(
        context: Context, archive: ToyArchive, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not sign this archive"):
        locked(context, archive, tmp_path, signer="other")
