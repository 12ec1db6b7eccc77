"""What was built, from what, and how: an in-toto statement with SLSA provenance, as data.

Sources: in-toto/attestation spec/v1 (statement, resource descriptors, digest sets) and SLSA's
provenance v1. Nothing here reads a file, a clock or the network; who signs it, and where it goes,
is decided elsewhere. The same arguments give the same statement.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from katagpu import keys
from katagpu.errors import UserError
from katagpu.lock import Deb, Lock

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "tag:katagpu,2025:guest/v1"
"""What `externalParameters` and `resolvedDependencies` mean: docs/sbom.md."""
BUILDER = "tag:katagpu,2025:builder"
FILE = "tag:katagpu,2025:file/"
"""Begins the URI of what is a file of the user's: its digest says which."""
HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class Material:
    """Something that was an input. `digest` is a digest set: algorithm to lower-case hex."""

    uri: str
    digest: Mapping[str, str]
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What is known of a build. `recipe` is the recipe's content; `overrides` what the command line
    set (`driver=`, `EXTRA_PKGS`). `actions` are the action digests of the stages by name.
    `builder` is a URI that names who runs builds, and `versions` of what.
    """

    recipe: Mapping[str, Any]
    materials: Sequence[Material]
    overrides: Mapping[str, str] = field(default_factory=dict)
    actions: Mapping[str, str] = field(default_factory=dict)
    builder: str = BUILDER
    versions: Mapping[str, str] = field(default_factory=dict)


def statement(subjects: Mapping[str, str], built: Built) -> dict[str, Any]:
    """The statement on artifacts: their SHA-256 by name. Raises `UserError` for what is none.

    The invocation's id is made of the content: two runs of the same build are one invocation, of
    which no time is said.
    """
    if not subjects:
        raise UserError("a statement needs at least one artifact", hint="build the guest first")
    for name, digest in subjects.items():
        if len(digest) != 64 or not set(digest) <= HEX:
            raise UserError(f"{name}: not a SHA-256: {digest!r}",
                            hint="64 lower-case hexadecimal digits")
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": {"recipe": dict(built.recipe),
                               "overrides": dict(sorted(built.overrides.items()))},
        "internalParameters": {"actions": dict(sorted(built.actions.items()))},
        "resolvedDependencies": [_descriptor(each) for each in sorted(
            built.materials, key=lambda each: (each.uri, each.name))],
    }
    builder: dict[str, Any] = {"id": built.builder}
    if built.versions:
        builder["version"] = dict(sorted(built.versions.items()))
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}}
                    for name, digest in sorted(subjects.items())],
        "predicateType": PREDICATE,
        "predicate": {"buildDefinition": definition, "runDetails": {
            "builder": builder,
            "metadata": {"invocationId": f"sha256:{keys.digest(definition)}"}}}}


def _descriptor(material: Material) -> dict[str, Any]:
    named = {"name": material.name} if material.name else {}
    return {**named, "uri": material.uri, "digest": dict(sorted(material.digest.items()))}


def packages(lock: Lock, origin: Callable[[str, Deb], tuple[str, str]]) -> list[Material]:
    """The packages of a lock, each once. By name and digest: which mirror had them says nothing.

    `origin` says who a group's package is of: a distribution with its suite, or others with none.
    """
    found: dict[str, Material] = {}
    for group in sorted(lock.groups):
        for deb in lock.groups[group]:
            namespace, suite = origin(group, deb)
            found.setdefault(deb.sha256, Material(
                name=f"{group}: {deb.package}", digest={"sha256": deb.sha256}, uri=purl(
                    "deb", namespace, deb.package, version=deb.version, arch=deb.architecture,
                    distro=suite)))
    return list(found.values())


def go_module(path: str, version: str, digest: str) -> Material:
    """A Go module, by its `h1:` digest. Raises `UserError` where it is none."""
    try:
        known = base64.b64decode(digest.removeprefix("h1:"), validate=True)
    except binascii.Error:
        known = b""
    if not digest.startswith("h1:") or len(known) != 32:
        raise UserError(f"{path}@{version}: not a digest of a Go module: {digest!r}",
                        hint="as in go.sum: h1: and 44 characters")
    return Material(uri=purl("golang", *path.split("/"), version=version),
                    digest={"dirHash": known.hex()})


def purl(kind: str, *path: str, version: str, **qualifiers: str) -> str:
    """A package URL; qualifiers without a value are left out."""
    from packageurl import PackageURL

    return PackageURL(type=kind, namespace="/".join(path[:-1]) or None, name=path[-1],
                      version=version or None,
                      qualifiers={name: value for name, value in qualifiers.items() if value},
                      ).to_string()
