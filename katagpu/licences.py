"""Licence names as Debian and others write them, as SPDX expressions.

Only names that mean one licence are translated; every other becomes a reference of its own
(`LicenseRef-…`) with the text that the package has. Nothing is guessed.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass

# Debian's copyright format 1.0 has names that SPDX writes otherwise.
ALIASES = {"expat": "MIT", "mit/x11": "MIT", "cc0": "CC0-1.0", "zlib/libpng": "Zlib"}
EXCEPTIONS = {"linux-syscall-note": "Linux-syscall-note", "libtool": "Libtool-exception",
              "bison": "Bison-exception-2.2"}
_GNU = re.compile(r"(GPL|LGPL|AGPL|GFDL)-?v?(\d(?:\.\d)?)(?:\.0)?(\+|-only|-or-later)?",
                  re.IGNORECASE)
_WITH = re.compile(r"(\S+) with (\S+?)(?:-| )exception", re.IGNORECASE)
_COMMA = re.compile(r",\s+(?:and\s+)?")
# Phrases by which a text has a licence in it.
_PHRASES = (
    ("Apache-2.0", ("Apache License", "Version 2.0, January 2004")),
    ("MPL-2.0", ("Mozilla Public License", "ersion 2.0")),
    ("MIT", ("Permission is hereby granted, free of charge", "without restriction")),
    ("ISC", ("Permission to use, copy, modify, and", "distribute this software for any purpose")),
    ("BSD-3-Clause", ("Redistribution and use in source and binary forms",
                      "be used to endorse or promote")),
    ("BSD-2-Clause", ("Redistribution and use in source and binary forms",)))


@dataclass(frozen=True, kw_only=True)
class Named:
    """A licence that SPDX does not list: its id in the document, its name, and its text."""

    id: str
    name: str
    text: str


class Naming:
    """Turns names into expressions, and keeps what has no id in SPDX's list."""

    def __init__(self) -> None:
        self.named: dict[str, Named] = {}

    def expression(self, names: tuple[str, ...], texts: dict[str, str], where: str) -> str:
        """All of these licences, as one expression; `where` says who has their texts."""
        terms = {term for name in names for term in self._terms(name, texts, where)}
        if len(terms) == 1:
            return terms.pop()
        return " AND ".join(f"({term})" if " OR " in term else term for term in sorted(terms))

    def reference(self, name: str, text: str) -> str:
        """The id of a licence of this name and text, which SPDX does not list."""
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "unnamed"
        mark = hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:8]
        known = f"LicenseRef-{slug}-{mark}"
        self.named.setdefault(known, Named(id=known, name=name, text=text))
        return known

    def _terms(self, name: str, texts: dict[str, str], where: str) -> set[str]:
        """What all hold at once: each a licence, or a choice."""
        whole = re.sub(r"_(or|and)_", r" \1 ", name)
        if re.search(r",\s+or\s", whole):  # how far that reaches is not said
            return {self._single(name, texts, where)}
        found: set[str] = set()
        for group in _COMMA.split(whole):
            sides = {tuple(sorted({self._single(each, texts, where)
                                   for each in re.split(r"\s+and\s+", side, flags=re.IGNORECASE)}))
                     for side in re.split(r"\s+or\s+", group, flags=re.IGNORECASE)}
            if len(sides) == 1:
                found |= set(*sides)
            else:
                found.add(" OR ".join(f"({' AND '.join(side)})" if len(side) > 1 else side[0]
                                      for side in sorted(sides)))
        return found

    def _single(self, name: str, texts: dict[str, str], where: str) -> str:
        known = spdx(name)
        if known is not None:
            return known
        return self.reference(name, texts.get(name, f"{where}\n"))


def spdx(name: str) -> str | None:
    """The SPDX id, or id with exception, of a single name; None where there is none."""
    special = _WITH.fullmatch(name)
    if special is not None:
        licence = spdx(special[1])
        known = EXCEPTIONS.get(special[2].lower())
        return f"{licence} WITH {known}" if licence and known else None
    gnu = _GNU.fullmatch(name)
    if gnu is not None:
        version = gnu[2] if "." in gnu[2] else f"{gnu[2]}.0"
        later = "or-later" if gnu[3] in ("+", "-or-later") else "only"
        name = f"{gnu[1].upper()}-{version}-{later}"
    return known_ids().get(ALIASES.get(name.lower(), name).lower())


@functools.cache
def known_ids() -> dict[str, str]:
    """The ids of SPDX's list, by themselves in lower case; exceptions are not among them."""
    from license_expression import get_spdx_licensing

    return {str(key).lower(): str(key) for key, symbol in get_spdx_licensing().known_symbols.items()
            if not symbol.is_exception and not str(key).startswith("LicenseRef-")}


def of_text(text: str) -> str | None:
    """The SPDX expression of a licence's text, of all that are in it; None where none is known."""
    flat = " ".join(text.split())
    if "advertising materials" in flat:  # of four clauses, of which there are many
        return None
    found = {known for known, phrases in _PHRASES if all(phrase in flat for phrase in phrases)}
    if "BSD-3-Clause" in found:  # whose words are those of the other, and more
        found.discard("BSD-2-Clause")
    return " AND ".join(sorted(found)) or None
