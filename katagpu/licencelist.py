"""The list of a guest's licences, for people: NVIDIA's first, and what may not be passed on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from katagpu.sbom import Component, Document, Kind

WIDTH = 100
# The words of NVIDIA's driver licence of which the sentence below is a summary (its 1.1 d).
PERMITS = ("binary files", "not modified in any way")


def render(document: Document, known: Mapping[str, Any]) -> bytes:
    """The list. `known` is what the build knows of the driver: flavour, GRID, daemons."""
    lines = [f"Licences of the guest {document.name} {document.version}", "",
             *_wrapped("What the guest's packages and programs say of themselves, no legal advice. "
                       "Names are SPDX's; a LicenseRef has its text at the end."), ""]
    lines += ["Redistribution", "--------------", *_redistribution(document, known), ""]
    for title, kinds in (("NVIDIA's driver", (Kind.DRIVER,)), ("Kernel", (Kind.KERNEL,)),
                         ("Agent", (Kind.AGENT,)), ("Go modules", (Kind.GO,)),
                         ("Packages", (Kind.DEB,))):
        rows = [each for each in document.components if each.kind in kinds]
        if rows:
            lines += [title, "-" * len(title), *(line for row in rows for line in _row(row)), ""]
    lines += ["Texts", "-----", ""]
    for each in document.licences:
        lines += [f"{each.id} ({each.name})", "",
                  textwrap.indent(each.text.rstrip(), "    "), ""]
    return ("\n".join(lines) + "\n").encode()


def _row(component: Component) -> Iterator[str]:
    yield f"{component.name} {component.version}"
    licence = component.licence or f"NOASSERTION ({component.facts.get('licence', 'not known')})"
    yield from textwrap.wrap(licence, WIDTH, initial_indent="    ", subsequent_indent="      ",
                             break_long_words=False, break_on_hyphens=False)


def _redistribution(document: Document, known: Mapping[str, Any]) -> Iterator[str]:
    names = {each.id: each for each in document.licences}
    nvidia = sorted({each.licence for each in document.components if each.kind is Kind.DRIVER
                     and each.licence in names})
    if known.get("grid"):
        yield from _item("The driver is a GRID guest driver. NVIDIA gives it to those who have a "
                         "licence of its vGPU software: this guest must not be published, nor "
                         "given to others.")
    for ref in nvidia:
        text = " ".join(names[ref].text.split())
        parts = ", ".join(each.name for each in document.components if each.licence == ref
                          and each.kind is Kind.DRIVER)
        yield from _item(f"{parts}: NVIDIA's own licence, {names[ref].name} ({ref}). It is not a "
                         "free software licence, and holds on NVIDIA's hardware only.")
        if known.get("grid"):
            continue
        if all(words in text for words in PERMITS):
            yield from _item("That licence lets the driver be distributed for free operating "
                             "systems as long as its binary files are not modified and everybody "
                             "who gets it gets the licence too. Its text is in the guest, and "
                             "below.")
        else:
            yield from _item("No permission to pass the driver on was recognised in its text: do "
                             "not publish this guest before you have read it.")
    if known.get("flavour") == "closed" and nvidia:
        yield from _item("The kernel modules are NVIDIA's closed ones, linked here with this "
                         "kernel. That is no unmodified file of NVIDIA's: do not pass them on "
                         "without NVIDIA's agreement.")
    if known.get("services"):
        yield from _item(f"NVIDIA's daemons ({', '.join(known['services'])}) have licences of "
                         "their own, in their packages: read them before this guest is published.")
    closed = [each.name for each in document.components if each.kind is Kind.DEB
              and each.facts.get("section", "").partition("/")[0] in (
                  "non-free", "non-free-firmware", "restricted", "multiverse")]
    if closed:
        yield from _item(f"From the distribution's parts that are not free: {', '.join(closed)}.")
    yield from _item("For the kernel, and each package under the GPL or LGPL, who passes the guest "
                     "on owes its source: sbom.spdx.json names each source package and version.")


def _item(words: str) -> list[str]:
    return _wrapped(words, "- ")


def _wrapped(words: str, first: str = "") -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=first, subsequent_indent=" " * len(first),
                         break_long_words=False, break_on_hyphens=False)
