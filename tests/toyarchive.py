"""A signed apt archive, served on the loopback: of packages that are only read about, or of real
ones made here.

Needs gpg of the host (`NEEDED`, with what reads the archive).
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from katagpu.lock import GUEST, Archive, Group, Request

NEEDED = ("apt-get", "dpkg-deb", "gpg", "gpgv")


def missing() -> list[str]:
    """The host's programs that are not there."""
    return [tool for tool in NEEDED if shutil.which(tool) is None]


@dataclass
class ToyArchive:
    """A signed archive in a directory, served by HTTP.

    A flat one has its index beside the packages, and only SHA-512 in its Release file and no date
    until which that holds, as NVIDIA's have it.
    """

    root: Path
    home: Path
    base: str = ""
    suite: str = "toy"
    flat: bool = False
    packages: dict[str, dict[str, str]] = field(default_factory=dict)
    published: int = 0

    def add(self, name: str, version: str, **fields: str) -> str:
        """A package (apt only reads about it); its file name."""
        file = f"{name}_{version.replace(':', '%3a')}_amd64.deb"
        content = f"not really {file}".encode()
        path = self.root / "pool" / file.replace("%3a", "_")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        self.packages[file] = {
            "Package": name, "Version": version, "Architecture": "amd64", "Maintainer": "t <t@t>",
            "Description": name, "Filename": f"pool/{path.name}", "Size": str(len(content)),
            "SHA256": hashlib.sha256(content).hexdigest(),
            "SHA512": hashlib.sha512(content).hexdigest(),
            **{key.replace("_", "-"): value for key, value in fields.items()}}
        return file

    def add_deb(self, name: str, version: str, programs: Mapping[str, bytes], **fields: str,
                ) -> Path:
        """A real package, with executables by their paths in the guest; its file."""
        with tempfile.TemporaryDirectory() as place:
            tree = Path(place) / "tree"
            for path, content in programs.items():
                target = tree / path.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
                target.chmod(0o755)
            control = {"Package": name, "Version": version, "Architecture": "amd64",
                       "Maintainer": "t <t@t>", "Description": name,
                       **{key.replace("_", "-"): value for key, value in fields.items()}}
            (tree / "DEBIAN").mkdir(parents=True)
            (tree / "DEBIAN/control").write_text(
                "".join(f"{key}: {value}\n" for key, value in control.items()))
            tree.chmod(0o755)
            deb = self.root / f"{name}_{version.replace(':', '_')}_amd64.deb"
            subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, deb], check=True,
                           stdout=subprocess.DEVNULL)
        content = deb.read_bytes()
        self.packages[deb.name] = {
            **control, "Filename": f"./{deb.name}", "Size": str(len(content)),
            "SHA256": hashlib.sha256(content).hexdigest(),
            "SHA512": hashlib.sha512(content).hexdigest()}
        return deb

    def publish(self, key: str = "test", valid: timedelta = timedelta(days=1)) -> None:
        """Write the indexes, and sign them with a key."""
        if self.flat:
            self._publish_flat(key)
        else:
            self._publish_suite(key, valid)

    def _publish_flat(self, key: str) -> None:
        text = self._index()
        (self.root / "Packages").write_bytes(text)
        (self.root / "Release").write_text(
            "Origin: toy\nArchitectures: amd64\nComponents: main\n"
            "Date: Fri, 27 Apr 2018 21:29:25 +0000\n"
            f"SHA512:\n {hashlib.sha512(text).hexdigest()} {len(text)} Packages\n")
        self._sign(self.root, key)

    def _index(self) -> bytes:
        return "\n".join("".join(f"{key}: {value}\n" for key, value in package.items())
                         for package in self.packages.values()).encode()

    def _sign(self, directory: Path, key: str) -> None:
        (directory / "InRelease").unlink(missing_ok=True)
        self.gpg("--local-user", key, "--output", directory / "InRelease", "--clearsign",
                 directory / "Release")
        self.published += 1  # HTTP's times are whole seconds, and tests are quicker
        now = datetime.now(UTC).timestamp()
        os.utime(directory / "InRelease", (now, now + self.published))

    def _publish_suite(self, key: str, valid: timedelta) -> None:
        text = self._index()
        suite = self.root / "dists" / self.suite
        index = suite / "main/binary-amd64/Packages"
        index.parent.mkdir(parents=True, exist_ok=True)
        index.write_bytes(text)
        now = datetime.now(UTC)
        form = "%a, %d %b %Y %H:%M:%S UTC"
        (suite / "Release").write_text(
            f"Origin: toy\nSuite: {self.suite}\nCodename: {self.suite}\n"
            "Architectures: amd64\nComponents: main contrib non-free non-free-firmware\n"
            f"Date: {now - timedelta(days=2):{form}}\nValid-Until: {now + valid:{form}}\n"
            f"SHA256:\n {hashlib.sha256(text).hexdigest()} {len(text)} "
            "main/binary-amd64/Packages\n")
        self._sign(suite, key)

    def gpg(self, *words: str | Path) -> str:
        """Run gpg with the toy's keys; what it says."""
        return subprocess.run(["gpg", "--batch", "--quiet", "--homedir", self.home,
                               "--pinentry-mode", "loopback", "--passphrase", "", *words],
                              check=True, capture_output=True, text=True).stdout

    def fingerprint(self, key: str = "test") -> str:
        """The fingerprint of a key, as gpg has it."""
        said = self.gpg("--with-colons", "--list-keys", key)
        return next(line.split(":")[9] for line in said.splitlines() if line.startswith("fpr"))

    def request(self, groups: Mapping[str, Group], **more: str) -> Request:
        """A request to this archive."""
        archive = Archive(uri=more.get("uri", self.base), suites=(self.suite,),
                          components=("main",), keyring=str(self.home / "test.gpg"))
        return Request(recipe="toy", identity="x", architecture="amd64",
                       archives={GUEST: (archive,)}, groups=dict(groups))


@contextlib.contextmanager
def signing_keys() -> Iterator[Path]:
    """A directory of keys: `test`, whose public half is test.gpg, and `other`."""
    with tempfile.TemporaryDirectory() as place:  # a short path: the agent has a socket in it
        archive = ToyArchive(Path(place), Path(place))
        for name in ("test", "other"):
            archive.gpg("--quick-gen-key", name, "ed25519", "sign", "never")
        archive.gpg("--output", Path(place) / "test.gpg", "--export", "test")
        yield Path(place)
        subprocess.run(["gpgconf", "--homedir", place, "--kill", "all"], check=False)


@contextlib.contextmanager
def served(archive: ToyArchive) -> Iterator[None]:
    """Serve the archive; its `base` is the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_words: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                             partial(Quiet, directory=archive.root))
    archive.base = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
    thread.join()
