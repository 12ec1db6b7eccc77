"""OpenPGP public keys, against real ones: those of the kernel's maintainers."""

from __future__ import annotations

from pathlib import Path

import pytest

from katagpu import pgp

KERNEL = ("gregkh", "torvalds")


def packet(kind: int, body: bytes) -> bytes:
    """A packet of the newer format with a length of one byte."""
    return bytes([0xc0 | kind, len(body)]) + body


KEY = packet(6, b"\x04" + bytes(9))


@pytest.mark.parametrize("name", KERNEL)
def test_the_fingerprints_of_real_keys(repository: Path, name: str) -> None:
    keys = repository / "keys/kernel.org"
    pinned = {line.split()[0] for line in (keys / "fingerprints").read_text().splitlines()
              if line.strip() and not line.startswith("#")}
    data = pgp.binary((keys / f"{name}.asc").read_bytes())
    found = pgp.certificates(data)
    assert set(found) <= pinned
    assert b"".join(found.values()) == data
    assert pgp.binary(data) == data


def test_armor_of_windows_and_with_headers(repository: Path) -> None:
    text = (repository / "keys/kernel.org/gregkh.asc").read_bytes()
    plain = pgp.binary(text)
    assert pgp.binary(b"before\n" + text.replace(b"\n", b"\r\n")) == plain
    begin = pgp.BEGIN.encode() + b"\n"
    assert pgp.binary(text.replace(begin, begin + b"Version: x\nComment: y\n", 1)) == plain


def test_each_key_has_its_own_packets() -> None:
    other = packet(6, b"\x04" + bytes(8) + b"x")
    found = pgp.certificates(KEY + packet(13, b"one") + other + packet(13, b"two"))
    assert list(found.values()) == [KEY + packet(13, b"one"), other + packet(13, b"two")]


@pytest.mark.parametrize("size", [1, 191, 192, 8383, 8384, 70000])
def test_lengths_of_the_newer_format(size: int) -> None:
    body = bytes(size)
    length = (bytes([size]) if size < 192 else
              bytes([192 + (size - 192 >> 8), size - 192 & 0xff]) if size < 8384 else
              b"\xff" + size.to_bytes(4, "big"))
    (found,) = pgp.certificates(KEY + b"\xcd" + length + body).values()
    assert len(found) == len(KEY) + 1 + len(length) + size


def test_version_6_has_a_longer_fingerprint() -> None:
    (fingerprint,) = pgp.certificates(packet(6, b"\x06" + bytes(9)))
    assert len(fingerprint) == 64


@pytest.mark.parametrize(("data", "why"), [
    (b"", "empty"), (b"\x00", "not in OpenPGP's format"), (b"\xc6", "ends in the middle"),
    (KEY[:-1], "ends in the middle"), (packet(13, b"who"), "does not begin with a public key"),
    (packet(6, b"\x03" + bytes(9)), "version 3"), (packet(5, b"\x04"), "secret key"),
    (b"\x9b\x04", "no length"), (KEY + b"\xcd\xe1xx", "comes in parts"),
])
def test_what_is_no_key(data: bytes, why: str) -> None:
    with pytest.raises(pgp.NotAKey, match=why):
        pgp.certificates(data)
