"""An archive of Ubuntu's shape on the loopback, signed, with real packages.

They are Debian's: most as they are, some packed anew as Ubuntu 20.04 and 24.04 have them, that is
with files in /bin, /sbin and /lib, with zstd, and with Ubuntu's versions.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from katagpu.stages.repository import control_of
from tests.toyarchive import ToyArchive

UNMERGED = ("bin", "sbin", "lib", "lib64")


@dataclass
class Archive:
    """Suites below one directory; `packages` are index paragraphs by suite and component."""

    root: Path
    toy: ToyArchive
    origin: str
    packages: dict[str, dict[str, list[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def add(self, deb: Path, digest: str, suite: str, component: str = "main") -> None:
        """Index a package of this digest."""
        place = self.root / "pool" / component / f"{digest}.deb"
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(deb)
        control = control_of(deb)
        control["Filename"] = str(place.relative_to(self.root))
        control["Size"] = str(deb.stat().st_size)
        control["SHA256"] = digest
        self.packages[suite][component].append(control.dump())

    def publish(self, components: Iterable[str]) -> None:
        """Write and sign the indexes of all suites."""
        for suite, parts in self.packages.items():
            directory = self.root / "dists" / suite
            sums = []
            for component in components:
                text = "\n".join(parts.get(component, [])).encode()
                index = directory / component / "binary-amd64/Packages"
                index.parent.mkdir(parents=True, exist_ok=True)
                index.write_bytes(text)
                sums.append(f" {hashlib.sha256(text).hexdigest()} {len(text)} "
                            f"{component}/binary-amd64/Packages\n")
            date = datetime.now(UTC) - timedelta(days=1)
            (directory / "Release").write_text(
                f"Origin: {self.origin}\nLabel: {self.origin}\nSuite: {suite}\n"
                f"Codename: {suite.partition('-')[0]}\nArchitectures: amd64\n"
                f"Components: {' '.join(components)}\nDate: {date:%a, %d %b %Y %H:%M:%S UTC}\n"
                f"SHA256:\n{''.join(sums)}")
            self.toy.gpg("--local-user", "test", "--output", directory / "InRelease",
                         "--clearsign", directory / "Release")


def repack(deb: Path, target: Path, version: str,
           change: Callable[[Path], None] = lambda _tree: None) -> Path:
    """A package with another version and content, packed with zstd."""
    tree = target / "tree"
    target.mkdir(parents=True)
    subprocess.run(["dpkg-deb", "--raw-extract", deb, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text("".join(
        f"Version: {version}\n" if line.startswith("Version:") else line
        for line in control.read_text().splitlines(keepends=True)))
    change(tree)
    made = target / f"{deb.name[:12]}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "--build", tree, made],
                   check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(tree)
    return made


def unmerge(tree: Path) -> None:
    """Move what is in /usr/bin, /usr/sbin, /usr/lib and /usr/lib64 to the root, as it once was.

    A link of that name (base-files) becomes a directory. Relative links lead where they did, since
    all four move.
    """
    for name in UNMERGED:
        if (tree / name).is_symlink():
            (tree / name).unlink()
            (tree / name).mkdir()
        if (tree / "usr" / name).is_dir():
            shutil.copytree(tree / "usr" / name, tree / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(tree / "usr" / name)


def ubuntu_release(tree: Path) -> None:
    """Make base-files Ubuntu's: its name, and directories in the place of links."""
    unmerge(tree)
    for path in (tree / "lib/os-release", tree / "usr/lib/os-release", tree / "etc/os-release"):
        if path.is_file() and not path.is_symlink():
            path.write_text('NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n'
                            "VERSION_CODENAME=noble\n")
