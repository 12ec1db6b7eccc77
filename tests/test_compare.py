"""What differs between two builds, as data and as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from katagpu import compare, compare_text, finished
from katagpu.compare import Change, Comparison, How
from katagpu.filelist import Entry, Kind
from tests import toybuild
from tests.toybuild import entry

OTHER = "535.216.01"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where builds are written."""
    return tmp_path


def differences(place: Path, before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """What differs between two builds that are written with these words."""
    builds = [finished.read(toybuild.write(place / name, **words), name)
              for name, words in (("one", before), ("two", after))]
    return compare.compare(*builds)


def lines(found: Comparison, **more: bool) -> list[str]:
    """The text."""
    return list(compare_text.text(found, **more))


def with_files(*entries: Entry, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Words for a build with these files too."""
    files = {path: one for path, one in toybuild.guest().items() if path not in without}
    return {"files": {**files, **{one.path: one for one in entries}}}


def test_a_build_and_itself(place: Path) -> None:
    found = differences(place, {}, {})
    assert found.same
    assert (found.facts, found.checks, found.packages, found.config, found.files) == ((),) * 5
    assert lines(found) == ["one → two", "Nothing differs."]


def test_packages(place: Path) -> None:
    after = {**toybuild.PACKAGES, "libc6": "2.41-13", "new": "1"}
    del after["base-files"]
    found = differences(place, {}, {"packages": after})
    assert found.packages == (
        Change(name="base-files", before="13", after=None),
        Change(name="libc6", before="2.41-12", after="2.41-13"),
        Change(name="new", before=None, after="1"))
    text = lines(found)
    at = text.index("Packages: 1 added, 1 removed, 1 with other versions")
    assert set(text[at + 1:at + 4]) == {"  - base-files 13", "  + new 1",
                                        "  ~ 2.41-12 → 2.41-13: libc6"}


def test_packages_of_one_source_stand_together_the_largest_group_first(place: Path) -> None:
    before = {"a": "9", **{f"lib{number}": "1" for number in range(6)}}
    after = {"a": "10", **{f"lib{number}": "2" for number in range(6)}}
    found = differences(place, {"packages": before}, {"packages": after})
    text = lines(found)
    at = text.index("Packages: 7 with other versions")
    assert text[at + 1:at + 3] == ["  ~ 1 → 2: lib0, lib1, lib2, lib3 … (6)", "  ~ 9 → 10: a"]
    assert "  ~ 1 → 2: lib5" in lines(found, everything=True)


def test_kernel_config(place: Path) -> None:
    config = ["# CONFIG_SMP is not set", "CONFIG_NR_CPUS=16", "CONFIG_PCI=y", "CONFIG_DRM=m"]
    found = differences(place, {}, {"config": config})
    assert found.config == (
        Change(name="DRM", before=None, after="m"), Change(name="NR_CPUS", before="8", after="16"),
        Change(name="SMP", before="y", after=None))
    assert lines(found)[-4:] == [
        "Kernel config: 1 newly set, 1 no longer set, 1 with other values",
        "  CONFIG_DRM: not set → m", "  CONFIG_NR_CPUS: 8 → 16", "  CONFIG_SMP: y → not set"]


def test_facts_of_the_manifest(place: Path) -> None:
    found = differences(place, {"checks": ["warning: one"]}, {
        "recipe": "other", "toolkit": {"source": "go", "version": "v1.18.0"},
        "image": {"dax_header": True}, "kata_agent": {"sha256": "ab" * 32, "size": 7},
        "driver": None, "new_field": [1, 2], "checks": ["every check passed"]})
    facts = {change.name: (change.before, change.after) for change in found.facts}
    assert facts == {
        "recipe": ("toy", "other"), "toolkit.version": ("v1.17.8", "v1.18.0"),
        "image.dax_header": ("no", "yes"), "driver": (None, "none"),
        "driver.version": ("550.163.01", None), "driver.kernel_module": ("open", None),
        "driver.capabilities": ("compute, utility", None), "new_field": (None, "1, 2"),
        "kata_agent": ("none", f"sha256:{'ab' * 32} (7 bytes)")}
    assert [change.before or change.after for change in found.checks] == [
        "warning: one", "every check passed"]
    text = lines(found)
    assert text[1] == "These are guests of different recipes."
    assert {"  recipe: toy → other", "  toolkit.version: v1.17.8 → v1.18.0", "  - warning: one",
            "  + every check passed"} <= set(text)


def test_a_long_list_is_not_shown_whole(place: Path) -> None:
    ids = [f"{number:04x}" for number in range(300)]
    found = differences(place, {"gpus": ids},
                        {"gpus": [*ids[1:], "20b7"]})
    (change,) = found.facts
    assert change.before != change.after
    for said in (change.before, change.after):
        assert said is not None
        assert said.startswith("300 entries (sha256:")


def test_sizes_of_the_parts_and_of_what_is_in_the_guest(place: Path) -> None:
    found = differences(place, {}, {
        "image_size": 9_000_000, "sizes": {"distribution": 1000, "NVIDIA user space: libcuda": 900,
                                      "kata-agent": 50}})
    parts = {part.name: part for part in found.parts}
    assert (parts["image"].before, parts["image"].after, parts["image"].delta) == (
        5000, 9_000_000, 8_995_000)
    assert parts["files"].same and not parts["image"].same
    assert found.sizes is not None
    assert [(size.name, size.delta) for size in found.sizes] == [
        ("NVIDIA user space: libcuda", 200), ("kata-agent", 50), ("licences", -10),
        ("distribution", 0)]
    text = lines(found)
    at = text.index("Sizes")
    assert text[at + 1:] == [
        "     +9.0 MB  image: 5.0 kB → 9.0 MB",
        "      +240 B  in the guest, unpacked: 1.7 kB → 1.9 kB",
        "        +200 B  NVIDIA user space: libcuda: 700 B → 900 B",
        "         +50 B  kata-agent (new)", "         -10 B  licences (gone)"]


def test_the_same_size_is_not_the_same_bytes(place: Path) -> None:
    parts = {"image": {"sha256": "1" * 64, "size": 5000}}
    found = differences(place, {"parts": parts}, {
        "parts": {"image": {"sha256": "2" * 64, "size": 5000}}})
    assert not found.same
    assert "   same size  image: 5.0 kB, other bytes" in lines(found)


# files


def changes(found: Comparison) -> dict[str, tuple[How, tuple[str, ...]]]:
    """How each file differs."""
    assert found.files is not None
    return {change.path: (change.how, change.what) for change in found.files}


@pytest.mark.parametrize(("other", "what"), [
    (entry("usr/bin/true", "other"), ("content",)),
    (entry("usr/bin/true", "other", size=101), ("content",)),
    (entry("usr/bin/true", "true", mode=0o4755), ("mode 0644 → 4755",)),
    (entry("usr/bin/true", "true", uid=3, gid=4), ("owner 0:0 → 3:4",)),
    (entry("usr/bin/true", "true", attributes="security.capability:01"),
     ("attributes none → security.capability:01",)),
    (entry("usr/bin/true", "false", kind=Kind.LINK), ("type file → link",)),
    (entry("usr/bin/true", kind=Kind.DIRECTORY, mode=0o644), ("type file → dir",)),
    (entry("usr/bin/true", "other", mode=0o600), ("content", "mode 0644 → 0600")),
])
def test_what_differs_of_a_file(place: Path, other: Entry, what: tuple[str, ...]) -> None:
    assert changes(differences(place, {}, with_files(other))) == {
        "usr/bin/true": (How.CHANGED, what)}


def test_a_link_s_target(place: Path) -> None:
    found = differences(place, with_files(entry("l", "usr/a", kind=Kind.LINK)),
                        with_files(entry("l", "usr/b", kind=Kind.LINK)))
    assert changes(found) == {"l": (How.CHANGED, ("target usr/a → usr/b",))}
    assert lines(found)[-2:] == ["Files: 1 changed", "  ~             l (target usr/a → usr/b)"]


def test_added_and_removed(place: Path) -> None:
    found = differences(place, with_files(entry("old", size=3000)),
                        with_files(entry("new", size=5_000_000), without=("usr/bin/true",)))
    assert changes(found) == {"new": (How.ADDED, ()), "old": (How.REMOVED, ()),
                              "usr/bin/true": (How.REMOVED, ())}
    assert lines(found)[-4:] == [
        "Files: 1 added (+5.0 MB), 2 removed (-3.1 kB)", "  +    +5.0 MB  new",
        "  -    -3.0 kB  old", "  -     -100 B  usr/bin/true"]


def test_a_driver_bump_shows_what_a_library_became(place: Path) -> None:
    found = differences(place, {}, {"driver": OTHER, "kernel_release": "6.2-toy", "files": {
        **toybuild.guest(OTHER, "6.2-toy"),
        f"usr/lib/libcuda.so.{OTHER}": entry(f"usr/lib/libcuda.so.{OTHER}", "new", size=900)}})
    assert changes(found) == {
        f"usr/lib/libcuda.so.{OTHER}": (How.CHANGED, ("content",)),
        "usr/lib/libcuda.so.1": (How.RENAMED, ()), "usr/lib/modules/6.2-toy": (How.RENAMED, ()),
        "usr/lib/modules/6.2-toy/modules.order": (How.RENAMED, ())}
    assert found.files is not None
    assert (found.files[0].was, found.files[0].delta) == ("usr/lib/libcuda.so.550.163.01", 200)
    text = lines(found)
    assert "Files: 1 changed (+200 B), 3 that only carry another version" in text
    assert f"  ~     +200 B  usr/lib/libcuda.so.{OTHER}" == text[-1]
    assert any(line.endswith("modules.order, was usr/lib/modules/6.1-toy/modules.order")
               for line in lines(found, everything=True))


def test_a_driver_bump_on_a_disk_of_its_own(place: Path) -> None:
    base = {path: one for path, one in toybuild.guest().items() if "libcuda" not in path}
    words = {"files": base, "disk": toybuild.disk(), "disk_sizes": {"NVIDIA kernel modules": 90}}
    after = {**words, "driver": OTHER, "disk_sizes": {"NVIDIA kernel modules": 100},
             "disk": {**toybuild.disk(OTHER), "bin": entry("bin", kind=Kind.DIRECTORY),
                      "bin/nvidia-imex": entry("bin/nvidia-imex", size=3000)}}
    found = differences(place, words, after)
    top = "run/kata-extensions/gpu"
    assert changes(found) == {
        f"{top}/usr/lib/libcuda.so.{OTHER}": (How.CHANGED, ("content",)),
        f"{top}/usr/lib/libcuda.so.1": (How.RENAMED, ()),
        f"{top}/bin": (How.ADDED, ()), f"{top}/bin/nvidia-imex": (How.ADDED, ())}
    text = lines(found)
    assert f"  +    +3.0 kB  {top}/bin/ (1 in it)" in text
    assert "         +10 B  NVIDIA kernel modules: 90 B → 100 B" in text
    assert not any("extension_" in line for line in text)  # the lists tell what is in them


def test_a_new_directory_stands_for_what_is_in_it(place: Path) -> None:
    inner = [entry("opt", kind=Kind.DIRECTORY), entry("opt/x", kind=Kind.DIRECTORY),
             *(entry(f"opt/x/{number}", str(number), size=1000) for number in range(5)),
             entry("empty", kind=Kind.DIRECTORY)]
    found = differences(place, {}, with_files(*inner))
    assert lines(found)[-3:] == ["Files: 8 added (+5.0 kB)", "  +    +5.0 kB  opt/ (6 in it)",
                                 "  +             empty/"]
    assert "  +    +1.0 kB  opt/x/3" in lines(found, everything=True)


def test_long_lists_are_cut_with_a_count_and_the_largest_stay(place: Path) -> None:
    many = [entry(f"usr/bin/{number:03}", str(number), size=number) for number in range(100)]
    config = [f"CONFIG_X{number:02}=y" for number in range(50)] + toybuild.CONFIG
    found = differences(place, {}, {**with_files(*many), "config": config})
    text = lines(found)
    assert text[-1] == "  … and 88 more (all=1 lists them)"
    assert text[-13] == "  +      +99 B  usr/bin/099"
    assert "  … and 38 more (all=1 lists them)" in text
    whole = lines(found, everything=True)
    assert not any("more (all=1" in line for line in whole)
    assert sum("  usr/bin/" in line for line in whole) == 100


def test_names_cannot_reach_the_terminal(place: Path) -> None:
    found = differences(place, {}, with_files(entry("usr/\x1b[2Jx\n\udcff", size=5)))
    assert lines(found)[-1].endswith(r"  usr/\x1b[2Jx\n\udcff")
    assert all(line.isprintable() for line in lines(found))


def test_what_one_build_lacks_is_said(place: Path) -> None:
    one = toybuild.write(place / "one")
    two = toybuild.write(place / "two", packages={})
    (two / "files.mtree").unlink()
    found = compare.compare(finished.read(one, "one"),
                            finished.read(two / "manifest.json", "two"))
    assert found.files is None
    assert lines(found)[-2:] == ["Not compared", "  two has no files.mtree"]


def test_json_has_all_of_it(place: Path) -> None:
    found = differences(place, {}, {"driver": OTHER, "files": toybuild.guest(OTHER)})
    data = json.loads(json.dumps(compare.as_json(found)))
    assert (data["before"], data["after"], data["same"]) == ("one", "two", False)
    (library,) = [change for change in data["files"] if change["how"] == "changed"]
    assert library["was"] == "usr/lib/libcuda.so.550.163.01"
    assert library["after"]["size"] == 700
    assert {part["name"] for part in data["parts"]} == {"image", "kernel_config", "sizes", "files"}
    assert set(data) == {"before", "after", "same", "facts", "checks", "packages", "parts",
                         "config", "sizes", "files", "lacks"}
