"""A finished build as it lies below out/, small: a manifest and the files that it names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from katagpu import filelist
from katagpu.filelist import Entry, Kind

RELEASE = "6.1-toy"
DRIVER = "550.163.01"
LIBRARY = "usr/lib/libcuda.so"
CONFIG = ["CONFIG_SMP=y", "CONFIG_NR_CPUS=8", "# CONFIG_DRM is not set", "CONFIG_PCI=y"]
SIZES = {"distribution": 1000, "NVIDIA user space: libcuda": 700, "licences": 10}
PACKAGES = {"base-files": "13", "libc6": "2.41-12", "libcuda1": f"{DRIVER}-2",
            "nvidia-smi": f"{DRIVER}-2"}


def entry(path: str, content: str = "", **facts: Any) -> Entry:
    """A file of the guest with this content; `kind` and all else as given."""
    kind = facts.setdefault("kind", Kind.FILE)
    if kind is Kind.FILE:
        content = hashlib.sha256(content.encode()).hexdigest()
        facts.setdefault("size", 100)
    facts.setdefault("mode", 0o755 if kind is Kind.DIRECTORY else 0o644)
    return Entry(path=path, content=content, uid=facts.pop("uid", 0), gid=facts.pop("gid", 0),
                 **facts)


def guest(driver: str = DRIVER, release: str = RELEASE) -> dict[str, Entry]:
    """The files of a guest, by path."""
    found = [entry("", kind=Kind.DIRECTORY), entry("usr", kind=Kind.DIRECTORY),
             entry("usr/bin", kind=Kind.DIRECTORY), entry("usr/bin/true", "true"),
             entry("usr/lib", kind=Kind.DIRECTORY),
             entry(f"{LIBRARY}.{driver}", f"library {driver}", size=700),
             entry(f"{LIBRARY}.1", f"libcuda.so.{driver}", kind=Kind.LINK, mode=0o777),
             entry(f"usr/lib/modules/{release}", kind=Kind.DIRECTORY),
             entry(f"usr/lib/modules/{release}/modules.order", "the same in all")]
    return {one.path: one for one in found}


def disk(driver: str = DRIVER) -> dict[str, Entry]:
    """The files of a driver's disk, by path."""
    found = [entry("", kind=Kind.DIRECTORY), entry("usr", kind=Kind.DIRECTORY),
             entry(f"{LIBRARY}.{driver}", f"library {driver}", size=700),
             entry(f"{LIBRARY}.1", f"libcuda.so.{driver}", kind=Kind.LINK, mode=0o777)]
    return {one.path: one for one in found}


def write(place: Path, *, files: dict[str, Entry] | None = None, driver: str | None = DRIVER,
          config: list[str] | None = None, sizes: dict[str, int] | None = None,
          packages: dict[str, str] | None = None, disk: dict[str, Entry] | None = None,
          disk_sizes: dict[str, int] | None = None, **facts: Any) -> Path:
    """Write a build; `facts` are other fields of the manifest, `...` leaves one out.

    `disk` are the files of a driver's disk; None: there is no such disk.
    """
    place.mkdir(parents=True, exist_ok=True)
    release = facts.get("kernel_release", RELEASE)
    files = guest(driver or DRIVER, release) if files is None else files
    ordered = [files[path] for path in sorted(files)]
    parts = {"kernel_config": (f"config-{release}", "\n".join(config or CONFIG).encode()),
             "sizes": ("sizes.json", json.dumps(sizes or SIZES).encode()),
             "files": ("files.mtree", filelist.render(ordered))}
    image = facts.pop("image_size", 5000)
    images = {"image": {"sha256": f"{image:064}", "size": image}}
    if disk is not None:
        images["extension"] = {"sha256": "e" * 64, "size": 4000}
        parts["extension_sizes"] = ("sizes-extension.json", json.dumps(disk_sizes or {}).encode())
        parts["extension_files"] = ("files-extension.mtree", filelist.render(
            [disk[path] for path in sorted(disk)]))
    for name, data in parts.values():
        (place / name).write_bytes(data)
    manifest = {
        "schema": 1, "kernel_release": release, "recipe": "toy",
        "driver": driver and {"version": driver, "kernel_module": "open",
                              "capabilities": ["compute", "utility"]},
        "toolkit": {"source": "go", "version": "v1.17.8"}, "image": {"dax_header": False},
        "packages": PACKAGES if packages is None else packages, "kata_agent": None,
        "parts": {**images,
                  **{part: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
                     for part, (_name, data) in parts.items()}},
        "checks": ["every check passed"], **facts}
    (place / "manifest.json").write_text(json.dumps(
        {name: value for name, value in manifest.items() if value is not ...}))
    return place
