"""A flat apt repository on disk, made of locked packages, and apt and mmdebstrap that use it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from katagpu.lock import Deb

PLACE = "/katagpu/repository"  # where a sandbox sees it
SOURCE = f"deb [trusted=yes] copy:{PLACE} ./"


def lay(directory: Path, debs: Sequence[Deb], paths: Sequence[Path]) -> None:
    """Put packages and their index into a new directory.

    Their digests were checked against the lock, and the lock against the archive's signature, so
    the index carries no signature of its own.
    """
    from debian.debfile import DebFile

    directory.mkdir()
    paragraphs = []
    for deb, path in zip(debs, paths, strict=True):
        name = f"{deb.sha256}.deb"  # nothing in it that apt would quote
        try:
            os.link(path, directory / name)
        except OSError:
            shutil.copyfile(path, directory / name)
        control = DebFile(filename=str(path)).debcontrol()
        control["Filename"] = f"./{name}"
        control["Size"] = str(deb.size)
        control["SHA256"] = deb.sha256
        paragraphs.append(control.dump())
    (directory / "Packages").write_text("\n".join(paragraphs))
