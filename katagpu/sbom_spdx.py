"""A guest's contents as SPDX 2.3, in JSON, by the SPDX project's own library."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from katagpu.errors import StepError
from katagpu.sbom import Component, Document
from katagpu.tree import EPOCH

if TYPE_CHECKING:
    from spdx_tools.spdx.model import Actor, File, Package, Relationship

GUEST = "SPDXRef-guest"


def render(document: Document) -> bytes:
    """The document. Raises `StepError` where the library finds it not to be valid."""
    from spdx_tools.spdx import model
    from spdx_tools.spdx.model import ActorType
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document
    from spdx_tools.spdx.writer.json.json_writer import write_document_to_stream

    made = model.Document(
        creation_info=model.CreationInfo(
            spdx_version="SPDX-2.3", spdx_id="SPDXRef-DOCUMENT", name=document.name,
            document_namespace=f"https://spdx.org/spdxdocs/{document.name}-{document.identity}",
            creators=[model.Actor(ActorType.TOOL, "katagpu")],
            created=datetime.fromtimestamp(EPOCH, UTC).replace(tzinfo=None),
            data_license="CC0-1.0"),
        packages=[_guest(document), *map(_package, document.components)],
        files=[_file(component, number) for component in document.components
               for number in range(len(component.files))],
        relationships=list(_relationships(document)),
        extracted_licensing_info=[
            model.ExtractedLicensingInfo(license_id=each.id, license_name=each.name,
                                         extracted_text=each.text)
            for each in document.licences])
    faults = validate_full_spdx_document(made)
    if faults:
        raise StepError("the SPDX document is not valid: "
                        + "; ".join(fault.validation_message for fault in faults[:6]),
                        hint="this is a fault of katagpu, please report it")
    stream = io.StringIO()
    write_document_to_stream(made, stream, validate=False)
    return stream.getvalue().encode() + b"\n"


def ident(ref: str) -> str:
    """The id of what has this name: letters, digits, dots and minus, nothing else."""
    return "SPDXRef-" + re.sub(
        r"[^A-Za-z0-9.]", lambda found: f"-{ord(found[0]):x}-" if found[0] not in "-:/@" else "-",
        ref)


def _guest(document: Document) -> Package:
    from spdx_tools.spdx import model

    disks = "; ".join(f"{name} sha256:{digest}" for name, digest in sorted(
        document.images.items()))
    return model.Package(
        spdx_id=GUEST, name=document.name, version=document.version,
        download_location=model.SpdxNoAssertion(), files_analyzed=False,
        primary_package_purpose=model.PackagePurpose.OPERATING_SYSTEM,
        comment=f"guest image of Kata Containers: {disks}")


def _package(component: Component) -> Package:
    from spdx_tools.common.spdx_licensing import spdx_licensing
    from spdx_tools.spdx import model
    from spdx_tools.spdx.spdx_element_utils import calculate_package_verification_code

    licence = model.SpdxNoAssertion() if component.licence is None else \
        spdx_licensing.parse(component.licence)
    comment = "\n".join(f"{name}: {value}" for name, value in sorted(component.facts.items()))
    files = [_file(component, number) for number in range(len(component.files))]
    code = calculate_package_verification_code(files) if files else None
    checksums = [] if component.sha256 is None else [
        model.Checksum(model.ChecksumAlgorithm.SHA256, component.sha256)]
    return model.Package(
        spdx_id=ident(component.ref), name=component.name, version=component.version,
        download_location=model.SpdxNoAssertion(), files_analyzed=code is not None,
        verification_code=code, supplier=_supplier(component.supplier), checksums=checksums,
        homepage=component.homepage or None, license_declared=licence,
        license_concluded=model.SpdxNoAssertion(), copyright_text=model.SpdxNoAssertion(),
        comment=comment or None,
        external_references=[model.ExternalPackageRef(
            category=model.ExternalPackageRefCategory.PACKAGE_MANAGER, reference_type="purl",
            locator=component.purl)])


def _supplier(words: str) -> Actor | None:
    from spdx_tools.spdx import model

    if not words:
        return None
    found = re.fullmatch(r"(.*?)\s*<([^<>]+)>", words)
    name, mail = (found[1], found[2]) if found else (words, None)
    return model.Actor(model.ActorType.ORGANIZATION, name.strip('"') or mail or words, mail)


def _file(component: Component, number: int) -> File:
    from spdx_tools.spdx import model

    file = component.files[number]
    return model.File(
        name=f".{file.path}", spdx_id=ident(f"file-{component.ref}-{number}"),
        checksums=[model.Checksum(model.ChecksumAlgorithm.SHA1, file.sha1),
                   model.Checksum(model.ChecksumAlgorithm.SHA256, file.sha256)],
        license_concluded=model.SpdxNoAssertion(), copyright_text=model.SpdxNoAssertion())


def _relationships(document: Document) -> Iterator[Relationship]:
    from spdx_tools.spdx.model import Relationship, RelationshipType

    yield Relationship("SPDXRef-DOCUMENT", RelationshipType.DESCRIBES, GUEST)
    for component in document.components:
        here = ident(component.ref)
        yield Relationship(GUEST, RelationshipType.CONTAINS, here)
        for number in range(len(component.files)):
            yield Relationship(here, RelationshipType.CONTAINS,
                               ident(f"file-{component.ref}-{number}"))
        for need in component.needs:
            yield Relationship(here, RelationshipType.DEPENDS_ON, ident(need))
