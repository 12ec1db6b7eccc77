"""The in-toto statement: its form, read back by in-toto's own library, and its bytes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from katagpu import statement
from katagpu.errors import UserError
from katagpu.lock import Deb, Lock
from katagpu.statement import Built, Material

SUBJECTS = {"b.image": "b" * 64, "a.toml": "a" * 64}
EMPTY = "h1:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="  # the specification's own example
URI = re.compile(r"[a-z][a-z0-9+.-]*:\S+")


def deb(name: str, version: str = "1:2+b1") -> Deb:
    return Deb(package=name, version=version, architecture="amd64", url="http://mirror.local/x",
               size=1, sha256=f"{len(name):064x}")


def built() -> Built:
    lock = Lock(recipe="r", request="", groups={
        "imagetools": (deb("abcd"),), "base": (deb("abc"), deb("ab"))})
    return Built(
        recipe={"name": "r"}, overrides={"driver": "550.1"}, actions={"image": "1" * 64},
        versions={"katagpu": "0.1.0"}, materials=[
            *statement.packages(lock, lambda group, _deb: (
                ("debian", "trixie") if group == "base" else ("ubuntu", ""))),
            statement.go_module("x.example/Tool/v2", "v2.0.0", EMPTY),
            Material(uri="https://x.example/driver.run", digest={"sha256": "d" * 64})])


def test_the_statement_is_in_toto_s() -> None:
    """By the library's own checks, after a way through JSON."""
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    made = json.loads(json.dumps(statement.statement(SUBJECTS, built())))
    parsed = ParseDict(made, statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    assert [each.name for each in parsed.subject] == ["a.toml", "b.image"]
    for each in made["predicate"]["buildDefinition"]["resolvedDependencies"]:
        descriptor = ResourceDescriptor(name=each.get("name", ""), uri=each["uri"],
                                        digest=each["digest"])
        descriptor.validate()


def test_the_predicate_has_what_slsa_requires() -> None:
    """Provenance v1: the required fields, the types of all, and nothing of another name."""
    made = statement.statement(SUBJECTS, built())
    assert made["predicateType"] == "https://slsa.dev/provenance/v1"
    predicate: dict[str, Any] = made["predicate"]
    assert set(predicate) == {"buildDefinition", "runDetails"}
    definition, details = predicate["buildDefinition"], predicate["runDetails"]
    assert set(definition) == {"buildType", "externalParameters", "internalParameters",
                               "resolvedDependencies"}
    assert set(details) == {"builder", "metadata"} and set(details["builder"]) == {"id", "version"}
    assert set(details["metadata"]) == {"invocationId"}, "no time that is not one"
    for uri in (definition["buildType"], details["builder"]["id"]):
        assert URI.fullmatch(uri)
    dependencies = definition["resolvedDependencies"]
    assert [each["uri"] for each in dependencies] == sorted(each["uri"] for each in dependencies)
    assert {each["uri"] for each in dependencies if each["uri"].startswith("pkg:deb")} == {
        "pkg:deb/debian/ab@1:2%2Bb1?arch=amd64&distro=trixie",
        "pkg:deb/debian/abc@1:2%2Bb1?arch=amd64&distro=trixie",
        "pkg:deb/ubuntu/abcd@1:2%2Bb1?arch=amd64"}
    for each in dependencies:
        assert URI.fullmatch(each["uri"])
        for algorithm, value in each["digest"].items():
            assert algorithm in ("sha256", "dirHash") and re.fullmatch("[0-9a-f]{64}", value)
    assert "mirror.local" not in json.dumps(made)


def spoilt(*path: str, value: Any) -> dict[str, Any]:
    """A predicate with another value at a place."""
    predicate: dict[str, Any] = statement.statement(SUBJECTS, built())["predicate"]
    inner = predicate
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return predicate


def test_the_predicate_is_that_of_the_published_schema() -> None:
    """SLSA's own definition, as in-toto's library has it; it knows no other field or type."""
    from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
    from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance

    predicate = json.loads(json.dumps(statement.statement(SUBJECTS, built())["predicate"]))
    parsed = ParseDict(predicate, Provenance())
    assert MessageToDict(parsed) == predicate, "nothing of it is lost on the way"
    assert parsed.build_definition.build_type == statement.BUILD_TYPE
    assert {key for each in parsed.build_definition.resolved_dependencies
            for key in each.digest} == {"sha256", "dirHash"}
    for wrong in (spoilt("buildDefinition", "materials", value=[]),
                  spoilt("buildDefinition", "buildType", value=7),
                  spoilt("buildDefinition", "externalParameters", value=["list"]),
                  spoilt("buildDefinition", "resolvedDependencies", value={"uri": "x:y"}),
                  spoilt("runDetails", "metadata", "startedOn", value="yesterday"),
                  spoilt("runDetails", "builder", "version", value="1.0"),
                  spoilt("invocation", value={})):
        with pytest.raises(ParseError):
            ParseDict(wrong, Provenance())


def test_the_same_build_has_the_same_bytes() -> None:
    one, two = (json.dumps(statement.statement(each, built())) for each in (
        SUBJECTS, dict(reversed(SUBJECTS.items()))))
    assert one == two


def test_other_actions_are_another_invocation() -> None:
    def invocation(action: str) -> str:
        made = statement.statement(SUBJECTS, Built(recipe={}, materials=[],
                                                   actions={"image": action}))
        return str(made["predicate"]["runDetails"]["metadata"]["invocationId"])

    assert invocation("1" * 64) != invocation("2" * 64)


def test_a_go_module_s_digest_is_that_of_the_specification() -> None:
    found = statement.go_module("x.example/Tool/v2", "v2.0.0", EMPTY)
    assert found.digest == {
        "dirHash": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    assert found.uri.startswith("pkg:golang/x.example/") and found.uri.endswith("@v2.0.0")


@pytest.mark.parametrize("digest", ["", "h1:", "h1:abc", "sha256:" + "a" * 64, EMPTY[3:]])
def test_what_is_no_digest_of_a_module(digest: str) -> None:
    with pytest.raises(UserError, match="not a digest of a Go module"):
        statement.go_module("x.example/a", "v1.0.0", digest)


@pytest.mark.parametrize(("subjects", "message"), [
    ({}, "at least one artifact"), ({"a": "A" * 64}, "a: not a SHA-256"),
    ({"a": "12"}, "a: not a SHA-256")])
def test_subjects_that_are_none(subjects: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        statement.statement(subjects, built())
