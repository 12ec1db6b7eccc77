"""Is there memory for a guest: /proc and control groups of both versions, as trees of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from katagpu.boot import memory
from katagpu.errors import UserError

MIB = 1 << 20
NO_LIMIT = 9223372036854771712  # what version 1 says instead of `max`


class Host:
    """A host's /proc and /sys/fs/cgroup."""

    def __init__(self, place: Path) -> None:
        self.proc = place / "proc"
        self.groups = place / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.groups.mkdir()
        self.has(8192 * MIB)

    def has(self, available: int) -> None:
        """So many bytes can be had."""
        (self.proc / "meminfo").write_text(
            f"MemTotal:       24684544 kB\nMemFree:          903012 kB\n"
            f"MemAvailable:   {available >> 10} kB\nBuffers:          123 kB\n")

    def are_in(self, *lines: str) -> None:
        """What /proc/self/cgroup says."""
        (self.proc / "self/cgroup").write_text("".join(f"{line}\n" for line in lines))

    def group(self, name: str, limit: int | str, used: int, cached: int = 0) -> Path:
        """A group of version 2."""
        return self._group(self.groups / name, "memory.max", limit, "memory.current", used,
                           f"anon {used - cached}\nfile {cached}\ninactive_file {cached // 2}\n"
                           f"active_file {cached - cached // 2}\n")

    def old(self, name: str, limit: int, used: int, cached: int = 0) -> Path:
        """A group of version 1, where a group's statistics are also told with those below it."""
        return self._group(self.groups / "memory" / name, "memory.limit_in_bytes", limit,
                           "memory.usage_in_bytes", used,
                           "active_file 0\ninactive_file 0\n"
                           f"total_active_file {cached}\ntotal_inactive_file 0\n")

    def _group(self, place: Path, limits: str, limit: int | str, usage: str, used: int,
               stat: str) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        (place / limits).write_text(f"{limit}\n")
        (place / usage).write_text(f"{used}\n")
        (place / "memory.stat").write_text(stat)
        return place

    @property
    def available(self) -> tuple[int, str]:
        """What is found."""
        return memory.available(self.proc, self.groups)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with 8 GiB that may be taken, and no control groups."""
    return Host(tmp_path)


def test_without_control_groups_it_is_the_host_s(host: Host) -> None:
    assert host.available == (8192 * MIB, "the host")
    host.are_in("0::/")
    assert host.available == (8192 * MIB, "the host"), "the top of version 2 has no files"


def test_a_group_s_limit_less_what_it_uses(host: Host) -> None:
    host.are_in("0::/user.slice/session")
    place = host.group("user.slice/session", 4096 * MIB, 1000 * MIB)
    assert host.available == (3096 * MIB, f"the control group {place}")


def test_cached_files_can_be_given_back(host: Host) -> None:
    host.are_in("0::/a")
    host.group("a", 4096 * MIB, 4000 * MIB, cached=3000 * MIB)
    assert host.available[0] == 3096 * MIB
    host.group("a", 4096 * MIB, 1000 * MIB, cached=2000 * MIB)  # counters are not read at once
    assert host.available[0] == 4096 * MIB


def test_a_limit_of_a_group_above_holds(host: Host) -> None:
    host.are_in("0::/a/b/c")
    host.group("a/b/c", "max", 10 * MIB)
    host.group("a/b", 6000 * MIB, 10 * MIB)
    place = host.group("a", 2000 * MIB, 500 * MIB)
    assert host.available == (1500 * MIB, f"the control group {place}")


def test_no_limit_is_none(host: Host) -> None:
    host.are_in("0::/a")
    host.group("a", "max", 9000 * MIB)
    assert host.available == (8192 * MIB, "the host")


def test_a_group_that_is_over_its_limit_has_nothing_left(host: Host) -> None:
    host.are_in("0::/a")
    host.group("a", 100 * MIB, 200 * MIB)
    assert host.available[0] == 0


def test_version_1(host: Host) -> None:
    host.are_in("11:devices:/docker/f00", "4:memory:/docker/f00", "1:name=systemd:/docker/f00",
                "0::/docker/f00")
    place = host.old("docker/f00", 3000 * MIB, 1000 * MIB, cached=400 * MIB)
    host.old("docker", NO_LIMIT, 9000 * MIB)
    host.old("", NO_LIMIT, 9000 * MIB)
    assert host.available == (2400 * MIB, f"the control group {place}")


def test_version_1_with_other_controllers_beside_it(host: Host) -> None:
    host.are_in("4:cpu,memory,pids:/a")
    host.old("a", 3000 * MIB, 0)
    assert host.available[0] == 3000 * MIB
    host.are_in("4:memory_of_another_kind:/a")
    assert host.available[0] == 8192 * MIB


@pytest.mark.parametrize("line", ["0::/docker/f00", "4:memory:/docker/f00", "0::/../f00"])
def test_in_a_container_its_own_group_is_the_top(host: Host, line: str) -> None:
    host.are_in(line)
    host.group("", 2048 * MIB, 48 * MIB)
    host.old("", 2048 * MIB, 48 * MIB)
    assert host.available[0] == 2000 * MIB


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
def test_a_group_that_cannot_be_read_is_passed_over(host: Host, name: str) -> None:
    host.are_in("0::/a/b")
    (host.group("a/b", 1000 * MIB, 0) / name).unlink()
    host.group("a", 2000 * MIB, 0)
    assert host.available[0] == 2000 * MIB


def test_garbage_in_a_group_is_passed_over(host: Host) -> None:
    host.are_in("0::/a")
    place = host.group("a", 1000 * MIB, 0)
    for name in ("memory.current", "memory.stat"):
        good = (place / name).read_text()
        (place / name).write_text("what is this?\n")
        assert host.available[0] == 8192 * MIB
        (place / name).write_text(good)
    (place / "memory.max").write_text("lots\n")
    assert host.available[0] == 8192 * MIB


def test_enough_for_a_guest_and_for_qemu(host: Host) -> None:
    host.has(4096 * MIB + memory.OVERHEAD)
    memory.must_have(4096 * MIB, host.proc, host.groups)
    host.has(4095 * MIB + memory.OVERHEAD)
    with pytest.raises(UserError) as refused:
        memory.must_have(4096 * MIB, host.proc, host.groups)
    assert refused.value.what == (
        "there is not enough memory for the guest: it has 4096 MiB and QEMU takes 384 MiB more, "
        "and the host has 4479 MiB left")
    assert "end other programs" in str(refused.value.hint)


def test_enough_for_two(host: Host) -> None:
    host.has(2 * (1024 * MIB + memory.OVERHEAD))
    memory.must_have(1024 * MIB, host.proc, host.groups, machines=2)
    with pytest.raises(UserError, match="for 2 guests: each has 1025 MiB"):
        memory.must_have(1025 * MIB, host.proc, host.groups, machines=2)


def test_the_limit_that_is_too_small_is_named(host: Host) -> None:
    host.are_in("0::/build.slice")
    place = host.group("build.slice", 2048 * MIB, 0)
    with pytest.raises(UserError, match=f"the control group {place} has 2048 MiB left"):
        memory.must_have(2048 * MIB, host.proc, host.groups)


def test_an_old_kernel(host: Host) -> None:
    (host.proc / "meminfo").write_text("MemTotal: 1 kB\n")
    with pytest.raises(UserError, match="has no MemAvailable"):
        memory.available(host.proc, host.groups)


def test_this_host() -> None:
    free, whose = memory.available()
    assert free > 0 and whose
    memory.must_have(0 if free > memory.OVERHEAD else -memory.OVERHEAD)
