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
)
from katagpu.schema import Agent, Section


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
    ("mode: cdi", "debs: [a.deb]", "toolkit.debs: belongs to `source: debs`", "remove"),
    ("[compute, utility]", "[compute, graphics]",
     "driver.capabilities[1]: 'graphics' needs DRM", "features: [drm]"),
    ("[compute, utility]", "[compute, cuda]", "driver.capabilities[1]: 'cuda' is not valid",
     "known: compute"),
    ("agent: null", "agent: {}", "agent: give one of file, release and image", ""),
    ("agent: null", "agent: {file: a, image: b}", "agent: give one of file, release and image, "
     "not file and image", ""),
    ("agent: null", "agent: {release: https://example.invalid/a}",
     "`release` and `sha256` belong together", ""),
    ("agent: null", "agent: {release: https://example.invalid/a, sha256: abc}",
     "agent.sha256: 'abc' is not valid", "64 hexadecimal digits"),
    ("compression: zstd", "level: 99", "image.level: 99 is not a level of zstd", "1 to 19"),
    ("dax_header: false", "{", "this is not YAML", ""),
    ("arch: x86_64", "on: x86_64", "'on' cannot be the name of a field", ""),
]


@pytest.mark.parametrize(("old", "new", "what", "cure"), CASES, ids=[case[1] for case in CASES])
def test_bad_fields_are_named_with_their_line(
        root: Path, old: str, new: str, what: str, cure: str) -> None:
    line = change(root, old, new)
    said = refused(root)
    assert what in said and cure in said
    assert said.startswith(f"{root}/recipes/debian-trixie.yaml:{line}: ") or "YAML" in said


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


def test_kernel_org_needs_a_version(root: Path) -> None:
    change(root, "  source: debian\n  package: linux-source-6.12", "  source: kernel.org")
    assert "`source: kernel.org` needs `version`" in refused(root)


def test_graphics_with_drm(root: Path) -> None:
    change(root, "[compute, utility]", "[compute, graphics]")
    change(root, "features: []", "features: [drm]")
    load("debian-trixie", root)


def test_driver_override(root: Path) -> None:
    assert load("debian-trixie", root, driver="535.1.2").driver.version == "535.1.2"
    with pytest.raises(UserError, match="driver=newest: this is not a version"):
        load("debian-trixie", root, driver="newest")
    change(root, "source: debian\n  version: \"550.163.01\"", "source: none")
    with pytest.raises(UserError, match="has no driver"):
        load("debian-trixie", root, driver="535.1.2")


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
