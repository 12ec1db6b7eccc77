"""Which driver fits which kernel, from the table of facts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from katagpu import patches
from katagpu.errors import UserError
from katagpu.nvbranches import (
    BRANCHES,
    LIMITS,
    RESIZE,
    check_flavour,
    check_kernel,
    limit,
    numbers,
)
from katagpu.schema import KernelModule

OPEN, CLOSED = KernelModule.OPEN, KernelModule.CLOSED


@pytest.mark.parametrize(("version", "found"), [
    ("6.12.117+deb13-amd64", (6, 12, 117)), ("5.15.23-nvidia-gpu", (5, 15, 23)), ("6.8", (6, 8)),
    ("6.19-rc1", (6, 19)), ("550.163.01", (550, 163, 1))])
def test_numbers(version: str, found: tuple[int, ...]) -> None:
    assert numbers(version) == found


@pytest.mark.parametrize(("version", "release", "flavour"), [
    ("510.54", "5.15.23-nvidia-gpu", CLOSED),  # the guide's pair
    ("550.163.01", "6.12.96", OPEN), ("550.163.01", "6.12.117", CLOSED),
    ("550.163.01", "6.14.9", CLOSED), ("580.126.09", "6.12.117", OPEN),
    ("535.261.03", "6.1.148", CLOSED), ("570.195.03", "6.17.1", OPEN),
    ("580.126.18", "6.19.0", OPEN), ("610.57.04", "7.2.0", OPEN),
    ("525.147.05", "6.1.75", CLOSED), ("525.147.05", "6.1.90", OPEN)])
def test_pairs_of_which_nothing_bad_is_known(
    version: str, release: str, flavour: KernelModule,
) -> None:
    assert limit(version, release, flavour) is None
    check_kernel(version, release, flavour)


@pytest.mark.parametrize(("version", "release", "flavour", "by"), [
    ("470.103.01", "6.0.0", CLOSED, "470.141.03"), ("510.54", "6.2.1", CLOSED, "510.85.02"),
    ("515.105.01", "6.6.30", OPEN, "515.105.01"), ("525.147.05", "6.1.90", CLOSED, "525.147.05"),
    ("525.147.05", "6.8.1", OPEN, "525.147.05"), ("535.54.03", "6.12.1", OPEN, "535.104.12"),
    ("550.163.01", "6.15.0", OPEN, "550.163.01"), ("565.57.01", "6.13.2", OPEN, "565.77"),
    ("570.153.02", "6.15.1", CLOSED, "570.153.02"), ("590.44.01", "6.19.7", OPEN, "590.48.01"),
    ("580.119.02", "7.0.9", CLOSED, "580.126.09"), ("580.95.05", "6.12.117", OPEN, "580.119.02"),
    ("550.163.01", "6.12.97", OPEN, "550.163.01"), ("590.44.01", "6.18.40", OPEN, "590.44.01"),
    ("535.261.03", "6.12.107+deb13-amd64", OPEN, "535.288.01")])
def test_pairs_that_do_not_build(
    version: str, release: str, flavour: KernelModule, by: str,
) -> None:
    found = limit(version, release, flavour)
    assert found is not None and found.driver == by


def test_the_refusal_names_the_fact_its_source_and_the_cures() -> None:
    with pytest.raises(UserError) as caught:
        check_kernel("550.163.01", "6.15.3", OPEN)
    assert str(caught.value) == (
        "driver 550.163.01 (open) does not build for kernel 6.15.3: as far as 550.163.01, its "
        "branch fails on 6.15 and later (Debian, nvidia-graphics-drivers (changelog of "
        "550.163.01-2))\n  hint: take a newer driver (later than 550.163.01 in its branch, where "
        "there is one; or branch 570), an older kernel, or put a patch that lifts 6.15 into "
        "patches/driver-open")


def test_a_patch_lifts_one_fact_and_not_the_next() -> None:
    check_kernel("535.104.05", "6.9.1", OPEN, frozenset({"6.8"}))
    with pytest.raises(UserError, match=r"fails on 6\.10 and later"):
        check_kernel("535.104.05", "6.10.1", OPEN, frozenset({"6.8"}))


# Releases of open-gpu-kernel-modules on which the shipped patch was tried: it applies to these,
THREE_ARGUMENTS = (
    "530.30.02", "535.43.02", "535.54.03", "535.86.10", "535.98", "535.104.05", "535.183.06",
    "535.216.01", "535.247.01", "535.261.03", "535.274.02", "535.288.01", "545.29.06", "550.40.07",
    "550.54.15", "550.78", "550.90.07", "550.127.05", "550.163.01", "555.58.02", "560.35.03",
    "565.57.01", "565.77", "570.86.15", "570.124.06", "570.133.20", "570.195.03", "570.207",
    "570.211.01", "575.64.05", "580.65.06", "580.76.05", "580.82.09", "580.95.05", "580.105.08",
    "580.119.02", "590.44.01")
# and not to these, of which the first ones do not call the function.
FOUR_ARGUMENTS = ("515.105.01", "525.147.05", "580.94.16", "580.126.09", "580.126.20", "580.142",
                  "590.48.01", "595.45.04")


def test_the_shipped_patch_lifts_the_change_of_pci_resize_resource(repository: Path) -> None:
    series = patches.load_series(repository / "patches/driver-open/series.yaml")
    for version in THREE_ARGUMENTS:
        lifted = patches.lifted(series, patches.Target.DRIVER_OPEN, version)
        assert lifted == set(RESIZE)
        found = limit(version, "6.12.117", OPEN, lifted)
        assert found is None or found.kernels != RESIZE
    for version in FOUR_ARGUMENTS:
        assert not patches.lifted(series, patches.Target.DRIVER_OPEN, version)
    for row in LIMITS:
        assert row.kernels != RESIZE or row.driver in THREE_ARGUMENTS


def test_a_kernel_that_is_too_old() -> None:
    with pytest.raises(UserError, match=r"driver 580\.95\.05 needs kernel 4\.15 or newer"):
        check_kernel("580.95.05", "4.4.302", OPEN)


def test_the_flavour_is_the_packages() -> None:
    check_flavour("550.163.01", OPEN, frozenset({"open", "closed"}))
    with pytest.raises(UserError, match="since branch 515"):
        check_flavour("470.256.02", OPEN, frozenset({"closed"}))
    with pytest.raises(UserError, match=r"has no closed kernel modules \(it has: open\)"):
        check_flavour("610.57.04", CLOSED, frozenset({"open"}))
    with pytest.raises(UserError, match="take NVIDIA's complete package"):
        check_flavour("550.163.01", CLOSED, frozenset())


def test_the_table_is_in_order() -> None:
    assert all(first.number < second.number for first, second in pairwise(BRANCHES))
    assert all(numbers(first.driver) <= numbers(second.driver)
               for first, second in pairwise(LIMITS))
    numbered = {branch.number for branch in BRANCHES}
    assert {numbers(each.driver)[0] for each in LIMITS} == numbered
    for branch in BRANCHES:
        last = max((each.driver for each in LIMITS if numbers(each.driver)[0] == branch.number),
                   key=numbers)
        assert numbers(branch.seen) >= numbers(last)
        assert (branch.open is not None) is (branch.number >= 515)
    assert all(each.source for each in LIMITS)


def test_the_documentation_has_every_row(repository: Path) -> None:
    text = (repository / "docs" / "driver.md").read_text()
    for branch in BRANCHES:
        assert f"| {branch.number} | {branch.oldest} | {branch.closed} | {branch.open or '–'} |" \
            in text  # noqa: RUF001
    for each in LIMITS:
        kernels = ", ".join(each.kernels)
        assert f"| {each.driver} | {kernels} | {each.flavour or 'both'} | {each.source} |" in text
