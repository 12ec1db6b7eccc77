"""Signatures of modules: what is verified, and what is refused; openssl says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from katagpu import modsig
from katagpu.errors import UserError
from katagpu.modsig import MAGIC, TRAILER, Unsigned
from tests.signers import Signer, append, needs_openssl, openssl, openssl_verifies, sign, signer

pytestmark = needs_openssl


@pytest.fixture(scope="module")
def signers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Signer, Signer]:
    """Two signers."""
    top = tmp_path_factory.mktemp("signers")
    return signer(top), signer(top, "stranger")


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """Something to sign."""
    path = tmp_path / "toy.ko"
    path.write_bytes(b"\x7fELF not really" * 100)
    return path


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
@pytest.mark.parametrize("options", [("-noattr",), ("-noattr", "-keyid")], ids=["issuer", "keyid"])
def test_a_module_that_is_signed(
    tmp_path: Path, module: Path, digest: str, options: tuple[str, ...],
) -> None:
    extensions = tmp_path / "extensions"
    extensions.write_text("subjectKeyIdentifier=hash\n")
    mine = signer(tmp_path, extensions=("-extfile", str(extensions)))
    plain = module.read_bytes()
    sign(module, mine, options=options, digest=digest)
    assert openssl_verifies(module, mine, tmp_path)
    assert modsig.verify(module.read_bytes(), mine.certificate) == digest
    assert modsig.split(module.read_bytes())[0] == plain


def test_the_same_module_has_the_same_signature(
    module: Path, signers: tuple[Signer, Signer],
) -> None:
    plain = module.read_bytes()
    sign(module, signers[0])
    once = module.read_bytes()
    module.write_bytes(plain)
    sign(module, signers[0])
    assert module.read_bytes() == once


def refusal(data: bytes, by: Signer) -> str:
    """Why a module is not taken."""
    with pytest.raises(Unsigned) as raised:
        modsig.verify(data, by.certificate)
    return str(raised.value)


def test_what_is_not_signed_by_the_certificate(
    tmp_path: Path, module: Path, signers: tuple[Signer, Signer],
) -> None:
    mine, stranger = signers
    plain = module.read_bytes()
    assert refusal(plain, mine) == "is not signed"
    sign(module, stranger)
    assert openssl_verifies(module, stranger, tmp_path)
    assert refusal(module.read_bytes(), mine) == "is signed by another than O=Toys,CN=signer"
    module.write_bytes(plain)
    sign(module, mine)
    good = module.read_bytes()
    changed = b"\x00" + good[1:]
    assert "was changed after it was signed" in refusal(changed, mine)
    module.write_bytes(changed)
    assert not openssl_verifies(module, mine, tmp_path)
    assert refusal(good[:-1], mine) == "is not signed"
    assert refusal(good[50:], mine).startswith("was changed")


def test_a_certificate_of_the_same_name_and_number_with_another_key(
    tmp_path: Path, module: Path,
) -> None:
    """By a serial number alone nobody is known."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    mine, twin = (signer(tmp_path / name, dates=("20200101", "20400101")) for name in ("a", "b"))
    sign(module, twin)
    assert "the key is another one of the name" in refusal(module.read_bytes(), mine)
    assert not openssl_verifies(module, mine, tmp_path)


def test_damaged_signatures(module: Path, signers: tuple[Signer, Signer]) -> None:
    mine = signers[0]
    plain = module.read_bytes()
    sign(module, mine)
    good = module.read_bytes()
    end = len(good) - len(MAGIC) - TRAILER.size
    size = TRAILER.unpack_from(good, end)[-1]
    cms = good[end - size:end]
    for broken in (b"", cms[:-9], cms[:40], b"\x30\x80" + cms[2:], b"\x30\x03\x02\x01\x05",
                   b"\x04" + cms[1:], cms + cms, bytes(300)):
        module.write_bytes(plain)
        append(module, broken)
        assert "damaged signature" in refusal(module.read_bytes(), mine)
    for trailer in (TRAILER.pack(0, 0, 1, 0, 0, size), TRAILER.pack(1, 0, 2, 0, 0, size),
                    TRAILER.pack(0, 0, 2, 0, 0, len(good))):
        assert "the kernel does not read" in refusal(good[:end] + trailer + MAGIC, mine)
    assert "cut short" in refusal(MAGIC, mine)
    for at in range(end - size, end):  # no bit of it may be turned
        turned = bytearray(good)
        turned[at] ^= 1
        try:
            modsig.verify(bytes(turned), mine.certificate)
        except Unsigned:
            continue
        # These say nothing of who signed what: versions, parameters, names of algorithms.
        assert at - (end - size) < size - 256, "the value of the signature"


def test_signed_attributes_are_refused(module: Path, signers: tuple[Signer, Signer]) -> None:
    """They have the time in them: the same module would differ each time."""
    sign(module, signers[0], options=())
    assert "signed attributes" in refusal(module.read_bytes(), signers[0])


def test_md5_is_refused(module: Path, signers: tuple[Signer, Signer]) -> None:
    sign(module, signers[0], digest="sha1")
    assert "damaged signature (hash 1.3.14.3.2.26)" in refusal(module.read_bytes(), signers[0])


# certificates


def test_a_certificate(tmp_path: Path, signers: tuple[Signer, Signer]) -> None:
    found = signers[0].certificate
    said = openssl("x509", "-in", signers[0].cert, "-noout", "-fingerprint", "-sha256").decode()
    assert said.strip().rpartition("=")[2].replace(":", "").lower() == found.fingerprint
    assert found.subject == "O=Toys,CN=signer"
    noisy = tmp_path / "noisy.pem"
    noisy.write_bytes(b"Words that openssl puts there\n" + signers[0].cert.read_bytes())
    assert modsig.certificate(noisy) == found
    assert found.pem() == openssl("x509", "-in", signers[0].cert)


def test_certificates_that_are_none(tmp_path: Path, signers: tuple[Signer, Signer]) -> None:
    path = tmp_path / "cert.pem"
    for data, said in ((b"", "not one certificate"), (b"\x30\x82garbage", "not one certificate"),
                       (signers[0].cert.read_bytes() + signers[1].cert.read_bytes(),
                        "not one certificate"),
                       (signers[0].cert.read_bytes() + signers[0].key.read_bytes(),
                        "has a private key in it")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=said):
            modsig.certificate(path)
    with pytest.raises(UserError, match="No such file"):
        modsig.certificate(tmp_path / "none")
    for name, kind in (("ec", ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384")),
                       ("ed", ("-algorithm", "ed25519")),
                       ("small", ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"))):
        with pytest.raises(UserError, match="not of an RSA key of 2048 to 4096 bits"):
            modsig.certificate(signer(tmp_path, name, kind=kind).cert)
