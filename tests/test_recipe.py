"""Recipes: what is accepted, what is refused, and how the refusal reads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from katagpu import recipe_docs
from katagpu.errors import UserError
from katagpu.recipe import (
    DriverSource,
    ImageFormat,
    ImageModel,
    KernelModule,
    Recipe,
    ToolkitMode,
    load,
    problems,
    versions,
    with_driver,
)
from katagpu.schema import Agent, Capability, Section


@pytest.fixture
def root(tmp_path: Path, repository: Path) -> Path:
    """A repository with the default recipe, and the kernel feature `drm`."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "kernel-configs/features").mkdir(parents=True)
    (tmp_path / "kernel-configs/features/drm.conf").touch()
    text = (repository / "recipes/debian-trixie.yaml").read_text()
    (tmp_path / "recipes/debian-trixie.yaml").write_text(text)
    return tmp_path


def change(root: Path, old: str, new: str) -> int:
    """Edit the recipe; the line (from 1) of the change."""
    path = root / "recipes/debian-trixie.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return text[:text.index(old)].count("\n") + 1


def refused(root: Path) -> str:
    """What is said about the recipe."""
    with pytest.raises(UserError) as caught:
        load("debian-trixie", root)
    assert caught.value.status == 1
    return str(caught.value)


def test_every_recipe_of_the_repository_loads(repository: Path) -> None:
    names = [path.stem for path in (repository / "recipes").glob("*.yaml")]
    assert "debian-trixie" in names
    for name in names:
        assert load(name, repository).name == name


def test_the_default_recipe(root: Path) -> None:
    recipe = load("debian-trixie", root)
    assert recipe.driver.version == "550.163.01"
    assert recipe.driver.kernel_module is KernelModule.OPEN
    with pytest.raises(AttributeError):
        recipe.name = "x"  # type: ignore[misc]


def test_unknown_recipe(root: Path) -> None:
    with pytest.raises(UserError) as caught:
        load("debian-trixi", root)
    assert "no recipe 'debian-trixi'; known: debian-trixie" in str(caught.value)
    assert "did you mean 'debian-trixie'?" in str(caught.value)
    with pytest.raises(UserError, match="no recipe"):
        load("../recipes/debian-trixie", root)
    with pytest.raises(UserError) as caught:
        load("NOPE", root)
    assert str(caught.value).count("debian-trixie") == 1
    assert "NAME.yaml" in str(caught.value.hint)


def test_a_recipe_that_cannot_be_read(root: Path) -> None:
    (root / "recipes/place.yaml").mkdir()
    (root / "recipes/odd.yaml").write_bytes(b"name: odd\nb: \xff\n")
    for name, said, cure in (("place", "cannot read .*place.yaml: Is a directory", "a file"),
                             ("odd", r"odd\.yaml:2: not UTF-8 \(byte 13\)", "save it as UTF-8")):
        with pytest.raises(UserError, match=said) as caught:
            load(name, root)
        assert cure in str(caught.value.hint)


RUNFILE = 'driver:\n  source: debian\n  version: "550.163.01"'

