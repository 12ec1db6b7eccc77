"""Two builds of one guest that differ in all that must not matter: what, and how each is started.

Linux has no namespace of the wall clock. The second build starts later, its uptime is another, and
the two time zones are 26 hours apart: their calendars never show the same day.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from katagpu import sandbox
from katagpu.run import run

LEFT_OUT = ("out", ".git", ".venv", ".venv.lock", ".*_cache", "__pycache__")
"""What a copy of the repository does not have."""
TOKEN = ".tok"  # a secret, of which no stage makes anything (katagpu.embed)
NAMES = ("first", "second")
PLACES = ("first", "the.second/build_elsewhere")
ZONES = ("UTC+12", "UTC-14")  # POSIX: hours west of Greenwich
UMASKS = (0o022, 0o077)
SETTING = "LC_", "LANG", "TZ", "KATAGPU_"  # beginnings of variables that are set here
LOCALE = "tr_TR.UTF-8"  # where the host has no other; its letters change case in their own way
UPTIME = 400 * 24 * 3600  # seconds that the second build's uptime is ahead
DISTURBING = {
    "CFLAGS": "-O1 -g3", "KCFLAGS": "-DELSEWHERE", "LDFLAGS": "--build-id=none", "MAKEFLAGS": "-k",
    "KBUILD_BUILD_USER": "somebody", "KBUILD_BUILD_HOST": "elsewhere", "SOURCE_DATE_EPOCH": "86400",
    "DEB_BUILD_OPTIONS": "nostrip", "GOFLAGS": "-mod=mod", "TAR_OPTIONS": "--mtime=@0",
    "XZ_OPT": "-0", "ZSTD_CLEVEL": "1", "USER": "somebody", "LOGNAME": "somebody", "COLUMNS": "41"}
"""What builds listen to where their environment is not a clean one."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two builds. `user` is whom it runs as, where not as us."""

    name: str
    place: Path
    umask: int
    ccache: bool
    environment: Mapping[str, str]
    prefix: Sequence[str] = ()
    user: str | None = None

    @property
    def tree(self) -> Path:
        """Its copy of the repository."""
        return self.place / "repository"

    @property
    def store(self) -> Path:
        """Its own store."""
        return self.place / "store"

    def argv(self, *words: str) -> list[str]:
        """The command line of its build."""
        return [*self.prefix, sys.executable, "-m", "katagpu",
                f"ccache={int(self.ccache)}", *words]


@dataclass
class Variation:
    """The two builds; by name what differs between them, and why something does not."""

    sides: tuple[Side, Side]
    varied: dict[str, tuple[str, str]] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)


def variation(scratch: Path, environment: Mapping[str, str],
              reads: Sequence[Path] = ()) -> Variation:
    """The builds below `scratch`, with as much of a difference as this host allows.

    `reads` are files outside of the repository that a build must be able to read.
    """
    places = [scratch / name for name in PLACES]
    varied = {"directory": PLACES, "time zone": ZONES,
              "umask": (f"{UMASKS[0]:03o}", f"{UMASKS[1]:03o}"), "ccache": ("off", "on")}
    same: dict[str, str] = {}
    settings: list[dict[str, str]] = [
        {"TZ": zone, "KATAGPU_STORE": str(place / "store"), "PYTHONHASHSEED": str(number)}
        for number, (zone, place) in enumerate(zip(ZONES, places, strict=True), 1)]
    settings[0]["LANG"] = "C.UTF-8"
    settings[1] |= {"LANG": _locale(), "LC_ALL": _locale(), "HOME": str(places[1] / "home"),
                    **DISTURBING}
    varied["locale"] = ("C.UTF-8", _locale())
    varied["environment"] = ("as here", f"{len(DISTURBING)} variables that builds listen to")
    _processors(settings, varied)
    user = _user(scratch, varied, same, reads)
    prefix = [*_namespaces(varied, same), *_fewer(varied, same), *_become(user)]
    kept = {name: value for name, value in environment.items() if not name.startswith(SETTING)}
    first, second = (
        Side(name=NAMES[number], place=places[number], umask=UMASKS[number], ccache=number == 1,
             environment={**kept, **settings[number]}, prefix=prefix if number else (),
             user=user if number else None)
        for number in (0, 1))
    return Variation((first, second), varied, same)


def _locale() -> str:
    """A locale of this host that is not the C locale, or one that it does not have."""
    if shutil.which("locale") is None:
        return LOCALE
    there = run(["locale", "-a"], capture=True, check=False).stdout.decode(errors="replace").split()
    return next((name for name in there if not name.startswith(("C", "POSIX", "en_"))), LOCALE)


