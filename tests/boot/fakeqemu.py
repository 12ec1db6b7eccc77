"""A program that stands where QEMU would be: `python fakeqemu.py WHAT QEMU'S-ARGUMENTS`.

It opens QEMU's sockets, and behaves as WHAT says: as one that refuses, or as one with a guest of
words that panics, hangs, ends in the middle, or answers; the shell of `shell` says what it was
given, and ends with the first key.
"""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from tests.boot.fakeguest import FakeGuest, FakeMonitor, Request

ANSWERS = 2  # of a guest that ends in the middle
FILES: dict[str, str | bytes | int] = {
    "/proc/uptime": "12.5 20.0\n",
    "/proc/meminfo": "MemTotal: 2048000 kB\nMemAvailable: 1024000 kB\n"}


class Ends(FakeGuest):
    """A guest whose kernel panics, which ends QEMU."""

    def take(self, asked: Request) -> None:
        if len(self.asked) == ANSWERS:
            os._exit(0)
        super().take(asked)


class Shell(FakeGuest):
    """A guest whose shell is on our own terminal, as QEMU's second console is."""

    def take(self, asked: Request) -> None:
        term = next(word[5:] for word in asked["env"] if word.startswith("TERM="))
        print(asked["rows"], asked["columns"], term, flush=True)
        print(f"got {os.read(0, 1).hex()}", flush=True)
        self.say(id=asked["id"])


KINDS: dict[str, type[FakeGuest]] = {"ends": Ends, "shell": Shell}


def main() -> None:
    what, *words = sys.argv[1:]
    line = " ".join(words)
    paths = {name: Path(match[1]) for name, pattern in {
        "serial": r"-serial file:(\S+)", "monitor": r"-qmp unix:([^,]+)",
        "probe": r"id=channel,path=([^,]+)"}.items() if (match := re.search(pattern, line))}
    if what == "refuses":
        sys.exit("qemu-system-x86_64: -chardev: Failed to bind socket: Address already in use")
    serial = ["[    0.000000] Linux version 6.12.117-nvidia-gpu"]
    if what == "panics":
        serial += ["[    1.0] VFS: Cannot open root device \"/dev/vda1\" or unknown-block(254,1)",
                   "[    1.1] Kernel panic - not syncing: VFS: Unable to mount root fs"]
    paths["serial"].write_text("\n".join(serial) + "\n")
    if what == "panics":
        return
    FakeMonitor(paths["monitor"])
    guest = KINDS.get(what, FakeGuest)(paths["probe"], ready=what != "hangs")
    guest.tables.files |= FILES
    guest.tables.programs |= {
        "systemctl show": "ActiveState=active\nActiveEnterTimestampMonotonic=5000000\n",
        "uname -r": "6.12.117-nvidia-gpu\n", "uname -v": "#1 SMP\n", "--failed": ""}
    time.sleep(60)


main()