CASES = [
    # old, new, what the error says
    ("arch: x86_64", "archs: x86_64", "archs: there is no such field", "did you mean 'arch'?"),
    ("  kernel_module:", "  kernel_modul:", "driver.kernel_modul: there is no such field",
     "did you mean 'kernel_module'?"),
    ("kernel_module: open", "kernel_module: opened",
     "driver.kernel_module: 'opened' is not valid", "did you mean 'open'?"),
    ("source: debian", "source: 7", "kernel.source: expected text, got a number", '"7"'),
    ('"550.163.01"', "550.16", "driver.version: expected text or null, got a number", '"550.16"'),
    ('"550.163.01"', '"latest"', "driver.version: 'latest' is not valid", "550.163.01"),
    ("features: []", "features: drm", "kernel.features: expected a list, got text", "optional"),
    ("features: []", "features: [dmr]", "kernel.features[0]: there is no kernel feature 'dmr'",
     "did you mean 'drm'?"),
    ("fragments: []", "fragments: [my.conf]", "there is no file", "repository's root"),
    ("  extra_packages: []", "  extra_packages: [gcc, Make]",
     "rootfs.extra_packages[1]: 'Make' is not valid", "lower case"),
    ("dax_header: false", "dax_header: 0", "image.dax_header: expected true or false", "DAX"),
    ("name: debian-trixie", "name: other", "name: 'other' is not the file's name",
     "name: debian-trixie"),
    ("mode: cdi", "mode: hook", "toolkit.mode: `hook` needs nvidia-container-cli, which the "
     "toolkit's Go module does not contain", "source: debs"),
    ("mode: cdi", "mode: [cdi, hook]", "toolkit.mode: expected text, got a list",
     "drops guest hooks"),
    ("  version: v1.17.8", '  version: "1.17.8-1"', "toolkit.version: '1.17.8-1' is not a version "
     "of the Go module", "v1.17.8"),
    ("mode: cdi", "repository: {uri: https://example.invalid/, signed_by: k}",
     "toolkit.repository: belongs to `source: apt`", "remove"),
    ("agent: null", "services: [fabricmanager]", "services[0]: 'fabricmanager' is in NVIDIA's own "
     "repository, and this recipe names none", "nvidia_repository"),
    ("agent: null", "services: [fabric]", "services[0]: 'fabric' is not valid",
     "did you mean 'fabricmanager'?"),
    ("agent: null", "nvidia_repository: {uri: https://example.invalid/, signed_by: k.asc}",
     "nvidia_repository.signed_by: there is no file", "repository's root"),
    ("mode: cdi", "debs: [a.deb]", "toolkit.debs: belongs to `source: debs`", "remove"),
    ("[compute, utility]", "[compute, graphics]",
     "driver.capabilities[1]: 'graphics' needs DRM", "features: [drm]"),
    ("[compute, utility]", "[compute, cuda]", "driver.capabilities[1]: 'cuda' is not valid",
     "compute, display"),
    ("[compute, utility]", "[compute, ngx]", "driver.capabilities[1]: 'ngx' is not in the "
     "distribution's packages", "source: runfile"),
    ("kernel_module: open", "modules_by: installer", "driver.modules_by: belongs to "
     "`source: runfile`", "remove"),
    ("kernel_module: open", "file: a.run", "driver.file: belongs to `source: runfile`", "remove"),
    ("[compute, utility]", "[compute]", "driver.capabilities: every guest needs `utility`",
     "containers get what they ask for"),
    ("agent: null", "agent: {}", "agent: give one of file, release and image", ""),
    ("agent: null", "agent: {file: a, image: b}", "agent: give one of file, release and image, "
     "not file and image", ""),
    ("agent: null", "agent: {release: https://example.invalid/a}",
     "`release` and `sha256` belong together", ""),
    ("agent: null", "agent: {release: https://example.invalid/a, sha256: abc}",
     "agent.sha256: 'abc' is not valid", "64 hexadecimal digits"),
    ("agent: null", "agent: {file: gone/kata-agent}", "agent.file: there is no file",
     "repository's root"),
    ("agent: null", "agent: {image: /nowhere/kata.img}", "agent.image: there is no file "
     "/nowhere/kata.img", "repository's root"),
    ("compression: zstd", "level: 99", "image.level: 99 is not a level of zstd", "1 to 19"),
    ("format: erofs", "verity: true\n  format: initrd", "image.verity: an initrd has no hash tree",
     "use a disk image"),
    ("dax_header: false", "{", "this is not YAML", ""),
    ("dax_header: false", "dax_header: \x01", "this is not YAML: the character U+0001", ""),
    ("dax_header: false", "dax_header: 2025-13-01", "this is not YAML: month must be", ""),
    ("[main, contrib, non-free, non-free-firmware]", "[main, universe]",
     "distribution.components[1]: debian has no part 'universe'", "non-free-firmware"),
    ("keyring: /usr/share/keyrings/debian-archive-keyring.gpg", "keyring: keys/none.asc",
     "distribution.keyring: there is no file", "repository's root"),
    ("id: debian", "id: fedora", "distribution.id: 'fedora' is not valid", "known: debian, ubuntu"),
    ("arch: x86_64", "on: x86_64", "'on' cannot be the name of a field", ""),
    ("agent: null", 'boot_check: {device: "abcd"}', "boot_check.device: which chip abcd has is not "
     "known", "`boot0` and `boot42`, or one of 20b7, "),
    ("agent: null", 'boot_check: {device: "abcd", boot0: "1b2000a1"}',
     "boot_check.device: which chip abcd has", "20b7"),
]


