"""What one vfio-user client asks, and the answers: versions, regions, interrupts, DMA ranges.

Source: see `vfiowire`. The function does no DMA and raises no interrupt, so file descriptors of
the guest's memory are closed at once, and eventfds are kept only until they are taken back.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Callable
from typing import Any

from katagpu.boot.pcifunction import Device, OutOfRange
from katagpu.boot.trail import Trail
from katagpu.boot.vfiowire import (
    IRQS,
    MAX_FDS,
    MAX_TRANSFER,
    REGIONS,
    Command,
    Malformed,
    Message,
    close_all,
)

MAJOR, MINOR = 0, 0
MAX_MAPS = 4096  # a guest has some ten; each new one is compared with all
MAP, UNMAP = struct.Struct("=IIQQQ"), struct.Struct("=IIQQ")
INFO, REGION, IRQ = struct.Struct("=IIII"), struct.Struct("=IIIIQQ"), struct.Struct("=IIII")
IRQ_SET, TRANSFER = struct.Struct("=IIIII"), struct.Struct("=QII")

UNMAP_ALL = 0x2
RESETS_AND_IS_PCI, READ_WRITE = 0x3, 0x3
INTX, MSI, MSIX, ERR, REQ = range(IRQS)
EVENTFD, MASKABLE_AUTOMASKED, NORESIZE = 0x1, 0x6, 0x8
DATA_NONE, DATA_BOOL, DATA_EVENTFD, ACTIONS = 0x01, 0x02, 0x04, 0x38
ACTION_TRIGGER = 0x20


class Refused(Exception):
    """A command that is answered by an error; the connection goes on."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number


