"""What Kata's agent says of itself: `Check` and `GetGuestDetails` over ttRPC.

Services, messages and field numbers are those of Kata Containers 4.1.0,
src/libs/protocols/protos/health.proto and agent.proto (the same since 2.0; `extra_features` is
newer). The agent listens on vsock port 1024 (src/agent/src/config.rs).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from katagpu.boot import protobuf
from katagpu.boot.ttrpc import Client
from katagpu.errors import StepError

PORT = 1024


class Serving(IntEnum):
    """HealthCheckResponse.ServingStatus."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2


@dataclass(frozen=True, kw_only=True)
class GuestDetails:
    """GuestDetailsResponse and its AgentDetails.

    `memory_block_bytes` is the unit of memory hot-plug, 0 where the guest has none.
    """

    memory_block_bytes: int
    memory_probe: bool
    version: str
    init_daemon: bool
    device_handlers: tuple[str, ...]
    storage_handlers: tuple[str, ...]
    supports_seccomp: bool
    extra_features: tuple[str, ...]


def check(client: Client, *, timeout: float) -> Serving:
    """grpc.Health/Check. Raises `StepError` and its kinds as `Client.call` does."""
    answer = protobuf.decode(client.call("grpc.Health", "Check", b"", timeout=timeout))
    status = protobuf.integer(answer, 1)
    try:
        return Serving(status)
    except ValueError:
        raise StepError(f"the agent's health is {status}, which is no known status") from None


def guest_details(client: Client, *, timeout: float) -> GuestDetails:
    """grpc.AgentService/GetGuestDetails. Raises `StepError` and its kinds as `Client.call` does."""
    request = protobuf.encode({1: True, 2: True})  # mem_block_size, mem_hotplug_probe
    answer = protobuf.decode(client.call(
        "grpc.AgentService", "GetGuestDetails", request, timeout=timeout))
    agent = protobuf.message(answer, 2)
    return GuestDetails(
        memory_block_bytes=protobuf.integer(answer, 1),
        memory_probe=bool(protobuf.integer(answer, 3)),
        version=protobuf.text(agent, 1),
        init_daemon=bool(protobuf.integer(agent, 2)),
        device_handlers=tuple(protobuf.strings(agent, 3)),
        storage_handlers=tuple(protobuf.strings(agent, 4)),
        supports_seccomp=bool(protobuf.integer(agent, 5)),
        extra_features=tuple(protobuf.strings(agent, 6)))
