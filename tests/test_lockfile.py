"""The text of a committed lock: the same for the same lock, one line for each package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from katagpu import lockfile
from katagpu.errors import UserError
from katagpu.lock import File
from katagpu.lockfile import LockedDeb, LockedPart, LockFile

RECIPE = "toy"


def deb(name: str, version: str = "1:1.0+b1") -> LockedDeb:
    """A package."""
    return LockedDeb(package=name, version=version, architecture="amd64", size=7, sha256="0" * 64,
                     archive="guest", path=f"pool/{name}_1.0%2bb1_amd64.deb")


LOCK = LockFile(
    recipe=RECIPE, archives={"guest": "http://deb.example.org/debian"}, parts={
        "toolkit": LockedPart(asked="2" * 64, modules={"example.org/b v1": "h1:b=",
                                                       "example.org/a v1": "h1:ä="}),
        "base": LockedPart(asked="1" * 64, packages={"base": (deb("app"), deb("lib"))}),
        "kernel": LockedPart(asked="3" * 64, files={
            "tarball": File(sha256="4" * 64, size=9, url="https://example.org/linux.tar.xz",
                            signer="AB" * 20)})})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with that lock."""
    found = tmp_path / "toy.lock"
    lockfile.write(LOCK, found)
    return found


def refused(path: Path, recipe: str = RECIPE) -> str:
    """What is said of a file."""
    with pytest.raises(UserError) as failure:
        lockfile.read(path, recipe)
    assert failure.value.status == 1
    assert str(path) in failure.value.what and failure.value.hint
    return str(failure.value)


def test_there_and_back(path: Path, tmp_path: Path) -> None:
    assert lockfile.read(path, RECIPE) == LOCK
    assert lockfile.read(tmp_path / "none.lock", RECIPE) is None
    assert not list(tmp_path.glob(".*"))


def test_the_text(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    assert json.loads(text)["sha256"] == lockfile.digest(LOCK)
    assert lines[1] == f' "sha256": "{lockfile.digest(LOCK)}",'
    assert sum('"package": "app"' in line for line in lines) == 1
    (app,) = [line for line in lines if '"package": "app"' in line]
    assert app == (
        '     {"package": "app", "version": "1:1.0+b1", "architecture": "amd64", "size": 7, '
        f'"sha256": "{"0" * 64}", "archive": "guest", "path": "pool/app_1.0%2bb1_amd64.deb"}},')
    assert '    "example.org/a v1": "h1:ä=",' in lines
    assert [line.strip() for line in lines if line.startswith("  \"") and line.endswith("{")] == [
        '"base": {', '"kernel": {', '"toolkit": {'], "sorted"
    assert text.endswith("}\n")


def test_another_order_is_the_same_text() -> None:
    turned = replace(LOCK, parts=dict(reversed(LOCK.parts.items())))
    assert lockfile.text(turned) == lockfile.text(LOCK)


def test_one_package_is_one_line_of_a_diff() -> None:
    newer = replace(LOCK.parts["base"], packages={"base": (deb("app", "2"), deb("lib"))})
    changed = lockfile.text(replace(LOCK, parts={**LOCK.parts, "base": newer})).splitlines()
    before = lockfile.text(LOCK).splitlines()
    assert len(changed) == len(before)
    assert [old for old, new in zip(before, changed, strict=True) if old != new] == [
        before[1], next(line for line in before if '"app"' in line)]


def test_as_builds_read_it() -> None:
    found = LOCK.lock()
    assert found.version("base", "app") == "1:1.0+b1"
    assert found.group("base")[0].url == \
        "http://deb.example.org/debian/pool/app_1.0%2bb1_amd64.deb"
    assert found.pins.archives == LOCK.archives
    assert found.pins.files["kernel/tarball"].signer == "AB" * 20
    assert found.pins.modules["example.org/b v1"] == "h1:b="


@pytest.mark.parametrize(("before", "after"), [
    ("1:1.0+b1", "1:1.0+b2"), ('"size": 7', '"size": 8'), ("pool/app", "pool/apq"),
    ("deb.example.org", "mirror.lan"), ("h1:b=", "h1:c="), (' "format"', '  "format"'),
    ("}\n", "}\n\n"), ('"recipe": "toy"', '"recipe": "tox"'),
])
def test_every_edit_by_hand_is_found(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    head, _, tail = text.rpartition(before)
    path.write_text(head + after + tail)
    assert "edited by hand" in refused(path)
    assert "git checkout" in refused(path)


def test_another_digest_by_hand(path: Path) -> None:
    path.write_text(path.read_text().replace(lockfile.digest(LOCK), "f" * 64))
    assert "edited by hand" in refused(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}", b'{\n "sha256": 7,\n}',
                                     b'[1],\n"kind": 1}', b"null,\n", b"1,\n2"])
def test_what_is_no_lock(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "not a lock" in refused(path)


def test_a_merge_that_was_left(path: Path) -> None:
    path.write_text(path.read_text().replace(' "kind"', "<<<<<<< HEAD\n \"kind\""))
    assert "conflict markers" in refused(path)


def test_another_recipe_s(path: Path) -> None:
    said = refused(path, "other")
    assert "is the lock of another recipe, 'toy'" in said
    assert "`./doitw recipe=other lock` makes the lock of other" in said


def test_a_format_of_another_day(path: Path) -> None:
    lockfile.write(replace(LOCK, format=99), path)
    assert "not a lock that this version of katagpu reads" in refused(path)


@pytest.mark.parametrize(("before", "after", "said"), [
    ('"recipe": "toy",', '', "missing required field `recipe`"), ('"size":', '"sizes":', "size"),
    ('"guest": "http', '"another": "http', "archive 'guest', which has no address"),
    ('"asked":', '"wanted":', "unknown field `wanted`"), ('"size": 7', '"size": "7"', "Expected")])
def test_an_edit_with_a_digest_of_its_own(path: Path, before: str, after: str, said: str) -> None:
    """As of a script that mends the first line too."""
    body = path.read_text().partition(",\n")[2]
    assert before in body
    body = body.replace(before, after, 1)
    sha256 = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(f'{{\n "sha256": "{sha256}",\n{body}')
    assert "is not a lock that this version of katagpu reads" in refused(path)
    assert said in refused(path)


def test_line_ends_of_another_system(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert lockfile.read(path, RECIPE) == LOCK


def test_a_directory_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*x\.lock: Is a directory"):
        lockfile.read(tmp_path / "x.lock", RECIPE)
