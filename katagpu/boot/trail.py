"""What an emulated function was asked, kept as evidence for a report. Bounded, whatever comes."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace

PLACES = 1024
"""So many different accesses are kept. A driver's probe makes fewer than 50, config space too."""
EVENTS = 256


@dataclass(frozen=True, kw_only=True)
class Access:
    """One kind of access: the same bytes of a region, read or written, `times` times.

    `region` is a VFIO region index: a BAR's number, or `vfiowire.CONFIG_REGION`. `last` is the
    value that was last read or written, little-endian, of its first 8 bytes.
    """

    region: int
    offset: int
    size: int
    write: bool
    times: int
    last: int

    def __str__(self) -> str:
        name = f"BAR{self.region}" if self.region < 6 else "config"
        way = "written" if self.write else "read"
        return (f"{name}+{self.offset:#x} {way} {self.times} times, {self.size} bytes,"
                f" last {self.last:#x}")


class Trail:
    """Accesses by first appearance, and events; written by a server's thread, read by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accesses: dict[tuple[int, int, int, bool], Access] = {}
        self._events: deque[str] = deque(maxlen=EVENTS)
        self._dropped = 0

    def access(self, region: int, offset: int, data: bytes, *, write: bool) -> None:
        """Record an access. A new one beyond `PLACES` is only counted."""
        key = (region, offset, len(data), write)
        last = int.from_bytes(data[:8], "little")
        with self._lock:
            seen = self._accesses.get(key)
            if seen is not None:
                self._accesses[key] = replace(seen, times=seen.times + 1, last=last)
            elif len(self._accesses) < PLACES:
                self._accesses[key] = Access(region=region, offset=offset, size=len(data),
                                             write=write, times=1, last=last)
            else:
                self._dropped += 1

    def event(self, text: str) -> None:
        """Record what happened to the connection or the function; the oldest ones go."""
        with self._lock:
            self._events.append(text)

    @property
    def accesses(self) -> tuple[Access, ...]:
        """The accesses so far."""
        with self._lock:
            return tuple(self._accesses.values())

    @property
    def events(self) -> tuple[str, ...]:
        """The events so far."""
        with self._lock:
            return tuple(self._events)

    @property
    def dropped(self) -> int:
        """How many accesses were not kept."""
        with self._lock:
            return self._dropped
