"""A release's directory: what is in it, the same again, and what is refused."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from katagpu import finished
from katagpu.embed import MARKER
from katagpu.errors import UserError
from katagpu.release import assemble, layout, notes, signature, signing
from katagpu.release.assemble import Piece
from tests import toybuild
from tests.release import toyrelease
from tests.release.conftest import Keys


def content(place: Path) -> dict[str, bytes]:
    """The bytes of a directory's files."""
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.mark.parametrize(("name", "expected"), [
    ("vmlinuz-6.1", "vmlinuz-6.1-1.0.0"), ("a.image", "a-1.0.0.image"),
    ("sbom.spdx.json", "sbom-1.0.0.spdx.json"), ("50-katagpu.toml", "50-katagpu-1.0.0.toml"),
    ("linux-headers-6.1.deb", "linux-headers-6.1-1.0.0.deb")])
def test_versioned_names(name: str, expected: str) -> None:
    assert assemble.versioned(name, "1.0.0") == expected


def is_in_totos(statement: dict[str, Any]) -> None:
    """By the published definitions of in-toto's statement and SLSA's provenance."""
    from google.protobuf.json_format import MessageToDict, ParseDict
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    Statement.copy_from_pb(ParseDict(statement, statement_pb2.Statement())).validate()
    parsed = ParseDict(statement["predicate"], Provenance())
    assert MessageToDict(parsed) == statement["predicate"]


def test_a_release(tmp_path: Path, keys: Keys) -> None:
    place = toyrelease.make(tmp_path, signer=keys.signer)
    found = content(place)
    release = layout.parse(found[layout.RELEASE], "here")
    assert place.name == release.id == "toy-1.0.0"
    assert {file.name for file in release.files} | {
        layout.RELEASE, layout.SUMS, layout.SIGNATURE, layout.NOTES, layout.INSTALLER,
        layout.HOST,
        "provenance-1.0.0.intoto.jsonl"} == set(found)
    assert all("1.0.0" in file.name for file in release.files)
    assert assemble.damaged(place) == []
    signature.verify(found[layout.SUMS], found[layout.SIGNATURE], keys.public, "it")
    statement = json.loads(base64.b64decode(
        json.loads(found["provenance-1.0.0.intoto.jsonl"])["payload"]))
    is_in_totos(statement)
    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    assert subjects == {name: digest for name, digest in layout.parse_sums(
        found[layout.SUMS], "it").items() if not name.startswith("provenance")}
    assert not list(place.parent.glob(".*"))


@pytest.mark.parametrize("kind", ["keys", "p256"])
def test_the_same_again_elsewhere_and_later(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest,
) -> None:
    signer = request.getfixturevalue(kind).signer
    first = content(toyrelease.make(tmp_path / "a", signer=signer))
    assert content(toyrelease.make(tmp_path / "a", signer=signer)) == first
    assert content(toyrelease.make(tmp_path / "b", signer=signer)) == first


def test_a_signer_that_never_says_the_same(tmp_path: Path) -> None:
    script = tmp_path / "sign"
    script.write_text("#!/bin/sh\ncat >/dev/null\nhead -c 8 /dev/urandom\n")
    script.chmod(0o755)
    signer = signing.CommandSigner(str(script), tmp_path)
    first = content(toyrelease.make(tmp_path, signer=signer))
    assert content(toyrelease.make(tmp_path, signer=signer)) == first


def test_another_content_is_refused(tmp_path: Path, keys: Keys, other_keys: Keys) -> None:
    place = toyrelease.make(tmp_path, signer=keys.signer)
    before = content(place)
    for signer, word in ((keys.signer, "other"), (other_keys.signer, "one"), (None, "one")):
        with pytest.raises(UserError, match="released already, with other content"):
            toyrelease.make(tmp_path, signer=signer, word=word)
    assert content(place) == before
    next(place.glob("*.image")).write_bytes(b"?")
    with pytest.raises(UserError, match="was changed since it was made: kata-toy"):
        toyrelease.make(tmp_path, signer=keys.signer)
    assert not list(place.parent.glob(".*"))


def test_unsigned(tmp_path: Path) -> None:
    found = content(toyrelease.make(tmp_path))
    assert layout.SIGNATURE not in found
    assert "provenance-1.0.0.json" in found


