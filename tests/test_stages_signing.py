"""Signed modules: what is in which key, and the real stages on a toy kernel.

The toy's `sign-file` is openssl (`data/toykernel/scripts/sign-file`); `tests/default` has the
kernel's own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import guest, keys, modsig, patches, recipe
from katagpu.check import kernelconfig
from katagpu.check.signed import trusted
from katagpu.errors import StepError, UserError
from katagpu.lock import Lock
from katagpu.plan import Plan, differing
from katagpu.release import preflight
from katagpu.schema import ModulesBy, Recipe, Sign
from katagpu.stages import kbuild, signing
from katagpu.stages.api import Ref, Stage
from katagpu.store import Kind, Store
from tests import test_toykernel
from tests.signers import Signer, needs_openssl, openssl, openssl_verifies, signer
from tests.test_toykernel import FRAGMENT, ROOT, TOY, content, unpacked

pytestmark = [test_toykernel.pytestmark, needs_openssl]
no_preflight = test_toykernel.no_preflight

Planned = Callable[..., Plan]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    """A signer."""
    return signer(tmp_path_factory.mktemp("mine"))


def signed(by: Signer | None, *, force: bool = False) -> Recipe:
    """The default recipe, with `sign`."""
    default = recipe.load("debian-trixie", ROOT)
    default = replace(default, driver=replace(default.driver, version="999.1"))  # has no patches
    return default if by is None else replace(
        default, sign=Sign(key=str(by.key), cert=str(by.cert), force=force))


def described(by: Signer | None, **options: bool) -> dict[str, Stage]:
    """The stages of the default guest."""
    wanted = signed(by, **options)
    return guest.stages(wanted, Lock(recipe=wanted.name, request="", groups={}), ROOT)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """A plan of the real stages up to the signed modules, on the toy kernel."""
    monkeypatch.setattr("katagpu.plan.Build", test_toykernel.HostBuild)
    (tmp_path / "allow.yaml").write_text("[]\n")
    (tmp_path / "own.conf").write_text(FRAGMENT)

    def make(by: Signer | None, store: str = "store", *, force: bool = False) -> Plan:
        real = described(by, force=force)
        config = real["kernel_config"]
        extra = {name: path for name, path in config.files.items() if "/signing/" in name}
        files: Mapping[str, Path] = {"own.conf": tmp_path / "own.conf", **extra}
        series = kbuild.patch_files(ROOT, patches.Target.KERNEL)
        found = [
            Stage(name="toolchain", title="", module="errors", make=test_toykernel.make_toolchain,
                  outputs={"root": Kind.TREE}),
            Stage(name="kernel_source", title="", module="errors",
                  make=test_toykernel.make_source, outputs={"tarball": Kind.FILE},
                  files={str(file.relative_to(TOY)): file for file in TOY.rglob("*")
                         if file.is_file()}),
            dataclasses.replace(config, options={"fragments": list(files)}, files={
                **files, "allow": tmp_path / "allow.yaml", **series}),
            dataclasses.replace(real["kernel"], options={
                **real["kernel"].options, "package_version": "9.9.1-1"}),
            dataclasses.replace(real["driver_modules"], make=test_toykernel.make_driver,
                                packages={}),
            *(real[name] for name in ("signed_kernel", "signed_driver") if name in real)]
        return Plan({stage.name: stage for stage in found}, Store(tmp_path / store),
                    tmp_path / "logs")

    return make


# keys


def test_recipes_without_sign_read_nothing_of_it() -> None:
    plain = described(None)
    assert not {"signed_kernel", "signed_driver"} & plain.keys()
    for stage in plain.values():
        if stage.name in ("kernel_config", "kernel", "driver_modules"):
            assert not {"modsig", "signingkey", "stages.signing", "stages.certified"} & \
                keys.code(stage.module).keys()
            assert "certificate" not in stage.files


def test_what_is_in_which_key(mine: Signer, tmp_path: Path) -> None:
    plain, found = described(None), described(mine)
    identities = dict.fromkeys(found["signed_driver"].inputs, "0" * 64)
    key = found["signed_driver"].key(identities)
    assert key["files"] == {"certificate": keys.file_digest(mine.cert)}
    assert set(key["inputs"]) == {"modules", "toolchain", "sign_file"}
    assert "signer.key" not in json.dumps(key) and str(mine.key) not in json.dumps(key)
    # The same certificate and another place of the key: nothing is another stage's.
    elsewhere = Signer(tmp_path / "elsewhere.key", mine.cert)
    moved = described(elsewhere)
    for name, stage in moved.items():
        there = dict.fromkeys(stage.inputs, "0" * 64)
        assert stage.key(there) == found[name].key(there), name
    # What is compiled for the driver is the same stage as without.
    there = dict.fromkeys(plain["driver_modules"].inputs, "0" * 64)
    assert plain["driver_modules"].key(there) == found["driver_modules"].key(there)
    assert found["signed_kernel"] == described(mine)["signed_kernel"], "one for all drivers"


def test_the_certificate_is_in_the_kernel_s_key(mine: Signer, tmp_path: Path) -> None:
    other = signer(tmp_path, "other")
    one, two = (described(by)["kernel"] for by in (mine, other))
    there = dict.fromkeys(one.inputs, "0" * 64)
    assert [line.partition(":")[0] for line in differing(one.key(there), two.key(there))] == [
        "files.certificate"]
    forced = described(mine, force=True)
    names = forced["kernel_config"].options["fragments"]
    assert names[-2:] == ["kernel-configs/signing/sign.conf", "kernel-configs/signing/force.conf"]


def test_all_that_ships_has_signed_modules(mine: Signer) -> None:
    found = described(mine)
    plain = {Ref(stage="kernel", output="modules"), Ref(stage="driver_modules", output="modules")}
    for stage in found.values():
        if stage.name not in ("signed_kernel", "signed_driver"):
            assert not plain & set(stage.inputs.values()), stage.name
    for name in ("rootfs", "image", "initrd"):
        assert found[name].inputs["kernel_modules"].stage == "signed_kernel"
        assert found[name].inputs["driver_modules"].stage == "signed_driver"
    assert found["rootfs"].files["certificate"] == mine.cert
    about = found["manifest"].options["module_signing"]
    assert about == {"subject": "O=Toys,CN=signer", "hash": "sha512", "force": False,
                     "certificate_sha256": mine.certificate.fingerprint}
    assert "module_signing" not in described(None)["manifest"].options
    order = list(found)
    for stage in found.values():
        for ref in stage.inputs.values():
            assert order.index(ref.stage) < order.index(stage.name)


def test_modules_of_nvidia_s_installer_too(mine: Signer) -> None:
    runs = [name for name in recipe.known(ROOT)
            if recipe.load(name, ROOT).driver.source == "runfile"]
    wanted = recipe.load(runs[0], ROOT)
    wanted = replace(wanted, sign=Sign(key=str(mine.key), cert=str(mine.cert)), driver=replace(
        wanted.driver, modules_by=ModulesBy.INSTALLER))
    found = guest.stages(wanted, Lock(recipe=wanted.name, request="", groups={}), ROOT)
    assert found["signed_driver"].inputs["modules"] == Ref(stage="driver_user", output="modules")
    assert found["image"].inputs["driver_modules"].stage == "signed_driver"


# the real thing on a toy


def test_kernel_and_modules(planned: Planned, mine: Signer, tmp_path: Path) -> None:
    plan = planned(mine, force=True)
    config = kernelconfig.read(content(plan, "kernel_config", "config"))
    assert config["MODULE_SIG_FORCE"] == "y" and "MODULE_SIG_ALL" not in config
    assert trusted(content(plan, "kernel", "vmlinux")) == mine.certificate.der
    for name, stage in (("signed_kernel", "kernel"), ("signed_driver", "driver_modules")):
        before = unpacked(plan, stage, "modules", tmp_path / stage)
        after = unpacked(plan, name, "modules", tmp_path / name)
        files = {path.relative_to(before) for path in before.rglob("*")}
        assert files == {path.relative_to(after) for path in after.rglob("*")}
        for path in sorted(path for path in files if (before / path).is_file()):
            data, was = (after / path).read_bytes(), (before / path).read_bytes()
            if path.suffix != ".ko":
                assert data == was
                continue
            assert modsig.split(data)[0] == was, "what is signed is what was made"
            assert modsig.verify(data, mine.certificate) == "sha512"
            assert openssl_verifies(after / path, mine, tmp_path)
            assert (after / path).stat().st_mode == (before / path).stat().st_mode
        assert plan.ensure(name).record["signer"] == mine.certificate.fingerprint
    assert plan.ensure("signed_driver").record["signed"] == 2


def test_what_is_unsigned_is_the_same_with_another_key(
    planned: Planned, mine: Signer, tmp_path: Path,
) -> None:
    """Modules do not know who will sign them; the kernel knows the certificate, and no key."""
    one, again, other = (planned(by, store) for by, store in (
        (mine, "one"), (mine, "again"), (signer(tmp_path, "other"), "other")))
    for stage in ("kernel", "driver_modules", "signed_kernel", "signed_driver"):
        assert one.ensure(stage).outputs == again.ensure(stage).outputs, stage
    plain = one.ensure("kernel").outputs
    assert plain["vmlinux"] != other.ensure("kernel").outputs["vmlinux"]
    driver = [plan.ensure("driver_modules").outputs["modules"].identity for plan in (one, other)]
    assert driver[0] == driver[1]
    assert one.ensure("signed_driver").outputs != other.ensure("signed_driver").outputs


def test_the_key_is_needed_where_the_store_has_nothing(
    planned: Planned, mine: Signer, tmp_path: Path,
) -> None:
    away = Signer(tmp_path / "away.key", mine.cert)
    plan = planned(away)
    assert plan.ensure("kernel")
    with pytest.raises(UserError, match=r"away\.key: No such file"):
        plan.ensure("signed_kernel")
    planned(mine).ensure("signed_kernel")
    assert planned(away).ensure("signed_kernel").stage == "signed_kernel"
    stages = [plan.stages[name] for name in ("kernel", "signed_driver")]
    assert "No such file" in (signing.lacks_key(stages) or "")
    assert signing.lacks_key([plan.stages["kernel"]]) is None


def test_the_key_is_nowhere(
    planned: Planned, mine: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither its bytes nor its passphrase are in the store, its records, or the logs."""
    encrypted = Signer(tmp_path / "encrypted.key", mine.cert)
    openssl("pkey", "-in", mine.key, "-aes256", "-passout", "pass:s3cr3t-w0rd", "-out",
            encrypted.key)
    encrypted.key.chmod(0o600)
    monkeypatch.setenv("KBUILD_SIGN_PIN", "s3cr3t-w0rd")
    plan = planned(encrypted)
    plan.ensure("signed_kernel")
    plan.ensure("signed_driver")
    needles = [b"s3cr3t-w0rd", b"PRIVATE KEY",
               *encrypted.key.read_bytes().splitlines()[1:3],
               *mine.key.read_bytes().splitlines()[1:3]]
    looked = 0
    for top in (tmp_path / "store", tmp_path / "logs"):
        for path in top.rglob("*"):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                looked += 1
                assert not [needle for needle in needles if needle in data], path
    assert looked > 20


