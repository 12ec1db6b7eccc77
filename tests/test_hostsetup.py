"""The host's packages, with an apt-get and a sudo that record how they were called."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from katagpu import hostsetup
from katagpu.errors import UserError
from katagpu.hostsetup import (
    FILES,
    PROGRAMS,
    ROOTLESS,
    TESTS,
    Host,
    ensure_host,
    ensure_tests,
    missing,
)

SYSTEM = "/usr/sbin:/usr/bin:/sbin:/bin"


class Toy:
    """A host in a directory. Its apt-get writes down its words, and `installs` what it is told."""

    def __init__(self, top: Path) -> None:
        self.bin = top / "bin"
        self.bin.mkdir()
        self.calls = top / "calls"
        self.calls.touch()
        self.prefix = top / "prefix"
        for file in FILES:
            (self.prefix / file.lstrip("/")).parent.mkdir(parents=True)
            (self.prefix / file.lstrip("/")).touch()
        for program in [*PROGRAMS, *ROOTLESS]:
            self.tool(program, "exit 0")

    def tool(self, name: str, script: str) -> None:
        """Put a program there."""
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def apt(self, *, known: bool = True, fails: int = 0) -> None:
        """apt-get installs mmdebstrap; its first `fails` installations fail."""
        self.tool("apt-cache", f"exit {0 if known else 100}")
        self.tool("apt-get", f"""
echo "$*" >>{self.calls}
[ "$1" = update ] && exit 0
[ "$(grep -c install {self.calls})" -gt {fails} ] || {{ echo stale lists; exit 100; }}
printf '#!/bin/sh\\n' >{self.bin}/mmdebstrap; chmod +x {self.bin}/mmdebstrap""")

    def host(self, *, root: bool = True, terminal: bool = False, **environment: str) -> Host:
        """The host; the real tools come after the toy's."""
        return Host(root=root, path=str(self.bin), prefix=self.prefix, environment=environment,
                    terminal=terminal)

    def said(self) -> list[str]:
        """How apt-get was called."""
        return self.calls.read_text().splitlines()


