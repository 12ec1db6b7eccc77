"""The private key: what it must be before anything is signed with it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from katagpu import signingkey
from katagpu.errors import UserError
from tests.signers import Signer, needs_openssl, openssl, signer

pytestmark = needs_openssl


@pytest.fixture
def mine(tmp_path: Path) -> Signer:
    """A signer."""
    return signer(tmp_path)


def refusal(key: Path, by: Signer, now: float | None = None) -> str:
    """Why a key cannot be used."""
    with pytest.raises(UserError) as raised:
        signingkey.usable(key, by.certificate, now)
    return str(raised.value)


def test_a_key_that_fits(mine: Signer, capfd: pytest.CaptureFixture[str]) -> None:
    assert signingkey.usable(mine.key, mine.certificate) is None
    assert capfd.readouterr().err == ""
    mine.key.chmod(0o640)
    signingkey.usable(mine.key, mine.certificate)
    assert f"can be read by others than its owner: chmod 600 {mine.key}" in capfd.readouterr().err


def test_keys_that_do_not(tmp_path: Path, mine: Signer) -> None:
    assert "No such file" in refusal(tmp_path / "none", mine)
    assert "the store has signed" in refusal(tmp_path / "none", mine)
    assert "is not the key of the certificate O=Toys,CN=signer" in refusal(
        signer(tmp_path, "other").key, mine)
    for name, kind in (("ec", ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")),
                       ("ed", ("-algorithm", "ed25519"))):
        made = tmp_path / name
        openssl("genpkey", *kind, "-out", made)
        assert "is not an RSA key" in refusal(made, mine)
    for data in (b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
                 mine.cert.read_bytes()):
        (tmp_path / "bad").write_bytes(data)
        assert "no private key in PEM" in refusal(tmp_path / "bad", mine)


def test_an_encrypted_key(
    tmp_path: Path, mine: Signer, monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "encrypted"
    openssl("pkey", "-in", mine.key, "-aes256", "-passout", "pass:secret", "-out", path)
    path.chmod(0o600)
    assert "is encrypted, and KBUILD_SIGN_PIN is not set" in refusal(path, mine)
    monkeypatch.setenv("KBUILD_SIGN_PIN", "wrong")
    said = refusal(path, mine)
    assert "the passphrase is wrong" in said and "wrong\n" not in said.partition("hint")[0]
    monkeypatch.setenv("KBUILD_SIGN_PIN", "secret")
    assert signingkey.usable(path, mine.certificate) == b"secret"
    assert signingkey.usable(mine.key, mine.certificate) is None, "it needs none"


def test_a_certificate_that_does_not_hold(tmp_path: Path) -> None:
    old = signer(tmp_path, "old", dates=("20200101", "20210101"))
    assert "O=Toys,CN=old expired on 2021-01-01" in refusal(old.key, old)
    assert signingkey.usable(old.key, old.certificate,
                             datetime(2020, 6, 1, tzinfo=UTC).timestamp()) is None
    early = datetime(2019, 6, 1, tzinfo=UTC).timestamp()
    assert "is not valid before 2020-01-01" in refusal(old.key, old, early)
