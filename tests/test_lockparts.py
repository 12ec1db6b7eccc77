"""What the parts of a lock ask for, and where they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from katagpu import emulator, lockparts, recipe, request
from katagpu.errors import UserError
from katagpu.lockparts import Part
from katagpu.schema import Recipe

Change = Callable[[Recipe], Recipe]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose apt has Debian from a mirror nearby."""
    monkeypatch.setattr(request, "host_archive", lambda distribution: {
        "": "http://mirror.lan/debian", "-security": "http://mirror.lan/debian-security",
    } if distribution == "debian" else {})


@pytest.fixture
def plain(repository: Path) -> Recipe:
    """The default recipe."""
    return recipe.load("debian-trixie", repository)


@pytest.mark.parametrize("name", ["debian-trixie", "nvidia-reference", "ubuntu-lts", "vgpu-grid"])
def test_every_group_is_of_a_part(repository: Path, name: str) -> None:
    found = recipe.load(name, repository)
    assert set(request.groups(found, repository)) <= set(lockparts.OF_GROUP)
    asked = lockparts.asked(found, repository)
    assert {Part.BASE, Part.KERNEL, Part.DRIVER, Part.TOOLKIT, Part.TOOLCHAIN, Part.TOOLS,
            Part.EMULATOR} <= set(asked)
    assert len(set(asked.values())) == len(asked)


def test_groups_of_every_option_are_of_a_part(plain: Recipe, repository: Path) -> None:
    text = (Path(request.__file__)).read_text()
    named = {word for word in lockparts.OF_GROUP if f'"{word}"' in text}
    assert named == set(lockparts.OF_GROUP) - {emulator.GROUP}, "each is a group of request.py"


def fields(**changes: object) -> Change:
    """A recipe with these fields of its sections: `section__field`."""
    def change(found: Recipe) -> Recipe:
        for name, value in changes.items():
            section, _, field = name.partition("__")
            value = replace(getattr(found, section), **{field: value}) if field else value
            found = replace(found, **{section: value})
        return found

    return change


@pytest.mark.parametrize("change", [
    fields(distribution__mirror="http://snapshot.example.org/debian"),
    fields(distribution__fallback_mirror="http://other.example.org/debian"),
    fields(distribution__security_mirror=None), fields(distribution__keyring="/other.gpg"),
    fields(kernel__features=("drm",)),
    fields(image__dax_header=True),
])
def test_addresses_and_what_needs_no_file_are_not_asked_for(
    plain: Recipe, repository: Path, change: Change,
) -> None:
    assert lockparts.asked(change(plain), repository) == lockparts.asked(plain, repository)


@pytest.mark.parametrize(("change", "parts"), [
    (fields(driver__version="535.216.01"), {"driver"}),
    (fields(driver__kernel_module=recipe.KernelModule.CLOSED), {"driver"}),
    (fields(rootfs__packages=("nfs-common",)), {"base"}),
    (fields(rootfs__extra_packages=("make",)), {"toolchain"}),
    (fields(kernel__package="linux-source-6.13"), {"kernel"}),
    (fields(kernel__source=recipe.KernelSource.KERNEL_ORG, kernel__version="6.12.30"), {"kernel"}),
    (fields(toolkit__version="v1.18.0"), {"toolkit"}),
    (fields(agent=recipe.Agent(file="agent")), {"agent", "base"}),  # and its libraries
    (fields(distribution__suite="forky"), {"base", "driver", "kernel", "toolchain"}),
])
def test_what_a_part_asks_for(
    plain: Recipe, repository: Path, change: Change, parts: set[str],
) -> None:
    before = lockparts.asked(plain, repository)
    after = lockparts.asked(change(plain), repository)
    differ = {part for part in {*before, *after} if before.get(part) != after.get(part)}
    assert differ == parts


def test_public_addresses_and_those_of_this_host(plain: Recipe, repository: Path) -> None:
    assert lockparts.origins(plain, repository) == {
        "guest": "http://ftp.debian.org/debian",
        "guest-security": "http://security.debian.org/debian-security"}
    assert lockparts.here(plain, repository) == {
        "guest": "http://mirror.lan/debian", "guest-security": "http://mirror.lan/debian-security"}
    assert lockparts.set_of(plain, emulator.GROUP) == "guest"


def test_of_an_ubuntu_guest(repository: Path) -> None:
    found = recipe.load("ubuntu-lts", repository)
    assert set(lockparts.origins(found, repository)) == {
        "guest", "guest-security", "tools", "tools-security"}
    here = lockparts.here(found, repository)
    assert here["guest"] == "http://archive.ubuntu.com/ubuntu"
    assert here["tools"] == "http://mirror.lan/debian"
    assert lockparts.set_of(found, emulator.GROUP) == "tools"
    assert lockparts.set_of(found, "imagetools", "tools") == "tools"


def test_a_mirror_in_the_recipe_is_public(plain: Recipe, repository: Path) -> None:
    own = fields(distribution__mirror="https://snapshot.example.org/debian/20251101T000000Z/")(plain)
    assert lockparts.origins(own, repository)["guest"] == \
        lockparts.here(own, repository)["guest"] == \
        "https://snapshot.example.org/debian/20251101T000000Z"


def test_repositories_are_archives_too(plain: Recipe, repository: Path) -> None:
    own = fields(toolkit=recipe.Toolkit(source=recipe.ToolkitSource.APT))(plain)
    assert lockparts.origins(own, repository)["repository-toolkit"].startswith(
        "https://nvidia.github.io/libnvidia-container/stable/deb/amd64")


def test_names_of_parts() -> None:
    assert lockparts.named("driver, base", Part) == [Part.DRIVER, Part.BASE]
    with pytest.raises(UserError, match="no part 'nothing'") as refused:
        lockparts.named("driver,nothing", [Part.DRIVER, Part.BASE])
    assert refused.value.hint is not None and "base, driver" in refused.value.hint
    assert msgspec.json.encode(Part.BASE) == b'"base"'
