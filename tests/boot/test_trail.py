"""What an emulated function was asked: counted, bounded, and safe to read while it is written."""

from __future__ import annotations

import threading

from katagpu.boot.trail import EVENTS, PLACES, Access, Trail
from katagpu.boot.vfiowire import CONFIG_REGION


def test_equal_accesses_are_one_with_the_last_value() -> None:
    trail = Trail()
    for value in (b"\x01\0\0\0", b"\xa1\0\0\x17"):
        trail.access(0, 0, value, write=False)
    assert trail.accesses == (
        Access(region=0, offset=0, size=4, write=False, times=2, last=0x170000A1),)


def test_others_stand_in_the_order_of_their_first() -> None:
    trail = Trail()
    trail.access(0, 4, bytes(4), write=True)
    trail.access(0, 0, bytes(4), write=True)
    trail.access(0, 4, bytes(4), write=False)  # another way
    trail.access(0, 4, bytes(2), write=True)  # another size
    trail.access(1, 4, bytes(4), write=True)  # another region
    trail.access(0, 4, bytes(4), write=True)
    assert [(each.region, each.offset, each.size, each.write, each.times)
            for each in trail.accesses] == [
        (0, 4, 4, True, 2), (0, 0, 4, True, 1), (0, 4, 4, False, 1), (0, 4, 2, True, 1),
        (1, 4, 4, True, 1)]


def test_as_a_person_reads_it() -> None:
    trail = Trail()
    trail.access(0, 0xA00, b"\0\x10\x0a\x17", write=False)
    trail.access(CONFIG_REGION, 4, b"\x06\0", write=True)
    assert [str(each) for each in trail.accesses] == [
        "BAR0+0xa00 read 1 times, 4 bytes, last 0x170a1000",
        "config+0x4 written 1 times, 2 bytes, last 0x6"]


def test_a_long_access_has_the_value_of_its_first_bytes() -> None:
    trail = Trail()
    trail.access(0, 0, bytes(range(1, 17)), write=False)
    trail.access(0, 0, b"", write=False)
    assert [(each.size, each.last) for each in trail.accesses] == [(16, 0x0807060504030201), (0, 0)]


def test_more_places_than_it_keeps_are_counted() -> None:
    trail = Trail()
    for offset in range(PLACES + 10):
        trail.access(0, offset, b"\x01", write=False)
    trail.access(0, 0, b"\x02", write=False)
    assert len(trail.accesses) == PLACES and trail.dropped == 10
    assert (trail.accesses[0].times, trail.accesses[0].last) == (2, 2)


def test_the_oldest_events_go() -> None:
    trail = Trail()
    for number in range(EVENTS + 3):
        trail.event(str(number))
    assert trail.events[0] == "3" and trail.events[-1] == str(EVENTS + 2)
    assert len(trail.events) == EVENTS


def test_what_was_read_does_not_change() -> None:
    trail = Trail()
    trail.access(0, 0, b"\x01", write=False)
    trail.event("reset")
    before = trail.accesses, trail.events
    trail.access(0, 0, b"\x02", write=False)
    trail.event("reset again")
    assert (before[0][0].times, before[1]) == (1, ("reset",))


def test_several_threads() -> None:
    trail = Trail()

    def work(number: int) -> None:
        for offset in range(200):
            trail.access(0, offset, bytes([number]), write=False)
            trail.event("x")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(trail.accesses) <= 200 and len(trail.events) <= EVENTS
    for thread in threads:
        thread.join()
    assert [each.times for each in trail.accesses] == [4] * 200
