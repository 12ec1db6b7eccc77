"""SBOMs of a small guest: read from its root, and judged by the formats' own validators."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from katagpu import contents, licencelist, sbom, sbom_cyclonedx, sbom_spdx
from katagpu.check.root import Root
from katagpu.sbom import Document

from .test_gobuildinfo import SUM, program

COPYRIGHT = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
NVIDIA = f"""{COPYRIGHT}
Files: *
License: NVIDIA-graphics-drivers

License: NVIDIA-graphics-drivers
 NVIDIA Driver License Agreement
 .
 the binary files thereof are not modified in any way
"""
STATUS = """Package: libcuda1
Status: install ok installed
Section: non-free/libs
Maintainer: Debian NVIDIA Maintainers <pkg-nvidia-devel@lists.alioth.debian.org>
Architecture: amd64
Source: nvidia-graphics-drivers
Version: 550.163.01-2
Description: toy
 more

Package: libtoy
Status: install ok installed
Section: libs
Maintainer: "Some, One" <one@example.invalid>
Architecture: amd64
Source: toy (1:2.0+really1)
Version: 1:2.0+b1
Homepage: https://toy.example/

Package: nvidia-tool
Status: install ok installed
Section: utils
Maintainer: NVIDIA CORPORATION <cudatools@nvidia.com>
Architecture: all
Version: 1.0-1

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
"""
KNOWN: dict[str, Any] = {
    "name": "toy-nvidia-gpu", "version": "550.163.01", "driver": "550.163.01",
    "images": {"kata-toy.image": "f" * 64}, "distribution": ["debian", "trixie"],
    "kernel": {"release": "6.12.1-nvidia-gpu", "source": "linux-source-6.12 6.12.1-1",
               "tarball": "1" * 64, "config": "2" * 64, "vmlinuz": "3" * 64},
    "agent": {"version": "3.99.0-toy", "sha256": "4" * 64},
    "debs": {"libtoy=1:2.0+b1": "5" * 64}}


def put(root: Path, path: str, data: str | bytes) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data.encode() if isinstance(data, str) else data)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with three packages, a Go program, a library of the driver and its firmware."""
    top = tmp_path / "root"
    put(top, "var/lib/dpkg/status", STATUS)
    put(top, "var/lib/dpkg/info/libtoy.list", "/.\n/usr/lib/libtoy.so.1\n")
    put(top, "var/lib/dpkg/info/libcuda1:amd64.list",
        "/usr/lib/x/libcuda.so.1\n/usr/share/doc/libcuda1/copyright\n")
    put(top, "usr/share/doc/libtoy/copyright",
        f"{COPYRIGHT}\nFiles: *\nLicense: LGPL-2.1+ or Toy\n\nLicense: Toy\n Do as you like.\n")
    put(top, "usr/share/doc/libcuda1/copyright", NVIDIA)
    put(top, "usr/share/doc/nvidia-tool/copyright", "All rights reserved.\n")
    put(top, "usr/bin/nvidia-ctk", program())
    put(top, "usr/bin/true", b"\x7fELF" + bytes(100))
    put(top, "usr/lib/x86_64-linux-gnu/libcuda.so.550.163.01", b"cuda")
    put(top, "usr/lib/firmware/nvidia/550.163.01/gsp_ga10x.bin", b"gsp")
    return top


def made(root: Path, **more: Any) -> Document:
    texts = {"x.example/a@v0.1.0": "Permission is hereby granted, free of charge, without "
                                   "restriction", "x.example/fork@v2.0.1": "Ask us.\n"}
    return sbom.document({**KNOWN, **more}, contents.survey(root, None), texts)


@pytest.fixture
def document(root: Path) -> Iterator[Document]:
    yield made(root)


