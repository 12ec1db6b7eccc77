"""What a release says of itself, and what is refused of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from katagpu.errors import UserError
from katagpu.release import layout
from katagpu.release.layout import File, Release

FILE = File(name="vmlinuz-1.0.0", source="vmlinuz-6.1", sha256="a" * 64, size=3,
            media_type="application/x", link="vmlinuz.container", part="vmlinuz")
RELEASE = Release(recipe="toy", version="1.0.0", files=(FILE,), previous="0.9.0")


def test_a_round_trip() -> None:
    assert layout.parse(layout.render(RELEASE), "here") == RELEASE
    assert RELEASE.file("vmlinuz-6.1") is FILE
    assert RELEASE.file("none") is None
    sums = {"b": "b" * 64, "a": "a" * 64}
    assert layout.parse_sums(layout.render_sums(sums), "here") == sums
    assert layout.render_sums(sums).startswith(b"a" * 64 + b"  a\n")


@pytest.mark.parametrize(("field", "value"), [
    ("name", "../x"), ("name", "/etc/passwd"), ("name", ".hidden"), ("name", ""), ("name", 1),
    ("link", "a/b"), ("source", "a\nb"), ("sha256", "A" * 64), ("sha256", None), ("size", -1),
    ("size", True), ("size", "1"), ("size", 1 << 50)])
def test_a_file_that_is_refused(field: str, value: Any) -> None:
    content = json.loads(layout.render(RELEASE))
    content["files"][0][field] = value
    with pytest.raises(UserError):
        layout.parse(json.dumps(content).encode(), "here")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"{\"schema\": 1}", b"\xff", b"null"])
def test_what_is_no_release(data: bytes) -> None:
    with pytest.raises(UserError, match="here"):
        layout.parse(data, "here")


def test_another_schema() -> None:
    data = layout.render(RELEASE).replace(b'"schema": 1', b'"schema": 2')
    with pytest.raises(UserError, match="schema 2"):
        layout.parse(data, "here")


@pytest.mark.parametrize("data", [b"what\n", b"a" * 64 + b"  ../x\n", b"a  b\n", b"\xff\n"])
def test_sums_that_are_refused(data: bytes) -> None:
    with pytest.raises(UserError):
        layout.parse_sums(data, "here")


def test_versions() -> None:
    ordered = ["0.9.0", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-rc.2", "1.0.0-rc.10", "1.0.0",
               "1.2.0", "1.10.0"]
    assert sorted(reversed(ordered), key=layout.order) == ordered
    for word in ordered:
        assert layout.version(word) == word
    for word in ("1", "1.0", "v1.0.0", "1.0.0/..", "", "1.0.0-", "1.0.0 "):
        with pytest.raises(UserError, match="no version"):
            layout.version(word)


@pytest.mark.parametrize(("name", "kind"), [
    ("kata-x-nvidia-gpu-extension-550.1.image", "application/vnd.katagpu.extension.disk"),
    ("kata-x-nvidia-gpu-base.image", "application/vnd.katagpu.image.disk"),
    ("sbom.spdx.json", "application/spdx+json"), ("sbom-1.0.0.cdx.json",
                                                   "application/vnd.cyclonedx+json"),
    ("sizes.json", "application/json"), ("whatever", "application/octet-stream")])
def test_media_types(name: str, kind: str) -> None:
    assert layout.media_type(name) == kind
