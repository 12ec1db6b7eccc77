"""The parameters of the command line (`recipe=NAME`): which there are, who reads them, values.

Paths among them are those of who types them: `doitw` changes into the repository, and says in
KATAGPU_CALLER where it was called.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from katagpu.errors import UserError

CALLER = "KATAGPU_CALLER"


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter as help shows it: `name=value`, and what it does. A value 0 or 1 is a flag."""

    name: str
    value: str
    what: str


GUEST = (
    Parameter(name="recipe", value="NAME", what="the guest of recipes/NAME.yaml (debian-trixie)"),
    Parameter(name="driver", value="VERSION",
              what="with another driver; driver=all: with each that the recipe lists"),
)
"""What every task admits: each run loads the guest that they choose."""
BUILD = (*GUEST, Parameter(
    name="ccache", value="0", what="compile without ccache, also what went through it before"))
PREFIX = Parameter(name="prefix", value="/", what="the root directory of the host")
TASKS: Mapping[str, tuple[Parameter, ...]] = {
    **dict.fromkeys(("build_kernel", "build_headers", "build_rootfs", "install_driver",
                     "install_toolkit", "build_initrd", "build_image", "boot_check", "boot_shell",
                     "why", "fetch"), BUILD),
    **dict.fromkeys(("setup", "lint", "fmt", "host", "cache", "cache:list", "cache:verify",
                     "cache:gc"), ()),
    "lock": (
        *GUEST,
        Parameter(name="update", value="PART", what=(
            "move these parts only (driver, kernel, base, toolkit, tools, agent …, with commas)")),
        Parameter(name="draft", value="1", what="resolve under out/, and not to be committed")),
    "diff": (GUEST[0],
             Parameter(name="all", value="1", what="all of each list"),
             Parameter(name="json", value="1", what="all of it as JSON")),
    "test": (Parameter(name="all", value="1", what="the long tests too"),),
    "bench": (*BUILD, Parameter(name="all", value="1",
                                what="also what has to be built; the kernel four times")),
    "reproduce": (
        *GUEST,
        Parameter(name="place", value="DIRECTORY", what="build there instead of in the store"),
        Parameter(name="diffoscope", value="PROGRAM", what="what shows where files differ")),
    "release": (
        GUEST[0],
        Parameter(name="version", value="X.Y.Z", what="the release's version"),
        Parameter(name="key", value="PRIVATE.pem", what="sign with this key (Ed25519, P-256)"),
        Parameter(name="signer", value='"COMMAND"',
                  what="sign with a command: bytes on stdin, the raw signature on stdout"),
        Parameter(name="unsigned", value="1", what="sign nothing"),
        Parameter(name="no_agent", value="1", what="release a guest without kata-agent")),
    "publish": (
        GUEST[0],
        Parameter(name="to", value="oci://REGISTRY/REPOSITORY:TAG",
                  what="where to; or to=DIRECTORY"),
        Parameter(name="version", value="X.Y.Z", what="another release than the latest"),
        Parameter(name="licensed", value="1",
                  what="only licensees can read that registry (vGPU software)")),
    "install": (
        Parameter(name="from", value="RELEASE",
                  what="a release's directory, or oci://REGISTRY/REPOSITORY:TAG"),
        Parameter(name="key", value="PUBLIC.pem", what="the public key of who signed it"),
        Parameter(name="unverified", value="1", what="install whatever is there, without a key"),
        PREFIX),
    "uninstall": (PREFIX,),
}
"""The public tasks, and what each takes."""
ALL: Mapping[str, Parameter] = {
    one.name: one for taken in TASKS.values() for one in taken}
FLAGS = frozenset(name for name, one in ALL.items() if one.value in ("0", "1"))
OF_THE_ENVIRONMENT = ("EXTRA_PKGS", "KATAGPU_")


def flag(values: Mapping[str, str], name: str, *, default: bool = False) -> bool:
    """Is a flag set? Raises `UserError` for what is neither 0 nor 1: `no` must not mean yes."""
    assert name in FLAGS, name
    given = values.get(name)
    if given not in (None, "0", "1"):
        raise UserError(f"{name}={given}: this is neither 0 nor 1", hint=f"{name}=1, or {name}=0")
    return default if given is None else given == "1"


def check(values: Mapping[str, str]) -> None:
    """Are these parameters, and flags set or not? Raises `UserError`."""
    for name, value in sorted(values.items()):
        if name.startswith(OF_THE_ENVIRONMENT):
            raise UserError(f"{name} is no parameter but a variable of the environment",
                            hint=f'it goes in front: {name}="{value}" ./doitw …')
        if name not in ALL:
            from katagpu.yamlfile import nearest

            raise UserError(f"unknown parameter {name}=", hint=nearest(name.lower(), ALL))
        if name in FLAGS:
            flag(values, name)


def unread(values: Mapping[str, str], tasks: Iterable[str]) -> UserError | None:
    """Why a parameter does not go with these tasks, of which none reads it; None where all do."""
    asked = list(tasks)
    read = {one.name for taken in (GUEST, *(TASKS[task] for task in asked)) for one in taken}
    for name in sorted(set(values) & set(ALL) - read):
        readers = [task for task, own in TASKS.items() if name in {one.name for one in own}]
        return UserError(f"{name}= is no parameter of {' or '.join(asked)}",
                         hint=f"leave it out; it is one of {', '.join(readers)}")
    return None


def caller() -> Path:
    """The directory in which the command line was typed."""
    return Path(os.environ.get(CALLER) or Path.cwd())


def path(text: str, start: Path | None = None) -> Path:
    """A path of the command line, by default from where it was typed. `~`: dash and zsh keep it."""
    given = Path(text)
    try:
        given = given.expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no such user", hint="write the path whole") from None
    return ((caller() if start is None else start) / given).absolute()


def place(text: str) -> str:
    """A path of the command line as `path` has it, or an address as it is."""
    return text if text.startswith("oci:") or "://" in text else str(path(text))


def program(text: str) -> str:
    """A program of the command line: by name, or by a path as `path` has it."""
    return str(path(text)) if "/" in text else text