def test_a_boot_check_s_device_with_its_registers(root: Path) -> None:
    change(root, "agent: null",
           'boot_check: {device: "abcd", boot0: "1b2000a1", boot42: "1b2a1000"}')
    assert load("debian-trixie", root).boot_check.device == "abcd"


def test_another_version_of_a_runfile(root: Path) -> None:
    change(root, RUNFILE, RUNFILE.replace(
        "debian", "runfile\n  file: a-{version}.run\n  sha256: " + "a" * 64))
    assert load("debian-trixie", root).driver.sha256 == "a" * 64
    other = load("debian-trixie", root, driver="580.95.05").driver
    assert (other.version, other.sha256, other.file) == ("580.95.05", None, "a-{version}.run")
    change(root, "a-{version}.run", "a-550.163.01.run")
    with pytest.raises(UserError, match=r"the recipe's driver\.file is the file of 550\.163\.01"):
        load("debian-trixie", root, driver="580.95.05")


def test_another_version_over_plain_http_has_no_digest(root: Path) -> None:
    change(root, RUNFILE, RUNFILE.replace(
        "debian", "runfile\n  url: http://x.example/a-{version}.run\n  sha256: " + "a" * 64))
    load("debian-trixie", root)
    with pytest.raises(UserError, match="plain http, and there is no digest of 580"):
        load("debian-trixie", root, driver="580.95.05")
    add(root, OTHERS.replace("debian, ", "runfile, sha256: " + "b" * 64
                             + ", url: 'http://x.example/b', "))
    assert load("debian-trixie", root, driver="570.1").driver.sha256 == "b" * 64


@pytest.mark.parametrize(("place", "version"), [
    ("file: downloads/NVIDIA-Linux-x86_64-550.163.02-grid.run", "550.163.02"),
    ("file: a/510.54/driver-535.98.run", "535.98"),
    ("url: https://x.example/580.1/NVIDIA-Linux-x86_64-580.126.09.run", "580.126.09")])
def test_the_version_of_a_runfile_may_be_that_in_its_name(
    root: Path, place: str, version: str,
) -> None:
    change(root, RUNFILE, f"driver:\n  source: runfile\n  {place}")
    add(root, "\nother_drivers:\n  - {source: runfile, file: x-570.211.01.run}\n")
    found = load("debian-trixie", root)
    assert versions(found) == [version, "570.211.01"]
    assert load("debian-trixie", root, driver="570.211.01").driver.file == "x-570.211.01.run"


@pytest.mark.parametrize("place", ["file: driver.run", "file: 'a-{version}.run'",
                                   "file: NVIDIA-Linux-x86_64.run"])
def test_a_runfile_without_a_version_in_its_name(root: Path, place: str) -> None:
    change(root, RUNFILE, f"driver:\n  source: runfile\n  {place}")
    said = refused(root)
    assert "`source: runfile` needs `version`" in said and "of a name with it in" in said


def test_extra_pkgs_may_bring_the_compiler_of_the_installer(root: Path) -> None:
    change(root, "  capabilities: [compute, utility]\n", "")
    change(root, RUNFILE, RUNFILE.replace("debian", "runfile\n  modules_by: installer"))
    found = load("debian-trixie", root, extra_packages=("make", "gcc"))
    assert found.rootfs.extra_packages == ("make", "gcc")
    with pytest.raises(UserError, match="finds no compiler"):
        load("debian-trixie", root, extra_packages=("gcc",))


