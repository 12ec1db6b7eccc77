"""Sections of fragments, and that the shipped fragments fit older kernels.

    python tests/test_kconfig_spans.py --renew TREE...

writes for the kernel of each source tree which symbols of our fragments it has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from katagpu.errors import UserError
from katagpu.kconfig import Finding, Kind, Request, audit, kernel_version, load_fragments
from katagpu.kconfig_spans import Span, forgive, read_spans
from katagpu.kconfig_tree import read_tree

DATA = Path(__file__).parent / "data"
TOY = DATA / "kconfig"
KNOWN = DATA / "kernel-symbols"
SHIPPED = Path(__file__).parent.parent / "kernel-configs"
NEEDS_A_NEWER_KERNEL = {"confidential", "mem-agent"}
"""Features that are about what older kernels do not have: there they fail."""
BETWEEN = {"SPECULATION_MITIGATIONS"}
"""Linux 5.19 to 6.8 and some stable ones (commits f43b9876e857, fe42754b94a4), none on record."""


def shipped_fragments() -> list[Path]:
    """Base and features."""
    return [*sorted((SHIPPED / "base").glob("*.conf")),
            *sorted((SHIPPED / "features").glob("*.conf"))]


def test_each_line_of_a_section_has_its_span(tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    path.write_text("CONFIG_A=y\n#: new in 6.10\nCONFIG_B=y\n# why\nCONFIG_C=y\n"
                    "#: new in 5.19, gone in 6.9\nCONFIG_D=y\n#: end\nCONFIG_E=y\n"
                    "#: gone in 5.15.3\nCONFIG_F=y\n")
    spans = read_spans(path)
    assert {each.symbol: spans.get(each.line) for each in load_fragments([path])} == {
        "A": None, "B": Span(new="6.10"), "C": Span(new="6.10"),
        "D": Span(new="5.19", gone="6.9"), "E": None, "F": Span(gone="5.15.3")}


@pytest.mark.parametrize("line", [
    "#:", "#: new", "#: new in six", "#: since 6.9", "#: new in 6.9 gone in 6.10",
    "#: , gone in 6.9", "#: new in 6.9, gone in", "#: new in 6.", "#: new in 6", "#: End",
    "#: new in 6.9, gone in 6.9", "#: new in 6.10, gone in 6.9",
])
def test_a_section_that_is_not_understood(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.conf"
    path.write_text(f"CONFIG_A=y\n{line}\n")
    with pytest.raises(UserError, match=r"a\.conf:2: "):
        read_spans(path)


@pytest.mark.parametrize(("span", "kernel", "covered"), [
    (Span(new="6.10"), "6.9.12", False), (Span(new="6.10"), "6.10", True),
    (Span(new="6.10"), "6.10.0-rc1", True), (Span(new="6.10"), "7.0.1", True),
    (Span(gone="6.9"), "5.15.23", True), (Span(gone="6.9"), "6.9.0", False),
    (Span(gone="6.9"), "6.12.117", False), (Span(new="5.19", gone="6.9"), "6.1.192", True),
    (Span(new="5.19", gone="6.9"), "5.15.23", False), (Span(gone="5.15.3"), "5.15.2", True),
])
def test_versions(span: Span, kernel: str, covered: bool) -> None:
    assert span.covers(kernel) is covered


def judged(tmp_path: Path, fragment: str, config: list[str], kernel: str) -> list[Finding]:
    """The findings on the toy tree, as if it were this kernel."""
    path, final = tmp_path / "a.conf", tmp_path / "config"
    path.write_text(fragment)
    final.write_text("\n".join(["CONFIG_64BIT=y", *config]) + "\n")
    findings = audit(load_fragments([path]), final, TOY, "x86_64", [])
    return forgive(findings, [path], kernel, TOY, "x86_64")


@pytest.mark.parametrize(("mark", "kernel", "kinds"), [
    ("new in 6.10", "6.9.1", [Kind.ALLOWED]), ("new in 6.10", "6.10", [Kind.UNKNOWN]),
    ("gone in 6.9", "6.9", []), ("gone in 6.9", "6.8.9", [Kind.UNKNOWN]),
    ("new in 5.19, gone in 6.9", "5.15.23", [Kind.ALLOWED]),
    ("new in 5.19, gone in 6.9", "6.12", []),
])
def test_a_kernel_without_the_symbol(tmp_path: Path, mark: str, kernel: str,
                                     kinds: list[Kind]) -> None:
    found = judged(tmp_path, f"#: {mark}\nCONFIG_BRAND_NEW=y\n", [], kernel)
    assert [each.kind for each in found] == kinds
    if kinds == [Kind.ALLOWED]:
        assert "a.conf:2: CONFIG_BRAND_NEW=y" in found[0].message
        assert kernel in found[0].message


def test_a_symbol_without_a_prompt_cannot_be_asked_for(tmp_path: Path) -> None:
    tree = read_tree(TOY, "x86_64")
    assert not any(each.prompt for each in tree.definitions["NOTIFIER"])
    (found,) = judged(tmp_path, "#: new in 6.10\nCONFIG_NOTIFIER=y\n", [], "6.9")
    assert found.kind is Kind.ALLOWED
    (found,) = judged(tmp_path, "#: new in 6.10\nCONFIG_NOTIFIER=y\n", [], "6.11")
    assert found.kind is Kind.LOST


def test_a_kernel_that_took_it_over_is_asked_all_the_same(tmp_path: Path) -> None:
    """It has a prompt, so what is lost is lost for another reason."""
    text = "#: new in 6.10\nCONFIG_HOTPLUG_PCI_PCIE=y\n"
    (found,) = judged(tmp_path, text, ["CONFIG_PCI=y"], "6.1.200")
    assert found.kind is Kind.LOST and found.fatal


def test_outside_of_a_section_nothing_is_forgiven(tmp_path: Path) -> None:
    (found,) = judged(tmp_path, "#: new in 6.10\n#: end\nCONFIG_BRAND_NEW=y\n", [], "5.15")
    assert found.kind is Kind.UNKNOWN


# the shipped fragments


def recorded() -> dict[str, set[str]]:
    """Kernel version → those of our symbols that it has."""
    return {path.name: set(path.read_text().split()) for path in sorted(KNOWN.iterdir())}


def requests() -> list[tuple[Request, Span | None]]:
    """Every request of the shipped fragments, with its span."""
    return [(each, read_spans(path).get(each.line)) for path in shipped_fragments()
            for each in load_fragments([path])]


@pytest.mark.parametrize("kernel", ["5.15.16", "6.1.192", "6.12.117"])
def test_the_shipped_fragments_fit_this_kernel(kernel: str) -> None:
    known = recorded()[kernel]
    wrong = [str(each) for each, span in requests()
             if each.value != "n" and each.symbol not in known
             and (span is None or span.covers(kernel))
             and each.path.stem not in NEEDS_A_NEWER_KERNEL]
    assert not wrong, (
        f"Linux {kernel} does not have these. Put them into a section (`#: new in …`), or, where "
        f"the record is old: python tests/test_kconfig_spans.py --renew TREE\n" + "\n".join(wrong))


def test_every_symbol_of_a_section_is_one_of_some_kernel() -> None:
    anywhere = set.union(*recorded().values())
    wrong = [str(each) for each, span in requests()
             if span is not None and each.symbol not in anywhere | BETWEEN]
    assert not wrong, "no kernel on record has these:\n" + "\n".join(wrong)


def renew(trees: list[Path]) -> None:
    """Write the record of each tree's kernel."""
    asked = {each.symbol for each in load_fragments(shipped_fragments())}
    KNOWN.mkdir(exist_ok=True)
    for tree in trees:
        known = sorted(asked & set(read_tree(tree, "x86_64").definitions))
        (KNOWN / kernel_version(tree)).write_text("\n".join(known) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--renew"] or not sys.argv[2:]:
        sys.exit(f"usage: {sys.argv[0]} --renew TREE...")
    renew([Path(word) for word in sys.argv[2:]])
