"""A toy kernel from a toy kernel.org, signed by keys made here (with gpg)."""

from __future__ import annotations

import io
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import kernelorg, recipe
from katagpu import keys as keys_module
from katagpu.errors import StepError, UserError
from katagpu.fetch import Gone, fetch_all
from katagpu.lock import Lock
from katagpu.plan import Plan
from katagpu.schema import KernelSource
from katagpu.stages import source
from katagpu.store import Store

pytestmark = pytest.mark.skipif(
    shutil.which("gpg") is None or shutil.which("gpgv") is None,
    reason="needs gpg, to make a test key (apt-get install gnupg)")


class Signer:
    """A throw-away key."""

    def __init__(self, home: Path, name: str) -> None:
        self.gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--pinentry-mode",
                    "loopback", "--passphrase", ""]
        home.mkdir(mode=0o700)
        self._run("--quick-gen-key", f"{name} <{name}@example.invalid>", "ed25519", "sign", "1d")
        listed = self._run("--with-colons", "--list-keys").decode()
        self.fingerprint = next(line.split(":")[9] for line in listed.splitlines()
                                if line.startswith("fpr:"))
        self.key = self._run("--armor", "--export")

    def _run(self, *words: str, data: bytes | None = None) -> bytes:
        return subprocess.run([*self.gpg, *words], input=data, stdout=subprocess.PIPE,
                              check=True).stdout

    def sign(self, data: bytes) -> bytes:
        """A detached signature."""
        return self._run("--armor", "--detach-sign", data=data)


@pytest.fixture(scope="module")
def signers() -> Iterator[tuple[Signer, Signer]]:
    """The key that is pinned, and a stranger's."""
    # Sockets of gpg-agent have short paths only.
    with TemporaryDirectory(prefix="gpg", dir="/tmp") as home:
        made = Signer(Path(home) / "a", "release"), Signer(Path(home) / "b", "stranger")
        yield made
        for name in ("a", "b"):
            subprocess.run(["gpgconf", "--homedir", f"{home}/{name}", "--kill", "gpg-agent"],
                           check=False)


@pytest.fixture
def keys(signers: tuple[Signer, Signer], tmp_path: Path) -> Path:
    """A directory of pinned keys."""
    place = tmp_path / "keys"
    place.mkdir()
    (place / "release.asc").write_bytes(signers[0].key)
    (place / "fingerprints").write_text(f"# toy\n{signers[0].fingerprint}  Release\n")
    return place


