"""How a difference is told: members of trees, bytes of files, stamps of the day."""

from __future__ import annotations

import io
import re
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import zstandard

from katagpu import differences
from katagpu.errors import UserError
from katagpu.store import Kind, Output, Store

FACTS: dict[str, Any] = {"mode": 0o644, "mtime": 1, "uid": 0}


def tar(path: Path, **members: dict[str, Any]) -> Path:
    """A tar with these members: their facts, and `data`."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as made:
        for name, facts in members.items():
            member = tarfile.TarInfo(name)
            data = facts.pop("data", b"data")
            for field, value in {**FACTS, **facts}.items():
                setattr(member, field, value)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("facts", "said"), [
    ({"data": b"dada"}, "/a: content"), ({"mode": 0o600}, "/a: mode"),
    ({"uid": 7}, "/a: owner"), ({"mtime": 2}, "/a: time"),
    ({"pax_headers": {"SCHILY.xattr.user.x": "1"}}, "/a: attributes"),
    ({"type": tarfile.SYMTYPE, "linkname": "x", "data": b""}, "/a: content, kind, link")])
def test_members_of_trees(tmp_path: Path, facts: dict[str, Any], said: str) -> None:
    one = tar(tmp_path / "1.tar", a={}, b={})
    other = tar(tmp_path / "2.tar", a=facts, b={})
    assert list(differences.glance(one, other)) == [said]


def test_members_that_are_not_in_both_and_many(tmp_path: Path) -> None:
    one = tar(tmp_path / "1.tar", a={}, b={})
    other = tar(tmp_path / "2.tar", b={}, c={})
    assert list(differences.glance(one, other)) == ["/a: only in the first",
                                                    "/c: only in the second"]
    many = {f"m{number:02}": {"data": b"x"} for number in range(20)}
    lines = list(differences.glance(tar(tmp_path / "3.tar"), tar(tmp_path / "4.tar", **many)))
    assert len(lines) == differences.MEMBERS + 1 and lines[-1] == "and 8 more"
    swapped = tar(tmp_path / "5.tar", b={}, a={})
    assert list(differences.glance(one, swapped)) == ["the same members in another order"]


def test_bytes_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "BLOCK", 64)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a" * 100 + b"left" + b"z" * 100)
    other.write_bytes(b"a" * 100 + b"right" + b"z" * 100)
    said = list(differences.glance(one, other))
    assert said[0] == "204 bytes and 205" and said[1].startswith("from byte 100: b'")
    assert "left" in said[1] and "right" in said[2]
    other.write_bytes(one.read_bytes() + b"more")
    assert list(differences.glance(one, other))[1].startswith("from byte 204: ")


def test_the_days_of_a_build() -> None:
    start = datetime(2026, 3, 7, 23, 50, tzinfo=UTC).timestamp()
    words = differences.days(start, start + 1200)
    for stamp in (b"2026-03-07T23:59:59Z", b"Mar  7 2026", b"Sat Mar  7 23:59:59 UTC 2026",
                  b"08 Mar 2026", b"Mar  8 2026", b"2026-03-08"):
        assert words.search(stamp), stamp
    for other in (b"2026-03-09", b"Mar  6 2026", b"Mar 17 2026", b"2025-03-07"):
        assert not words.search(other), other


def test_stamps_are_found_in_trees_and_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    plain = tar(tmp_path / "1.tar", a={"data": b"x" * 3000 + b"built 2026-03-07" + b"y" * 3000})
    packed = tmp_path / "packed"
    packed.write_bytes(zstandard.compress(plain.read_bytes()))
    blob, size = store.put(packed)
    output = Output(kind=Kind.TREE, identity="1" * 64, blob=blob, size=size)
    for block in (64, 100, 1 << 20):
        monkeypatch.setattr(differences, "BLOCK", block)
        assert differences.stamps(store, output, re.compile(b"2026-03-0.")) == {"2026-03-07"}
        assert differences.stamps(store, output, re.compile(b"2026-03-08")) == set()


def test_the_program(tmp_path: Path) -> None:
    assert differences.find("/bin/sh") == "/bin/sh"
    with pytest.raises(UserError, match="there is no such program"):
        differences.find(str(tmp_path / "none"))
