"""What a run of NVIDIA's installer came to. Its exit status 0 is no proof.

The installer goes on after failures to copy a file or to run ldconfig, and says 0; so success is
exit status 0, both marks in the log, no ERROR, and then the modules themselves (`judge_modules`).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from katagpu import nvbranches, nvcauses
from katagpu.errors import KatagpuError, StepError, UserError
from katagpu.nvcauses import OURS, SPACE_CURE, Kind
from katagpu.schema import KernelModule

MARKS = ("Post-install sanity check passed.", "is now complete.")
SHOWN = 12  # lines of the log in an error
WIDTH = 240  # characters of a line in an error
# objtool complains of each function in NVIDIA's prebuilt object: tens of thousands of lines. The
# two warnings are there in every good run.
NOISE = re.compile(r"naked return|: warning: objtool: |^\s*(?:CC|LD|AR|CONFTEST:|SYMLINK) "
                   r"|You do not appear to have an NVIDIA GPU|You specified the '--no-kernel-mod")
_MATTERS = re.compile(r"^(?:ERROR|WARNING): |\(Answer: (?:Abort|Continue) installation"
                      r"|: (?:fatal )?error: |undefined!|^\S*make(?:\[\d+\])?: \*\*\*|No space left"
                      r"|GPL-only")
_ERROR = re.compile(r"^ERROR: (.*)$", re.MULTILINE)
_ABORT = re.compile(r"^-> (.*)\(Answer: Abort installation\.?\)\s*$", re.MULTILINE)
AGAIN = "remove the file and let it be fetched again; compare its SHA-256 with NVIDIA's"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A run that ended, or did not.

    `status` is the exit status (negative or 128 + n: signal n), None when the run was ended after
    `seconds`. `log` is the text of the installer's log, empty where it wrote none; `said` is what
    went to stdout and stderr.
    """

    status: int | None
    log: str
    said: str
    version: str
    release: str
    flavour: KernelModule
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What it came to: a sentence, the lines that matter, a cure. `mends`: the user can mend it."""

    kind: Kind
    sentence: str
    lines: tuple[str, ...] = ()
    cure: str | None = None
    mends: bool = False

    @property
    def ok(self) -> bool:
        """Is the driver installed, as far as status and log tell?"""
        return self.kind is Kind.INSTALLED

    def error(self) -> KatagpuError:
        """The error of a verdict that is not ok."""
        text = "\n".join([self.sentence, *(f"    {line}" for line in self.lines)])
        return (UserError if self.mends else StepError)(text, hint=self.cure)


def judge(outcome: Outcome) -> Verdict:
    """The class of an outcome, and what to do."""
    if outcome.status is None:
        return _hang(outcome)
    status = outcome.status if outcome.status >= 0 else 128 - outcome.status
    if status == 0:
        return _zero(outcome)
    if status == 1:
        return _failed(outcome)
    return _other(outcome, status)


def judge_modules(
    expected: Collection[str], built: Mapping[str, str], release: str,
) -> Verdict:
    """The modules that must be there: `built` has the vermagic of each, by name without `.ko`."""
    missing = [name for name in expected if name not in built]
    foreign = [f"{name}: {vermagic}" for name, vermagic in sorted(built.items())
               if vermagic.split(" ")[0] != release]
    if not built:
        return Verdict(kind=Kind.UNPROVEN, cure=OURS,
                       sentence="the installer reported success and left no kernel modules")
    if missing:
        return Verdict(kind=Kind.UNPROVEN, cure=OURS,
                       sentence=f"the installer left no {', '.join(missing)} among the modules")
    if foreign:
        return Verdict(kind=Kind.UNPROVEN, lines=tuple(foreign), cure=OURS,
                       sentence=f"modules are built for another kernel than {release}")
    return Verdict(kind=Kind.INSTALLED, sentence=f"{len(built)} modules for {release}")


def lines(text: str, count: int = SHOWN) -> tuple[str, ...]:
    """The lines of a log that matter: the first errors of the compiler, and the last of the rest.

    A compiler's first error makes the others; the installer's last question ends it.
    """
    kept: list[str] = []
    for line in text.splitlines():
        shown = line.strip()[:WIDTH]
        if _MATTERS.search(line.strip()) and not NOISE.search(line) and shown not in kept:
            kept.append(shown)
    if len(kept) <= count:
        return tuple(kept)
    return (*kept[:count // 2], f"… {len(kept) - count} more …", *kept[-(count - count // 2):])


def _facts(outcome: Outcome) -> dict[str, str]:
    return {"driver": outcome.version, "kernel": outcome.release, "flavour": str(outcome.flavour)}


def _quiet(outcome: Outcome) -> str:
    """Log and output, without the noise."""
    text = f"{outcome.log}\n{outcome.said}"
    return "\n".join(line for line in text.splitlines() if not NOISE.search(line))


def _explained(outcome: Outcome, text: str, prefix: str = "") -> Verdict | None:
    """The verdict by the first cause that the log shows."""
    found = nvcauses.find(text, _facts(outcome))
    if found is None:
        return None
    cause, what, cure = found
    known = nvbranches.limit(outcome.version, outcome.release, outcome.flavour)
    if cause.kind in (Kind.KERNEL, Kind.COMPILE) and known is not None:
        what += (f" (known: as far as {known.driver} the branch fails on "
                 f"{' and '.join(known.kernels)} and later; {known.source})")
    return Verdict(kind=cause.kind, sentence=f"{prefix}{what}", lines=lines(text), cure=cure,
                   mends=cause.mends)


def _zero(outcome: Outcome) -> Verdict:
    text = _quiet(outcome)
    errors = _ERROR.findall(text)
    if errors:
        prefix = "the installer ended with status 0 in spite of errors: "
        found = _explained(outcome, text, prefix)
        return found or Verdict(kind=Kind.ERRORS, sentence=f"{prefix}{errors[0][:WIDTH]}",
                                lines=lines(text), cure=OURS)
    missing = [mark for mark in MARKS if mark not in outcome.log]
    if not missing:
        return Verdict(kind=Kind.INSTALLED,
                       sentence=f"driver {outcome.version} is installed for {outcome.release}")
    if not outcome.log.strip():
        return Verdict(kind=Kind.UNPROVEN, lines=lines(text), cure=SPACE_CURE, mends=True,
                       sentence="the installer ended with status 0 and wrote no log, so nothing "
                                "proves that the driver is installed")
    if "Post-install sanity check failed." in outcome.log:
        return Verdict(kind=Kind.ERRORS, lines=lines(text), cure=OURS,
                       sentence="the installer ended with status 0, but its own check of the "
                                "installed files failed")
    return Verdict(kind=Kind.UNPROVEN, lines=(*lines(text), *_tail(outcome.log)), mends=True,
                   sentence="the installer ended with status 0, but its log breaks off: it lacks "
                            + " and ".join(f"'{mark}'" for mark in missing), cure=SPACE_CURE)


def _failed(outcome: Outcome) -> Verdict:
    text = _quiet(outcome)
    found = _explained(outcome, text)
    if found is not None:
        return found
    aborts = _ABORT.findall(text)
    if aborts:
        return Verdict(kind=Kind.ABORTED, lines=lines(text), cure=OURS,
                       sentence="the installer asked a question whose default answer is to abort: "
                                f"{aborts[-1].strip()[:WIDTH]}")
    errors = [error for error in _ERROR.findall(text) if "Installation has failed" not in error]
    return Verdict(kind=Kind.UNKNOWN, lines=lines(text) or _tail(text), cure=OURS,
                   sentence="the installer failed: " + (errors[0][:WIDTH] if errors else
                                                        "it did not say why"))


def _hang(outcome: Outcome) -> Verdict:
    return Verdict(kind=Kind.HANG, lines=_tail(outcome.log) or _tail(_quiet(outcome)),
                   sentence=f"the installer did not end within {outcome.seconds:.0f} s and was "
                            "ended, with all that it had started",
                   cure="the last lines of its log say what it was doing; a machine that is only "
                        "slow needs fewer builds at once")


def _other(outcome: Outcome, status: int) -> Verdict:
    """Statuses that are not the installer's own 0 and 1: its signals, and the .run's script."""
    text = _quiet(outcome)
    shown = lines(text) or _tail(text)
    if status == 2:
        return Verdict(kind=Kind.ARCHIVE, lines=shown, mends=True, cure=AGAIN,
                       sentence="the .run is damaged: a checksum is not what its header says")
    if status == 15:
        return Verdict(kind=Kind.UNPACK, lines=shown, mends=True, cure=SPACE_CURE,
                       sentence="the .run could not be unpacked: disk full, or damaged")
    if status in (126, 127):
        return Verdict(kind=Kind.START, lines=shown, cure=AGAIN, mends=True,
                       sentence="the installer could not be started: it is not in the package, "
                                "not executable, or of another architecture")
    if status == 128 + signal.SIGBUS:
        return Verdict(kind=Kind.SPACE, lines=shown, mends=True, cure=SPACE_CURE,
                       sentence="the disk was full while the driver's files were copied (SIGBUS: "
                                "the installer writes through a mapping)")
    if status == 128 + signal.SIGTERM:
        return Verdict(kind=Kind.UNPACK, lines=shown, mends=True, cure=SPACE_CURE,
                       sentence="ended by SIGTERM: a .run does that to itself when unpacking "
                                "fails (disk full, or damaged); else something sent it")
    if status == 128 + signal.SIGKILL:
        return Verdict(kind=Kind.MEMORY, lines=shown, mends=True,
                       sentence="the installer was killed (SIGKILL), as the kernel does when there "
                                "is no memory left",
                       cure="give the machine more memory, or fewer jobs at once")
    name = _signal(status)
    if name is not None:
        return Verdict(kind=Kind.SIGNAL, lines=shown, cure=OURS,
                       sentence=f"the installer was ended by {name}")
    return Verdict(kind=Kind.UNKNOWN, lines=shown, cure=OURS,
                   sentence=f"the installer ended with status {status}, which it never does")


def _signal(status: int) -> str | None:
    try:
        return signal.Signals(status - 128).name
    except ValueError:
        return None


def _tail(text: str, count: int = 5) -> tuple[str, ...]:
    found = [line.strip()[:WIDTH] for line in text.splitlines() if line.strip()]
    return tuple(found[-count:])
