"""Signing by key and command, verifying by openssl, and what is no key."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

from katagpu.errors import KatagpuError, UserError
from katagpu.release import provenance, signature, signing
from tests.release.conftest import Keys

DATA = b"what is signed\n"


@pytest.mark.parametrize("kind", ["keys", "p256"])
def test_a_key_signs_the_same_and_openssl_verifies(
    kind: str, request: pytest.FixtureRequest, other_keys: Keys, tmp_path: Path,
) -> None:
    keys: Keys = request.getfixturevalue(kind)
    signer = signing.choose({"key": str(keys.private)}, tmp_path)
    assert signer is not None
    found = signer.sign(DATA)
    assert found == keys.signer.sign(DATA)
    assert signer.accepts(DATA, found)
    assert not signer.accepts(DATA + b"?", found)
    signature.verify(DATA, found, keys.public, "it")
    for data, signed, key in ((DATA + b"?", found, keys.public), (DATA, found[:-1], keys.public),
                              (DATA, b"", keys.public), (DATA, found, other_keys.public)):
        with pytest.raises(UserError, match="is not by the key"):
            signature.verify(data, signed, key, "it")


def test_a_command_signs(keys: Keys, tmp_path: Path) -> None:
    script = tmp_path / "sign"
    script.write_text(f"#!/bin/sh\ncat > {tmp_path}/data\n"
                      f"openssl pkeyutl -sign -rawin -inkey {keys.private} -in {tmp_path}/data\n")
    script.chmod(0o755)
    signer = signing.choose({"signer": f"{script} 'a word'"}, tmp_path)
    assert signer is not None
    assert signer.sign(DATA) == keys.signer.sign(DATA)
    assert signer.accepts(DATA, b"another")


@pytest.mark.parametrize(("command", "said"), [
    ("false", "ended with status 1"), ("true", "printed no signature"),
    ("no-such-program", "is not installed"), (" ", "names no command")])
def test_a_command_that_does_not(command: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(KatagpuError, match=said):
        signing.CommandSigner(command, tmp_path).sign(DATA)


def test_a_key_by_a_relative_path_and_below_home(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(keys.private.parent))
    for text, root in ((keys.private.name, keys.private.parent),
                       (f"~/{keys.private.name}", tmp_path)):
        signer = signing.choose({"key": text}, root)
        assert signer is not None and signer.sign(DATA) == keys.signer.sign(DATA)


def test_who_signs_is_said_once(keys: Keys, tmp_path: Path) -> None:
    assert signing.choose({"unsigned": "1"}, tmp_path) is None
    with pytest.raises(UserError, match="Nothing is said"):
        signing.choose({"unsigned": "0"}, tmp_path)
    with pytest.raises(UserError, match="unsigned=no: this is neither 0 nor 1"):
        signing.choose({"unsigned": "no"}, tmp_path)
    with pytest.raises(UserError, match="key and unsigned are given"):
        signing.choose({"unsigned": "1", "key": str(keys.private)}, tmp_path)


@pytest.mark.parametrize(("words", "said"), [
    (["-algorithm", "rsa"], "of another kind"),
    (["-algorithm", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1"], "of another kind"),
    (["-algorithm", "ed25519", "-aes256", "-pass", "pass:x"], "is encrypted")])
def test_keys_that_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    subprocess.run(["openssl", "genpkey", "-out", path, *words], check=True, capture_output=True)
    with pytest.raises(UserError, match=said):
        signing.load(path)
    if "-pass" not in words:
        public = tmp_path / "public"
        subprocess.run(["openssl", "pkey", "-in", path, "-pubout", "-out", public], check=True)
        with pytest.raises(UserError, match="of another kind"):
            signature.verify(DATA, b"x", public, "it")


def test_no_key_at_all(keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        signing.load(tmp_path / "none")
    with pytest.raises(UserError, match="no private key"):
        signing.load(keys.public)


def test_a_host_without_openssl_or_with_an_old_one(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="openssl is not installed"):
        signature.verify(DATA, b"x", keys.public, "it")
    old = tmp_path / "openssl"
    old.write_text("#!/bin/sh\ncase $1 in pkey) echo ED25519;; version) echo OpenSSL 1.1.1n;; "
                   "*) exit 1;; esac\n")
    old.chmod(0o755)
    with pytest.raises(UserError, match=r"OpenSSL 1\.1\.1n cannot verify"):
        signature.verify(DATA, b"x", keys.public, "it")


# the statement


def test_an_envelope_as_dsse_has_it(keys: Keys) -> None:
    assert provenance.encoded(b"ab") == b"DSSEv1 28 application/vnd.in-toto+json 2 ab"
    payload = b'{"_type": "a statement"}'
    found = json.loads(provenance.envelope(payload, keys.signer, None))
    assert base64.b64decode(found["payload"]) == payload
    signed = base64.b64decode(found["signatures"][0]["sig"])
    signature.verify(provenance.encoded(payload), signed, keys.public, "it")


def test_an_envelope_from_before_is_kept(keys: Keys, other_keys: Keys, tmp_path: Path) -> None:
    payload = b"{}"
    script = tmp_path / "sign"
    script.write_text(f"#!/bin/sh\ncat >/dev/null\necho x >> {tmp_path}/count\n"
                      f"wc -l < {tmp_path}/count\n")
    script.chmod(0o755)
    signer = signing.CommandSigner(str(script), tmp_path)
    first = provenance.envelope(payload, signer, None)
    assert provenance.envelope(payload, signer, first) == first
    assert provenance.envelope(b"[]", signer, first) != first
    assert provenance.envelope(payload, signer, b"damaged") != first
    mine = provenance.envelope(payload, keys.signer, None)
    assert provenance.envelope(payload, other_keys.signer, mine) != mine
