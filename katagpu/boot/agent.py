"""Checks of kata-agent: it runs, and it answers the calls that Kata's runtime makes first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from katagpu.boot import kata_agent, ttrpc
from katagpu.boot.channel import Gone
from katagpu.boot.facts import Failed, Skipped
from katagpu.boot.session import Session
from katagpu.errors import StepError

NO_AGENT = "this image has no kata-agent"
ANSWER = 20.0  # seconds that the agent may take, started before the target under an emulator


def agent_runs(session: Session) -> list[str]:
    """kata-agent is there and starts."""
    if not session.facts.agent:
        raise Skipped(NO_AGENT)
    found = session.guest.run(["/usr/bin/kata-agent", "--version"])
    if found.status != 0:
        raise Failed(f"kata-agent --version ended with status {found.status}", found.said,
                     cause="it is of another architecture, or a library that it is linked to is "
                           "missing", cure="take the agent of a Kata release for x86_64 "
                           "(recipe: agent), which is static")
    return found.said


def agent_answers(session: Session) -> list[str]:
    """kata-agent answers over vsock, as Kata's runtime asks for it: Check."""
    with _called(session) as client:
        serving = kata_agent.check(client, timeout=ANSWER * session.guest.slow)
    if serving is not kata_agent.Serving.SERVING:
        raise Failed(f"the agent says {serving.name}", cause="it is not ready, or gave up",
                     cure="journalctl -u kata-agent in ./doitw boot_shell")
    return [f"{serving.name}, {session.link.how}"]


def agent_details(session: Session) -> list[str]:
    """kata-agent tells its version and features: GetGuestDetails."""
    with _called(session) as client:
        found = kata_agent.guest_details(client, timeout=ANSWER * session.guest.slow)
    if not found.version:
        raise Failed("the agent names no version", [found], cause="it is no agent of Kata's",
                     cure="recipe: agent")
    return [f"version {found.version}", f"init: {found.init_daemon}",
            f"storage: {' '.join(found.storage_handlers)}",
            f"devices: {' '.join(found.device_handlers)}",
            f"features: {' '.join(found.extra_features)}"]


@contextmanager
def _called(session: Session) -> Iterator[ttrpc.Client]:
    """A connection to the agent. What goes wrong on it is the check's failure."""
    if not session.facts.agent:
        raise Skipped(NO_AGENT)
    try:
        patience = ANSWER * session.guest.slow
        with session.link.connect(kata_agent.PORT, timeout=patience) as connection:
            yield ttrpc.Client(connection)
    except StepError as refusal:
        if isinstance(refusal, Gone):
            raise
        said = session.guest.run(["journalctl", "--no-pager", "--quiet", "-o", "cat", "-n", "10",
                                  "-u", "kata-agent.service"]).said
        raise Failed(f"the agent does not answer on port {kata_agent.PORT}: {refusal.what}", said,
                     cause="it did not start, or the kernel lacks VIRTIO_VSOCKETS: Kata's runtime "
                           "would wait for dial_timeout and give up",
                     cure="the agent's own lines above; kernel-configs: keep VIRTIO_VSOCKETS"
                     ) from None
