"""NVIDIA's driver branches: which kernels they build for, and which kernel modules they have.

A fact here is an upper bound: "this release of the branch, as NVIDIA ships it, does not compile for
that kernel". It holds for every earlier release of the branch and every later kernel. About a
release after the last one that is named nothing is known, and it is let pass.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from katagpu.errors import UserError
from katagpu.schema import KernelModule

# Where the facts are from. Debian's changelog names the release and the kernel of each change that
# its maintainer carried back to make an older driver compile.
DEBIAN = "Debian, nvidia-graphics-drivers (changelog of {})"
NVIDIA = "https://github.com/NVIDIA/open-gpu-kernel-modules/{}"
TKG = "https://github.com/Frogging-Family/nvidia-all ({})"
PATCH_LIST = TKG.format("patches.list")

OPEN_SINCE = 515
RESIZE = ("6.12.97", "6.18.40")  # pci_resize_resource() has a fourth argument there, as in 6.19
RESIZE_SOURCE = ("https://github.com/truenas/scale-build/pull/1002; "
                 "https://github.com/strongtz/i915-sriov-dkms/issues/467")
PFN_VALID = ("6.1.76", "6.6.15", "6.7.3", "6.8")  # pfn_valid() uses a GPL-only symbol since then


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A branch. `closed` and `open` are the first GPU generation that each flavour drives.

    `oldest` is the oldest kernel that NVIDIA's README admits, `seen` the newest release that the
    limits below consider.
    """

    number: int
    oldest: str
    closed: str
    open: str | None
    seen: str


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Up to release `driver` the branch does not build for `kernels`.

    `6.15` stands for itself and everything newer, `6.1.76` for the rest of the series 6.1. Without
    `flavour` it holds for both.
    """

    driver: str
    kernels: tuple[str, ...]
    source: str
    flavour: KernelModule | None = None


def _resize(driver: str) -> Limit:
    """The last release of a branch whose open modules give the function three arguments.

    Which those are is seen in `kernel-open/nvidia/nv-pci.c` of open-gpu-kernel-modules' tags.
    """
    return Limit(driver=driver, kernels=RESIZE, source=RESIZE_SOURCE, flavour=KernelModule.OPEN)


# Sources: `oldest`: NVIDIA_Changelog, entry 495.29.05 ("from 2.6.32 to 3.10"), README of 550.163.01
# ("3.10 and newer"), README.md of open-gpu-kernel-modules 580.105.08 ("4.15 or newer"). GPUs:
# README; NVIDIA's deprecation schedule for Unix (Kepler ends with 470; Maxwell, Pascal and Volta
# with 580). Blackwell is driven by the open modules alone.
BRANCHES = (
    Branch(number=470, oldest="2.6.32", closed="Kepler", open=None, seen="470.256.02"),
    Branch(number=510, oldest="3.10", closed="Maxwell", open=None, seen="510.108.03"),
    Branch(number=515, oldest="3.10", closed="Maxwell", open="Turing", seen="515.105.01"),
    Branch(number=525, oldest="3.10", closed="Maxwell", open="Turing", seen="525.147.05"),
    Branch(number=535, oldest="3.10", closed="Maxwell", open="Turing", seen="535.288.01"),
    Branch(number=550, oldest="3.10", closed="Maxwell", open="Turing", seen="550.163.01"),
    Branch(number=565, oldest="3.10", closed="Maxwell", open="Turing", seen="565.77"),
    Branch(number=570, oldest="3.10", closed="Maxwell", open="Turing", seen="570.211.01"),
    Branch(number=575, oldest="3.10", closed="Maxwell", open="Turing", seen="575.64.05"),
    Branch(number=580, oldest="4.15", closed="Maxwell", open="Turing", seen="580.142"),
    Branch(number=590, oldest="4.15", closed="Turing", open="Turing", seen="590.48.01"),
    Branch(number=595, oldest="4.15", closed="Turing", open="Turing", seen="595.58.03"),
)

LIMITS = (
    Limit(driver="470.57.02", kernels=("5.14",), source=DEBIAN.format("470.57.02-3")),
    Limit(driver="470.141.03", kernels=("6.0",), source=DEBIAN.format("470.141.03-3")),
    Limit(driver="470.161.03", kernels=("6.2",), source=DEBIAN.format("470.161.03-2")),
    Limit(driver="470.182.03", kernels=("6.3",), source=DEBIAN.format("470.182.03-2")),
    Limit(driver="470.199.02", kernels=("6.5",), source=DEBIAN.format("470.199.02-2")),
    Limit(driver="470.223.02", kernels=PFN_VALID, source=DEBIAN.format("470.223.02-4")),
    Limit(driver="470.256.02", kernels=("6.10",), source=DEBIAN.format("470.256.02-3")),
    Limit(driver="510.85.02", kernels=("6.0",), source=DEBIAN.format("510.85.02-5")),
    Limit(driver="510.108.03", kernels=("6.2",), source=DEBIAN.format("510.108.03-3")),
    Limit(driver="515.48.07", kernels=("6.0",), source=DEBIAN.format("515.48.07-1")),
    Limit(driver="515.105.01", kernels=("6.3",), source=DEBIAN.format("515.105.01-1")),
    Limit(driver="525.105.17", kernels=("6.4",), source=DEBIAN.format("525.105.17-2")),
    Limit(driver="525.125.06", kernels=("6.5",), source=DEBIAN.format("525.125.06-2")),
    Limit(driver="525.147.05", kernels=PFN_VALID, source=DEBIAN.format("525.147.05-6"),
          flavour=KernelModule.CLOSED),
    Limit(driver="525.147.05", kernels=("6.8",), source=DEBIAN.format("525.147.05-10")),
    Limit(driver="535.43.02", kernels=("6.5",), source=PATCH_LIST),
    Limit(driver="535.104.12", kernels=("6.8",), source=DEBIAN.format("535.104.12-2")),
    Limit(driver="535.154.05", kernels=PFN_VALID, flavour=KernelModule.CLOSED,
          source=f"{DEBIAN.format('535.54.03-1')}; {PATCH_LIST}"),
    Limit(driver="535.183.06", kernels=("6.10",), source=DEBIAN.format("535.183.06-1")),
    Limit(driver="535.216.03", kernels=("6.13",), source=DEBIAN.format("535.216.03-2")),
    Limit(driver="535.247.01", kernels=("6.15",), source=DEBIAN.format("535.247.01-2")),
    _resize("535.288.01"),
    Limit(driver="550.40.07", kernels=PFN_VALID, flavour=KernelModule.CLOSED, source=PATCH_LIST),
    Limit(driver="550.78", kernels=("6.10",), source=DEBIAN.format("545.23.06-2")),
    Limit(driver="550.135", kernels=("6.13",), source=DEBIAN.format("545.23.06-4")),
    Limit(driver="550.163.01", kernels=("6.15",), source=DEBIAN.format("550.163.01-2")),
    _resize("550.163.01"),
    Limit(driver="565.77", kernels=("6.13",), source=NVIDIA.format("issues/751")),
    _resize("565.77"),
    Limit(driver="570.144", kernels=("6.15",), source=DEBIAN.format("550.163.01-2")),
    Limit(driver="570.153.02", kernels=("6.15",), flavour=KernelModule.CLOSED,
          source=DEBIAN.format("550.163.01-2")),
    Limit(driver="570.183", kernels=("6.17",), source=TKG.format("issue 310")),
    _resize("570.211.01"),
    Limit(driver="575.57.08", kernels=("6.16",), source=NVIDIA.format("issues/881")),
    Limit(driver="575.64.05", kernels=("6.17",), source=PATCH_LIST),
    _resize("575.64.05"),
    _resize("580.119.02"),
    Limit(driver="580.126.09", kernels=("6.19",),
          source="https://github.com/NixOS/nixpkgs/pull/491462"),
    Limit(driver="580.142", kernels=("7.0",), source=PATCH_LIST),
    _resize("590.44.01"),
    Limit(driver="590.48.01", kernels=("6.19",), source=NVIDIA.format("issues/1021")),
    Limit(driver="595.58.03", kernels=("7.0",), source=PATCH_LIST),
)


def numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers: `6.12.117+deb13-amd64` is 6, 12, 117."""
    found: list[int] = []
    for part in version.split("."):
        digits = part[:len(part) - len(part.lstrip("0123456789"))]
        if digits:
            found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


