"""Checks of kata-agent, on a guest of words and a ttRPC server behind its port."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from katagpu.boot import agent, protobuf
from katagpu.boot.facts import Skipped
from katagpu.boot.session import Session

from .scripted import Scripted
from .test_system import failed
from .test_ttrpc import request, response

Make = Callable[..., Scripted]
Answer = Callable[[bytes], None]
DETAILS = protobuf.encode({
    1: 128 << 20, 2: protobuf.encode({1: "4.1.0", 2: True, 3: "blk", 4: "overlayfs"})})


@pytest.fixture
def answer(scripted: Make, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Scripted, Answer]]:
    """A guest whose agent answers the next call with these bytes."""
    monkeypatch.setattr(agent, "ANSWER", 0.5)
    found = scripted()
    found.tables.programs["journalctl.*kata-agent"] = "the agent's last words\n"
    with contextlib.ExitStack() as stack:
        def behave(payload: bytes) -> None:
            ours, theirs = socket.socketpair()
            found.agent.append(ours)

            def serve() -> None:
                with theirs:
                    stream, _fields = request(theirs)
                    theirs.sendall(response(stream, payload) if payload != b"broken" else payload)

            thread = threading.Thread(target=serve)
            thread.start()
            stack.callback(thread.join)

        yield found, behave


def test_runs(scripted: Make) -> None:
    found = scripted()
    found.tables.programs["^/usr/bin/kata-agent --version$"] = "kata-agent 4.1.0\n"
    assert agent.agent_runs(found.session) == ["kata-agent 4.1.0"]
    found.tables.programs["^/usr/bin/kata-agent --version$"] = (
        127, "", "error while loading shared libraries: libdevmapper.so.1.02.1\n")
    assert failed(agent.agent_runs, found.session, "ended with status 127").lines


@pytest.mark.parametrize("check", [agent.agent_runs, agent.agent_answers, agent.agent_details])
def test_an_image_without(scripted: Make, check: Callable[[Session], list[str]]) -> None:
    with pytest.raises(Skipped, match="no kata-agent"):
        check(scripted(agent=False).session)


def test_answers(answer: tuple[Scripted, Answer]) -> None:
    found, behave = answer
    behave(protobuf.encode({1: 1}))
    assert agent.agent_answers(found.session) == ["SERVING, a test"]


@pytest.mark.parametrize(("payload", "name"), [
    (b"", "UNKNOWN"), (protobuf.encode({1: 2}), "NOT_SERVING")])
def test_an_agent_that_does_not_serve(
    answer: tuple[Scripted, Answer], payload: bytes, name: str,
) -> None:
    found, behave = answer
    behave(payload)
    failed(agent.agent_answers, found.session, f"the agent says {name}")


def test_details(answer: tuple[Scripted, Answer]) -> None:
    found, behave = answer
    behave(DETAILS)
    assert agent.agent_details(found.session) == [
        "version 4.1.0", "init: True", "storage: overlayfs", "devices: blk", "features: "]


def test_no_version(answer: tuple[Scripted, Answer]) -> None:
    found, behave = answer
    behave(b"")
    assert failed(agent.agent_details, found.session, "no version").lines


@pytest.mark.parametrize("check", [agent.agent_answers, agent.agent_details])
def test_words_of_no_agent(
    answer: tuple[Scripted, Answer], check: Callable[[Session], list[str]],
) -> None:
    found, behave = answer
    behave(b"broken")
    refusal = failed(check, found.session, "does not answer on port 1024: .*broke")
    assert refusal.lines == ["the agent's last words"]


def test_nobody_listens(answer: tuple[Scripted, Answer]) -> None:
    refusal = failed(agent.agent_answers, answer[0].session, "nobody listens on 1024")
    assert refusal.lines == ["the agent's last words"] and "VIRTIO_VSOCKETS" in refusal.cure
