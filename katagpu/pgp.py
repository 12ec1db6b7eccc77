"""OpenPGP public keys (RFC 9580): out of their ASCII armor, told apart, known by fingerprint.

Keys are only read here: whether a signature is good is gpgv's to say. So a build host needs no gpg.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator

from katagpu.errors import UserError

BEGIN = "-----BEGIN PGP PUBLIC KEY BLOCK-----"
_PUBLIC_KEY = 6  # packet types: RFC 9580, 5
_SECRET_KEY = 5


class NotAKey(UserError):
    """These bytes are no public key; the text says what is wrong with them."""


def dearmored(block: str) -> bytes:
    """The bytes of an ASCII armor (6.2): headers, an empty line, base64, a checksum.

    Raises `NotAKey` when that is not what it is.
    """
    text = re.split(r"\n[ \t]*\n", block.split("-----END")[0].replace("\r", ""), maxsplit=1)[-1]
    try:
        return base64.b64decode("".join(line for line in text.split() if line[:1] != "="),
                                validate=True)
    except binascii.Error as wrong:
        raise NotAKey(f"its ASCII armor is damaged: {wrong}") from None


def binary(data: bytes) -> bytes:
    """Keys in binary form, whether they came in it or as text with armored blocks."""
    if BEGIN.encode() not in data:
        return data
    blocks = data.decode(errors="replace").split(BEGIN)[1:]
    return b"".join(dearmored(block) for block in blocks)


def certificates(data: bytes) -> dict[str, bytes]:
    """Each key of a binary keyring: fingerprint of its primary key → all packets that are its.

    Fingerprints are upper case hexadecimal digits. Raises `NotAKey`.
    """
    found: dict[str, bytes] = {}
    fingerprint = None
    for kind, body, packet in _packets(data):
        if kind == _SECRET_KEY:
            raise NotAKey("it is a secret key: give the public one")
        if kind == _PUBLIC_KEY:
            fingerprint = _fingerprint(body)
        elif fingerprint is None:
            raise NotAKey("it does not begin with a public key")
        found[fingerprint] = found.get(fingerprint, b"") + packet
    if not found:
        raise NotAKey("it is empty")
    return found


def _fingerprint(body: bytes) -> str:
    """Of a public key packet of version 4 or 6 (5.5.4)."""
    version = body[0] if body else 0
    if version == 4:
        sha1 = hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body, usedforsecurity=False)
        return sha1.hexdigest().upper()
    if version == 6:
        framed = b"\x9b" + len(body).to_bytes(4, "big") + body
        return hashlib.sha256(framed).hexdigest().upper()
    raise NotAKey(f"its version {version} is not one that apt takes")


def _packets(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Type, body and all bytes of each packet (4.2)."""
    at = 0
    while at < len(data):
        try:
            kind, start, size = _header(data, at)
        except IndexError:
            raise NotAKey("it ends in the middle") from None
        end = start + size
        if end > len(data):
            raise NotAKey("it ends in the middle")
        yield kind, data[start:end], data[at:end]
        at = end


def _header(data: bytes, at: int) -> tuple[int, int, int]:
    """Type of the packet at `at`, and where its body starts and how long it is."""
    first = data[at]
    if not first & 0x80:
        raise NotAKey("it is not in OpenPGP's format")
    if not first & 0x40:  # the older form: the size of the length is in the type's two last bits
        count = 1 << (first & 3)
        if count == 8:
            raise NotAKey("a packet of it has no length")
        size = int.from_bytes(data[at + 1:at + 1 + count], "big")
        return first >> 2 & 0x0f, at + 1 + count, size
    kind, length = first & 0x3f, data[at + 1]
    if length < 192:
        return kind, at + 2, length
    if length < 224:
        return kind, at + 3, (length - 192 << 8) + data[at + 2] + 192
    if length == 255:
        return kind, at + 6, int.from_bytes(data[at + 2:at + 6], "big")
    raise NotAKey("a packet of it comes in parts, which no key does")