@pytest.mark.parametrize(("more", "line", "what", "cure"), [
    ("file: 'a-{versoin}.run'", 23, "driver.file: `{version}` is all", "write it so"),
    ("file: 'a-{0}.run'", 23, "driver.file: `{version}` is all", "write it so"),
    ("url: https://x.example/a\n  file: a.run", 24, "driver.file: `url` is given too", "keep one"),
    ("url: http://x.example/a", 23, "driver.url: over plain http anything may come", "sha256"),
    ("modules_by: installer", 23, "driver.modules_by: nvidia-installer finds no compiler",
     "extra_packages: [gcc, make]"),
    ("capabilities: [compat32, utility]", 23,
     "driver.capabilities[0]: 'compat32' needs 32-bit programs",
     "features: [ia32]"),
])
def test_bad_fields_of_a_runfile(root: Path, more: str, line: int, what: str, cure: str) -> None:
    change(root, "  capabilities: [compute, utility]\n", "")
    change(root, RUNFILE, RUNFILE.replace("debian", f"runfile\n  {more}"))
    said = refused(root)
    assert f"debian-trixie.yaml:{line}: {what}" in said and cure in said


@pytest.mark.parametrize(("old", "new", "what", "cure"), CASES, ids=[case[1] for case in CASES])
def test_bad_fields_are_named_with_their_line(
        root: Path, old: str, new: str, what: str, cure: str) -> None:
    line = change(root, old, new)
    said = refused(root)
    assert what in said and cure in said
    assert said.startswith(f"{root}/recipes/debian-trixie.yaml:{line}: ") or "YAML" in said


def test_debians_source_packages_are_not_in_ubuntu(root: Path) -> None:
    change(root, "id: debian", "id: ubuntu")
    change(root, "  components: [main, contrib, non-free, non-free-firmware]\n", "")
    line = change(root, "  package: linux-source-6.12\n", "  version: '6.12.30'\n") - 1
    said = refused(root)
    assert f"yaml:{line}: kernel.source: the packages of `source: debian` are not in ubuntu" in said
    assert "source: kernel.org" in said
    change(root, "kernel:\n  source: debian", "kernel:\n  source: kernel.org")
    assert "driver.source: the packages of `source: debian` are not in ubuntu" in refused(root)


def test_a_missing_field(root: Path) -> None:
    change(root, "  suite: trixie\n", "")
    assert "distribution: the field 'suite' is missing" in refused(root)


def test_a_field_given_twice(root: Path) -> None:
    change(root, "arch: x86_64", "arch: x86_64\narch: x86_64")
    assert "field 'arch' was given already, in line 3" in refused(root)


@pytest.mark.parametrize("content", [b"", b"[]", b"word", b"\xff\xfe"])
def test_files_that_are_no_recipe(root: Path, content: bytes) -> None:
    (root / "recipes/debian-trixie.yaml").write_bytes(content)
    assert "debian-trixie.yaml" in refused(root)


def test_ext4_is_not_compressed(root: Path) -> None:
    line = change(root, "format: erofs", "format: ext4") + 1
    said = refused(root)
    assert f":{line}: image.compression: ext4 cannot be compressed with zstd" in said
    assert "use `none`" in said


APT = """toolkit:
  source: apt
  version: "1.17.8-1"
  mode: hook
  repository:
    uri: https://example.invalid/deb/$(ARCH)
    suite: stable
    components: [main]
    signed_by: https://example.invalid/key
    fingerprint: C95B321B61E88C1809C4F759DDCAE044F796ECB0
"""
TOOLKIT = """toolkit:
  source: go
  version: v1.17.8
  mode: cdi
"""


def test_a_toolkit_of_any_apt_repository(root: Path) -> None:
    change(root, TOOLKIT, APT)
    assert load("debian-trixie", root).toolkit.repository.suite == "stable"


def test_nvidia_s_repository_is_the_default(root: Path) -> None:
    change(root, TOOLKIT, "toolkit: {source: apt, mode: hook}\n")
    toolkit = load("debian-trixie", root).toolkit
    assert toolkit.repository.uri == (
        "https://nvidia.github.io/libnvidia-container/stable/deb/$(ARCH)")
    assert toolkit.version is None and toolkit.repository.fingerprint is not None