def test_components(document: Document) -> None:
    found = {each.ref: each for each in document.components}
    assert list(found) == [
        "kernel", "nvidia-driver", "nvidia-gsp-firmware", "kata-agent", "go:stdlib@1.24.4",
        "go:x.example/a@v0.1.0", "go:x.example/fork@v2.0.1", "go:x.example/tool@v1.2.3",
        "deb:libcuda1:amd64", "deb:libtoy:amd64", "deb:nvidia-tool:all"]
    toy = found["deb:libtoy:amd64"]
    assert toy.purl == "pkg:deb/debian/libtoy@1:2.0%2Bb1?arch=amd64&distro=trixie"
    assert toy.sha256 == "5" * 64 and toy.facts["source-package"] == "toy 1:2.0+really1"
    assert toy.licence is not None and toy.licence.startswith("LGPL-2.1-or-later OR LicenseRef-Toy")
    tool = found["deb:nvidia-tool:all"]
    assert tool.licence is None and tool.purl == "pkg:deb/nvidia/nvidia-tool@1.0-1?arch=all"
    assert tool.facts["licence"] == "not machine-readable: /usr/share/doc/nvidia-tool/copyright"
    driver = found["nvidia-driver"]
    assert [file.path for file in driver.files] == [
        "/usr/lib/x86_64-linux-gnu/libcuda.so.550.163.01"]
    assert driver.licence == found["nvidia-gsp-firmware"].licence
    assert driver.licence is not None
    assert driver.licence.startswith("LicenseRef-NVIDIA-graphics-drivers-")
    module = found["go:x.example/tool@v1.2.3"]
    assert module.facts["go-sum"] == SUM and "go:stdlib@1.24.4" in module.needs
    assert found["go:x.example/a@v0.1.0"].licence == "MIT"
    assert found["kernel"].facts["source-sha256"] == "1" * 64


def test_spdx_is_valid_and_says_the_same(document: Document, tmp_path: Path) -> None:
    """Written, read back by the library from the file alone, and validated again."""
    from spdx_tools.spdx.parser.parse_anything import parse_file
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

    target = tmp_path / "sbom.spdx.json"
    target.write_bytes(sbom_spdx.render(document))
    parsed = parse_file(str(target))
    assert validate_full_spdx_document(parsed) == []
    assert parsed.creation_info.spdx_version == "SPDX-2.3"
    assert len(parsed.packages) == 1 + len(document.components)
    named = {each.name: each for each in parsed.packages}
    assert str(named["linux"].license_declared) == "GPL-2.0-only WITH Linux-syscall-note"
    assert {each.license_id for each in parsed.extracted_licensing_info} == {
        each.id for each in document.licences}
    assert [str(each.name) for each in parsed.files] == [
        "./usr/lib/x86_64-linux-gnu/libcuda.so.550.163.01",
        "./usr/lib/firmware/nvidia/550.163.01/gsp_ga10x.bin"]


def test_cyclonedx_is_valid_by_its_schema(document: Document) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = sbom_cyclonedx.render(document).decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    content = json.loads(text)
    kinds = {each["bom-ref"]: each["type"] for each in content["components"]}
    assert kinds["nvidia-gsp-firmware"] == "firmware" and kinds["kernel"] == "operating-system"
    driver = next(each for each in content["components"] if each["bom-ref"] == "nvidia-driver")
    (licence,) = driver["licenses"]
    assert licence["license"]["name"] == "NVIDIA-graphics-drivers"
    assert "NVIDIA Driver License Agreement" in licence["license"]["text"]["content"]
    assert {each["ref"] for each in content["dependencies"]} >= set(kinds)


@pytest.mark.parametrize("render", [sbom_spdx.render, sbom_cyclonedx.render])
def test_the_same_content_has_the_same_bytes(root: Path, render: Any) -> None:
    one = render(made(root))
    assert one == render(made(root)) and b"2025-01-01T00:00:00" in one
    put(root, "usr/lib/firmware/nvidia/550.163.01/gsp_ga10x.bin", b"other")
    assert render(made(root)) != one


def test_the_identity_is_that_of_the_content(root: Path) -> None:
    assert made(root).identity == made(root).identity
    assert made(root).identity != made(root, images={"kata-toy.image": "e" * 64}).identity


