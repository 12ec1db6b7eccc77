"""The kernel's own sign-file, on the modules of the default guest; openssl says the same."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from katagpu import modsig
from katagpu.context import Context
from katagpu.modsig import Unsigned
from katagpu.stages.signing import SCRIPT
from tests.signers import Signer, needs_openssl, openssl, openssl_verifies, signer

pytestmark = [needs_openssl, pytest.mark.skipif(
    shutil.which("gcc") is None or not Path("/usr/include/openssl/cms.h").exists(),
    reason="needs gcc and libssl-dev")]
SOURCES = ("scripts/sign-file.c", "scripts/ssl-common.h")  # the latter since 6.13


@pytest.fixture(scope="module")
def sign_file(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled from the source of the default kernel."""
    top = tmp_path_factory.mktemp("sign-file")
    tarball = context.store.blob(context.plan.ensure("kernel_source").outputs["tarball"].blob)
    subprocess.run(["tar", "--extract", "--strip-components=2", "--wildcards", "--file", tarball,
                    "--directory", top, *(f"*/{name}" for name in SOURCES[:1])], check=True)
    subprocess.run(["tar", "--extract", "--strip-components=2", "--wildcards", "--file", tarball,
                    "--directory", top, f"*/{SOURCES[1]}"], check=False, capture_output=True)
    subprocess.run(["gcc", "-o", top / "sign-file", top / "sign-file.c", "-lcrypto"], check=True,
                   capture_output=True)
    return top / "sign-file"


@pytest.fixture
def modules(context: Context, tmp_path: Path) -> Iterator[list[Path]]:
    """The modules of kernel and driver, unpacked."""
    for name in ("kernel", "driver_modules"):
        blob = context.store.blob(context.plan.ensure(name).outputs["modules"].blob)
        with blob.open("rb") as stream, \
                zstandard.ZstdDecompressor().stream_reader(stream) as plain, \
                tarfile.open(fileobj=plain, mode="r|") as tar:
            tar.extractall(tmp_path / name, filter="data")
    yield sorted(tmp_path.rglob("*.ko"))


def test_real_modules(
    sign_file: Path, modules: list[Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
) -> None:
    mine = signer(tmp_path)
    stranger = signer(tmp_path, "stranger")
    assert any(path.name == "nvidia.ko" for path in modules)

    def signed(path: Path, by: Signer) -> bytes:
        target = tmp_path_factory.mktemp("signed") / path.name
        subprocess.run([sign_file, "sha512", by.key, by.cert, path, target], check=True)
        data = target.read_bytes()
        assert openssl_verifies(target, by, tmp_path)
        target.unlink()
        return data

    for path in modules:
        plain, data = path.read_bytes(), signed(path, mine)
        assert modsig.verify(data, mine.certificate) == "sha512"
        assert modsig.split(data)[0] == plain
        with pytest.raises(Unsigned, match="is not signed"):
            modsig.verify(plain, mine.certificate)
    smallest = min(modules, key=lambda path: path.stat().st_size)
    once = signed(smallest, mine)
    assert once == signed(smallest, mine), "the same each time"
    with pytest.raises(Unsigned, match="signed by another"):
        modsig.verify(signed(smallest, stranger), mine.certificate)
    encrypted = tmp_path / "encrypted.key"
    openssl("pkey", "-in", mine.key, "-aes256", "-passout", "pass:a word", "-out", encrypted)
    subprocess.run(["sh", "-c", SCRIPT, "sh", sign_file, "sha512", encrypted, mine.cert, smallest],
                   input=b"a word\n", capture_output=True, check=True)
    assert smallest.read_bytes() == once, "as the stage calls it, the passphrase on stdin"