@pytest.mark.parametrize(("old", "new", "what", "cure"), [
    ('"1.17.8-1"', "v1.17.8", "toolkit.version: 'v1.17.8' is not the version of a package",
     '"1.17.8-1"'),
    ('"1.17.8-1"', "1.17", "toolkit.version: expected text or null, got a number", '"1.17"'),
    ("    fingerprint: C95B321B61E88C1809C4F759DDCAE044F796ECB0\n", "",
     "toolkit.repository.signed_by: a key from a URL needs `fingerprint`", "publishes"),
    ("C95B321B61E88C1809C4F759DDCAE044F796ECB0", '"C95B 321B"',
     "toolkit.repository.fingerprint: 'C95B 321B' is not valid", "without blanks"),
    ("https://example.invalid/key", "keys/none.asc",
     "toolkit.repository.signed_by: there is no file", "repository's root"),
    ("    suite: stable\n", "",
     "toolkit.repository.components: a flat repository has none", "remove"),
    ("    components: [main]\n", "", "toolkit.repository: the suite 'stable' needs `components`",
     "slash"),
    ("    uri: https", "    uri: ftp", "toolkit.repository.uri: 'ftp", "address"),
    ("[main]", '["main\\ndeb [trusted=yes] http://evil ./"]',
     "toolkit.repository.components[0]: 'main\\ndeb", "not valid"),
    ("    suite: stable", '    suite: "stable main"', "toolkit.repository.suite: 'stable main'",
     "flat"),
    ("    uri:", "    url:", "toolkit.repository.url: there is no such field",
     "did you mean 'uri'?"),
    ("source: apt", "source: none", "toolkit.version: belongs to", "remove"),
])
def test_bad_fields_of_a_repository(
    root: Path, old: str, new: str, what: str, cure: str,
) -> None:
    change(root, TOOLKIT, APT)
    change(root, old, new)
    said = refused(root)
    assert what in said and cure in said


NVIDIA = """nvidia_repository:
  uri: https://example.invalid/ubuntu2404/x86_64
  signed_by: https://example.invalid/key
  fingerprint: EB693B3035CD5710E231E123A4B469963BF863CC
"""


def test_services_with_nvidia_s_repository(root: Path) -> None:
    change(root, "agent: null", f"services: [dcgm, fabricmanager]\n{NVIDIA}")
    assert load("debian-trixie", root).services == ("dcgm", "fabricmanager")


def test_services_that_make_no_sense(root: Path) -> None:
    change(root, "agent: null", NVIDIA)
    assert "nvidia_repository: no service is taken from it" in refused(root)
    change(root, NVIDIA, f"services: [dcgm, dcgm]\n{NVIDIA}")
    assert "services[1]: 'dcgm' is there twice" in refused(root)
    change(root, "[dcgm, dcgm]", "[dcgm]")
    change(root, 'source: debian\n  version: "550.163.01"', "source: none")
    assert "services[0]: 'dcgm' needs the driver, and there is none" in refused(root)


@pytest.mark.parametrize(("section", "fields", "said"), [
    ("image", {"format": ImageFormat.INITRD, "compression": "zstd"}, "is a disk image"),
    ("toolkit", {"mode": ToolkitMode.HOOK}, "`model: extension` has it elsewhere"),
    ("driver", {"source": DriverSource.NONE, "version": None}, "and there is none"),
])
def test_a_driver_s_disk_that_cannot_be(
    root: Path, section: str, fields: dict[str, object], said: str,
) -> None:
    change(root, "image:\n", "image:\n  model: extension\n")
    recipe = load("debian-trixie", root)
    assert recipe.image.model is ImageModel.EXTENSION
    wrong = replace(recipe, **{section: replace(getattr(recipe, section), **fields)})
    assert [what for _where, what, _cure in problems(wrong, "debian-trixie", root) if said in what]


@pytest.mark.parametrize(("source", "model", "lost"), [
    (DriverSource.RUNFILE, ImageModel.EXTENSION, {"graphics", "display", "compat32"}),
    (DriverSource.RUNFILE, ImageModel.SINGLE, set()),
    (DriverSource.DEBIAN, ImageModel.EXTENSION, set())])
