"""What `host check` says of Kata: its release, what its runtimes read, and whether that fits."""

from __future__ import annotations

from collections.abc import Iterator

from katagpu.errors import UserError
from katagpu.host import configure, katafiles, kataguest
from katagpu.host.katafiles import Effective, Target
from katagpu.host.kataguest import Guest
from katagpu.host.machine import Machine
from katagpu.host.verdict import Verdict, failed, passed, warned
from katagpu.kataconfig import LARGE_BAR
from katagpu.kataversions import OLDEST, Shim, parse

INSTALL = "https://github.com/kata-containers/kata-containers/releases, or kata-deploy"
CHECK = "katagpu host configure --check lists them, katagpu host configure mends them"


def versions(machine: Machine, *, large: bool) -> Iterator[Verdict]:
    """Kata is there, and new enough."""
    said = {katafiles.installed(machine, shim) for shim in Shim} - {None}
    if not said:
        yield failed("kata", "Kata Containers is not installed, or does not say its version",
                     INSTALL)
    for text, source in sorted(filter(None, said)):
        try:
            number = parse(text)
        except UserError as failure:
            yield failed("kata", f"{failure.what} ({source})", failure.hint or INSTALL)
            continue
        needed = LARGE_BAR if large else OLDEST
        if number < needed:
            yield failed("kata", f"{text} ({source}) is older than {needed}, which GPUs with large "
                         "BARs need", INSTALL)
        else:
            yield passed("kata", f"{text} ({source})")


def read(machine: Machine) -> tuple[list[Effective], list[Verdict]]:
    """What Kata's runtimes see, and what is to be said of the files that it is from."""
    found: list[Effective] = []
    said: list[Verdict] = []
    try:
        targets = [configure.in_use(machine, one) for one in katafiles.targets(machine)]
    except UserError as failure:
        return [], [failed("kata-config", failure.what, failure.hint or INSTALL)]
    for target in targets:
        try:
            effective = katafiles.effective(machine, target)
        except UserError as failure:
            said.append(failed("kata-config", failure.what, failure.hint or INSTALL))
            continue
        found.append(effective)
        said.append(passed("kata-config", _files(target, effective)))
        said += [failed("kata-config", what, cure) for what, cure in effective.problems]
    return found, said


def _files(target: Target, effective: Effective) -> str:
    names = ", ".join(path.rpartition("/")[2] for path in effective.files[1:])
    return f"{target.config}; " + (f"drop-ins: {names}" if names else "no drop-ins")


def fits(machine: Machine) -> Iterator[Verdict]:
    """What the runtimes see is what the installed guest needs: a line for each runtime."""
    name = "kata-guest"
    if not machine.names(kataguest.CURRENT):
        yield warned(name, "no guest of katagpu is installed",
                     "katagpu-install.pyz install … places kernel, image and drop-in")
        return
    try:
        guest, goals, _ = configure.plan(machine, configure.defaults())
    except UserError as failure:
        yield failed(name, failure.what, failure.hint or INSTALL)
        return
    for goal in goals:
        try:
            found = configure.differences(machine, goal)
        except UserError:
            continue  # a file that is none has its line already
        yield _fits(guest, goal, [difference.what for difference in found],
                    chosen=all(difference.origin == goal.path for difference in found))


def _fits(guest: Guest, goal: configure.Goal, found: list[str], *, chosen: bool) -> Verdict:
    """`chosen`: all that differs is what our own file says, maybe with options of its own."""
    runtime = f"Kata {goal.target.version} ({goal.target.shim})"
    if not found:
        return passed("kata-guest", f"{runtime} is configured for {guest.name}")
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return (warned if chosen else failed)(
        "kata-guest", f"{runtime} is not configured for {guest.name}: {found[0]}{more}", CHECK)
