"""The kernel from kernel.org: a release's tarball, and its signature by a key pinned here.

Signatures are made over the tar, not over its compressed form
(https://www.kernel.org/signature.html).
"""

from __future__ import annotations

import contextlib
import lzma
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from katagpu import pgp
from katagpu.errors import StepError, UserError
from katagpu.fetch import Fetched, Job, fetch_all
from katagpu.run import run

RELEASES = "https://cdn.kernel.org/pub/linux/kernel"
CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Release:
    """A verified release: the tarball, and the fingerprint of the primary key that signed it."""

    tarball: Path
    fetched: Fetched
    signed_by: str


def urls(version: str, releases: str = RELEASES) -> tuple[str, str]:
    """Addresses of a release's tarball and of its signature."""
    series = version.split(".")[0]
    start = f"{releases.rstrip('/')}/v{series}.x/linux-{version}.tar"
    return f"{start}.xz", f"{start}.sign"


def release(version: str, directory: Path, keys: Path, *, releases: str = RELEASES) -> Release:
    """Fetch `linux-<version>.tar.xz` into `directory` and verify it.

    `keys` is a directory of `*.asc` files and a file `fingerprints`. Raises `UserError` when
    something is missing, `StepError` when the signature is not good.
    """
    tarball, signature = urls(version, releases)
    here = directory / f"linux-{version}.tar.xz"
    sign = directory / f"linux-{version}.tar.sign"
    fetched, _ = fetch_all([
        (Job(url=tarball, what=f"kernel {version}"), here),
        (Job(url=signature, what=f"signature of kernel {version}"), sign),
    ])
    return Release(tarball=here, fetched=fetched, signed_by=verify(here, sign, keys))


def verify(tarball: Path, signature: Path, keys: Path) -> str:
    """The fingerprint of the pinned primary key that signed the tar in an `.xz` file."""
    pinned = _pinned(keys)
    with TemporaryDirectory(prefix="katagpu-") as temporary:
        keyring = Path(temporary) / "keyring.gpg"
        keyring.write_bytes(_keyring(keys))
        status, said = _gpgv(tarball, signature, keyring)
    # doc/DETAILS of GnuPG: VALIDSIG's first field is the signing key, its last the primary key.
    words = [line.split()[1:] for line in said.splitlines() if line.startswith("[GNUPG:] ")]
    bad = {line[0] for line in words} & {"BADSIG", "ERRSIG", "REVKEYSIG", "NODATA"}
    signers = [line[-1] for line in words if line[0] == "VALIDSIG"]
    if status != 0 or bad or not signers:
        raise StepError(f"the signature of {tarball.name} is not good (gpgv: {_why(words)})", hint=(
            "run the same command again, which fetches it anew; if it stays so, do not build this "
            "kernel"))
    strangers = [signer for signer in signers if signer not in pinned]
    if strangers:
        raise StepError(f"{tarball.name} is signed by {', '.join(strangers)}, which is not among "
                        f"the keys in {keys / 'fingerprints'}")
    return signers[0]


def _why(words: list[list[str]]) -> str:
    known = {"BADSIG": "the file or the signature was altered", "REVKEYSIG": "the key is revoked",
             "NO_PUBKEY": "signed by a key that is not pinned", "NODATA": "no signature in it"}
    return next((known[line[0]] for line in words if line[0] in known), "no valid signature")


def _pinned(keys: Path) -> set[str]:
    """Fingerprints, one per line before a comment; `#` starts one."""
    try:
        lines = (keys / "fingerprints").read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"there is no list of pinned keys {keys / 'fingerprints'}") from None
    return {line.split()[0].upper() for line in lines if line.strip() and line[0] != "#"}


def _keyring(keys: Path) -> bytes:
    """The keys in the binary form that gpgv reads."""
    blocks = [block for path in sorted(keys.glob("*.asc"))
              for block in path.read_text().split(pgp.BEGIN)[1:]]
    if not blocks:
        raise UserError(f"there are no keys in {keys}", hint=(
            f"put the keys of {keys / 'fingerprints'} there as *.asc (gpg --armor --export)"))
    return b"".join(pgp.dearmored(block) for block in blocks)


def _gpgv(tarball: Path, signature: Path, keyring: Path) -> tuple[int, str]:
    """gpgv's exit status and status lines for the decompressed tarball."""
    if shutil.which("gpgv") is None:
        raise UserError("the program 'gpgv' is not installed",
                        hint="./doitw setup installs what the build host needs")
    reader, writer = os.pipe()
    failures: list[Exception] = []

    def feed() -> None:
        # gpgv may stop before the end: its verdict counts, not the broken pipe.
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as pipe:
            try:
                with lzma.open(tarball) as tar:
                    shutil.copyfileobj(tar, pipe, CHUNK)
            except (lzma.LZMAError, EOFError) as damaged:
                failures.append(damaged)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        result = run(["gpgv", "--status-fd", "1", "--keyring", keyring, signature,
                      f"/dev/fd/{reader}"], capture=True, check=False, pass_fds=(reader,))
    finally:
        os.close(reader)
        feeder.join()
    if failures:
        raise StepError(f"{tarball} is damaged: {failures[0]}",
                        hint="run the same command again, which fetches it anew")
    return result.status, result.stdout.decode(errors="replace")
