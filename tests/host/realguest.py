"""A Debian as an initrd: its kernel with the real vfio-pci, udev, Python, and a program of ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from katagpu import newc
from katagpu.apt import host_archive

SUITE, MIRROR = "trixie", "http://deb.debian.org/debian"
PACKAGES = ("busybox-static", "kmod", "linux-image-amd64", "python3", "udev")
TOOLS = ("cat", "mount", "sh")
# What the test loads; all other modules would be unpacked for nothing.
MODULES = re.compile(r"/kernel/(drivers/(vfio|pci/pci-stub)|virt/lib/irqbypass)")
LEFT_OUT = ("usr/lib/udev/hwdb.d", "usr/share/locale", "usr/share/bash-completion", "var")
LOADER = "usr/lib64/ld-linux-x86-64.so.2"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
INIT = """\
#!/usr/bin/busybox sh
export PATH=/usr/sbin:/usr/bin LC_ALL=C
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /run
/usr/lib/systemd/systemd-udevd --daemon
udevadm trigger --action=add
udevadm settle
python3 -B /steps.py
busybox poweroff -f
"""


@dataclass(frozen=True)
class Guest:
    """What QEMU boots."""

    kernel: Path
    initrd: Path


def make(place: Path, files: Mapping[str, Path]) -> Guest:
    """Make it below a directory; `files` are put into its root, by name."""
    root = place / "root"
    root.mkdir()
    with subprocess.Popen(
            ["nice", "-n", "19", "mmdebstrap", "--quiet", "--variant=extract",
             f"--include={','.join(PACKAGES)}", "--dpkgopt=path-exclude=/usr/share/doc/*", SUITE,
             "-", host_archive("debian").get("") or MIRROR], stdout=subprocess.PIPE) as maker:
        subprocess.run(["tar", "--extract", "--no-same-owner", "--exclude=./dev/*", "--directory",
                        root], stdin=maker.stdout, check=True)
    assert maker.returncode == 0
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    kernel = kernel.rename(place / "vmlinuz")
    _prune(root)
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for tool in TOOLS:
        if not (root / "usr/bin" / tool).exists():
            (root / "usr/bin" / tool).symlink_to("busybox")
    (release,) = (path.name for path in (root / "usr/lib/modules").iterdir())
    subprocess.run([root / LOADER, "--argv0", "depmod", "--library-path", root / LIBRARIES,
                    root / "usr/bin/kmod", "--basedir", root, release], check=True)
    for directory in ("proc", "sys", "dev", "run", "tmp", "etc"):
        (root / directory).mkdir(exist_ok=True)
    for name, path in files.items():
        shutil.copyfile(path, root / name)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    return Guest(kernel, _pack(place, root))


def _prune(root: Path) -> None:
    for name in LEFT_OUT:
        shutil.rmtree(root / name, ignore_errors=True)
    for path in (root / "usr/lib/modules").rglob("*.ko*"):
        if not MODULES.search(str(path)):
            path.unlink()


def _pack(place: Path, root: Path) -> Path:
    def owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        return member

    with tarfile.open(place / "tar", "w") as tar:
        tar.add(root, ".", filter=owned)
    with (place / "initrd").open("wb") as sink:
        newc.write(lambda: (place / "tar").open("rb"), sink, time=0)
    return place / "initrd"