def test_notes(tmp_path: Path, keys: Keys) -> None:
    first = toyrelease.make(tmp_path, "1.9.0", keys.signer)
    assert "first release" in (first / layout.NOTES).read_text()
    changed: dict[str, Any] = {
        "packages": {**toybuild.PACKAGES, "libc6": "2.42-1"}, "driver": "590.1",
        "config": ["CONFIG_SMP=y", "CONFIG_NR_CPUS=64"],
        "sizes": {**toybuild.SIZES, "distribution": 1500}}
    second = toyrelease.make(tmp_path, "1.10.0", keys.signer, "two", **changed)
    text = (second / layout.NOTES).read_text()
    for line in ("## Changes since 1.9.0", "driver.version: 550.163.01 → 590.1",
                 "~ 2.41-12 → 2.42-1: libc6", "CONFIG_NR_CPUS: 8 → 64",
                 "distribution: 1.0 kB → 1.5 kB"):
        assert line in text, line
    between = toyrelease.make(tmp_path, "1.9.5", keys.signer, "three")
    assert "since 1.9.0" in (between / layout.NOTES).read_text()
    before = content(second)
    toyrelease.make(tmp_path, "1.10.0", keys.signer, "two", **changed)
    assert content(second) == before  # it still speaks of 1.9.0
    for path in first.iterdir():
        path.unlink()
    first.rmdir()
    toyrelease.make(tmp_path, "1.10.0", keys.signer, "two", **changed)
    assert content(second) == before
    assert finished.read(second, "it").config == {"SMP": "y", "NR_CPUS": "64"}


def test_files_of_another_build(tmp_path: Path) -> None:
    order = toyrelease.order(tmp_path / "build")
    (tmp_path / "build/kata-toy-nvidia-gpu.image").write_bytes(b"?")
    with pytest.raises(UserError, match="not the file that the manifest names"):
        assemble.make(order, tmp_path / "release")
    without = replace(order, pieces=[piece for piece in order.pieces
                                     if piece.path.name != "manifest.json"])
    with pytest.raises(UserError, match="no manifest"):
        assemble.make(without, tmp_path / "release")
    gone = replace(order, pieces=[Piece(path=tmp_path / "gone")])
    with pytest.raises(UserError, match="cannot make a release"):
        assemble.make(gone, tmp_path / "release")
    assert list((tmp_path / "release").iterdir()) == []


def test_a_client_token_is_never_released(tmp_path: Path) -> None:
    facts: dict[str, Any] = {MARKER: True}
    with pytest.raises(UserError, match="client token"):
        toyrelease.make(tmp_path, **facts)
    assert list((tmp_path / "release").iterdir()) == []


def test_grid_drivers_are_known_by_their_files(tmp_path: Path) -> None:
    plain = notes.read(toyrelease.make(tmp_path / "a"))
    assert not plain.licensed
    entry = toybuild.entry("usr/bin/nvidia-gridd", "daemon")
    grid = notes.read(toyrelease.make(
        tmp_path / "b", files={**toybuild.guest(), entry.path: entry}))
    assert grid.licensed


def test_what_a_killed_run_left(tmp_path: Path) -> None:
    left = tmp_path / "release/.toy-1.0.0.4194305.part"  # no process has this number
    left.mkdir(parents=True)
    (left / "file").touch()
    toyrelease.make(tmp_path)
    assert not left.exists()


def test_what_is_no_whole_release(tmp_path: Path) -> None:
    """As after a copy that broke off, or a file too many."""
    place = toyrelease.make(tmp_path)
    (place / "more").mkdir()
    with pytest.raises(UserError, match=r"was changed since it was made: more"):
        toyrelease.make(tmp_path)
    for name in (layout.SUMS, layout.RELEASE):
        (place / name).unlink()
        with pytest.raises(UserError, match=rf"{name} cannot be read[\s\S]*remove the directory"):
            toyrelease.make(tmp_path)


def test_what_is_not_confirmed_gets_no_name(tmp_path: Path) -> None:
    def confirm() -> None:
        raise UserError("the repository changed")

    order = toyrelease.order(tmp_path / "build")
    with pytest.raises(UserError, match="the repository changed"):
        assemble.make(order, tmp_path / "release", confirm=confirm)
    assert list((tmp_path / "release").iterdir()) == []
