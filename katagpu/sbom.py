"""The contents of a guest as components: what SPDX, CycloneDX and the list of licences are made of.

Everything comes from the guest itself (`contents`) and from what the build knows of its sources;
nothing depends on the time or the machine.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from katagpu import keys
from katagpu.licences import Named, Naming, of_text
from katagpu.statement import purl

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://spdx.org/spdxdocs/katagpu")
NVIDIA = "NVIDIA Corporation"
KERNEL_LICENCE = "GPL-2.0-only WITH Linux-syscall-note"
TOOLKIT = "github.com/NVIDIA/nvidia-container-toolkit"  # Apache-2.0, whoever compiled it
MODULE_LICENCES = {"Dual MIT/GPL": "MIT OR GPL-2.0-only"}  # MODULE_LICENSE() of the open modules
DRIVER_PARTS = {"NVIDIA user space": "nvidia-driver", "GSP firmware": "nvidia-gsp-firmware",
                "NVIDIA kernel modules": "nvidia-kernel-modules"}


class Kind(StrEnum):
    """What a component is; the lists are sorted in this order."""

    KERNEL = "kernel"
    DRIVER = "driver"
    AGENT = "agent"
    GO = "go"
    DEB = "deb"


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a component, by its path in the guest; `size` in bytes."""

    path: str
    size: int
    sha256: str
    sha1: str


@dataclass(frozen=True, kw_only=True)
class Component:
    """Something in the guest. `licence` is an SPDX expression, None where it is not known.

    `ref` names it in the document. `sha256` is that of the package that it was installed from.
    `facts` are what has no field of its own.
    """

    ref: str
    kind: Kind
    name: str
    version: str
    purl: str
    licence: str | None = None
    supplier: str = ""
    homepage: str = ""
    sha256: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Document:
    """A guest's contents. `images` are the disks' SHA-256 by file name."""

    name: str
    version: str
    images: Mapping[str, str]
    components: tuple[Component, ...]
    licences: tuple[Named, ...]

    @property
    def identity(self) -> uuid.UUID:
        """A UUID of the content."""
        parts = [[self.name, self.version, sorted(self.images.items())],
                 *([each.ref, each.version, each.licence or "", each.sha256 or "",
                    sorted(each.facts.items()), [file.sha256 for file in each.files]]
                   for each in self.components)]
        return uuid.uuid5(NAMESPACE, keys.digest(parts))


def document(known: Mapping[str, Any], found: Mapping[str, Any],
             go_licences: Mapping[str, str]) -> Document:
    """The document of what was found (`contents.survey`); `known` is what the build knows.

    `go_licences` are the licences' texts of Go modules, by `path@version`.
    """
    naming = Naming()
    driver = list(_driver(known, found, naming))
    components = [_kernel(known), *driver, *_agent(known), *_go(found, go_licences, naming),
                  *_debs(known, found, naming)]
    order = list(Kind)
    return Document(
        name=known["name"], version=known["version"], images=known["images"],
        components=tuple(sorted(components, key=lambda each: (order.index(each.kind), each.ref))),
        licences=tuple(naming.named[name] for name in sorted(naming.named)))


def _kernel(known: Mapping[str, Any]) -> Component:
    kernel = known["kernel"]
    facts = {"source": kernel["source"], "source-sha256": kernel["tarball"],
             "config-sha256": kernel["config"], "vmlinuz-sha256": kernel["vmlinuz"]}
    return Component(
        ref="kernel", kind=Kind.KERNEL, name="linux", version=kernel["release"],
        purl=purl("generic", "linux", version=kernel["release"]), licence=KERNEL_LICENCE,
        supplier="the Linux kernel's authors", homepage="https://www.kernel.org/", facts=facts)


def nvidia_licence(found: Mapping[str, Any], naming: Naming) -> str:
    """NVIDIA's own licence of the driver, with the text that the guest has of it."""
    if found["licence"]:
        title = found["licence"].strip().splitlines()[0].strip()
        return naming.reference(f"NVIDIA-{title}" if "NVIDIA" not in title else title,
                                found["licence"])
    for deb in found["debs"]:
        for name in deb["names"] or ():
            if name.startswith("NVIDIA") and name in deb["texts"]:
                return naming.reference(name, deb["texts"][name])
    return naming.reference("NVIDIA", "The guest has no text of it; it comes with the driver.\n")