LINE = "install -y --no-install-recommends mmdebstrap"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A host that has everything."""
    toy = Toy(tmp_path)
    for name in ("grep", "chmod", "cat", "setpriv", "env"):
        (toy.bin / name).unlink(missing_ok=True)
        found = next(Path(place, name) for place in SYSTEM.split(":")
                     if Path(place, name).exists())
        (toy.bin / name).symlink_to(found)
    # Popen looks up the program in the child's PATH only where the parent's has it too.
    monkeypatch.setenv("PATH", str(toy.bin), prepend=":")
    return toy


def test_nothing_is_missing_and_that_is_quick(toy: Toy) -> None:
    assert missing(toy.host()) == []
    started = time.perf_counter()
    for _ in range(20):
        ensure_host(toy.host(root=False))
    assert (time.perf_counter() - started) / 20 < 0.005
    assert toy.said() == []


def test_what_is_missing_is_named_by_package(toy: Toy) -> None:
    (toy.bin / "xz").unlink()
    (toy.bin / "newuidmap").unlink()
    (toy.prefix / "usr/share/keyrings/debian-archive-keyring.gpg").unlink()
    assert missing(toy.host()) == ["debian-archive-keyring", "xz-utils"]
    assert missing(toy.host(root=False)) == ["debian-archive-keyring", "uidmap", "xz-utils"]


def test_root_installs_and_shows_the_line(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    toy.apt()
    (toy.bin / "mmdebstrap").unlink()
    ensure_host(toy.host())
    assert toy.said() == [LINE]
    assert f"apt-get {LINE}" in capfd.readouterr().err


def test_what_tests_need_is_installed_or_said_to_be_missing(
        toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    toy.apt()
    for name in TESTS:
        (toy.bin / name).unlink(missing_ok=True)
    ensure_tests(toy.host(KATAGPU_NO_INSTALL="1"))
    assert toy.said() == []
    packages = ["cpio", "cryptsetup-bin", "diffoscope-minimal", "fdisk", "mtree-netbsd",
                "shellcheck", "uidmap"]
    assert f"some tests are skipped: the build host lacks {', '.join(packages)}" in \
        capfd.readouterr().err
    ensure_tests(toy.host())
    assert toy.said() == [f"install -y --no-install-recommends {' '.join(packages)}"]


def test_unknown_packages_need_lists_first(toy: Toy) -> None:
    toy.apt(known=False)
    (toy.bin / "mmdebstrap").unlink()
    ensure_host(toy.host())
    assert toy.said() == ["update", LINE]


def test_stale_lists_are_renewed_once(toy: Toy) -> None:
    toy.apt(fails=1)
    (toy.bin / "mmdebstrap").unlink()
    ensure_host(toy.host())
    assert toy.said() == [LINE, "update", LINE]


def test_a_failure_shows_what_apt_said(toy: Toy) -> None:
    toy.apt(fails=9)
    (toy.bin / "mmdebstrap").unlink()
    with pytest.raises(UserError, match="stale lists"):
        ensure_host(toy.host())


def test_it_may_be_forbidden(toy: Toy) -> None:
    toy.apt()
    (toy.bin / "mmdebstrap").unlink()
    with pytest.raises(UserError, match="KATAGPU_NO_INSTALL=1") as caught:
        ensure_host(toy.host(KATAGPU_NO_INSTALL="1"))
    assert caught.value.hint == f"apt-get {LINE}"
    assert toy.said() == []


@pytest.mark.parametrize("sudo", [None, "exit 1"], ids=["no sudo", "sudo with a password"])
def test_without_the_right_it_stops_with_the_line(toy: Toy, sudo: str | None) -> None:
    toy.apt()
    (toy.bin / "mmdebstrap").unlink()
    if sudo:
        toy.tool("sudo", sudo)
    with pytest.raises(UserError, match="no right") as caught:
        ensure_host(toy.host(root=False))
    assert caught.value.hint == f"sudo apt-get {LINE}"
    assert toy.said() == []


def test_sudo_without_a_password(toy: Toy) -> None:
    toy.apt()
    (toy.bin / "mmdebstrap").unlink()
    toy.tool("sudo", f'echo "sudo $*" >>{toy.calls}; shift; [ "$1" = true ] || exec "$@"')
    ensure_host(toy.host(root=False, http_proxy="http://proxy.invalid"))
    assert toy.said() == [
        "sudo -n true", "sudo -n env DEBIAN_FRONTEND=noninteractive "
        f"http_proxy=http://proxy.invalid apt-get {LINE}", LINE]


ASKS = """
echo "sudo $*" >>{calls}
case $1 in
-n) exit 1 ;;
-p) echo "$2" >&2; exit {status} ;;
esac
exec "$@"
"""


def test_on_a_terminal_sudo_asks(toy: Toy, capfd: pytest.CaptureFixture[str]) -> None:
    toy.apt(known=False)
    (toy.bin / "mmdebstrap").unlink()
    toy.tool("sudo", ASKS.format(calls=toy.calls, status=0))
    ensure_host(toy.host(root=False, terminal=True, http_proxy="http://proxy.invalid"))
    more = "env DEBIAN_FRONTEND=noninteractive http_proxy=http://proxy.invalid apt-get"
    assert [line for line in toy.said() if not line.startswith(("sudo -p", "[sudo]"))] == [
        "sudo -n true", f"sudo {more} update", "update", f"sudo {more} {LINE}", LINE]
    # what it is for, before the password
    assert f"to run `sudo apt-get {LINE}`\n[sudo] password for %p: " in capfd.readouterr().err


def test_a_wrong_password_stops_with_the_line(toy: Toy) -> None:
    toy.apt()
    (toy.bin / "mmdebstrap").unlink()
    toy.tool("sudo", ASKS.format(calls=toy.calls, status=1))
    with pytest.raises(UserError, match="no right") as caught:
        ensure_host(toy.host(root=False, terminal=True))
    assert caught.value.hint == f"sudo apt-get {LINE}"


def test_a_host_without_apt(toy: Toy) -> None:
    (toy.bin / "apt-get").unlink()
    with pytest.raises(UserError, match="has no apt-get"):
        ensure_host(toy.host())


def test_the_real_host_is_recent_enough() -> None:
    if missing(Host()):
        pytest.skip("this host lacks packages")
    hostsetup.setup()