def test_what_the_driver_s_disk_does_not_carry_cannot_be_asked_for(
    root: Path, source: DriverSource, model: ImageModel, lost: set[str],
) -> None:
    recipe = load("debian-trixie", root)
    driver = replace(recipe.driver, source=source, capabilities=tuple(Capability))
    wanted = replace(recipe, driver=driver, image=replace(recipe.image, model=model),
                     other_drivers=(replace(driver, version="570.1"),))
    found = {where: (what, cure) for where, what, cure in problems(wanted, "debian-trixie", root)
             if "whose disk has no" in what}
    numbers = [number for number, name in enumerate(Capability) if name in lost]
    assert set(found) == {(*section, "capabilities", number) for number in numbers
                          for section in (("driver",), ("other_drivers", 0))}
    for number in numbers:
        what, cure = found["driver", "capabilities", number]
        assert what.startswith(f"{list(Capability)[number].value!r} of a `.run` file")
        assert cure is not None and "image: {model: single}" in cure


def test_kernel_org_needs_a_version(root: Path) -> None:
    change(root, "  source: debian\n  package: linux-source-6.12", "  source: kernel.org")
    assert "`source: kernel.org` needs `version`" in refused(root)


def test_graphics_with_drm(root: Path) -> None:
    change(root, "[compute, utility]", "[utility, graphics]")
    change(root, "features: []", "features: [drm]")
    load("debian-trixie", root)


def test_what_does_not_go_with_another_driver_is_its_error(root: Path) -> None:
    change(root, "agent: null", "vgpu: {feature_type: 1}\nother_drivers:\n"
           "  - {source: debian, version: '550.163.01'}")
    change(root, RUNFILE, RUNFILE.replace("debian", "runfile").replace("550.163.01", "580.95.05"))
    assert "other_drivers[0]: a vGPU guest needs NVIDIA's GRID guest driver" in refused(root)


def test_driver_override(root: Path) -> None:
    assert load("debian-trixie", root, driver="535.1.2").driver.version == "535.1.2"
    with pytest.raises(UserError, match="driver=newest: this is not a version"):
        load("debian-trixie", root, driver="newest")
    change(root, "source: debian\n  version: \"550.163.01\"", "source: none")
    with pytest.raises(UserError, match="has no driver"):
        load("debian-trixie", root, driver="535.1.2")


OTHERS = """
other_drivers:
  - {source: debian, version: "535.216.01", kernel_module: closed}
  - {source: debian, version: "570.1"}
"""


def add(root: Path, text: str) -> None:
    """Add to the recipe."""
    with (root / "recipes/debian-trixie.yaml").open("a") as stream:
        stream.write(text)


def test_other_drivers_are_taken_whole_by_their_version(root: Path) -> None:
    add(root, OTHERS)
    default = load("debian-trixie", root)
    assert versions(default) == ["550.163.01", "535.216.01", "570.1"]
    other = load("debian-trixie", root, driver="535.216.01")
    assert other.driver.kernel_module is KernelModule.CLOSED
    assert sorted(versions(other)) == sorted(versions(default))
    # One that is not listed is like the default's section, and the way back is not lost.
    free = load("debian-trixie", root, driver="580.1")
    assert (free.driver.version, free.driver.kernel_module) == ("580.1", KernelModule.OPEN)
    for way in (other, free):
        assert with_driver(way, "550.163.01").driver == default.driver
    with pytest.raises(UserError, match=r"535\.216\.01, 570\.1; driver=all"):
        load("debian-trixie", root, driver="newest")


