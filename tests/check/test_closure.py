"""Programs and libraries: what cannot be loaded is found, and what can be is not."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from katagpu.check import Finding, Severity
from katagpu.check.elf import Damaged, read_binary, read_build_id
from katagpu.check.linker import Linker
from katagpu.check.root import Root

from .toys import LIB, Toy, cache_entries, gcc, ldconfig, library, program


def about(toy: Toy, check: str) -> list[Finding]:
    return [finding for finding in toy.find() if finding.check == check]


def test_a_missing_library_is_named_with_who_needs_it(toy: Toy) -> None:
    library(toy.root / LIB / "libgone.so.3", "libgone.so.3")
    library(toy.root / LIB / "libmid.so.1", "libmid.so.1", toy.root / LIB / "libgone.so.3")
    program(toy.root / "usr/bin/tool", toy.root / LIB / "libmid.so.1",
            "-Wl,--allow-shlib-undefined")
    ldconfig(toy.root, cache_entries(toy.root))
    assert toy.ids() == set()
    (toy.root / LIB / "libgone.so.3").unlink()
    ldconfig(toy.root, cache_entries(toy.root))
    [finding] = about(toy, "elf-needed")
    assert finding.where == f"/{LIB}/libmid.so.1"
    assert "libgone.so.3" in finding.what and "/usr/bin/tool" in finding.what


@pytest.mark.parametrize("option", ["--enable-new-dtags", "--disable-new-dtags"])
def test_origin_in_rpath_and_runpath(toy: Toy, option: str) -> None:
    private = toy.root / "opt/app/lib/libprivate.so.1"
    library(private, "libprivate.so.1")
    program(toy.root / "opt/app/bin/app", private, f"-Wl,{option}", "-Wl,-rpath,$ORIGIN/../lib")
    assert toy.ids() == set()
    private.rename(private.with_name("libother.so"))
    assert toy.ids() == {"elf-needed"}


@pytest.mark.parametrize(("option", "expected"), [
    ("--disable-new-dtags", set()), ("--enable-new-dtags", {"elf-needed"})])
def test_rpath_is_inherited_and_runpath_is_not(toy: Toy, option: str, expected: set[str]) -> None:
    lib = toy.root / "opt/app/lib"
    library(lib / "libdeep.so.1", "libdeep.so.1")
    library(lib / "libupper.so.1", "libupper.so.1", lib / "libdeep.so.1")
    program(toy.root / "opt/app/bin/app", lib / "libupper.so.1", f"-Wl,{option}",
            "-Wl,-rpath,$ORIGIN/../lib", "-Wl,--allow-shlib-undefined",
            f"-Wl,-rpath-link,{lib}")
    assert toy.ids() == expected


def test_a_library_in_a_configured_directory_needs_the_cache(toy: Toy) -> None:
    extra = toy.root / "opt/extra/libextra.so.1"
    library(extra, "libextra.so.1")
    program(toy.root / "usr/bin/tool", extra)
    (toy.root / "etc/ld.so.conf.d/b.conf").write_text("/opt/extra\n")
    [finding] = about(toy, "elf-needed")
    assert "ldconfig" in finding.cure
    ldconfig(toy.root, cache_entries(toy.root) | {"libextra.so.1": "/opt/extra/libextra.so.1"})
    assert toy.ids() == set()


def test_a_link_is_followed_inside_the_root_only(toy: Toy, tmp_path: Path) -> None:
    outside = tmp_path / "outside.so"
    library(outside, "libcuda.so.1")
    link = toy.root / LIB / "libcuda.so.1"
    link.unlink()
    link.symlink_to(outside)
    assert {"driver-dlopen", "elf-cache", "left-links"} <= toy.ids()
    link.unlink()
    link.symlink_to("/../../../usr/lib/x86_64-linux-gnu/libcuda.so.550.163.01")
    assert toy.ids() == set()
    link.unlink()
    link.symlink_to("libcuda.so.1")
    assert "left-links" in toy.ids()


def test_a_missing_interpreter(toy: Toy) -> None:
    (toy.root / "usr/lib64/ld-linux-x86-64.so.2").unlink()
    assert [finding.check for finding in toy.find()] == ["elf-interpreter"]
    assert "elf-interpreter" in toy.ids()


def test_a_version_that_the_library_lacks(toy: Toy) -> None:
    newer = toy.root.parent / "newer/libc.so.6"
    library(newer, "libc.so.6", version="GLIBC_2.99")
    program(toy.root / "usr/bin/kata-agent", newer, call="f_v")
    [finding] = about(toy, "elf-version")
    assert finding.where == "/usr/bin/kata-agent" and "GLIBC_2.99" in finding.what


def test_a_foreign_file_is_a_warning(toy: Toy) -> None:
    path = toy.root / LIB / "libold.so.1"
    library(path, "libold.so.1")
    data = bytearray(path.read_bytes())
    data[18:20] = (183).to_bytes(2, "little")
    path.write_bytes(data)
    [finding] = about(toy, "elf-foreign")
    assert finding.severity is Severity.WARNING and "AARCH64" in finding.what


@pytest.mark.parametrize("size", [20, 100, 600])
def test_a_file_cut_short(toy: Toy, size: int) -> None:
    path = toy.root / LIB / "libnvidia-cfg.so.550.163.01"
    path.write_bytes(path.read_bytes()[:size])
    assert "elf-damaged" in toy.ids()


def test_what_may_not_be_read_is_said(toy: Toy) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become someone else")
    with tempfile.TemporaryDirectory() as name:
        # pytest's own directories are closed to others.
        top = Path(name)
        top.chmod(0o755)
        shutil.copytree(toy.root.parent, top / "toy", symlinks=True)
        (top / "toy").chmod(0o755)
        other = Toy(root=top / "toy/root", facts=replace(
            toy.facts, symvers=top / "toy/Module.symvers", kernel_config=top / "toy/config"))
        assert as_nobody(other) == []
        (other.root / "usr/sbin").chmod(0o700)
        (other.root / "usr/bin/kmod").chmod(0o700)
        assert as_nobody(other) == ["/usr/sbin", "/usr/bin/kmod"]


def as_nobody(toy: Toy) -> list[str]:
    os.seteuid(65534)
    try:
        return [finding.where for finding in about(toy, "elf-damaged")]
    finally:
        os.seteuid(0)


def test_the_cache_lists_what_is_there(toy: Toy) -> None:
    ldconfig(toy.root, cache_entries(toy.root) | {"libold.so.1": "/lib/libold.so.1"})
    [finding] = about(toy, "elf-cache")
    assert "libold.so.1" in finding.what


def test_the_cache_has_the_driver(toy: Toy) -> None:
    entries = cache_entries(toy.root)
    ldconfig(toy.root, {name: path for name, path in entries.items() if "libcuda" not in name})
    [finding] = about(toy, "elf-cache")
    assert "libcuda.so.1" in finding.what and finding.severity is Severity.ERROR
    ldconfig(toy.root, {name: path for name, path in entries.items() if name != "libc.so.6"})
    assert {finding.severity for finding in about(toy, "elf-cache")} == {Severity.WARNING}
    (toy.root / "etc/ld.so.cache").write_bytes(b"nonsense")
    assert "elf-cache" in toy.ids()


def test_the_cache_of_this_host_is_understood() -> None:
    if not Path("/etc/ld.so.cache").exists():
        pytest.skip("needs a host with ld.so.cache")
    assert "libc.so.6" in Linker(Root(Path("/"))).cache


def test_build_id(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    source = tmp_path / "x.c"
    source.write_text("int x;\n")
    gcc("-shared", "-o", tmp_path / "with", source, "-Wl,--build-id=0x00112233aabb")
    gcc("-shared", "-o", tmp_path / "without", source, "-Wl,--build-id=none")
    assert read_build_id(tmp_path / "with") == "00112233aabb"
    assert read_build_id(tmp_path / "without") is None
    with pytest.raises(Damaged):
        read_build_id(source)


def test_every_cut_of_a_library_is_damaged_or_read(toy: Toy, tmp_path: Path) -> None:
    whole = (toy.root / LIB / "libc.so.6").read_bytes()
    part = tmp_path / "part"
    for size in range(4, len(whole), 97):
        part.write_bytes(whole[:size])
        with part.open("rb") as stream:
            try:
                read_binary(stream, "/part")
            except Damaged:
                continue
