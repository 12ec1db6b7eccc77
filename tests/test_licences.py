"""Licence names as SPDX expressions: what is translated, and what becomes a reference."""

from __future__ import annotations

import pytest

from katagpu import debcopyright, licences

FORMAT = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
FILE = FORMAT + """Upstream-Name: toy

Files: *
Copyright: someone
License: GPL-2+ and Toy-1
 The text of both,
 .
   indented.

Files: debian/*
Copyright: someone
License: Expat

License: Toy-1
 Do as you like.
"""


def test_a_machine_readable_file() -> None:
    found = debcopyright.read(FILE)
    assert found is not None and found.names == ("Expat", "GPL-2+ and Toy-1")
    assert found.texts == {"GPL-2+ and Toy-1": "The text of both,\n\n  indented.\n",
                           "Toy-1": "Do as you like.\n"}


@pytest.mark.parametrize("text", [
    "This package was debianized by someone.\nIts format is free.\n", "", FORMAT,
    "License: GPL-2\n", FORMAT + "\nFiles: *\nCopyright: x\n"])
def test_of_other_files_nothing_is_guessed(text: str) -> None:
    assert debcopyright.read(text) is None


def test_a_licence_of_the_header_alone() -> None:
    found = debcopyright.read(FORMAT + "License: ISC\n")
    assert found is not None and found.names == ("ISC",)


@pytest.mark.parametrize(("name", "spdx"), [
    ("GPL-2+", "GPL-2.0-or-later"), ("GPL-2", "GPL-2.0-only"), ("GPLv3+", "GPL-3.0-or-later"),
    ("LGPL-2.1+", "LGPL-2.1-or-later"), ("LGPL-2.0-or-later", "LGPL-2.0-or-later"),
    ("GPL-2.0+", "GPL-2.0-or-later"), ("GFDL-1.3+", "GFDL-1.3-or-later"), ("Expat", "MIT"),
    ("BSD-3-clause", "BSD-3-Clause"), ("Zlib", "Zlib"), ("CC0", "CC0-1.0"),
    ("GPL-2 with Linux-syscall-note exception", "GPL-2.0-only WITH Linux-syscall-note"),
    # What could be one of several stays what it is.
    ("GPL", None), ("Artistic", None), ("public-domain", None), ("GPL-3+ with toy exception", None),
    ("LicenseRef-scancode-x", None), ("GPL-9", None)])
def test_single_names(name: str, spdx: str | None) -> None:
    assert licences.spdx(name) == spdx


@pytest.mark.parametrize(("names", "expression"), [
    (("GPL-2+", "Expat"), "GPL-2.0-or-later AND MIT"),
    (("GPL-2+ or BSD-3-clause", "Expat"), "(BSD-3-Clause OR GPL-2.0-or-later) AND MIT"),
    (("LGPLv3+_or_GPLv2+",), "GPL-2.0-or-later OR LGPL-3.0-or-later"),
    (("GPL-2 or ISC, and Expat",), "(GPL-2.0-only OR ISC) AND MIT"),
    (("ISC and Expat or GPL-2",), "GPL-2.0-only OR (ISC AND MIT)"),
    (("ISC and Expat", "Expat"), "ISC AND MIT")])
def test_expressions(names: tuple[str, ...], expression: str) -> None:
    from license_expression import get_spdx_licensing

    assert licences.Naming().expression(names, {}, "where") == expression
    assert get_spdx_licensing().validate(expression).errors == []


def test_other_licences_are_named_by_name_and_text() -> None:
    naming = licences.Naming()
    one = naming.expression(("Toy+1",), {"Toy+1": "Do  as\nyou like.\n"}, "")
    same = naming.expression(("Toy+1",), {"Toy+1": "Do as you like.\n"}, "")
    other = naming.expression(("Toy+1",), {"Toy+1": "Do not.\n"}, "")
    assert one == same != other and one.startswith("LicenseRef-Toy-1-")
    assert naming.named[one].name == "Toy+1"
    textless = naming.expression(("Toy",), {}, "See the file.")
    assert naming.named[textless].text == "See the file.\n"


@pytest.mark.parametrize(("text", "known"), [
    ("Apache License\n  Version 2.0, January 2004", "Apache-2.0"),
    ("Permission is hereby granted, free of charge, … without restriction", "MIT"),
    ("Redistribution and use in source and\nbinary forms", "BSD-2-Clause"),
    ("Redistribution and use in source and binary forms … be used to endorse or promote",
     "BSD-3-Clause"),
    # Two in one file (go-toml has such a one): both.
    ("Permission is hereby granted, free of charge, without restriction\nApache License "
     "Version 2.0, January 2004", "Apache-2.0 AND MIT"),
    ("Redistribution and use in source and binary forms … advertising materials … be used to "
     "endorse or promote", None),
    ("All rights reserved.", None)])
def test_texts(text: str, known: str | None) -> None:
    assert licences.of_text(text) == known
