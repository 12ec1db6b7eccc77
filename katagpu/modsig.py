"""Signatures of kernel modules: what is appended to a module, and whether a certificate made it.

At the end of a module stand a CMS SignedData in DER (RFC 5652), twelve bytes that tell its length
(`struct module_signature` of include/linux/module_signature.h), and `MAGIC`. The kernel knows the
signer by issuer and serial number, or by its subject key identifier (crypto/asymmetric_keys).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from katagpu.errors import UserError

if TYPE_CHECKING:
    from cryptography import x509

MAGIC = b"~Module signature appended~\n"
TRAILER = struct.Struct(">BBBBB3xI")  # algorithm, hash, kind, lengths of signer and key id, size
PKCS7 = 2  # PKEY_ID_PKCS7, the only kind
BITS = range(2048, 4097)  # of RSA: below, FIPS kernels refuse; above, all do (crypto/rsa_helper.c)
HASHES = {"2.16.840.1.101.3.4.2.1": "sha256", "2.16.840.1.101.3.4.2.2": "sha384",
          "2.16.840.1.101.3.4.2.3": "sha512"}
SEQUENCE, SET, INTEGER, OCTETS, OBJECT = 0x30, 0x31, 0x02, 0x04, 0x06
CONTENT, ATTRIBUTES, KEY_ID = 0xA0, 0xA0, 0x80  # context tags of RFC 5652
SIGNED_DATA = "1.2.840.113549.1.7.2"


class Unsigned(Exception):
    """A module is not signed, or not by this certificate; says why."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Who signs: DER, and what people know it by. Times are seconds since the epoch."""

    der: bytes
    subject: str
    fingerprint: str
    begins: float
    ends: float

    def x509(self) -> x509.Certificate:
        """The certificate of the library."""
        from cryptography import x509

        return x509.load_der_x509_certificate(self.der)

    def pem(self) -> bytes:
        """The certificate alone, in PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding

        return self.x509().public_bytes(Encoding.PEM)


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a module's signature says. One of `serial` with `issuer`, and `key_id`."""

    hash: str
    value: bytes
    issuer: bytes = b""
    serial: int = 0
    key_id: bytes = b""


def certificate(path: Path) -> Certificate:
    """Read a certificate in PEM. Raises `UserError` for what the kernel could not use."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    try:
        data = path.read_bytes()
    except OSError as refusal:
        raise UserError(f"cannot read the signing certificate {path}: {refusal.strerror}",
                        hint="`sign.cert` of the recipe names it") from None
    if b"PRIVATE KEY" in data:
        raise UserError(f"{path} has a private key in it: `sign.cert` is the certificate alone, "
                        "which goes into the kernel", hint=f"openssl x509 -in {path} -out CERT.pem")
    try:
        (found,) = x509.load_pem_x509_certificates(data)
    except ValueError:
        raise UserError(f"{path} is not one certificate in PEM",
                        hint="a kernel trusts all that it is given: give the signer's alone") \
            from None
    key = found.public_key()
    if not isinstance(key, rsa.RSAPublicKey) or key.key_size not in BITS:
        raise UserError(f"{path} is not of an RSA key of {BITS.start} to {BITS.stop - 1} bits",
                        hint="a signature by another kind of key differs each time it is made")
    return Certificate(
        der=found.public_bytes(serialization.Encoding.DER), subject=found.subject.rfc4514_string(),
        fingerprint=found.fingerprint(hashes.SHA256()).hex(),
        begins=found.not_valid_before_utc.timestamp(), ends=found.not_valid_after_utc.timestamp())


def split(module: bytes) -> tuple[bytes, bytes]:
    """A module without its signature, and the CMS. Raises `Unsigned` where there is none."""
    if not module.endswith(MAGIC):
        raise Unsigned("is not signed")
    end = len(module) - len(MAGIC) - TRAILER.size
    if end < 0:
        raise Unsigned("has a signature that is cut short")
    algorithm, digest, kind, signer, key, size = TRAILER.unpack_from(module, end)
    if kind != PKCS7 or any((algorithm, digest, signer, key)) or size > end:
        raise Unsigned("has a signature that the kernel does not read")
    return module[:end - size], module[end - size:end]


def verify(module: bytes, signer: Certificate) -> str:
    """Verify a module's signature; the hash that it is by. Raises `Unsigned`."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    content, cms = split(module)
    try:
        found = _parse(cms)
    except (ValueError, IndexError) as broken:
        raise Unsigned(f"has a damaged signature ({broken})") from None
    if not _is_by(found, signer):
        raise Unsigned(f"is signed by another than {signer.subject}")
    key = signer.x509().public_key()
    assert isinstance(key, rsa.RSAPublicKey), "certificate() looked"
    kinds = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
    try:
        key.verify(found.value, content, padding.PKCS1v15(), kinds[found.hash])
    except InvalidSignature:
        raise Unsigned("was changed after it was signed, or the key is another one of the "
                       f"name {signer.subject}") from None
    return found.hash


def _is_by(found: Signature, signer: Certificate) -> bool:
    from cryptography import x509

    known = signer.x509()
    if found.key_id:
        try:
            identifier = known.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except x509.ExtensionNotFound:
            return False
        return identifier.value.digest == found.key_id
    return (known.issuer.public_bytes(), known.serial_number) == (found.issuer, found.serial)


# just enough of DER


@dataclass(frozen=True, kw_only=True)
class _Node:
    tag: int
    value: bytes
    whole: bytes

    def inner(self) -> list[_Node]:
        return list(_nodes(self.value))


def _nodes(data: bytes) -> Iterator[_Node]:
    at = 0
    while at < len(data):
        start, tag, size = at, data[at], data[at + 1]
        at += 2
        if size & 0x80:
            count = size & 0x7F
            if not 0 < count <= 4:
                raise ValueError("a length that is not DER's")
            size = int.from_bytes(data[at:at + count])
            at += count
        if at + size > len(data):
            raise ValueError("cut short")
        yield _Node(tag=tag, value=data[at:at + size], whole=data[start:at + size])
        at += size


def _object(node: _Node) -> str:
    """An object identifier in dots (X.690, 8.19)."""
    if node.tag != OBJECT:
        raise ValueError("no object identifier where one belongs")
    numbers, value = [], 0
    for byte in node.value:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            numbers.append(value)
            value = 0
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))


def _parse(cms: bytes) -> Signature:
    """The one signer of a CMS. Raises `ValueError`, `IndexError` for what it is not."""
    (whole,) = _nodes(cms)
    kind, content = whole.inner()
    if whole.tag != SEQUENCE or _object(kind) != SIGNED_DATA or content.tag != CONTENT:
        raise ValueError("not signed data")
    (signed,) = content.inner()
    signers = signed.inner()[-1]
    (info,) = signers.inner()
    if signers.tag != SET or info.tag != SEQUENCE:
        raise ValueError("not one signer")
    _version, who, digest, *rest = info.inner()
    if rest[0].tag == ATTRIBUTES:
        raise ValueError("signed attributes, which have the time in them")
    _algorithm, value = rest[:2]
    name = _object(digest.inner()[0])
    if name not in HASHES or value.tag != OCTETS:
        raise ValueError(f"hash {name}")
    if who.tag == KEY_ID:
        return Signature(hash=HASHES[name], value=value.value, key_id=who.value)
    issuer, serial = who.inner()
    if serial.tag != INTEGER:
        raise ValueError("no serial number")
    return Signature(hash=HASHES[name], value=value.value, issuer=issuer.whole,
                     serial=int.from_bytes(serial.value, signed=True))
