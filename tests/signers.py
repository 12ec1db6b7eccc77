"""Keys and certificates made by openssl, and its own verification of a signed module."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from katagpu import modsig
from katagpu.modsig import MAGIC, PKCS7, TRAILER

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
RSA = ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")


def openssl(*words: str | Path) -> bytes:
    """Run openssl; what it prints."""
    return subprocess.run(["openssl", *words], check=True, capture_output=True).stdout


@dataclass(frozen=True)
class Signer:
    """A key and its certificate."""

    key: Path
    cert: Path

    @property
    def certificate(self) -> modsig.Certificate:
        """As it is read."""
        return modsig.certificate(self.cert)


def signer(top: Path, name: str = "signer", *, kind: tuple[str, ...] = RSA,
           dates: tuple[str, str] | None = None, extensions: tuple[str, ...] = ()) -> Signer:
    """Make a key and a certificate of this name; `dates` as YYYYMMDD."""
    made = Signer(top / f"{name}.key", top / f"{name}.pem")
    openssl("genpkey", *kind, "-out", made.key)
    made.key.chmod(0o600)
    request = top / f"{name}.csr"
    openssl("req", "-new", "-key", made.key, "-subj", f"/CN={name}/O=Toys", "-out", request)
    until = ["-days", "3650"]
    if dates is not None:
        from datetime import UTC, datetime

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

        asked = x509.load_pem_x509_csr(request.read_bytes())
        private = serialization.load_pem_private_key(made.key.read_bytes(), None)
        assert isinstance(private, RSAPrivateKey)
        begin, end = (datetime.strptime(day, "%Y%m%d").replace(tzinfo=UTC) for day in dates)
        built = x509.CertificateBuilder(
            issuer_name=asked.subject, subject_name=asked.subject,
            public_key=asked.public_key(), serial_number=7, not_valid_before=begin,
            not_valid_after=end).sign(private, hashes.SHA256())
        made.cert.write_bytes(built.public_bytes(serialization.Encoding.PEM))
        return made
    openssl("x509", "-req", "-in", request, "-signkey", made.key, *until, *extensions,
            "-out", made.cert)
    return made


def sign(module: Path, by: Signer, *, options: tuple[str, ...] = ("-noattr",),
         digest: str = "sha512") -> None:
    """Sign a module as the kernel wants it, without its `sign-file`."""
    cms = openssl("cms", "-sign", "-binary", "-nocerts", *options, "-outform", "DER", "-md", digest,
                  "-inkey", by.key, "-signer", by.cert, "-in", module)
    append(module, cms)


def append(module: Path, cms: bytes) -> None:
    """Put a signature behind a module."""
    with module.open("ab") as stream:
        stream.write(cms + TRAILER.pack(0, 0, PKCS7, 0, 0, len(cms)) + MAGIC)


def openssl_verifies(module: Path, by: Signer, scratch: Path) -> bool:
    """Does openssl, which knows nothing of us, verify a signed module?"""
    data = module.read_bytes()
    end = len(data) - len(MAGIC) - TRAILER.size
    size = TRAILER.unpack_from(data, end)[-1]
    (scratch / "content").write_bytes(data[:end - size])
    (scratch / "cms").write_bytes(data[end - size:end])
    return subprocess.run(
        ["openssl", "cms", "-verify", "-binary", "-inform", "DER", "-in", scratch / "cms",
         "-content", scratch / "content", "-certfile", by.cert, "-noverify", "-out", "/dev/null"],
        capture_output=True).returncode == 0
