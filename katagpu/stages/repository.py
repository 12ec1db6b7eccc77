"""A flat apt repository on disk, made of locked packages, and apt and mmdebstrap that use it."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from debian.deb822 import Deb822

PLACE = "/katagpu/repository"  # where a sandbox sees it
SOURCE = f"deb [trusted=yes] copy:{PLACE} ./"


def lay(directory: Path, debs: Mapping[str, Path]) -> None:
    """Put packages (SHA-256 → file) and their index into a new directory.

    Their digests were checked against the lock, and the lock against the archive's signature, so
    the index carries no signature of its own.
    """
    directory.mkdir()
    paragraphs = []
    for digest, path in debs.items():
        name = f"{digest}.deb"  # nothing in it that apt would quote
        try:
            os.link(path, directory / name)
        except OSError:
            shutil.copyfile(path, directory / name)
        control = control_of(path)
        control["Filename"] = f"./{name}"
        control["Size"] = str(path.stat().st_size)
        control["SHA256"] = digest
        paragraphs.append(control.dump())
    (directory / "Packages").write_text("\n".join(paragraphs))


def name_of(path: Path) -> str:
    """`package=version` of a package file, as apt-get installs it."""
    control = control_of(path)
    return f"{control['Package']}={control['Version']}"


def control_of(path: Path) -> Deb822:
    """A package's control fields."""
    from debian.debfile import DebFile

    with path.open("rb") as stream, DebFile(fileobj=stream) as deb:
        if "control.tar.zst" in deb.getnames():
            return _zstd_control(deb.getmember("control.tar.zst").read())
        return deb.debcontrol()


def _zstd_control(archive: bytes) -> Deb822:
    """As Ubuntu packs since 21.10. python-debian would call unzstd(1), which not every host has."""
    import zstandard
    from debian.deb822 import Deb822

    content = zstandard.ZstdDecompressor().decompressobj().decompress(archive)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        control = tar.extractfile("./control")
        assert control is not None
        return Deb822(control.read())
