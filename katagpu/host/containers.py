"""Programs that run a container with Kata: ctr, nerdctl, crictl, whichever is there."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from katagpu.errors import UserError
from katagpu.host.changes import Remove
from katagpu.host.machine import Machine
from katagpu.host.programs import Result, TooLong

PROGRAMS = ("ctr", "nerdctl", "crictl")
CLEANING = 30.0  # seconds
POLL = 1.0
RUN = "/run/katagpu-smoke"
BY_NAME = "io.containerd.kata.v2"  # nerdctl takes any other word for a program like runc
NOTES = {"nerdctl": "nerdctl cannot say which configuration Kata reads: it is that of Kata's "
                    "defaults (/etc/kata-containers/configuration.toml first)",
         "crictl": "crictl takes the runtime of that name at containerd (snippets containerd)"}


@dataclass(frozen=True)
class Job:
    """A container: its name, image, device, and what sh does in it."""

    name: str
    image: str
    device: str
    script: str
    shim: str  # the path of the runtime's shim
    config: str  # Kata's configuration file
    handler: str  # the runtime's name at containerd
    copy: str = ""  # a configuration to be used in its place, where the program can name one


def choose(machine: Machine, wanted: str | None) -> str:
    """The program. Raises `UserError` where there is none."""
    for name in [wanted] if wanted else PROGRAMS:
        if machine.programs.find(name):
            return name
    raise UserError(f"there is no {wanted or ', no '.join(PROGRAMS)} on this host",
                    hint="ctr comes with containerd")


def run(machine: Machine, program: str, job: Job, *, timeout: float) -> Result:
    """Run it to its end; nothing is left of it. Raises `TooLong`, and `UserError` before it runs.

    A status other than 0 is a result.
    """
    return {"ctr": _ctr, "nerdctl": _nerdctl, "crictl": _crictl}[program](machine, job, timeout)


def _do(machine: Machine, words: list[str], timeout: float) -> Result:
    """Run a program whose failure is an answer; print it in a dry run."""
    if machine.dry_run:
        return machine.run(words)
    return machine.ask(words, timeout=timeout)


@contextlib.contextmanager
def _afterwards(machine: Machine, *cleanings: list[str]) -> Iterator[None]:
    """Clean up after a container that did not end by itself."""
    try:
        yield
    except BaseException:
        for words in cleanings:
            with contextlib.suppress(UserError):
                machine.ask(words, timeout=CLEANING)
        raise


def _pull(machine: Machine, listing: list[str], pulling: list[str], image: str,
          timeout: float) -> Result | None:
    """Pull an image that is not there; the result where that failed."""
    if not machine.dry_run and image in _images(machine.ask(listing).out):
        return None
    said = _do(machine, pulling, timeout)
    return said if said.status else None


def _images(out: str) -> set[str]:
    """The names in a list of images: words, or crictl's JSON."""
    try:
        listed = json.loads(out)["images"]
        return {name for one in listed for key in ("repoTags", "repoDigests")
                for name in one.get(key) or ()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set(out.split())


@contextlib.contextmanager
def _files(machine: Machine, name: str, contents: Mapping[str, str]) -> Iterator[None]:
    """Files for one container, and nothing of it (its log neither) afterwards."""
    try:
        for path, text in contents.items():
            machine.place(path, text)
        yield
    finally:
        for path in (*contents, f"{RUN}/{name}.log"):
            if machine.dry_run and path in contents:
                machine.do(Remove(path))
            else:
                machine.remove(path)


def _ctr(machine: Machine, job: Job, timeout: float) -> Result:
    path = f"{RUN}/{job.name}.toml"
    with _files(machine, job.name, {path: job.copy} if job.copy else {}):
        return _ctr_run(machine, job, path if job.copy else job.config, timeout)


def _ctr_run(machine: Machine, job: Job, config: str, timeout: float) -> Result:
    failed = _pull(machine, ["ctr", "image", "ls", "-q"], ["ctr", "image", "pull", job.image],
                   job.image, timeout)
    if failed:
        return failed
    with _afterwards(machine, ["ctr", "task", "kill", "-s", "SIGKILL", job.name],
                     ["ctr", "task", "rm", "-f", job.name], ["ctr", "container", "rm", job.name]):
        return _do(machine, ["ctr", "run", "--rm", "--runtime", job.shim, "--runtime-config-path",
                             config, "--device", job.device, job.image, job.name, "sh", "-c",
                             job.script], timeout)


def _nerdctl(machine: Machine, job: Job, timeout: float) -> Result:
    with _afterwards(machine, ["nerdctl", "rm", "-f", job.name]):
        return _do(machine, ["nerdctl", "run", "--rm", "--name", job.name, "--runtime", BY_NAME,
                             "--device", job.device, job.image, "sh", "-c", job.script], timeout)


def _crictl(machine: Machine, job: Job, timeout: float,
            sleep: Callable[[float], None] = time.sleep) -> Result:
    pod = {"metadata": {"name": job.name, "namespace": "default", "uid": job.name, "attempt": 1},
           "log_directory": RUN, "linux": {}}
    container = {"metadata": {"name": job.name}, "image": {"image": job.image},
                 "command": ["sh", "-c", job.script], "log_path": f"{job.name}.log", "linux": {},
                 "devices": [{"host_path": job.device, "container_path": job.device,
                              "permissions": "rwm"}]}
    files = {f"{RUN}/pod.json": json.dumps(pod), f"{RUN}/container.json": json.dumps(container)}
    with _files(machine, job.name, files):
        return _pod(machine, job, list(files), timeout, sleep)


def _pod(machine: Machine, job: Job, files: list[str], timeout: float,
         sleep: Callable[[float], None]) -> Result:
    failed = _pull(machine, ["crictl", "images", "-o", "json"], ["crictl", "pull", job.image],
                   job.image, timeout)
    if failed:
        return failed
    started = _do(machine, ["crictl", "runp", "--runtime", job.handler, files[0]], timeout)
    if machine.dry_run:
        return _rest(machine, files)
    if started.status:
        return started
    pod = started.out.strip()
    try:
        made = machine.ask(["crictl", "create", pod, files[1], files[0]], timeout=timeout)
        if made.status:
            return made
        name = made.out.strip()
        begun = machine.ask(["crictl", "start", name], timeout=timeout)
        if begun.status:
            return begun
        until = time.monotonic() + timeout
        while _state(machine, name) != "CONTAINER_EXITED":
            if time.monotonic() > until:
                raise TooLong(f"the container did not end within {timeout:.0f} s",
                              hint="journalctl -t kata has the guest's messages")
            sleep(POLL)
        return machine.ask(["crictl", "logs", name])
    finally:
        for words in (["crictl", "stopp", pod], ["crictl", "rmp", "-f", pod]):
            with contextlib.suppress(UserError):
                machine.ask(words, timeout=CLEANING)


def _rest(machine: Machine, files: list[str]) -> Result:
    """What follows `runp` in a dry run: POD and CONTAINER are what crictl answers."""
    for words in (["create", "POD", files[1], files[0]], ["start", "CONTAINER"],
                  ["logs", "CONTAINER"], ["stopp", "POD"]):
        machine.run(["crictl", *words])
    return machine.run(["crictl", "rmp", "-f", "POD"])


def _state(machine: Machine, name: str) -> str:
    said = machine.ask(["crictl", "inspect", "-o", "json", name])
    try:
        return str(json.loads(said.out)["status"]["state"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"crictl inspect does not say how the container is: {said.said}") from None