def _processors(settings: list[dict[str, str]], varied: dict[str, tuple[str, str]]) -> None:
    count = len(os.sched_getaffinity(0))
    for number, jobs in enumerate((count, count + 1)):
        settings[number]["KATAGPU_JOBS"] = str(jobs)
    varied["jobs"] = (f"-j{count}", f"-j{count + 1}")


def _namespaces(varied: dict[str, tuple[str, str]], same: dict[str, str]) -> list[str]:
    """What gives the second build another host name and uptime, as far as that works here."""
    if sandbox.rootless():
        same["host name"] = same["uptime"] = "only root can have another without a user namespace"
        return []
    found = []
    for name, options, values in (
            ("host name", ["--uts"], (socket.gethostname(), "elsewhere.example")),
            ("uptime", ["--time", f"--boottime={UPTIME}", f"--monotonic={UPTIME}"],
             ("this host's", f"{UPTIME // 86400} days more"))):
        if run(["unshare", *options, "true"], check=False).status == 0:
            found += options
            varied[name] = values
        else:
            same[name] = "the kernel or the container refuses another one"
    if "host name" not in varied:
        return ["unshare", "--fork", *found] if found else []
    return ["unshare", "--fork", "--kill-child=TERM", *found, "sh", "-c",
            'echo "$0" >/proc/sys/kernel/hostname && exec "$@"', varied["host name"][1]]


def _fewer(varied: dict[str, tuple[str, str]], same: dict[str, str]) -> list[str]:
    """One processor less for the second build, where that does not halve its speed."""
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 4 or shutil.which("taskset") is None:
        same["processors"] = "with less than four, one build would take twice the time"
        return []
    varied["processors"] = (str(len(mine)), str(len(mine) - 1))
    return ["taskset", "--cpu-list", ",".join(map(str, mine[:-1]))]


def _user(scratch: Path, varied: dict[str, tuple[str, str]], same: dict[str, str],
          reads: Sequence[Path]) -> str | None:
    """An ordinary user with subordinate ids, as whom root can run the second build rootless."""
    if sandbox.rootless():
        same["user"] = "only root can build as another user"
        return None
    names = [line.split(":")[0] for path in sandbox.SUBORDINATE[:1] if path.exists()
             for line in path.read_text().splitlines()]
    why = "no user here has subordinate ids (/etc/subuid) for a rootless build"
    for name in names:
        try:
            if pwd.getpwnam(name).pw_uid == 0:
                continue
        except KeyError:
            continue
        tries = [
            (["test", "-x", str(scratch)], f"{name} cannot enter {scratch}: give place=DIRECTORY"),
            ([sys.executable, "-c", "import doit"], f"{name} cannot run {sys.executable}"),
            (["unshare", "--user", "--map-auto", "--map-root-user", "true"],
             f"{name} cannot open a user namespace"),
            *((["test", "-r", str(path)], f"{name} cannot read {path}") for path in reads)]
        for argv, refusal in tries:
            # by way of a shell: setpriv itself still has root's rights when it starts a program
            if run([*_become(name), "sh", "-c", 'exec "$@"', "sh", *argv],
                   check=False).status != 0:
                why = refusal
                break
        else:
            varied["user"] = ("root", f"{name}, rootless")
            return name
    same["user"] = why
    return None


def _become(user: str | None) -> list[str]:
    if user is None:
        return []
    found = pwd.getpwnam(user)
    return ["setpriv", f"--reuid={found.pw_uid}", f"--regid={found.pw_gid}", "--init-groups", "--"]


def copy(root: Path, target: Path) -> None:
    """Copy the repository without what builds leave in it; of a client token the name alone."""
    def one(source: str, copied: str) -> str:
        if source.endswith(TOKEN):
            Path(copied).touch()
            return copied
        return str(shutil.copy2(source, copied))

    shutil.copytree(root, target, symlinks=True, copy_function=one,
                    ignore=shutil.ignore_patterns(*LEFT_OUT))


def lay(root: Path, side: Side, locks: Sequence[Path]) -> None:
    """The copy of the repository that a build has, with modes as its umask leaves them."""
    side.place.mkdir(parents=True)
    side.place.chmod(0o755)
    copy(root, side.tree)
    for lock in locks:
        place = side.tree / lock.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(lock, place)
    for path in (side.tree, *side.tree.rglob("*")):
        if not path.is_symlink():
            full = 0o777 if path.is_dir() or path.stat().st_mode & 0o100 else 0o666
            path.chmod(full & ~side.umask)
    (side.place / "home").mkdir()


def give(side: Side) -> None:
    """Let all of it belong to the user as whom it is built."""
    if side.user is not None:
        found = pwd.getpwnam(side.user)
        for path in (side.place, *side.place.rglob("*")):
            os.chown(path, found.pw_uid, grp.getgrgid(found.pw_gid).gr_gid, follow_symlinks=False)
