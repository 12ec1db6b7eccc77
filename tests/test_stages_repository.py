"""A flat repository of real packages, packed as Debian and as Ubuntu do it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from katagpu import keys
from katagpu.stages import repository

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")


def package(place: Path, compressor: str) -> Path:
    """A package, its members packed with a compressor."""
    control = place / "tree/DEBIAN/control"
    control.parent.mkdir(parents=True)
    control.write_text("Package: toy\nVersion: 1:2.0-1ubuntu3\nArchitecture: all\n"
                       "Maintainer: nobody <nobody@localhost>\nDepends: libc6 (>= 2.39)\n"
                       "Description: für einen Test\n with a second line\n")
    deb = place / f"{compressor}.deb"
    done = subprocess.run(["dpkg-deb", f"-Z{compressor}", "--build", place / "tree", deb],
                          capture_output=True, check=False)
    if b"unknown compression" in done.stderr:
        pytest.skip(f"this dpkg-deb has no {compressor}")
    assert done.returncode == 0, done.stderr
    return deb


@pytest.mark.parametrize("compressor", ["zstd", "xz", "gzip", "none"])
def test_the_index_needs_no_program_of_the_host(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressor: str) -> None:
    deb = package(tmp_path, compressor)
    if compressor == "zstd":
        assert b"control.tar.zst" in deb.read_bytes()[:200]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert repository.name_of(deb) == "toy=1:2.0-1ubuntu3"
    digest = keys.file_digest(deb)
    repository.lay(tmp_path / "flat", {digest: deb})
    text = (tmp_path / "flat/Packages").read_text()
    assert f"Filename: ./{digest}.deb\n" in text and f"Size: {deb.stat().st_size}\n" in text
    assert "Depends: libc6 (>= 2.39)\n" in text
    assert "Description: für einen Test\n with a second line\n" in text
    assert (tmp_path / f"flat/{digest}.deb").read_bytes() == deb.read_bytes()