def test_a_sign_file_that_does_not_sign(
    planned: Planned, mine: Signer, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signing, "SCRIPT", "true")
    with pytest.raises(StepError, match=r"toy\.ko is not signed, just after it was signed"):
        planned(mine).ensure("signed_kernel")


def test_bad_certificates_are_refused_when_stages_are_planned(tmp_path: Path) -> None:
    small = signer(tmp_path, "small", kind=("-algorithm", "ed25519"))
    with pytest.raises(UserError, match="not of an RSA key"):
        described(small)


def test_an_expired_certificate_signs_nothing(planned: Planned, tmp_path: Path) -> None:
    old = signer(tmp_path, "old", dates=("20200101", "20210101"))
    plan = planned(old)
    plan.ensure("kernel")
    with pytest.raises(UserError, match="expired on 2021-01-01"):
        plan.ensure("signed_kernel")


# before a release


def test_a_release_verifies_what_the_store_has(planned: Planned, mine: Signer) -> None:
    plan = planned(mine)
    for name in ("signed_kernel", "signed_driver"):
        plan.ensure(name)
    preflight.signed(plan, ROOT, signed(None))
    preflight.signed(plan, ROOT, signed(mine))
    digest, action = plan.digest("signed_driver"), plan.ensure("signed_driver")
    assert digest is not None
    plan.store.commit(digest, replace(action, outputs=plan.ensure("driver_modules").outputs))
    plan.forget()
    with pytest.raises(UserError, match="must not be released") as raised:
        preflight.signed(plan, ROOT, signed(mine))
    said = str(raised.value)
    assert said.count("is not signed") == 2 and "/kernel/drivers/video/nvidia.ko is not" in said


def test_a_release_wants_the_kernel_that_trusts_them(
    planned: Planned, mine: Signer, tmp_path: Path,
) -> None:
    plan, other = planned(mine), planned(signer(tmp_path, "other"))
    for name in ("signed_kernel", "signed_driver"):
        plan.ensure(name)
    digest = plan.digest("kernel")
    assert digest is not None
    plan.store.commit(digest, replace(plan.ensure("kernel"), outputs={
        **plan.ensure("kernel").outputs, "vmlinux": other.ensure("kernel").outputs["vmlinux"]}))
    plan.forget()
    with pytest.raises(UserError, match="vmlinux: trusts another certificate"):
        preflight.signed(plan, ROOT, signed(mine))