def _driver(known: Mapping[str, Any], found: Mapping[str, Any],
            naming: Naming) -> Iterator[Component]:
    version = known["driver"]
    parts: dict[str, list[dict[str, Any]]] = {}
    for file in found["driver"]:
        parts.setdefault(file["part"], []).append(file)
    for part, files in sorted(parts.items()):
        name = DRIVER_PARTS[part]
        licence = {MODULE_LICENCES.get(file["licence"]) for file in files}
        single = next(iter(licence)) if len(licence) == 1 else None
        facts = {"modinfo-license": files[0]["licence"]} if files[0]["licence"] else {}
        yield Component(
            ref=name, kind=Kind.DRIVER, name=name, version=version or files[0]["version"],
            purl=purl("generic", name, version=version or ""), facts=facts,
            licence=single or nvidia_licence(found, naming), supplier=NVIDIA,
            homepage="https://www.nvidia.com/drivers",
            files=tuple(File(path=file["path"], size=file["size"], sha256=file["sha256"],
                             sha1=file["sha1"]) for file in files))


def _agent(known: Mapping[str, Any]) -> Iterator[Component]:
    agent = known.get("agent")
    if agent is not None:
        yield Component(
            ref="kata-agent", kind=Kind.AGENT, name="kata-agent", version=agent["version"],
            purl=purl("github", "kata-containers", "kata-containers", version=agent["version"]),
            licence="Apache-2.0", supplier="Kata Containers", sha256=agent["sha256"],
            homepage="https://github.com/kata-containers/kata-containers",
            facts={"path": "/usr/bin/kata-agent"})


def _go(found: Mapping[str, Any], texts: Mapping[str, str],
        naming: Naming) -> Iterator[Component]:
    modules: dict[tuple[str, str], dict[str, Any]] = {}

    def add(named: Sequence[str], program: str) -> str:
        path, version, digest = named
        module = modules.setdefault((path, version), {"sum": digest, "in": set(), "needs": set()})
        module["sum"] = module["sum"] or digest
        module["in"].add(program)
        return f"go:{path}@{version}"

    for program in found["go"]:
        own = ["stdlib", program["go"], ""]
        inner = {add(module, program["path"]) for module in [*program["modules"], own]}
        if program["main"] is not None:
            add(program["main"], program["path"])
            modules[program["main"][0], program["main"][1]]["needs"] |= inner
    for (path, version), module in sorted(modules.items()):
        facts = {"programs": " ".join(sorted(module["in"]))}
        if module["sum"]:
            facts["go-sum"] = module["sum"]
        yield Component(
            ref=f"go:{path}@{version}", kind=Kind.GO, name=path, version=version, facts=facts,
            purl=purl("golang", *path.split("/"), version=version),
            licence=_go_licence(path, version, texts, naming),
            homepage="" if path == "stdlib" else f"https://pkg.go.dev/{path}",
            needs=tuple(sorted(module["needs"])))


def _go_licence(path: str, version: str, texts: Mapping[str, str], naming: Naming) -> str | None:
    if path == "stdlib":
        return "BSD-3-Clause"
    if path == TOOLKIT:
        return "Apache-2.0"
    text = texts.get(f"{path}@{version}")
    if text is None:
        return None
    return of_text(text) or naming.reference(f"{path.rpartition('/')[2]}-licence", text)


def _debs(known: Mapping[str, Any], found: Mapping[str, Any],
          naming: Naming) -> Iterator[Component]:
    distribution, suite = known["distribution"]
    for deb in found["debs"]:
        of_nvidia = "@nvidia.com" in deb["maintainer"]
        licence = None if deb["names"] is None else naming.expression(
            tuple(deb["names"]), deb["texts"],
            f"See the copyright file of packages made of {deb['source']}.")
        qualifiers = {"arch": deb["architecture"], "distro": "" if of_nvidia else suite}
        facts = {"source-package": f"{deb['source']} {deb['source_version']}",
                 "section": deb["section"]}
        if licence is None:
            facts["licence"] = f"not machine-readable: {deb['file']}" if deb["copyright"] \
                else "the guest has no copyright file of it"
        yield Component(
            ref=f"deb:{deb['name']}:{deb['architecture']}", kind=Kind.DEB, name=deb["name"],
            version=deb["version"], licence=licence, supplier=deb["maintainer"], facts=facts,
            purl=purl("deb", "nvidia" if of_nvidia else distribution, deb["name"],
                       version=deb["version"], **qualifiers), homepage=deb["homepage"],
            sha256=known["debs"].get(f"{deb['name']}={deb['version']}"))
