"""What a recipe asks the archives for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from katagpu import recipe, request
from katagpu.errors import UserError
from katagpu.recipe import (
    Agent,
    Capability,
    DistributionId,
    DriverSource,
    Headers,
    ImageModel,
    KernelModule,
    KernelSource,
    Recipe,
    Repository,
    Service,
    ToolkitMode,
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


# repositories beside the distribution's


KEY = "C95B321B61E88C1809C4F759DDCAE044F796ECB0"
OTHER = Repository(uri="http://mine/$(ARCH)/deb", suite="stable", components=("main",),
                   signed_by="keys/mine.asc", fingerprint=KEY)


def apt(old: Recipe, **fields: Any) -> Recipe:
    """A recipe with the toolkit from apt."""
    return change(old, "toolkit", **{"source": ToolkitSource.APT, "version": "1.17.8-1", **fields})


def test_a_toolkit_from_apt(default: Recipe, repository: Path) -> None:
    groups = request.groups(apt(default), repository)
    toolkit = groups["toolkit"]
    assert (toolkit.packages, toolkit.on) == (("nvidia-container-toolkit",), "base")
    (pin,) = toolkit.pins
    assert pin.version == "1.17.8-1" and pin.leader == "nvidia-container-toolkit"
    for name in ("nvidia-container-toolkit", "nvidia-container-toolkit-base",
                 "libnvidia-container1", "libnvidia-container-tools"):
        assert pin.has(name)
    assert not pin.has("libc6") and not pin.has("libcuda1")
    assert groups["driver_user"].on == "toolkit"
    hook = request.groups(apt(default, mode=ToolkitMode.HOOK), repository)["toolkit"]
    assert "libnvidia-container-tools" in hook.packages  # nvidia-container-cli


def test_where_the_toolkit_comes_from(default: Recipe, repository: Path) -> None:
    assert request.repositories(default, repository) == {}
    found = request.request(apt(default), repository).repositories
    assert list(found) == ["toolkit"]
    archive = found["toolkit"].archive
    assert archive.uri == "https://nvidia.github.io/libnvidia-container/stable/deb/amd64"
    assert (archive.suites, archive.components) == (("/",), ())
    assert archive.keyring == "https://nvidia.github.io/libnvidia-container/gpgkey"
    mine = request.repositories(apt(default, repository=OTHER), repository)["toolkit"]
    assert mine.archive.uri == "http://mine/amd64/deb"
    assert mine.archive.keyring == str(repository / "keys/mine.asc")
    assert mine.fingerprint == KEY


def serving(old: Recipe, version: str, *services: Service) -> Recipe:
    """A recipe with services, and a version of the driver."""
    return replace(change(old, "driver", version=version), services=services,
                   nvidia_repository=OTHER)


@pytest.mark.parametrize(("version", "suffix"), [
    ("550.163.01", "-550"), ("575.57.08", "-575"), ("580.65.06", ""), ("590.44.01", "")])
def test_the_fabric_manager_has_the_driver_s_version(
    default: Recipe, repository: Path, version: str, suffix: str,
) -> None:
    wanted = serving(default, version, Service.FABRICMANAGER)
    services = request.groups(wanted, repository)["services"]
    assert services.packages == (f"nvidia-fabricmanager{suffix}",)
    assert (services.on, services.repository) == ("driver_user", "nvidia")
    assert services.pins[0].version == f"{version}-*"
    assert list(request.repositories(wanted, repository)) == ["nvidia"]


def test_dcgm_has_its_own_version_and_reads_switches(default: Recipe, repository: Path) -> None:
    both = serving(default, "550.163.01", Service.DCGM, Service.FABRICMANAGER)
    services = request.groups(both, repository)["services"]
    assert services.packages == ("nvidia-fabricmanager-550", "libnvidia-nscq-550",
                                 "datacenter-gpu-manager-4-core")
    assert services.pins[0].has("libnvidia-nscq-550")
    assert services.pins[1].version is None
    alone = request.groups(serving(default, "550.163.01", Service.DCGM), repository)["services"]
    assert alone.packages == ("datacenter-gpu-manager-4-core",)


@pytest.mark.parametrize("more", [
    {"version": "1.17.9-1"}, {"version": None}, {"mode": ToolkitMode.HOOK}, {"repository": OTHER},
])
def test_what_is_asked_of_a_repository_is_in_the_identity(
    default: Recipe, repository: Path, more: dict[str, Any],
) -> None:
    assert request.identity(apt(default, **more), repository) != request.identity(
        apt(default), repository)


def test_a_repository_that_nothing_is_taken_from_is_not(default: Recipe, repository: Path) -> None:
    assert request.identity(change(default, "toolkit", repository=OTHER), repository) == \
        request.identity(default, repository)


# distributions


UBUNTU = {"id": DistributionId.UBUNTU, "suite": "focal", "components": None,
          "keyring": "keys/ubuntu/archive-2018.asc"}


def test_the_tools_of_an_ubuntu_guest_are_debians(default: Recipe, repository: Path) -> None:
    focal = change(default, "distribution", **UBUNTU)
    sets = {name: group.archives for name, group in request.groups(focal, repository).items()}
    assert sets == {"stage0": "tools", "toolchain": "guest", "imagetools": "tools",
                    "base": "guest", "kernel_source": "guest", "driver_user": "guest",
                    "driver_source": "guest"}
    assert {name: one.suite for name, one in request.distributions(focal).items()} == {
        "guest": "focal", "tools": "trixie"}


def test_a_guest_of_the_tools_suite_has_one_set_of_archives(default: Recipe,
                                                            repository: Path) -> None:
    groups = request.groups(default, repository).values()
    assert {group.archives for group in groups} == {"guest"}
    assert list(request.distributions(default)) == ["guest"]
    older = change(default, "distribution", suite="bookworm")
    assert list(request.distributions(older)) == ["guest", "tools"]


def test_a_recipe_may_name_other_tools(default: Recipe, repository: Path) -> None:
    snapshot = replace(default.distribution, mirror="http://snapshot/1", security_mirror=None)
    other = replace(default, tools=snapshot)
    assert request.distributions(other)["tools"] is snapshot
    assert request.groups(other, repository)["stage0"].archives == "tools"
    assert request.identity(other, repository) != request.identity(default, repository)


def test_the_archives_of_ubuntu(default: Recipe, repository: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "host_archive", lambda _distribution: {})
    focal = change(default, "distribution", **UBUNTU, security_mirror="http://security.invalid/u",
                   fallback_mirror="http://archive.invalid/u")
    main, security = request.archives(focal.distribution, repository)
    assert (main.uri, main.suites) == ("http://archive.invalid/u", ("focal", "focal-updates"))
    assert (security.uri, security.suites) == ("http://security.invalid/u", ("focal-security",))
    assert main.components == ("main", "restricted", "universe", "multiverse")
    assert main.keyring == str(repository / "keys/ubuntu/archive-2018.asc")


def test_a_keyring_that_is_not_on_this_host(default: Recipe, repository: Path) -> None:
    other = change(default, "distribution", keyring="/nowhere/debian.gpg")
    with pytest.raises(UserError, match=r"keyring /nowhere/debian\.gpg of .* is not there"):
        request.request(other, repository)


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


def test_the_base_has_what_a_released_agent_is_linked_to(default: Recipe, repository: Path) -> None:
    with_agent = replace(default, agent=Agent(file="kata-agent"))
    groups = request.groups(with_agent, repository)
    assert groups["base"].packages == (*request.BASE, "libdevmapper1.02.1", "libseccomp2")
    plain = request.groups(default, repository)
    assert plain["base"].packages == request.BASE
    assert {name for name in groups if groups[name] != plain[name]} == {"base"}
    assert request.identity(with_agent, repository) != request.identity(default, repository)
    # The locks of both share what does not stand on the base.
    one, other = (request.digests(each, repository) for each in (with_agent, default))
    assert {name for name in one if one[name] != other[name]} == {"base", "driver_user"}


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
    default: Recipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    mirror: str, host: dict[str, str], main: str, security: str,
) -> None:
    monkeypatch.setattr(request, "host_archive", lambda _distribution: host)
    wanted = change(default, "distribution", mirror=mirror, fallback_mirror="http://fallback/debian",
                    security_mirror="http://security/")
    found = request.archives(wanted.distribution, Path("/repository"))
    assert [(one.uri, one.suites) for one in found] == [
        (main, ("trixie", "trixie-updates")), (security, ("trixie-security",))]
    fell_back = "apt has no debian to offer; trixie comes from `fallback_mirror`, http://fallback/"
    assert (fell_back in capfd.readouterr().err) == (main == "http://fallback/debian")
    assert all("non-free" in one.components for one in found)
    without = change(wanted, "distribution", security_mirror=None, mirror="http://snapshot/1")
    monkeypatch.setattr(request, "host_archive", lambda _distribution: {})
    assert [(one.uri, one.suites) for one in request.archives(without.distribution, Path("/"))] == [
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
