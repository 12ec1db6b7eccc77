"""Which Kata reads which key: compared with the keys of every release, recorded from its source."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu import kataconfig, kataversions
from katagpu.errors import UserError
from katagpu.kataconfig import Bar, Extension, KataSettings, Plug, Port, ToolkitMode
from katagpu.kataversions import Shim, Version, known, parse, reads_drop_ins

FACTS = json.loads((Path(__file__).parent / "host/data/kata-keys.json").read_text())
GROUPS = {"hypervisor.qemu": "hypervisor", "agent.kata": "agent", "runtime": "runtime"}
LINE = (f"root_hash={'ab' * 32},salt={'01' * 32},data_blocks=12,data_block_size=4096,"
        "hash_block_size=4096")


def number(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def reads(shim: str, release: str, group: str, key: str) -> bool:
    """Does the release's source have the key?"""
    return any(number(first) <= number(release) <= number(last)
               for first, last in FACTS["keys"][shim][group].get(key, []))


def releases(shim: Shim) -> list[str]:
    return [text for text in FACTS["releases"][str(shim)]
            if number(text) >= tuple(kataversions.OLDEST)]


def every() -> Iterator[tuple[Shim, str]]:
    for shim in Shim:
        for release in releases(shim):
            yield shim, release


def test_the_facts_are_of_every_release() -> None:
    assert len(releases(Shim.GO)) > 100 and len(releases(Shim.RUST)) > 35
    assert releases(Shim.GO)[-1] == releases(Shim.RUST)[-1] == str(kataversions.NEWEST)
    assert releases(Shim.GO)[0] == str(kataversions.OLDEST)


@pytest.mark.parametrize("shim", list(Shim))
def test_each_key_with_a_history_is_as_in_the_source(shim: Shim) -> None:
    for table, keys in kataversions._TABLES.items():
        for key, release in itertools.product(keys, releases(shim)):
            assert known(shim, parse(release), table, key) is \
                reads(str(shim), release, GROUPS[table], key), f"{shim} {release} [{table}] {key}"


def drop_ins(shim: Shim, release: str) -> Iterator[dict[str, Any]]:
    """All that can be written for a release."""
    version = parse(release)
    for bar, plug, port, mode, extra in itertools.product(
            Bar, Plug, Port, (ToolkitMode.CDI, ToolkitMode.HOOK), (
            {"image": "/i", "rootfs_type": "erofs"}, {"image": "/i", "rootfs_type": "ext4",
                                                      "dax_header": True},
            {"initrd": "/r", "rootfs_type": "ext4"},
            {"image": "/i", "rootfs_type": "erofs", "kernel_verity_params": LINE,
             "extensions": (Extension(name="gpu", path="/g"),)})):
        try:
            settings = KataSettings(kernel="/k", shim=shim, version=version, bar=bar, plug=plug,
                                    port=port, toolkit_mode=mode,
                                    **extra)  # type: ignore[arg-type]
        except UserError:
            continue
        yield tomllib.loads(kataconfig.render_drop_in(settings))
        yield tomllib.loads(kataconfig.render_tables(kataconfig.host_tables(settings)))


@pytest.mark.parametrize(("shim", "release"), list(every()),
                         ids=lambda value: str(value))
def test_nothing_is_written_that_the_release_does_not_read(shim: Shim, release: str) -> None:
    written = 0
    for drop_in in drop_ins(shim, release):
        for table, group in GROUPS.items():
            keys: Any = drop_in
            for part in table.split("."):
                keys = keys.get(part, {})
            for key in keys:
                assert reads(str(shim), release, group, key), f"[{table}] {key}"
                written += 1
    assert written > 10


@pytest.mark.parametrize(("text", "version"), [
    ("4.1.0", (4, 1, 0)), ("3.2.0-rc0", (3, 2, 0)), ("3.25", (3, 25, 0)), ("v2.5.2", (2, 5, 2)),
    ("kata-runtime  : 2.5.2\n   commit : 1234567", (2, 5, 2)), ("4.7.3", (4, 7, 3)),
    ('Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: 3.2.0, '
     "commit: 12", (3, 2, 0)), ("1.3.0", (1, 3, 0)), ("3.3.0-alpha0-37-gb99f574", (3, 3, 0))])
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert parse(text) == version


@pytest.mark.parametrize(("text", "word"), [
    ("latest", "is no version"), ("", "is no version"), ("4", "is no version"),
    ("1.2.2", "cannot give a GPU"), ("0.9.1", "cannot give a GPU"),
    ("5.0.0", "not known here"), ("10.2", "not known here")])
def test_versions_that_are_not_known(text: str, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        parse(text)
    assert caught.value.hint


def test_since_when_drop_ins_are_read() -> None:
    assert not reads_drop_ins(Shim.GO, Version(2, 4, 3))
    assert reads_drop_ins(Shim.GO, Version(2, 5, 0))
    assert reads_drop_ins(Shim.RUST, Version(3, 0, 0))


def test_words_are_text() -> None:
    assert f"{Shim.RUST}" == str(Shim.RUST) == Shim.RUST.value == "runtime-rs"
    assert Shim("go") is Shim.GO
