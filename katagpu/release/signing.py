"""Who signs a release: a key in a file, or a command that is given the bytes.

A key signs the same bytes with the same signature: Ed25519 always does, ECDSA by RFC 6979.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from katagpu import parameters, run
from katagpu.errors import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HINT = "openssl genpkey -algorithm ed25519 -out release.key makes one; keep it outside"
CURVE = "secp256r1"
TIMEOUT = 600.0  # seconds for a command: somebody may have to touch a token


class Signer(Protocol):
    """Signs bytes. `keyid` says by which key; empty: not known here."""

    keyid: str

    def sign(self, data: bytes) -> bytes:
        """A detached signature. Raises `UserError`, `StepError`."""

    def accepts(self, data: bytes, signature: bytes) -> bool:
        """Can a signature that was made before be kept?"""


class KeySigner:
    """An Ed25519 or ECDSA P-256 key."""

    def __init__(self, key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> None:
        from cryptography.hazmat.primitives import serialization

        self.key = key
        self.keyid = hashlib.sha256(key.public_key().public_bytes(
            serialization.Encoding.DER,
            serialization.PublicFormat.SubjectPublicKeyInfo)).hexdigest()

    def sign(self, data: bytes) -> bytes:
        """Sign."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        if isinstance(self.key, ec.EllipticCurvePrivateKey):
            return self.key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))
        return self.key.sign(data)

    def accepts(self, data: bytes, signature: bytes) -> bool:
        """Only what it would make."""
        return signature == self.sign(data)


class CommandSigner:
    """A command that gets the bytes on stdin and prints the signature, in this environment."""

    keyid = ""

    def __init__(self, command: str, root: Path) -> None:
        self.argv = shlex.split(command)
        self.root = root
        if not self.argv:
            raise UserError("signer= names no command")

    def sign(self, data: bytes) -> bytes:
        """Ask the command."""
        found = run.run(self.argv, env=dict(os.environ), cwd=self.root, stdin=data, capture=True,
                        timeout=TIMEOUT).stdout
        if not found:
            raise UserError(f"the signer printed no signature: {shlex.join(self.argv)}")
        return found

    def accepts(self, data: bytes, signature: bytes) -> bool:
        """It was made for the same bytes, and this command may make another each time."""
        return bool(signature)


def choose(values: Mapping[str, str], root: Path) -> Signer | None:
    """The signer of a command line; None where the release shall be unsigned. Raises `UserError`.

    Relative paths start at `root`.
    """
    chosen = [name for name in ("key", "signer") if values.get(name)]
    if parameters.flag(values, "unsigned"):
        chosen.append("unsigned")
    if len(chosen) != 1:
        raise UserError("who signs this release? " + (
            "Nothing is said of it" if not chosen else f"{' and '.join(chosen)} are given"),
            hint="key=PRIVATE.pem, or signer=\"command\", or unsigned=1")
    if chosen[0] == "unsigned":
        return None
    if chosen[0] == "signer":
        return CommandSigner(values["signer"], root)
    return load(parameters.path(values["key"], root))


def load(path: Path) -> KeySigner:
    """The signer of a private key file (PEM). Raises `UserError`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as refusal:
        raise UserError(f"the key {path} cannot be read: {refusal.strerror}", hint=HINT) from None
    except TypeError:
        raise UserError(f"the key {path} is encrypted", hint="signer=\"command\" can ask for a "
                        "password, or a token") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path} is no private key in PEM", hint=HINT) from None
    if isinstance(key, ed25519.Ed25519PrivateKey) or (
            isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == CURVE):
        return KeySigner(key)
    raise UserError(f"{path} is a key of another kind: Ed25519 or ECDSA P-256 it has to be",
                    hint=HINT)