class Session:
    """A connection's state: version agreed, DMA ranges, eventfds. The function outlives it."""

    def __init__(self, device: Device, trail: Trail) -> None:
        self.device = device
        self.trail = trail
        self._agreed = False
        self._maps: dict[int, int] = {}
        self._eventfds: dict[tuple[int, int, int], int] = {}
        self._answers: dict[int, Callable[[Message], bytes]] = {
            Command.VERSION: self._version,
            Command.DMA_MAP: self._map,
            Command.DMA_UNMAP: self._unmap,
            Command.GET_INFO: self._info,
            Command.GET_REGION_INFO: self._region_info,
            Command.GET_IRQ_INFO: self._irq_info,
            Command.SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._read,
            Command.REGION_WRITE: self._write,
            Command.RESET: self._reset,
        }

    def close(self) -> None:
        """Forget the client: its ranges and its eventfds."""
        self._maps.clear()
        close_all(list(self._eventfds.values()))
        self._eventfds.clear()

    def answer(self, message: Message) -> bytes:
        """The payload of the reply. Raises `Refused` and `Malformed`."""
        if not self._agreed and message.command != Command.VERSION:
            raise Malformed(f"command {message.command} before a version was agreed")
        handle = self._answers.get(message.command)
        if handle is None:
            raise Refused(errno.ENOTSUP, f"command {message.command} is not supported")
        return handle(message)

    def _version(self, message: Message) -> bytes:
        if self._agreed:
            raise Refused(errno.EINVAL, "a second version message")
        if len(message.payload) < 4:
            raise Malformed("a version message without a version")
        major, minor = struct.unpack_from("=HH", message.payload)
        if major != MAJOR:
            raise Malformed(f"protocol version {major}.{minor}; only {MAJOR}.x is served")
        offered = _capabilities(message.payload[4:])
        ours = {"max_msg_fds": MAX_FDS, "max_data_xfer_size": MAX_TRANSFER,
                "max_dma_maps": MAX_MAPS}
        both = {name: value for name, value in ours.items() if name in offered}
        self._agreed = True
        return struct.pack("=HH", MAJOR, min(minor, MINOR)) \
            + json.dumps({"capabilities": both}).encode() + b"\0"

    def _map(self, message: Message) -> bytes:
        _argsz, _flags, _offset, address, size = _unpack(MAP, message)
        if not size or address + size > 1 << 64:
            raise Refused(errno.EINVAL, f"DMA range of {size} bytes at {address:#x}")
        if any(address < at + length and at < address + size
               for at, length in self._maps.items()):
            raise Refused(errno.EEXIST, f"DMA range at {address:#x} is mapped already")
        if len(self._maps) >= MAX_MAPS:
            raise Refused(errno.ENOSPC, f"more than {MAX_MAPS} DMA ranges")
        self._maps[address] = size
        return b""

    def _unmap(self, message: Message) -> bytes:
        argsz, flags, address, size = _unpack(UNMAP, message)
        if flags & UNMAP_ALL:
            self._maps.clear()
        elif self._maps.get(address) != size:
            raise Refused(errno.ENOENT, f"no DMA range of {size} bytes at {address:#x}")
        else:
            del self._maps[address]
        return UNMAP.pack(argsz, flags, address, size)

    def _info(self, message: Message) -> bytes:
        _room(_unpack(INFO, message)[0], INFO)
        return INFO.pack(INFO.size, RESETS_AND_IS_PCI, REGIONS, IRQS)

    def _region_info(self, message: Message) -> bytes:
        argsz, _flags, index, *_ = _unpack(REGION, message)
        _room(argsz, REGION)
        if index >= REGIONS:
            raise Refused(errno.EINVAL, f"region {index}")
        size = self.device.size(index)
        return REGION.pack(REGION.size, READ_WRITE if size else 0, index, 0, size, 0)

    def _irq_count(self, index: int) -> int:
        """How many interrupts of a kind, by the rules of the kernel's vfio-pci."""
        if index >= IRQS:
            raise Refused(errno.EINVAL, f"interrupt type {index}")
        function = self.device.function
        return {INTX: 1, MSI: 1, MSIX: function.msix.vectors if function.msix else 0,
                ERR: int(function.express), REQ: 1}[index]

    def _irq_info(self, message: Message) -> bytes:
        argsz, _flags, index, _count = _unpack(IRQ, message)
        _room(argsz, IRQ)
        count = self._irq_count(index)
        kind = MASKABLE_AUTOMASKED if index == INTX else NORESIZE
        return IRQ.pack(IRQ.size, EVENTFD | kind, index, count)

    def _set_irqs(self, message: Message) -> bytes:
        _argsz, flags, index, start, count = _unpack(IRQ_SET, message)
        data, action = flags & 0x7, flags & ACTIONS
        if data.bit_count() != 1 or action.bit_count() != 1:
            raise Refused(errno.EINVAL, f"interrupt flags {flags:#x}")
        if start + count > self._irq_count(index):
            raise Refused(errno.EINVAL, f"interrupts {start} to {start + count} of type {index}")
        if data == DATA_BOOL and len(message.payload) < IRQ_SET.size + count:
            raise Malformed(f"{count} interrupts to set, fewer booleans")
        chosen = range(start, start + count)
        if data == DATA_EVENTFD:
            if len(message.fds) not in {0, count}:
                raise Refused(errno.EINVAL, f"{len(message.fds)} eventfds for {count} interrupts")
            self._drop(index, chosen, action)
            for number in chosen if message.fds else ():
                self._eventfds[index, action, number] = message.fds.pop(0)
        elif action == ACTION_TRIGGER and count:
            raise Refused(errno.ENOTSUP, "this function raises no interrupts")
        elif action == ACTION_TRIGGER:
            for kind in (0x08, 0x10, 0x20):
                self._drop(index, range(self._irq_count(index)), kind)
        self.trail.event(f"interrupts of type {index}: {self._kept(index)} eventfds")
        return b""

    def _kept(self, index: int) -> int:
        return sum(kind == index for kind, _action, _number in self._eventfds)

    def _drop(self, index: int, numbers: range, action: int) -> None:
        """Close the eventfds of some interrupts."""
        close_all([self._eventfds.pop((index, action, number)) for number in numbers
                   if (index, action, number) in self._eventfds])

    def _read(self, message: Message) -> bytes:
        offset, region, count = _unpack(TRANSFER, message)
        if count > MAX_TRANSFER:
            raise Refused(errno.EINVAL, f"a read of {count} bytes")
        try:
            data = self.device.read(region, offset, count)
        except OutOfRange as error:
            raise Refused(errno.EINVAL, f"read of {error}") from None
        self.trail.access(region, offset, data, write=False)
        return TRANSFER.pack(offset, region, count) + data

    def _write(self, message: Message) -> bytes:
        offset, region, count = _unpack(TRANSFER, message)
        data = message.payload[TRANSFER.size:]
        if len(data) != count:
            raise Malformed(f"a write of {count} bytes that carries {len(data)}")
        try:
            self.device.write(region, offset, data)
        except OutOfRange as error:
            raise Refused(errno.EINVAL, f"write of {error}") from None
        self.trail.access(region, offset, data, write=True)
        return TRANSFER.pack(offset, region, count)

    def _reset(self, _message: Message) -> bytes:
        self.device.reset()
        self.trail.event("reset")
        return b""


def _unpack(layout: struct.Struct, message: Message) -> tuple[Any, ...]:
    """The fixed part of a payload."""
    if len(message.payload) < layout.size:
        raise Malformed(f"command {message.command} with {len(message.payload)} bytes of payload,"
                        f" fewer than {layout.size}")
    return layout.unpack_from(message.payload)


def _room(argsz: int, layout: struct.Struct) -> None:
    """The reply must fit into what the client has room for."""
    if argsz < layout.size:
        raise Refused(errno.EINVAL, f"room for {argsz} bytes, needs {layout.size}")


def _capabilities(text: bytes) -> dict[str, Any]:
    """The capabilities of a version message. Raises `Malformed`."""
    if not text.rstrip(b"\0"):
        return {}
    try:
        said = json.loads(text.rstrip(b"\0"))
    except (ValueError, RecursionError):
        raise Malformed("version data that is no JSON") from None
    offered = said.get("capabilities", {}) if isinstance(said, dict) else None
    if not isinstance(offered, dict):
        raise Malformed("version data without an object of capabilities")
    return offered
