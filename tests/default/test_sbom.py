"""What the default guest's documents say, against dpkg, Go and the files themselves."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from katagpu import sandbox
from katagpu.context import Context
from katagpu.sandbox import Root
from katagpu.stages.api import Build

Guest = tuple[Build, Root]


@pytest.fixture(scope="module")
def outputs(context: Context) -> dict[str, Path]:
    """The stage's outputs as files."""
    made = context.plan.ensure("sbom").outputs
    return {name: context.store.sound(output.blob) for name, output in made.items()}


@pytest.fixture(scope="module")
def bom(outputs: dict[str, Path]) -> dict[str, Any]:
    """The CycloneDX document."""
    found: dict[str, Any] = json.loads(outputs["cyclonedx"].read_bytes())
    return found


def test_both_documents_are_valid(outputs: dict[str, Path], tmp_path: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from spdx_tools.spdx.parser.parse_anything import parse_file
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

    shutil.copyfile(outputs["spdx"], tmp_path / "sbom.spdx.json")
    parsed = parse_file(str(tmp_path / "sbom.spdx.json"))
    assert validate_full_spdx_document(parsed) == []
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(
        outputs["cyclonedx"].read_text()) is None
    names = {each["name"] for each in json.loads(outputs["cyclonedx"].read_bytes())["components"]}
    assert {each.name for each in parsed.packages} == {*names, parsed.creation_info.name}


def test_packages_are_those_of_dpkg(guest: Guest, bom: dict[str, Any]) -> None:
    build, root = guest
    said = build.enter(["dpkg-query", "-W", "-f", "${Package} ${Version}\\n"], [root],
                       capture=True).stdout.decode().split("\n")
    listed = [f"{each['name']} {each['version']}" for each in bom["components"]
              if each["purl"].startswith("pkg:deb/")]
    assert sorted(listed) == sorted(line for line in said if line)
    assert len(listed) > 100
    # The lock knows the digest of every one of them.
    assert all(each.get("hashes") for each in bom["components"]
               if each["purl"].startswith("pkg:deb/"))


def test_most_packages_have_a_licence_and_nvidia_s_is_named(bom: dict[str, Any],
                                                            outputs: dict[str, Path]) -> None:
    debs = [each for each in bom["components"] if each["purl"].startswith("pkg:deb/")]
    assert sum("licenses" in each for each in debs) > 0.8 * len(debs)
    for name in ("nvidia-driver", "nvidia-gsp-firmware"):
        (part,) = [each for each in bom["components"] if each["name"] == name]
        assert part["version"] == "550.163.01" and part["components"]
        assert part["licenses"][0]["license"]["name"] == "NVIDIA-graphics-drivers"
    (modules,) = [each for each in bom["components"] if each["name"] == "nvidia-kernel-modules"]
    assert modules["licenses"] == [{"expression": "MIT OR GPL-2.0-only"}]
    said = outputs["licences"].read_text()
    assert "NVIDIA Driver License Agreement" in said and "parts that are not free" in said


@pytest.mark.skipif(shutil.which("go") is None, reason="needs go")
def test_go_modules_are_those_that_go_reads(guest: Guest, bom: dict[str, Any],
                                            tmp_path: Path) -> None:
    build, root = guest
    data = build.enter(["cat", "/usr/bin/nvidia-ctk"], [root], capture=True).stdout
    (tmp_path / "nvidia-ctk").write_bytes(data)
    said = subprocess.run(["go", "version", "-m", tmp_path / "nvidia-ctk"], check=True, text=True,
                          capture_output=True).stdout
    rows = [line.split("\t")[1:] for line in said.splitlines()[1:]]
    wanted = {(row[1], row[2], row[3]) for row in rows if row[0] in ("mod", "dep")}
    listed = {(each["name"], each["version"], prop["value"]) for each in bom["components"]
              for prop in each.get("properties", []) if prop["name"] == "katagpu:go-sum"}
    assert len(wanted) > 10 and wanted <= listed
    assert all("licenses" in each for each in bom["components"]
               if each["purl"].startswith("pkg:golang/"))


def test_files_of_the_driver_are_those_of_the_list_of_files(context: Context,
                                                            bom: dict[str, Any]) -> None:
    image = context.plan.ensure("image")
    lines = context.store.sound(image.outputs["files"].blob).read_text().splitlines()
    digests = {line.split()[0]: line.rpartition("sha256digest=")[2].split()[0]
               for line in lines if "sha256digest=" in line}
    files = [file for each in bom["components"] for file in each.get("components", [])]
    assert len(files) > 8
    for file in files:
        assert digests[f".{file['name']}"] == file["hashes"][0]["content"]


def test_made_again_they_are_the_same_bytes(context: Context) -> None:
    plan = context.plan
    stage = plan.stages["sbom"]
    made = plan.ensure("sbom")
    with context.store.staging("tests", sandbox.remove) as scratch:
        build = Build(stage, context.store, plan.inputs("sbom"), scratch, scratch / "log")
        stage.make(build)
    assert {name: each.identity for name, each in build.outputs.items()} == {
        name: each.identity for name, each in made.outputs.items()}
    image = plan.ensure("image").outputs["image"].identity
    text = context.store.sound(made.outputs["cyclonedx"].blob).read_text()
    assert f"sha256:{image}" in text