def text(document: Document, **known: Any) -> str:
    return " ".join(licencelist.render(document, known).decode().split())


def test_the_list_of_licences(document: Document) -> None:
    said = text(document, flavour="open", services=["dcgm"])
    assert "nvidia-driver, nvidia-gsp-firmware: NVIDIA's own licence" in said
    assert "as long as its binary files are not modified" in said
    assert "parts that are not free: libcuda1." in said and "daemons (dcgm)" in said
    assert "closed ones" not in said and "GRID" not in said
    assert "nvidia-tool 1.0-1 NOASSERTION (not machine-readable: /usr/share/doc/" in said
    assert "Do as you like." in said and "NVIDIA Driver License Agreement" in said


def test_what_may_not_be_passed_on(root: Path) -> None:
    assert "do not pass them on without NVIDIA's agreement" in text(made(root), flavour="closed")
    grid = text(made(root), grid=True)
    assert "must not be published, nor given to others" in grid
    assert "as long as its binary files are not modified" not in grid
    put(root, "usr/share/doc/libcuda1/copyright", NVIDIA.replace("are not modified", "are ours"))
    assert "No permission to pass the driver on was recognised" in text(made(root))


def test_the_licence_of_a_run_file(root: Path) -> None:
    put(root, contents.RUN_LICENCE.lstrip("/"), "License For Customer Use\n\nof NVIDIA Software\n")
    driver = next(each for each in made(root).components if each.ref == "nvidia-driver")
    assert driver.licence is not None
    assert driver.licence.startswith("LicenseRef-NVIDIA-License-For-Customer-Use-")


def test_a_guest_without_driver_toolkit_and_agent(tmp_path: Path) -> None:
    put(tmp_path, "var/lib/dpkg/status", STATUS.split("\n\n")[1] + "\n")
    known = {name: value for name, value in KNOWN.items() if name != "agent"} | {
        "driver": None, "version": "no-driver"}
    found = sbom.document(known, contents.survey(tmp_path, None), {})
    assert [each.ref for each in found.components] == ["kernel", "deb:libtoy:amd64"]
    assert found.components[1].facts["licence"] == "the guest has no copyright file of it"
    sbom_spdx.render(found)
    sbom_cyclonedx.render(found)
    assert "NVIDIA's own licence" not in text(found)


def test_a_disk_of_the_driver_s_own(root: Path) -> None:
    """Its files are at the disk's place; its packages are those with a file of that name on it."""
    disk = "/run/kata-extensions/gpu"
    put(root, f"{disk}/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1".lstrip("/"), b"ml")
    put(root, f"{disk}/bin/nvidia-cdi-hook".lstrip("/"), program())
    found = contents.survey(root, disk)
    assert f"{disk}/bin/nvidia-cdi-hook" in [each["path"] for each in found["go"]]
    assert f"{disk}/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1" in [
        each["path"] for each in found["driver"]]
    assert [each["name"] for each in contents.owners(root, ["libcuda.so.1"])] == ["libcuda1"]
    assert contents.owners(root, ["copyright"]) == []


def test_links_of_the_guest_are_followed_inside_it(root: Path) -> None:
    doc = root / "usr/share/doc"
    (doc / "libtoy/copyright").unlink()
    (doc / "libtoy").rmdir()
    (doc / "libtoy").symlink_to("/usr/share/doc/libcuda1")
    toy = next(each for each in contents.debs(root) if each["name"] == "libtoy")
    assert toy["names"] == ["NVIDIA-graphics-drivers"]
    assert Root(root).is_file("/usr/share/doc/libtoy/copyright")


def test_a_run_with_nothing_to_do_loads_no_library_of_these() -> None:
    import subprocess
    import sys

    heavy = "{'spdx_tools', 'cyclonedx', 'packageurl', 'license_expression', 'debian', 'rdflib'}"
    code = f"import sys, katagpu.tasks, katagpu.guest; print(sorted({heavy} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(sbom.__file__).parent.parent).stdout
    assert said.strip() == "[]"
