"""Checks for what a build leaves behind: dangling links, caches, build trees.

Set-uid programs are not looked for: containers have a root of their own, and nobody logs in to the
guest.
"""

from __future__ import annotations

from collections.abc import Iterator

from katagpu.check.context import Guest
from katagpu.check.facts import Fault, Severity
from katagpu.check.linker import DEFAULT_DIRECTORIES

CACHES = ("/var/cache/apt", "/var/lib/apt/lists", "/var/cache/dnf", "/root/.cache", "/tmp",
          "/var/tmp", "/usr/src", "/var/log")
WORTH_A_WORD = 1_000_000


def dangling_libraries(guest: Guest) -> Iterator[Fault]:
    """No link in a library directory leads nowhere: to a program it is a missing library."""
    root = guest.root
    directories = {root.resolve(directory)
                   for directory in (*guest.linker.configured, *DEFAULT_DIRECTORIES,
                                     *guest.linker.library_path())}
    for path in root.links:
        directory, _, name = path.rpartition("/")
        if directory in directories and ".so" in name and root.resolve(path) is None:
            # libfoo.so is for linking, libfoo.so.1 for running.
            for_running = not name.endswith(".so") or name.startswith(("libcuda", "libnvidia"))
            yield Fault(what=f"this link to {root.link_target(path)} leads nowhere", where=path,
                        cure="add the library it leads to, or remove the link",
                        severity=Severity.ERROR if for_running else Severity.WARNING)


def build_links(guest: Guest) -> Iterator[Fault]:
    """No link names a place that only the build had, such as /lib/modules/<release>/build."""
    tops = {f"/{name}" for name in guest.root.names("/")} - {"/tmp", "/home", "/root", "/mnt"}
    for path in guest.root.links:
        target = guest.root.link_target(path) or ""
        top = "/" + target.lstrip("/").partition("/")[0]
        modules = path.startswith(("/lib/modules/", "/usr/lib/modules/"))
        if guest.root.resolve(path) is None and (
                modules or (target.startswith("/") and top not in tops)):
            yield Fault(what=f"this link leads to {target}, which the guest does not have",
                        where=path, cure="remove the link", severity=Severity.WARNING)


def caches(guest: Guest) -> Iterator[Fault]:
    """No cache, log or source tree of a build step is shipped."""
    for directory in CACHES:
        size = 0
        for path in guest.root.below(directory):
            size += guest.root.host(path).stat().st_size
        if size >= WORTH_A_WORD:
            yield Fault(what=f"{size / 1e6:.1f} MB that the guest does not need", where=directory,
                        cure="empty this directory before the image is packed",
                        severity=Severity.WARNING)