def limit(version: str, release: str, flavour: KernelModule,
          lifted: Set[str] = frozenset()) -> Limit | None:
    """The fact that speaks against a driver of this version on a kernel of this release.

    Patches of ours have `lifted` the facts about these kernels.
    """
    driver = numbers(version)
    for each in LIMITS:
        last = numbers(each.driver)
        if last[0] == driver[0] and driver <= last and each.flavour in (None, flavour) \
                and any(_covers(kernel, release) for kernel in set(each.kernels) - lifted):
            return each
    return None


def _covers(kernel: str, release: str) -> bool:
    bound, found = numbers(kernel), numbers(release)
    return found >= bound and (len(bound) == 2 or found[:2] == bound[:2])


def check_kernel(version: str, release: str, flavour: KernelModule,
                 lifted: Set[str] = frozenset()) -> None:
    """Refuse a driver that does not build for the kernel as NVIDIA ships it. Raises `UserError`.

    `lifted` is as for `limit`.
    """
    known = limit(version, release, flavour, lifted)
    if known is not None:
        kernel = next(each for each in known.kernels if _covers(each, release))
        raise UserError(
            f"driver {version} ({flavour}) does not build for kernel {release}: as far as "
            f"{known.driver}, its branch fails on {kernel} and later ({known.source})",
            hint=f"take a newer driver ({_newer(version, release, flavour)}), an older kernel, or "
                 f"put a patch that lifts {kernel} into patches/driver-{flavour}")
    branch = _branch(version)
    if branch is not None and numbers(release) < numbers(branch.oldest):
        raise UserError(f"driver {version} needs kernel {branch.oldest} or newer, not {release}",
                        hint="take an older driver, or a newer kernel")


