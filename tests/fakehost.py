"""A build host with a GPU, a driver, an X server and Secure Boot, as a sandbox would show it.

The sandbox mounts proc, sys and tmp afresh, so that nothing that is laid over the host's own can be
seen in it, with or without hiding. So the fakes are put into the fresh ones, in the moment before
`enter.hide_host` covers what tells of the host.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from katagpu import enter

PID = 4242
"""Of the X server."""
FAKES = {
    "modules": {"proc/modules": "nvidia_uvm 4096 0 - Live 0x0000000000000000\n"},
    "version": {"proc/version": "Linux version 5.4.0-fake (root@host) (gcc version 9.4.0)\n"},
    "modprobe": {"proc/sys/kernel/modprobe": "/run/current-system/sw/bin/modprobe\n"},
    "nouveau": {"sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
                "sys/bus/pci/devices/0000:01:00.0/class": "0x030200\n",
                "sys/bus/pci/devices/0000:01:00.0/driver": "-> ../../drivers/nouveau",
                "sys/bus/pci/drivers/nouveau/bind": "", "sys/module/nouveau/refcnt": "1\n",
                "sys/class/drm/card0/dev": "226:0\n"},
    "secure-boot": {"sys/firmware/efi/efivars/SecureBoot-8be4df61": "\x06\x00\x00\x00\x01"},
    "x": {"tmp/.X0-lock": f"      {PID}\n", f"proc/{PID}/comm": "Xorg\n"},
}
"""What such a host shows: files by path, links with an arrow."""

_SCRIPT = """\
import importlib.util, sys
from pathlib import Path

found = importlib.util.spec_from_file_location("enter", {enter!r})
enter = importlib.util.module_from_spec(found)
found.loader.exec_module(enter)
hide_host, mount = enter.hide_host, enter.mount
hiding = {hiding!r}


def faked(root):
    for name in ("proc", "sys"):
        mount("tmpfs", root / name, "tmpfs")
    (root / "sys/fs").mkdir()
    for name, text in {files!r}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            path.symlink_to(text[3:])
        elif not path.exists():
            path.write_text(text)
    if hiding:
        hide_host(root)


def without_tmp(source, target, kind, flags=0, options=""):
    if hiding or target.name != "tmp":
        mount(source, target, kind, flags, options)


enter.hide_host, enter.mount = faked, without_tmp
try:
    sys.exit(enter.main(sys.argv[1:]))
except OSError as refusal:
    sys.exit(f"sandbox: {{refusal}}")
"""


def program(place: Path, *, hiding: bool = True, fakes: Collection[str] = tuple(FAKES)) -> Path:
    """What stands for `sandbox.ENTER` on such a host; without `hiding` it lets everything be seen.

    There are no processes in its proc: programs that need /proc/self do not run.
    """
    files = {path: text for name in fakes for path, text in FAKES[name].items()}
    path = place / f"enter-{len(list(place.glob('enter-*')))}.py"
    path.write_text(_SCRIPT.format(enter=str(Path(enter.__file__)), hiding=hiding, files=files))
    return path
