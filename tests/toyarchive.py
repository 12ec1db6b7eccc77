"""A signed apt archive of packages that are only read about, served on the loopback.

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
    """A signed archive in a directory, served by HTTP."""

    root: Path
    home: Path
    base: str = ""
    suite: str = "toy"
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

    def publish(self, key: str = "test", valid: timedelta = timedelta(days=1)) -> None:
        """Write the indexes, and sign them with a key."""
        text = "\n".join("".join(f"{key}: {value}\n" for key, value in package.items())
                         for package in self.packages.values()).encode()
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
        (suite / "InRelease").unlink(missing_ok=True)
        self.gpg("--local-user", key, "--output", suite / "InRelease", "--clearsign",
                 suite / "Release")
        self.published += 1  # HTTP's times are whole seconds, and tests are quicker
        os.utime(suite / "InRelease", (now.timestamp(), now.timestamp() + self.published))

    def gpg(self, *words: str | Path) -> None:
        """Run gpg with the toy's keys."""
        subprocess.run(["gpg", "--batch", "--quiet", "--homedir", self.home, "--pinentry-mode",
                        "loopback", "--passphrase", "", *words], check=True, capture_output=True)

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
    yield
    server.shutdown()
    server.server_close()
    thread.join()
