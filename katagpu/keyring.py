"""The keyring of one apt repository: the one key that the recipe trusts, in the form apt wants.

The key is a file, or comes from a URL. What a URL gives today is trusted for nothing but its
fingerprint, which the recipe has.
"""

from __future__ import annotations

from pathlib import Path

from katagpu import pgp
from katagpu.errors import UserError
from katagpu.fetch import Job, fetch
from katagpu.store import writing


def place(signed_by: str, fingerprint: str | None, target: Path) -> Path:
    """Write the keyring to `target`, binary, with the key of this fingerprint and no other.

    `signed_by` is a path or a URL. Without a fingerprint all keys of a file are taken. Raises
    `UserError`.
    """
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if signed_by.startswith(("http://", "https://")):
            if fingerprint is None:
                raise UserError(f"the key {signed_by} has no fingerprint in the recipe")
            source = target.with_suffix(".fetched")
            fetch(Job(url=signed_by, what=f"signing key {signed_by}"), source)
        else:
            source = Path(signed_by)
        target.write_bytes(_chosen(_read(source), signed_by, fingerprint))
    return target


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as failure:
        raise UserError(f"cannot read the key {source}: {failure.strerror}") from None


def _chosen(data: bytes, signed_by: str, fingerprint: str | None) -> bytes:
    try:
        keys = pgp.certificates(pgp.binary(data))
    except pgp.NotAKey as wrong:
        raise UserError(f"{signed_by} is not an OpenPGP public key: {wrong.what}", hint=(
            "a keyring of apt, or what `gpg --armor --export` writes")) from None
    if fingerprint is None:
        return b"".join(keys.values())
    if fingerprint.upper() not in keys:
        raise UserError(f"the key at {signed_by} is not the recipe's\n"
                        f"  expected fingerprint {fingerprint.upper()}\n"
                        f"  got                  {', '.join(keys)}", hint=(
            "where the repository has a new key, learn its fingerprint from somebody else than the "
            "repository, and write it into the recipe"))
    return keys[fingerprint.upper()]
