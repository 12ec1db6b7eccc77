"""What a recipe asks the archives for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import recipe, request
from katagpu.recipe import (
    Capability,
    DriverSource,
    Headers,
    ImageModel,
    KernelModule,
    KernelSource,
    Recipe,
    ToolkitSource,
)


@pytest.fixture
def default(repository: Path) -> Recipe:
    """The default recipe."""
    return recipe.load("debian-trixie", repository)


def change(old: Recipe, name: str, **fields: Any) -> Recipe:
    """A recipe with other fields in one section."""
    return replace(old, **{name: replace(getattr(old, name), **fields)})


def test_groups_of_the_default_recipe(default: Recipe, repository: Path) -> None:
    groups = request.groups(default, repository)
    assert list(groups) == ["stage0", "toolchain", "imagetools", "base", "kernel_source",
                            "driver_user", "driver_source"]
    assert groups["kernel_source"].packages == ("linux-source-6.12",)
    assert groups["driver_source"].packages == ("nvidia-open-kernel-source=550.163.01*",)
    assert groups["driver_source"].alone and groups["kernel_source"].alone
    user = groups["driver_user"]
    assert user.on == "base"
    # libcuda1 only dlopens it, and does not depend on it
    assert "libnvidia-nvvm4=550.163.01*" in user.packages
    # it maps `modprobe nvidia` to nvidia-current, which our modules are not named
    assert not any("kernel-support" in package for package in user.packages)
    assert not any("modprobe" in package for package in user.packages)


def test_every_group_below_another_comes_before_it(default: Recipe, repository: Path) -> None:
    wanted = change(default, "rootfs", extra_packages=("gcc",))
    seen: set[str] = set()
    for name, group in request.groups(wanted, repository).items():
        assert group.on is None or group.on in seen
        seen.add(name)


def test_the_closed_driver_has_a_source_of_its_own(default: Recipe, repository: Path) -> None:
    closed = change(default, "driver", kernel_module=KernelModule.CLOSED)
    assert request.groups(closed, repository)["driver_source"].packages == (
        "nvidia-kernel-source=550.163.01*",)


def test_capabilities_choose_libraries(default: Recipe, repository: Path) -> None:
    utility = change(default, "driver", capabilities=(Capability.UTILITY,))
    packages = request.groups(utility, repository)["driver_user"].packages
    assert "nvidia-smi=550.163.01*" in packages
    assert not any(package.startswith("libcuda1") for package in packages)
    both = change(default, "driver", capabilities=(Capability.UTILITY, Capability.COMPUTE))
    order = change(default, "driver", capabilities=(Capability.COMPUTE, Capability.UTILITY))
    assert request.identity(both, repository) == request.identity(order, repository)


def test_a_guest_without_a_driver(default: Recipe, repository: Path) -> None:
    none = change(default, "driver", source=DriverSource.NONE, version=None)
    assert not {"driver_user", "driver_source"} & set(request.groups(none, repository))


def test_a_kernel_of_kernel_org_needs_no_package(default: Recipe, repository: Path) -> None:
    kernel = change(default, "kernel", source=KernelSource.KERNEL_ORG, package=None,
                    version="6.12.30")
    assert "kernel_source" not in request.groups(kernel, repository)
    pinned = change(default, "kernel", version="6.12.30-1")
    assert request.groups(pinned, repository)["kernel_source"].packages == (
        "linux-source-6.12=6.12.30-1",)


def test_extra_packages_are_below_the_driver_and_shipped_when_asked(
    default: Recipe, repository: Path,
) -> None:
    extra = change(default, "rootfs", extra_packages=("gcc", "make"))
    groups = request.groups(extra, repository)
    assert groups["build_layer"].packages == ("gcc", "make")
    assert groups["build_layer"].on == "toolchain"
    assert "make" not in groups["base"].packages
    kept = change(extra, "rootfs", keep_extra_pkgs=True)
    assert {"gcc", "make"} <= set(request.groups(kept, repository)["base"].packages)


def test_rpm_headers_need_rpm_and_the_same_toolchain(default: Recipe, repository: Path) -> None:
    groups = request.groups(default, repository)
    assert "rpm_tools" not in groups
    rpm = request.groups(change(default, "kernel", headers=Headers.RPM), repository)
    assert rpm["rpm_tools"].packages == ("rpm",) and rpm["rpm_tools"].on == "toolchain"
    # ccache knows the compiler by the toolchain's content: another one would compile everything.
    assert rpm["toolchain"] == groups["toolchain"]


def test_toolkit_packages_given_as_files(default: Recipe, tmp_path: Path) -> None:
    (tmp_path / "one.deb").write_text("one")
    debs = change(default, "toolkit", source=ToolkitSource.DEBS, debs=("one.deb",), version=None)
    groups = request.groups(debs, tmp_path)
    assert (groups["toolkit"].on, groups["driver_user"].on) == ("base", "toolkit")
    assert groups["toolkit"].files[0].path == str(tmp_path / "one.deb")
    before = request.identity(debs, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "one.deb").write_text("one")
    assert request.identity(debs, elsewhere) == before
    (elsewhere / "one.deb").write_text("two")
    assert request.identity(debs, elsewhere) != before


@pytest.mark.parametrize("more", [
    ("driver", {"version": "550.1"}), ("driver", {"kernel_module": KernelModule.CLOSED}),
    ("rootfs", {"packages": ("curl",)}), ("distribution", {"suite": "bookworm"}),
    ("kernel", {"package": "linux-source-6.6"}),
])
def test_what_is_asked_for_is_the_identity(
    default: Recipe, repository: Path, more: tuple[str, dict[str, Any]],
) -> None:
    other = change(default, more[0], **more[1])
    assert request.identity(other, repository) != request.identity(default, repository)


def test_other_options_do_not_ask_anew(default: Recipe, repository: Path) -> None:
    other = change(change(default, "image", level=5), "toolkit", version="v1.18.0")
    assert request.identity(other, repository) == request.identity(default, repository)


# archives


@pytest.mark.parametrize(("mirror", "host", "main", "security"), [
    ("host", {}, "http://fallback/debian", "http://security/"),
    ("host", {"": "http://near/debian", "-security": "http://near/security"},
     "http://near/debian", "http://near/security"),
    ("http://mine/debian", {"": "http://near/debian"}, "http://mine/debian", "http://security/"),
])
def test_archives(
    default: Recipe, monkeypatch: pytest.MonkeyPatch, mirror: str, host: dict[str, str], main: str,
    security: str,
) -> None:
    monkeypatch.setattr(request, "host_archive", lambda _distribution: host)
    wanted = change(default, "distribution", mirror=mirror, fallback_mirror="http://fallback/debian",
                    security_mirror="http://security/")
    found = request.archives(wanted)
    assert [(one.uri, one.suites) for one in found] == [
        (main, ("trixie", "trixie-updates")), (security, ("trixie-security",))]
    assert all("non-free" in one.components for one in found)
    without = change(wanted, "distribution", security_mirror=None, mirror="http://snapshot/1")
    monkeypatch.setattr(request, "host_archive", lambda _distribution: {})
    assert [(one.uri, one.suites) for one in request.archives(without)] == [
        ("http://snapshot/1", ("trixie",))]


def test_a_driver_s_disk_needs_what_mounts_it_on_the_base(
    default: Recipe, repository: Path,
) -> None:
    single = request.groups(default, repository)
    split = request.groups(change(default, "image", model=ImageModel.EXTENSION), repository)
    assert set(split) - set(single) == {"extension_tools"}
    tools = split["extension_tools"]
    assert tools.packages == ("cryptsetup-bin",) and tools.on == "base"
    # The base itself is the same in both models, and so is the driver on it.
    assert {name: split[name] for name in single} == single
    assert "cryptsetup-bin" in single["imagetools"].packages
