"""Split virtqueues in shared guest memory, from the device's side (virtio 1.2, section 2.7).

Whatever the guest wrote is checked before it is used: an address outside of the memory table, an
index outside of the ring or a chain that does not end raise `RingError`. Indirect descriptors,
event indexes and packed rings are not offered, so a guest that uses one of them is in error too.
x86-64 only: fields are accessed as the machine's own integers, and its stores are not reordered.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

NEXT, WRITE, INDIRECT = 1, 2, 4  # flags of a descriptor (2.7.5)
LARGEST_RING = 32768


class RingError(Exception):
    """The guest or its virtual machine broke the rules of a virtqueue."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of guest memory: its guest and front-end addresses, its size, and the mapped bytes."""

    guest: int
    user: int
    size: int
    data: memoryview


class Memory:
    """The memory table: guest memory by either of its addresses."""

    def __init__(self) -> None:
        self.regions: tuple[Region, ...] = ()

    def replace(self, entries: Iterable[tuple[int, int, int, int, int]]) -> None:
        """Map a new table of (guest address, size, user address, offset in the file, descriptor).

        Raises `RingError` when a region cannot be mapped; the old table stays then. Pages of the
        old one stay mapped as long as someone holds a view of them.
        """
        found = []
        for guest, size, user, offset, descriptor in entries:
            try:
                # From the file's start, since mmap(2) wants an offset of whole pages.
                mapped = mmap.mmap(descriptor, offset + size)
            except (OSError, ValueError, OverflowError) as failure:
                raise RingError(f"guest memory at {guest:#x} cannot be mapped: {failure}") from None
            found.append(Region(guest=guest, user=user, size=size,
                                data=memoryview(mapped)[offset:offset + size]))
        self.regions = tuple(found)

    def guest(self, address: int, size: int) -> memoryview:
        """Memory by its guest address; it must lie in one region."""
        for region in self.regions:
            start = address - region.guest
            if start >= 0 and start + size <= region.size:
                return region.data[start:start + size]
        raise RingError(f"{size} bytes at guest address {address:#x} are outside of guest memory")

    def user(self, address: int, size: int) -> memoryview:
        """Memory by its address in the front end, as rings are given."""
        for region in self.regions:
            start = address - region.user
            if start >= 0 and start + size <= region.size:
                return region.data[start:start + size]
        raise RingError(f"{size} bytes at user address {address:#x} are outside of guest memory")


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A buffer that the driver made available: what the device reads, then what it writes."""

    head: int
    readable: tuple[memoryview, ...]
    writable: tuple[memoryview, ...]

    @property
    def room(self) -> int:
        """Bytes that the device may write."""
        return sum(len(part) for part in self.writable)

    def read(self, start: int, count: int) -> bytes:
        """Bytes of the readable part. Raises `RingError` when it is shorter."""
        found = bytearray()
        for part in self.readable:
            found += part[start:start + count - len(found)]
            start = max(0, start - len(part))
        if len(found) < count:
            raise RingError(f"a buffer is {count - len(found)} bytes short of its packet")
        return bytes(found)

    def write(self, data: bytes) -> None:
        """Fill the writable part from its start. Raises `RingError` when it is too small."""
        if len(data) > self.room:
            raise RingError(f"{len(data)} bytes do not fit into a buffer of {self.room}")
        for part in self.writable:
            now = data[:len(part)]
            part[:len(now)] = now
            data = data[len(now):]


@dataclass
class _Views:
    descriptors: memoryview
    avail: memoryview
    used: memoryview
    used_entries: memoryview


@dataclass
class Ring:
    """One virtqueue. The front end sets it up in steps; it runs when it is enabled and has a kick.

    `kick`, `call` and `error` are eventfds that the ring owns. `next` is the index of the next
    available entry, `done` that of the next used one.
    """

    memory: Memory
    size: int = 0
    addresses: tuple[int, int, int] | None = None  # user addresses of descriptors, used, avail
    next: int = 0
    done: int = 0
    kick: int | None = None
    call: int | None = None
    error: int | None = None
    enabled: bool = False
    broken: bool = False
    _views: _Views | None = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        """Whether buffers may be taken from it."""
        return (self.enabled and not self.broken and self.kick is not None
                and self.addresses is not None)

    def place(self, addresses: tuple[int, int, int]) -> None:
        """Set where the descriptor table, the used and the available ring are."""
        self.addresses = addresses
        self.unmap()
        self.done = self._mapped().used[1]

    def unmap(self) -> None:
        """Forget where the ring is mapped: the memory table changed."""
        self._views = None

    def stop(self) -> int:
        """Stop the ring and let its eventfds go; the index of the next available entry."""
        self.unmap()
        for name in ("kick", "call", "error"):
            self.own(name, None)
        self.broken = False
        return self.next

    def own(self, name: str, descriptor: int | None) -> None:
        """Take an eventfd in place of the one that was there."""
        old = getattr(self, name)
        if old is not None:
            os.close(old)
        setattr(self, name, descriptor)

    def _mapped(self) -> _Views:
        if self._views is None:
            if self.addresses is None or not self.size:
                raise RingError("a ring is used before it has a size and addresses")
            descriptors, used, avail = self.addresses
            if descriptors % 16 or used % 4 or avail % 2:
                raise RingError("a ring is not aligned")
            used_bytes = self.memory.user(used, 6 + 8 * self.size)
            self._views = _Views(
                descriptors=self.memory.user(descriptors, 16 * self.size),
                avail=self.memory.user(avail, 6 + 2 * self.size).cast("H"),
                used=used_bytes[:4].cast("H"),
                used_entries=used_bytes[4:4 + 8 * self.size].cast("I"))
        return self._views

    def waiting(self) -> int:
        """How many buffers the driver made available."""
        count = (self._mapped().avail[1] - self.next) & 0xFFFF
        if count > self.size:
            raise RingError(f"the driver says that {count} buffers are available in a ring of "
                            f"{self.size}")
        return count

    def take(self) -> Chain | None:
        """The next available buffer, None when there is none."""
        if not self.waiting():
            return None
        head = self._mapped().avail[2 + self.next % self.size]
        chain = self._chain(head)
        self.next = (self.next + 1) & 0xFFFF
        return chain

    def untake(self) -> None:
        """The buffer taken last was not needed; it is the next again."""
        self.next = (self.next - 1) & 0xFFFF

    def _chain(self, head: int) -> Chain:
        descriptors = self._mapped().descriptors
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        index = head
        for _ in range(self.size):
            if index >= self.size:
                raise RingError(f"descriptor {index} is outside of a ring of {self.size}")
            # A copy, so that what is checked is what is used.
            entry = bytes(descriptors[16 * index:16 * index + 16])
            flags = int.from_bytes(entry[12:14], "little")
            part = self.memory.guest(int.from_bytes(entry[:8], "little"),
                                     int.from_bytes(entry[8:12], "little"))
            if flags & INDIRECT:
                raise RingError(f"descriptor {index} is indirect, which was not offered")
            if flags & WRITE:
                writable.append(part)
            elif writable:
                raise RingError(f"descriptor {index} is readable and follows a writable one")
            else:
                readable.append(part)
            if not flags & NEXT:
                return Chain(head=head, readable=tuple(readable), writable=tuple(writable))
            index = int.from_bytes(entry[14:16], "little")
        raise RingError(f"the chain of descriptor {head} does not end")

    def give_back(self, chain: Chain, written: int) -> None:
        """Put a buffer on the used ring; `written` is how many bytes the device wrote."""
        views = self._mapped()
        at = self.done % self.size
        views.used_entries[2 * at] = chain.head
        views.used_entries[2 * at + 1] = written
        self.done = (self.done + 1) & 0xFFFF
        views.used[1] = self.done  # one aligned store, after those of the entry

    def notify(self) -> None:
        """Interrupt the driver. Its wish not to be (2.7.7) is ignored, which it has to bear."""
        self._signal(self.call)

    def fail(self) -> None:
        """Stop for good after `RingError`, and tell the front end."""
        self.broken = True
        self._signal(self.error)

    @staticmethod
    def _signal(descriptor: int | None) -> None:
        if descriptor is not None:
            # Full means that it is signalled already; an eventfd of the front end may be gone.
            with contextlib.suppress(OSError):
                os.eventfd_write(descriptor, 1)
