"""`katagpu-install.pyz`: the command line of the installer on a host without the build."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from katagpu import log
from katagpu.errors import KatagpuError, Status
from katagpu.release import install
from katagpu.release.host import Host

EPILOG = """\
A release is a directory, or oci://registry/repository:tag. The public key comes from a place other
than the release itself. Registries: credentials as docker login leaves them, REGISTRY_AUTH_FILE,
SSL_CERT_FILE, https_proxy."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="katagpu-install.pyz", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Install a katagpu guest for Kata Containers on this host.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    below = argparse.ArgumentParser(add_help=False)
    below.add_argument("--prefix", type=Path, default=Path("/"),
                       help="the root directory of the host (default: /)")
    new = commands.add_parser("install", parents=[below],
                              help="verify a release, place it, and let Kata use it")
    new.add_argument("release", help="a directory, or oci://registry/repository:tag")
    trust = new.add_mutually_exclusive_group(required=True)
    trust.add_argument("--key", type=Path, help="the public key of who signed it (PEM)")
    trust.add_argument("--unverified", action="store_true",
                       help="install whatever is there, without a key")
    commands.add_parser("rollback", parents=[below], help="go back to the release before")
    commands.add_parser("uninstall", parents=[below], help="remove all that was installed")
    commands.add_parser("status", parents=[below],
                        help="say what is installed, and whether it is intact")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; its exit status (0, 1: the user can mend it)."""
    try:
        given = parser().parse_args(argv)
    except SystemExit as said:  # of argparse, which has 2 for what a user can mend
        return int(Status.USER if said.code else Status.OK)
    host = Host(given.prefix.absolute())
    try:
        if given.command == "install":
            install.install(given.release, host, key=given.key, unverified=given.unverified)
        elif given.command == "rollback":
            install.rollback(host)
        elif given.command == "uninstall":
            install.uninstall(host)
        else:
            for line in install.status(host):
                sys.stdout.write(line + "\n")
    except KatagpuError as error:
        log.error(str(error))
        return int(error.status)
    except OSError as refusal:
        log.error(f"{refusal.filename or ''}: {refusal.strerror or refusal}".lstrip(": "))
        return int(Status.USER)
    except KeyboardInterrupt:
        log.error("interrupted; run the same command again to go on")
        return 128 + signal.SIGINT
    return 0
