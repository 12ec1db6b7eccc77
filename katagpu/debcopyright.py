"""The licences of a Debian package, from its copyright file.

Machine-readable files are those of Debian's copyright format 1.0 (and the drafts before it, DEP-5);
of others nothing is guessed.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Copyright:
    """The short names of all licences, as the file has them, and the texts that it has of them."""

    names: tuple[str, ...]
    texts: dict[str, str] = field(default_factory=dict)


def read(text: str) -> Copyright | None:
    """The licences of the package's files; None for a file that is not machine-readable."""
    from debian.deb822 import Deb822

    if "format" not in text[:400].lower():
        return None
    try:
        paragraphs = list(Deb822.iter_paragraphs(io.StringIO(text), use_apt_pkg=False))
    except (ValueError, UnicodeError):
        return None
    if not paragraphs or not {"format", "format-specification"} & set(
            name.lower() for name in paragraphs[0]):
        return None
    names: dict[str, None] = {}
    texts: dict[str, str] = {}
    for number, paragraph in enumerate(paragraphs):
        name, _newline, words = str(paragraph.get("License", "")).partition("\n")
        name = " ".join(name.split())
        if not name:
            continue
        if words.strip():
            texts.setdefault(name, plain(words))
        if "Files" in paragraph or number == 0:
            names[name] = None
    return Copyright(names=tuple(sorted(names)), texts=texts) if names else None


def plain(words: str) -> str:
    """A field's text without the format's indent and its dots for blank lines."""
    lines = [line[1:] if line.startswith((" ", "\t")) else line for line in words.splitlines()]
    return "\n".join("" if line.strip() == "." else line.rstrip() for line in lines).strip() + "\n"
