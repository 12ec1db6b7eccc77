"""What the build host needs, and how it gets there: a few packages of Debian and Ubuntu.

Everything else that a build runs comes from its locked build roots.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from katagpu import log
from katagpu.errors import UserError
from katagpu.run import CLEAN, PATH, run

PROGRAMS: Mapping[str, str] = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "gpgv": "gpgv",
    "mmdebstrap": "mmdebstrap",
    "patch": "patch",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "xz": "xz-utils",
}
"""Program → the package that has it, under the same name in Debian 12, 13 and Ubuntu 24.04."""

ROOTLESS: Mapping[str, str] = {"newuidmap": "uidmap"}
"""What a user who is not root needs besides."""

TESTS: Mapping[str, str] = {
    "cpio": "cpio",
    "diffoscope": "diffoscope-minimal",
    "mtree": "mtree-netbsd",
    "newuidmap": "uidmap",  # builds without root rights are tried as root, too
    "sfdisk": "fdisk",
    "shellcheck": "shellcheck",
    "veritysetup": "cryptsetup-bin",
}
"""What tests need besides."""

FILES: Mapping[str, str] = {
    "/etc/ssl/certs/ca-certificates.crt": "ca-certificates",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}

UTIL_LINUX = (2, 38)
"""The first whose `unshare` has `--map-auto`."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """The build host as this module sees it; tests give another one.

    `terminal` says that somebody can type a password.
    """

    root: bool = field(default_factory=lambda: os.geteuid() == 0)
    path: str = PATH
    prefix: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    terminal: bool = field(default_factory=lambda: sys.stdin.isatty() and sys.stderr.isatty())


def missing(host: Host) -> list[str]:
    """The packages that are not there, sorted. Looks for files only and starts nothing."""
    programs = PROGRAMS if host.root else {**PROGRAMS, **ROOTLESS}
    lacking = {package for program, package in programs.items()
               if shutil.which(program, path=host.path) is None}
    lacking |= {package for file, package in FILES.items()
                if not (host.prefix / file.lstrip("/")).exists()}
    return sorted(lacking)


def apt_line(packages: Sequence[str]) -> list[str]:
    """The command that installs packages."""
    return ["apt-get", "install", "-y", "--no-install-recommends", *packages]


def ensure_host(host: Host | None = None) -> None:
    """Install what is missing, where that is allowed. Well under 2 ms when nothing is.

    Raises `UserError` with the exact line where it may not be installed.
    """
    host = host or Host()
    packages = missing(host)
    if packages:
        _install(packages, host)
        if still := missing(host):
            raise UserError(f"after the installation {', '.join(still)} is still missing")


def ensure_tests(host: Host | None = None) -> None:
    """Install what tests need besides; where that may not be, say so: they are skipped then."""
    host = host or Host()
    packages = sorted({package for program, package in TESTS.items()
                       if shutil.which(program, path=host.path) is None})
    if packages:
        try:
            _install(packages, host)
        except UserError as refusal:
            log.warn(f"some tests are skipped: {refusal}")


def setup(host: Host | None = None) -> None:
    """`ensure_host`, and what only a program's answer can tell."""
    host = host or Host()
    ensure_host(host)
    said = run(["unshare", "--version"], capture=True).stdout.decode()
    found = re.search(r"(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < UTIL_LINUX:
        raise UserError(f"util-linux is too old here ({said.strip()}); {UTIL_LINUX[0]}."
                        f"{UTIL_LINUX[1]} is needed", hint="Debian 12 and Ubuntu 24.04 have it")
    log.note("the build host has everything")


def _install(packages: Sequence[str], host: Host) -> None:
    line = apt_line(packages)
    by_hand = " ".join(line if host.root else ["sudo", *line])
    what = f"the build host lacks {', '.join(packages)}"
    if shutil.which("apt-get", path=host.path) is None:
        raise UserError(f"{what}, and has no apt-get", hint="builds run on Debian and Ubuntu")
    if host.environment.get("KATAGPU_NO_INSTALL") == "1":
        raise UserError(f"{what}, and KATAGPU_NO_INSTALL=1 forbids to install it", hint=by_hand)
    become = [] if host.root else _sudo(host, by_hand)
    if become is None:
        raise UserError(f"{what}, and there is no right to install it (root, or sudo; a password "
                        "can be asked for on a terminal only)", hint=by_hand)
    log.say(f"{what}; installing:\n  {by_hand}")
    updated = not _known(packages, host)
    if updated:
        _apt(become, ["apt-get", "update"], host)
    try:
        _apt(become, line, host)
    except UserError:
        if updated:
            raise
        log.warn("that failed; once more with fresh package lists")
        _apt(become, ["apt-get", "update"], host)
        _apt(become, line, host)


def _sudo(host: Host, by_hand: str) -> list[str] | None:
    """What makes this user root, for which it may ask for a password; None where nothing does."""
    if shutil.which("sudo", path=host.path) is None:
        return None
    if run(["sudo", "-n", "true"], check=False, env={"PATH": host.path}).status == 0:
        return ["sudo", "-n"]
    prompt = f"to run `{by_hand}`\n[sudo] password for %p: "
    asked = host.terminal and _on_terminal(["sudo", "-p", prompt, "-v"], host) == 0
    return ["sudo"] if asked else None


def _on_terminal(argv: Sequence[str], host: Host) -> int:
    """Run a program in our own session, where sudo may ask, and knows what it was told."""
    return subprocess.run(argv, check=False, stdout=2,
                          env={**CLEAN, "PATH": host.path}).returncode


def _known(packages: Sequence[str], host: Host) -> bool:
    return run(["apt-cache", "show", *packages], check=False, env={"PATH": host.path}).status == 0


def _apt(become: Sequence[str], argv: Sequence[str], host: Host) -> None:
    proxies = {name: value for name, value in host.environment.items()
               if name.lower() in {"http_proxy", "https_proxy", "no_proxy"}}
    noninteractive = {"DEBIAN_FRONTEND": "noninteractive", **proxies}
    if become:
        # sudo clears the environment.
        words = [f"{name}={value}" for name, value in noninteractive.items()]
        argv = [*become, "env", *words, *argv]
    said = ""
    if become == ["sudo"]:
        status = _on_terminal(argv, host)
    else:
        result = run(argv, check=False, capture=True, env={**noninteractive, "PATH": host.path})
        status, said = result.status, result.stdout.decode(errors="replace").strip()
    if status != 0:
        raise UserError(f"{' '.join(argv)} failed with status {status}:\n{said[-2000:]}",
                        hint="is the network there, and are apt's sources right?")
