"""A guest's contents as CycloneDX 1.6, in JSON, by the CycloneDX project's own library."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from katagpu.sbom import Component, Document, Kind
from katagpu.tree import EPOCH

if TYPE_CHECKING:
    from cyclonedx.model import HashType, Property
    from cyclonedx.model import component as parts

TYPES = {Kind.KERNEL: "operating-system", Kind.DRIVER: "device-driver",
         Kind.AGENT: "application", Kind.GO: "library", Kind.DEB: "library"}
FIRMWARE = "nvidia-gsp-firmware"
PREFIX = "katagpu:"  # of names of properties


def render(document: Document) -> bytes:
    """The document."""
    from cyclonedx.model import bom as boms
    from cyclonedx.model import component as parts
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6

    bom = boms.Bom(serial_number=document.identity)
    bom.metadata.timestamp = datetime.fromtimestamp(EPOCH, UTC)
    bom.metadata.tools = ToolRepository(components=[parts.Component(
        type=parts.ComponentType.APPLICATION, name="katagpu", bom_ref="katagpu")])
    guest = parts.Component(
        type=parts.ComponentType.OPERATING_SYSTEM, name=document.name, version=document.version,
        bom_ref="guest", properties=_properties({
            f"image:{name}": f"sha256:{digest}" for name, digest in document.images.items()}))
    bom.metadata.component = guest
    named = {each.id: (each.name, each.text) for each in document.licences}
    made = {each.ref: _component(each, named) for each in document.components}
    bom.components.update(made.values())
    bom.register_dependency(guest, made.values())
    for each in document.components:
        bom.register_dependency(made[each.ref], [made[need] for need in each.needs])
    return JsonV1Dot6(bom).output_as_string(indent=1).encode() + b"\n"


def _component(component: Component, named: dict[str, tuple[str, str]]) -> parts.Component:
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri
    from cyclonedx.model import component as parts
    from cyclonedx.model.contact import OrganizationalEntity
    from packageurl import PackageURL

    kind = "firmware" if component.name == FIRMWARE else TYPES[component.kind]
    files = [parts.Component(
        type=parts.ComponentType.FILE, name=file.path, bom_ref=f"file:{file.path}",
        hashes=[_sha256(file.sha256)], properties=_properties({"size": str(file.size)}))
        for file in component.files]
    site = [ExternalReference(type=ExternalReferenceType.WEBSITE, url=XsUri(component.homepage))
            ] if component.homepage else []
    made = parts.Component(
        type=parts.ComponentType(kind), name=component.name, version=component.version,
        bom_ref=component.ref, purl=PackageURL.from_string(component.purl), components=files,
        supplier=OrganizationalEntity(name=component.supplier) if component.supplier else None,
        hashes=[_sha256(component.sha256)] if component.sha256 else [],
        external_references=site, properties=_properties(component.facts))
    _license(made, component.licence, named)
    return made


def _license(made: parts.Component, expression: str | None,
             named: dict[str, tuple[str, str]]) -> None:
    """One that SPDX does not list goes by its name and text, which an expression has no place for.
    """
    from cyclonedx.model import AttachedText
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression

    if expression in named:
        name, text = named[expression]
        made.licenses.add(DisjunctiveLicense(name=name, text=AttachedText(content=text)))
    elif expression is not None:
        made.licenses.add(LicenseExpression(expression))


def _sha256(digest: str) -> HashType:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _properties(facts: Mapping[str, str]) -> list[Property]:
    from cyclonedx.model import Property

    return [Property(name=f"{PREFIX}{name}", value=value)
            for name, value in sorted(facts.items())]
