"""Go's record of modules: read from what the linker writes, and from a program that Go made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from katagpu import gobuildinfo

SUM = "h1:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
MODULES = (f"path\tx.example/tool/cmd/tool\nmod\tx.example/tool\tv1.2.3\t{SUM}\n"
           f"dep\tx.example/a\tv0.1.0\t{SUM}\ndep\tx.example/b\tv2.0.0+incompatible\n"
           f"=>\tx.example/fork\tv2.0.1\t{SUM}\nbuild\t-trimpath=true\n")


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def program(text: str = MODULES, *, flags: int = 2, before: bytes = b"") -> bytes:
    """An ELF file as far as it is looked at."""
    words = b"\0" * 16 + text.encode() + b"\0" * 16
    record = gobuildinfo.MAGIC + bytes([8, flags]) + b"\0" * 16
    head = (b"\x7fELF" + before).ljust(64, b"\0")
    version = b"go1.24.4"
    return head + record + varint(len(version)) + version + varint(len(words)) + words


def test_modules_and_their_sums(tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(program())
    found = gobuildinfo.read(tmp_path / "tool")
    assert found is not None and found.go == "1.24.4"
    assert found.main == gobuildinfo.Module(path="x.example/tool", version="v1.2.3", sum=SUM)
    assert [(each.path, each.version) for each in found.modules] == [
        ("x.example/a", "v0.1.0"), ("x.example/fork", "v2.0.1")]


@pytest.mark.parametrize("data", [
    b"#!/bin/sh\nexit 0\n" * 10, b"\x7fELF" + bytes(200), program(flags=0),
    program().replace(b"\xff Go", b"\xfe Go")],
    ids=["script", "C", "before 1.18", "no record"])
def test_what_is_not_go_s(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tool").write_bytes(data)
    assert gobuildinfo.read(tmp_path / "tool") is None


def test_the_magic_as_mere_words_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(program(before=b"-" + gobuildinfo.MAGIC))
    found = gobuildinfo.read(tmp_path / "tool")
    assert found is not None and found.main is not None


@pytest.mark.skipif(shutil.which("go") is None, reason="needs go")
def test_a_program_of_go_s_own(tmp_path: Path) -> None:
    (tmp_path / "go.mod").write_text("module x.example/toy\n\ngo 1.21\n")
    (tmp_path / "main.go").write_text("package main\n\nfunc main() {}\n")
    subprocess.run(["go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", "toy",
                    "."], cwd=tmp_path, check=True, env={**os.environ, "GOTOOLCHAIN": "local",
                                                         "GOCACHE": str(tmp_path / "cache")})
    found = gobuildinfo.read(tmp_path / "toy")
    said = subprocess.run(["go", "version", tmp_path / "toy"], check=True, capture_output=True,
                          text=True).stdout
    assert found is not None and found.main is not None and not found.modules
    assert found.main.path == "x.example/toy" and said.split()[-1] == f"go{found.go}"
