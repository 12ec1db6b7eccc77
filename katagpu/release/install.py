"""Install a release on a host that runs Kata, go back to the one before, remove all of it.

A kill at any moment leaves each of Kata's runtimes with one whole release, the old or the new one;
the next run completes what was begun, or sweeps it away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from katagpu import log
from katagpu.errors import UserError
from katagpu.release import layout, placed, source
from katagpu.release.host import CONFIG, DROP_INS, PLACE, Host
from katagpu.release.layout import Release
from katagpu.release.placement import Placement


def install(text: str, host: Host, *, key: Path | None, unverified: bool = False) -> None:
    """Install the release that `text` names, verified by a public key.

    Without one only with `unverified`. Raises `UserError`; nothing is changed then.
    """
    if key is None and not unverified:
        raise UserError(f"by whom is {text} signed? No public key is given",
                        hint="key=PUBLIC.pem (--key), from a place other than the release's; or "
                             "unverified=1 (--unverified), which trusts what comes")
    origin = source.open_source(text)
    found = source.verified(origin, None if unverified else key)
    if not found.signed:
        log.warn(f"{text}: the signature is not verified, as was asked for")
    with host.alone():
        recover(host)
        try:
            placement = Placement(found, host, origin)
            _must_be_ours(host, placement.drop_ins.values())
            placement.fill()
        except (UserError, OSError):
            host.sweep()
            host.remove_directories()
            raise
        _compare(host.target("current"), found.release)
        switch(host, found.release.id)
    log.say(f"installed: {found.release.id} in {host.home}")


def _compare(current: str | None, release: Release) -> None:
    """Say what may not have been meant: a lower version than the current one, another recipe."""
    if current is None or current == release.id:
        return
    version = current.removeprefix(f"{release.recipe}-")
    if not layout.VERSION.fullmatch(version):
        log.note(f"{release.id} takes the place of {current}, which is of another recipe")
    elif layout.order(release.version) < layout.order(version):
        log.note(f"{release.id} is older than {current}, which was installed")


def rollback(host: Host) -> None:
    """Go back to the release before this one; done twice, it is this one again."""
    _must_have_some(host)
    with host.alone():
        recover(host)
        previous = host.target("previous")
        if previous is None or previous not in host.releases():
            raise UserError("there is no release to go back to",
                            hint="install keeps one, the release before")
        _must_be_whole(host, previous)
        switch(host, previous)
    log.say(f"rolled back to {previous}")


def uninstall(host: Host) -> None:
    """Remove all that was installed: Kata's runtimes first, files last."""
    if host.home.exists() or any(_is_of(host, name) for name in DROP_INS):
        with host.alone():
            for name in DROP_INS:
                if not _is_of(host, name):
                    if host.drop_in(name).exists():
                        log.warn(f"{host.drop_in(name)} names nothing of ours, and stays")
                    continue
                if not _is_ours(host, name):
                    log.warn(f"{host.drop_in(name)} was changed since; it is removed")
                host.remove(host.drop_in(name))
            for link in ("next", "current", "previous"):
                host.remove(host.home / link)
            for release in host.releases():
                host.drop(release)
            host.sweep()
            host.remove_directories()
        log.say(f"uninstalled from {host.prefix}")
    else:
        log.say(f"nothing is installed in {host.prefix}")


def status(host: Host) -> Iterator[str]:
    """What is installed, and whether its files still are what they were."""
    current = host.target("current")
    pending = host.target("next")
    if pending is not None:
        yield f"interrupted: the switch to {pending}; install or rollback completes it"
    if current is None:
        yield f"nothing is installed in {host.prefix}" if pending is None else "current: none"
        return
    yield f"current: {current} ({_health(host, current)})"
    previous = host.target("previous")
    if previous is not None:
        yield f"previous: {previous} ({_health(host, previous)})"
    for name in DROP_INS:
        try:
            same = host.drop_in(name).read_bytes() == _config(host, current, name)
            state = "as it was placed" if same else "not that of this release"
        except FileNotFoundError:
            state = "missing"
        yield f"drop-in: {host.drop_in(name)} ({state})"


def recover(host: Host) -> None:
    """Complete, or sweep away, what an interrupted run left."""
    host.sweep()
    pending = host.target("next")
    if pending is None:
        return
    wrong = list(placed.damaged(host.home / pending))
    if not wrong:
        log.note(f"an earlier run was interrupted: the switch to {pending} is completed")
        _complete(host, pending)
        return
    if pending in host.releases():
        log.warn(f"an earlier run was interrupted, and the switch to {pending} is not completed: "
                 f"damaged are {', '.join(wrong)}")
    host.remove(host.home / "next")


def switch(host: Host, release: str) -> None:
    """Let the runtimes use a release that is complete. Raises `UserError` before any change."""
    _must_be_ours(host)
    host.link("next", release)
    try:
        _use(host, release)
    except (OSError, UserError):
        if not any(_config(host, release, name) == host.content(name) is not None
                   for name in DROP_INS):
            host.remove(host.home / "next")  # no runtime uses it: there is nothing to complete
        raise
    _complete(host, release)


def _use(host: Host, release: str) -> None:
    """Let all runtimes use a release, or leave them what they use. Raises `OSError`.

    Raises `UserError` where the release has lost its drop-ins: each has one at least.
    """
    wanted = {name: _config(host, release, name) for name in DROP_INS}
    if not any(wanted.values()):
        raise UserError(f"{release} is damaged: it has no drop-in for Kata any more",
                        hint="install it again")
    host.place(wanted)


def _complete(host: Host, release: str) -> None:
    """The switch, from any state that a kill may leave it in."""
    _use(host, release)
    current = host.target("current")
    if current != release:
        if current is not None:
            host.link("previous", current)
        host.link("current", release)
    host.remove(host.home / "next")
    kept = {release, host.target("previous")}
    for other in host.releases():
        if other not in kept:
            host.drop(other)


def _config(host: Host, release: str, name: str) -> bytes | None:
    try:
        return (host.home / release / CONFIG / name).read_bytes()
    except FileNotFoundError:
        return None


def _is_ours(host: Host, name: str) -> bool:
    """Is a drop-in that of a release that is here?"""
    found = host.drop_in(name).read_bytes()
    return any(placed.is_drop_in(host.home / release, name, found) for release in host.releases())


def _is_of(host: Host, name: str) -> bool:
    """Does a drop-in name releases that are installed here, whoever changed it?"""
    path = host.drop_in(name)
    return path.exists() and f"{PLACE}/{host.home.name}/".encode() in path.read_bytes()


def _must_be_ours(host: Host, coming: Collection[bytes] = ()) -> None:
    """Raise `UserError` where a drop-in is not one that was placed here, or is being placed."""
    for name in DROP_INS:
        found = host.content(name)
        if found is not None and found not in coming and not _is_ours(host, name):
            raise UserError(f"{host.drop_in(name)} is not as it was placed here",
                            hint="move it away; settings of your own belong into a file beside it, "
                                 "60-mine.toml, which Kata reads after it")


def _must_have_some(host: Host) -> None:
    if not host.home.is_dir():
        raise UserError(f"nothing is installed in {host.prefix}")


def _health(host: Host, release: str) -> str:
    wrong = list(placed.damaged(host.home / release))
    return f"damaged: {', '.join(wrong)}" if wrong else "intact"


def _must_be_whole(host: Host, release: str) -> None:
    wrong = list(placed.damaged(host.home / release))
    if wrong:
        raise UserError(f"{release} is damaged: {', '.join(wrong)}", hint="install it again")