@pytest.mark.parametrize(("old", "new", "what"), [
    ("570.1", "535.216.01", ":40: other_drivers[1].version: 535.216.01 is listed already"),
    ("570.1", "550.163.01", ":40: other_drivers[1].version: 550.163.01 is listed already"),
    ('version: "570.1"', "capabilities: [utility]",
     ":40: other_drivers[1]: `source: debian` needs `version`"),
    ('source: debian, version: "570.1"', "source: none",
     ":40: other_drivers[1]: a guest without a driver is a recipe of its own"),
    ('"570.1"', '"570.1", capabilities: [graphics]',
     ":40: other_drivers[1].capabilities[0]: 'graphics' needs DRM"),
    ('"570.1"', '"570.1", flavour: open', "other_drivers[1].flavour: there is no such field"),
    ('"570.1"', "570.1", "other_drivers[1].version: expected text"),
])
def test_bad_other_drivers(root: Path, old: str, new: str, what: str) -> None:
    add(root, OTHERS.replace(old, new))
    lines = (root / "recipes/debian-trixie.yaml").read_text().splitlines()
    number = next(index for index, line in enumerate(lines, 1) if "other_drivers" in line) + 2
    assert what.replace(":40:", f":{number}:") in refused(root)


def test_other_drivers_without_a_first_one(root: Path) -> None:
    add(root, OTHERS)
    change(root, "source: debian\n  version: \"550.163.01\"", "source: none")
    assert "other_drivers: the recipe has no driver of its own" in refused(root)


def test_extra_packages_are_added_once(root: Path) -> None:
    change(root, "extra_packages: []", "extra_packages: [make]")
    recipe = load("debian-trixie", root, extra_packages=["gcc", "make"])
    assert recipe.rootfs.extra_packages == ("make", "gcc")
    with pytest.raises(UserError, match="EXTRA_PKGS: '-y'"):
        load("debian-trixie", root, extra_packages=["-y"])


def test_a_cached_recipe_is_the_same_and_needs_no_yaml(root: Path) -> None:
    first = load("debian-trixie", root, cache=root / "cache")
    code = ("import sys; from pathlib import Path; from katagpu.recipe import load;"
            "r = load('debian-trixie', Path(sys.argv[1]), cache=Path(sys.argv[1], 'cache'));"
            "assert 'yaml' not in sys.modules and 'katagpu.yamlfile' not in sys.modules;"
            "import msgspec; sys.stdout.buffer.write(msgspec.json.encode(r))")
    said = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, check=True)
    assert msgspec.json.decode(said.stdout, type=Recipe) == first


def test_a_cached_recipe_is_still_checked(root: Path) -> None:
    change(root, "features: []", "features: [drm]")
    load("debian-trixie", root, cache=root / "cache")
    (root / "kernel-configs/features/drm.conf").unlink()
    with pytest.raises(UserError, match="no kernel feature 'drm'"):
        load("debian-trixie", root, cache=root / "cache")


def test_an_edit_or_a_damaged_cache_is_noticed(root: Path) -> None:
    load("debian-trixie", root, cache=root / "cache")
    for path in (root / "cache").iterdir():
        path.write_bytes(b"{")
    assert load("debian-trixie", root, cache=root / "cache").name == "debian-trixie"
    change(root, "kernel_module: open", "kernel_module: closed")
    assert load("debian-trixie", root, cache=root / "cache").driver.kernel_module == "closed"


def test_a_cache_that_cannot_be_written_does_not_matter(root: Path) -> None:
    (root / "cache").write_text("a file")
    load("debian-trixie", root, cache=root / "cache")


def test_each_agent_form_is_enough(root: Path) -> None:
    recipe = load("debian-trixie", root)
    for name in ("a", "b"):
        (root / name).touch()
    forms = [Agent(file="a"), Agent(image="b"),
             Agent(release="https://example.invalid/", sha256="0" * 64)]
    for agent in forms:
        changed = msgspec.structs.replace(recipe, agent=agent)
        assert list(problems(changed, "debian-trixie", root)) == []


def test_the_reference_is_that_of_the_schema(repository: Path) -> None:
    text = (repository / "docs/recipe.md").read_text()
    assert text == recipe_docs.updated(text), \
        "run: .venv/bin/python -m katagpu.recipe_docs docs/recipe.md"


def test_every_section_is_strict() -> None:
    for section in Section.__subclasses__():
        config = section.__struct_config__
        assert config.frozen and config.forbid_unknown_fields
