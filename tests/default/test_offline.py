"""The default guest, built from nothing but what `fetch` brought, with the network cut."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from katagpu.context import Context
from tests.toyrepo import COPIED

pytestmark = pytest.mark.slow
NO_NETWORK = ["unshare", *(["--map-root-user"] if os.geteuid() else []), "--net", "--"]


def digest(directory: Path, pattern: str) -> str:
    """SHA-256 of the one result of this name."""
    (path,) = [path for path in directory.glob(pattern) if not path.is_symlink()]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(directory: Path) -> dict[str, Any]:
    """Without what the boot check added to it: the guest here was not booted."""
    found: dict[str, Any] = json.loads((directory / "manifest.json").read_bytes())
    found.pop("boot_check", None)
    return found


def place(context: Context, top: Path) -> Path:
    """A copy of the repository with the default build's lock, and a store with its packages.

    Mirrors drop superseded packages, so these are taken from the store; compilers' caches are too.
    """
    root = top / "repository"
    root.mkdir()
    for name in (*COPIED, "keys", "hooks"):
        source = context.root / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    (root / "recipes/debian-trixie.lock").unlink(missing_ok=True)
    results = root / context.directory.relative_to(context.root)
    results.mkdir(parents=True)
    shutil.copy(context.locks.path, results)
    if context.booting.lock.path.exists():
        shutil.copy(context.booting.lock.path, results.parent)
    found = context.locked()
    assert found is not None, "./doitw build_image"
    blobs = top / "store/blobs/sha256"
    blobs.mkdir(parents=True)
    (top / "store/ccache").symlink_to(context.store.root / "ccache")
    for deb in (deb for group in found.groups.values() for deb in group):
        if context.store.has(deb.sha256) and not (blobs / deb.sha256).exists():
            shutil.copyfile(context.store.blob(deb.sha256), blobs / deb.sha256)
    return root


@pytest.mark.timeout(1800)
def test_the_default_guest_needs_no_network_after_fetch(context: Context, tmp_path: Path) -> None:
    if context.locks.committed.path.exists():
        pytest.skip("here the default recipe has a committed lock, and its build is not under out/")
    if subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode:
        pytest.skip("no network namespaces here")
    root = place(context, tmp_path)
    environment = {**os.environ, "KATAGPU_STORE": str(tmp_path / "store")}

    def run(*words: str) -> None:
        done = subprocess.run([*words], cwd=root, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-4000:]

    run(sys.executable, "-m", "katagpu", "fetch")
    run(*NO_NETWORK, sys.executable, "-m", "katagpu", "build_image")
    results = root / context.directory.relative_to(context.root)
    for pattern in ("vmlinuz-6*", "vmlinux-6*", "kata-*.image"):
        assert digest(results, pattern) == digest(context.directory, pattern), pattern
    assert manifest(results) == manifest(context.directory)
