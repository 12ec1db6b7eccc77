"""Whether a detached signature is by the owner of a public key, by the host's openssl(1)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from katagpu.errors import UserError

HINT = "the public key is a PEM file of Ed25519 or ECDSA P-256, from `openssl pkey -pubout`"


def verify(data: bytes, signature: bytes, key: Path, what: str) -> None:
    """Verify a signature of `what`. Raises `UserError` where it does not hold, or cannot be asked.
    """
    program = shutil.which("openssl", path=os.environ.get("PATH") or os.defpath)
    if program is None:
        raise UserError(f"the signature of {what} cannot be verified: openssl is not installed",
                        hint="apt-get install openssl, or its like")
    if not key.is_file():
        raise UserError(f"there is no public key {key}", hint=HINT)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "data").write_bytes(data)
        (directory / "sig").write_bytes(signature)
        text = _openssl(program, ["pkey", "-pubin", "-in", key, "-noout", "-text"])
        if text.returncode != 0:
            raise UserError(f"{key} is no public key", hint=HINT)
        if b"ED25519" in text.stdout:
            words = ["pkeyutl", "-verify", "-pubin", "-inkey", key, "-rawin",
                     "-in", directory / "data", "-sigfile", directory / "sig"]
        elif b"prime256v1" in text.stdout:
            words = ["dgst", "-sha256", "-verify", key, "-signature", directory / "sig",
                     directory / "data"]
        else:
            raise UserError(f"{key} is a key of another kind", hint=HINT)
        said = _openssl(program, words)
    if said.returncode == 0:
        return
    version = _openssl(program, ["version"]).stdout.decode(errors="replace").strip()
    if "pkeyutl" in words and version.startswith(("OpenSSL 0.", "OpenSSL 1.", "LibreSSL")):
        raise UserError(f"{version} cannot verify an Ed25519 signature",
                        hint="OpenSSL 3.0 or newer can; or verify SHA256SUMS.sig on another host, "
                             "and say unverified here")
    raise UserError(f"{what}: the signature is not by the key {key}, or what it signs was changed",
                    hint="do not use it; take the release and the public key again, from where "
                         "they are published")


def _openssl(program: str, words: Sequence[object]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([program, *map(str, words)], check=False, stdin=subprocess.DEVNULL,
                          capture_output=True)