def _branch(version: str) -> Branch | None:
    """The branch of a version; a feature branch in between counts as the one before it."""
    number = numbers(version)[0]
    return max((each for each in BRANCHES if each.number <= number),
               key=lambda each: each.number, default=None)


def _newer(version: str, release: str, flavour: KernelModule) -> str:
    """Words for the drivers of which nothing bad is known on this kernel."""
    driver = numbers(version)
    last = next((each.driver for each in reversed(LIMITS)
                 if numbers(each.driver)[0] == driver[0] and each.flavour in (None, flavour)
                 and any(_covers(kernel, release) for kernel in each.kernels)), None)
    branch = next((each.number for each in BRANCHES if each.number > driver[0]
                   and limit(each.seen, release, flavour) is None), None)
    words = [f"later than {last} in its branch, where there is one"] if last else []
    if branch is not None:
        words.append(f"branch {branch}")
    return "; or ".join(words) or "none is known here yet"


def check_flavour(version: str, flavour: KernelModule, has: frozenset[str]) -> None:
    """Refuse a flavour that the package lacks. Raises `UserError`.

    `has` are the flavours of the package's own manifest, so that a branch that drops one, or an
    archive without one, needs no entry here.
    """
    if str(flavour) in has:
        return
    other = ", ".join(sorted(has)) or "none"
    if flavour is KernelModule.OPEN and numbers(version)[0] < OPEN_SINCE:
        raise UserError(f"driver {version} has no open kernel modules: NVIDIA publishes them "
                        f"since branch {OPEN_SINCE}",
                        hint="set driver.kernel_module: closed, or take a newer driver")
    raise UserError(f"this package of driver {version} has no {flavour} kernel modules "
                    f"(it has: {other})",
                    hint="set driver.kernel_module to one that it has" if has else
                    "take NVIDIA's complete package, not one without kernel modules")
