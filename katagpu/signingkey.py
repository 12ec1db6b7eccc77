"""The private key that signs modules: looked at when modules are signed, and never kept.

`KBUILD_SIGN_PIN` is the passphrase of an encrypted one, as the kernel's own build has it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from katagpu import log
from katagpu.errors import UserError
from katagpu.modsig import Certificate

PASSPHRASE = "KBUILD_SIGN_PIN"
OTHERS = 0o077  # the mode's bits for group and others


def usable(path: Path, signer: Certificate, now: float | None = None) -> bytes | None:
    """Look whether the key can sign for a certificate; its passphrase, None where it has none.

    Raises `UserError` with the reason why not. A key that others may read is warned of.
    """
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    passphrase = os.environ.get(PASSPHRASE, "").encode() or None
    try:
        data, mode = path.read_bytes(), path.stat().st_mode
    except OSError as refusal:
        raise UserError(f"the key that signs modules, {path}: {refusal.strerror}",
                        hint="`sign.key` of the recipe names it; without it only those modules "
                             "can be had that the store has signed") from None
    try:
        found = load_pem_private_key(data, passphrase if b"ENCRYPTED" in data else None)
    except TypeError:
        raise UserError(f"{path} is encrypted, and {PASSPHRASE} is not set",
                        hint=f"{PASSPHRASE}=… in the environment, read from where you keep it") \
            from None
    except Exception as refusal:  # ValueError, UnsupportedAlgorithm, and those of old formats
        cause = "the passphrase is wrong, or it is damaged" if b"ENCRYPTED" in data \
            else f"it is no private key in PEM ({type(refusal).__name__})"
        raise UserError(f"cannot use the key {path}: {cause}",
                        hint="openssl pkey -in KEY.pem -noout tells") from None
    if not isinstance(found, rsa.RSAPrivateKey):
        raise UserError(f"{path} is not an RSA key",
                        hint="a signature by another kind of key differs each time it is made: "
                             "openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:4096")
    if found.public_key() != signer.x509().public_key():
        raise UserError(f"{path} is not the key of the certificate {signer.subject}",
                        hint="`sign.key` and `sign.cert` of the recipe belong together")
    _must_hold(signer, time.time() if now is None else now)
    if mode & OTHERS:
        log.warn(f"{path} can be read by others than its owner: chmod 600 {path}")
    return passphrase if b"ENCRYPTED" in data else None


def _must_hold(signer: Certificate, now: float) -> None:
    """The kernel looks at no date; people who verify a guest do."""
    day = "%Y-%m-%d"
    if now > signer.ends:
        raise UserError(f"the certificate {signer.subject} expired on "
                        f"{time.strftime(day, time.gmtime(signer.ends))}",
                        hint="make another one; the kernel is built anew, since it has it in it")
    if now < signer.begins:
        raise UserError(f"the certificate {signer.subject} is not valid before "
                        f"{time.strftime(day, time.gmtime(signer.begins))}",
                        hint="is this machine's clock right?")