def toy_tar() -> bytes:
    """linux-6.12.3.tar with a Makefile."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo("linux-6.12.3/Makefile")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"all:\n"))
    return out.getvalue()


TAR = toy_tar()


def serve(site: Any, signature: bytes | None, packed: bytes | None = None) -> None:
    """The toy release."""
    site.add("v6.x/linux-6.12.3.tar.xz", lzma.compress(TAR) if packed is None else packed)
    if signature is not None:
        site.add("v6.x/linux-6.12.3.tar.sign", signature)


def test_a_signed_release(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[0].sign(TAR))
    release = kernelorg.release("6.12.3", tmp_path / "out", keys, releases=site.base)
    assert release.signed_by == signers[0].fingerprint
    assert lzma.decompress(release.tarball.read_bytes()) == TAR
    assert release.fetched.size == release.tarball.stat().st_size


def test_an_altered_tar(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[0].sign(TAR), lzma.compress(TAR.replace(b"all:", b"evil")))
    with pytest.raises(StepError, match="was altered"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)


def test_the_signature_is_of_the_tar_and_not_of_the_xz(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    packed = lzma.compress(TAR)
    serve(site, signers[0].sign(packed), packed)
    with pytest.raises(StepError, match="not good"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)


def test_a_stranger_without_a_key(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[1].sign(TAR))
    with pytest.raises(StepError, match="not pinned"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)


def test_key_material_alone_is_not_trusted(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    (keys / "stranger.asc").write_bytes(signers[1].key)
    serve(site, signers[1].sign(TAR))
    with pytest.raises(StepError, match="not among the keys"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)


def test_no_signature(site: Any, keys: Path, tmp_path: Path) -> None:
    serve(site, None)
    with pytest.raises(Gone, match="signature of kernel"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)


@pytest.mark.parametrize("signature", [b"", b"nonsense"])
def test_a_signature_that_is_none(
        site: Any, keys: Path, tmp_path: Path, signature: bytes) -> None:
    serve(site, signature)
    with pytest.raises(StepError, match="not good"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)


def test_a_truncated_tarball(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[0].sign(TAR), lzma.compress(TAR)[:-20])
    with pytest.raises(StepError, match="damaged"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)


def test_no_keys(site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[0].sign(TAR))
    (keys / "release.asc").unlink()
    with pytest.raises(UserError, match="no keys"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)
    (keys / "fingerprints").unlink()
    with pytest.raises(UserError, match="no list of pinned keys"):
        kernelorg.release("6.12.3", tmp_path, keys, releases=site.base)


def test_the_repository_has_the_keys_that_it_pins(repository: Path, tmp_path: Path) -> None:
    place = repository / "keys" / "kernel.org"
    tmp_path.chmod(0o700)
    listed = subprocess.run(
        ["gpg", "--homedir", tmp_path, "--batch", "--with-colons", "--show-keys",
         *sorted(place.glob("*.asc"))], capture_output=True, text=True, check=True).stdout
    lines = listed.splitlines()
    primary = {lines[number + 1].split(":")[9] for number, line in enumerate(lines)
               if line.startswith("pub:")}
    assert primary == kernelorg._pinned(place)


def test_addresses() -> None:
    assert kernelorg.urls("6.12.30") == (
        "https://cdn.kernel.org/pub/linux/kernel/v6.x/linux-6.12.30.tar.xz",
        "https://cdn.kernel.org/pub/linux/kernel/v6.x/linux-6.12.30.tar.sign")


def make_stage(site: Any, keys: Path, tmp_path: Path) -> tuple[Plan, Path]:
    """A plan of the source stage of a recipe that asks for the toy release."""
    root = tmp_path / "repository"
    shutil.copytree(keys, root / "keys/kernel.org")
    default = recipe.load("debian-trixie", keys_module.PACKAGE.parent)
    kernel = replace(default.kernel, source=KernelSource.KERNEL_ORG, package=None,
                     version="6.12.3", releases=site.base)
    stage = source.source(replace(default, kernel=kernel),
                          Lock(recipe="toy", request="", groups={}), root)
    return Plan({stage.name: stage}, Store(tmp_path / "store"), tmp_path / "logs"), root


def test_stage_keeps_the_verified_tarball_and_its_signer(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[0].sign(TAR))
    plan, _root = make_stage(site, keys, tmp_path)
    action = plan.ensure("kernel_source")
    assert action.record["signed_by"] == signers[0].fingerprint
    assert lzma.decompress(plan.store.blob(action.outputs["tarball"].blob).read_bytes()) == TAR
    asked = len(site.asked)
    plan.forget()
    assert plan.ensure("kernel_source") == action
    assert len(site.asked) == asked


def test_stage_fails_on_a_strangers_signature(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[1].sign(TAR))
    plan, _root = make_stage(site, keys, tmp_path)
    with pytest.raises(StepError, match="not good"):
        plan.ensure("kernel_source")
    assert plan.action("kernel_source") is None


def test_stage_goes_on_with_an_interrupted_tarball(
        site: Any, page: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    packed = lzma.compress(TAR)
    serve(site, signers[0].sign(TAR))
    tarball = "v6.x/linux-6.12.3.tar.xz"
    site.add(tarball, page(body=packed, cuts=9, cut_at=20))
    monkeypatch.setattr(kernelorg, "fetch_all", partial(fetch_all, pauses=()))
    plan, _root = make_stage(site, keys, tmp_path)
    with pytest.raises(UserError, match="broke off") as failure:
        plan.ensure("kernel_source")
    assert "run the same command again, it goes on from there" in str(failure.value)
    site.add(tarball, packed)
    site.asked.clear()
    plan.ensure("kernel_source")
    assert [(wanted, status) for path, wanted, _match, status in site.asked
            if path == f"/{tarball}"] == [("bytes=20-", 206)]
    (place,) = (plan.store.root / "partial").iterdir()
    assert list(place.iterdir()) == []


def test_stage_fetches_a_release_anew_that_was_not_good(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[0].sign(TAR), lzma.compress(TAR)[:-20])
    plan, _root = make_stage(site, keys, tmp_path)
    with pytest.raises(StepError, match="damaged"):
        plan.ensure("kernel_source")
    serve(site, signers[0].sign(TAR))
    assert plan.ensure("kernel_source").record["signed_by"] == signers[0].fingerprint


def test_other_pinned_keys_fetch_and_verify_again(
        site: Any, signers: tuple[Signer, Signer], keys: Path, tmp_path: Path) -> None:
    serve(site, signers[0].sign(TAR))
    plan, root = make_stage(site, keys, tmp_path)
    plan.ensure("kernel_source")
    pinned = root / "keys/kernel.org/fingerprints"
    pinned.write_text(pinned.read_text() + "# reviewed\n")
    plan.forget()
    assert "fingerprints" in plan.reason("kernel_source")
