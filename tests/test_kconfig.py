"""The audit of kernel configurations, on a toy tree that has each rule of the Kconfig language."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from katagpu.errors import StepError, UserError
from katagpu.kconfig import (
    Allowance,
    Finding,
    Kind,
    Request,
    audit,
    kernel_version,
    load_allowances,
    load_fragments,
    parse_fragment,
    require,
)
from katagpu.kconfig_explain import Config
from katagpu.kconfig_expr import Malformed, N, Y, evaluate, parse, render, tokens, unmet
from katagpu.kconfig_tree import read_tree

TOY = Path(__file__).parent / "data" / "kconfig"
SHIPPED = Path(__file__).parent.parent / "kernel-configs"
GOOD = ["CONFIG_64BIT=y", "CONFIG_MODULES=y", "CONFIG_SYSFS=y", "CONFIG_HZ_250=y", "CONFIG_HZ=250"]

Auditor = Callable[..., list[Finding]]


@pytest.fixture
def auditor(tmp_path: Path) -> Auditor:
    """Audit fragments (`name=lines`) against a final configuration of `GOOD` plus `config`."""

    def run(config: list[str], allow: tuple[Allowance, ...] = (),
            **fragments: str) -> list[Finding]:
        final = tmp_path / "config"
        final.write_text("\n".join([*GOOD, *config]) + "\n")
        paths = []
        for name, text in fragments.items():
            path = tmp_path / name.replace("_", "/") / f"{name}.conf"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            paths.append(path)
        return audit(load_fragments(paths), final, TOY, "x86_64", allow)

    return run


def values(**symbols: str) -> Config:
    return Config(symbols, read_tree(TOY, "x86_64"))


@pytest.mark.parametrize(("text", "expected"), [
    ("PCI", Y),
    ("!PCI", N),
    ("SOUND && PCI", 1),
    ("SOUND || PCI", Y),
    ("ACPI || PCI && ACPI", N),
    ("(ACPI || PCI) && PCI", Y),
    ("HZ = 250", Y),
    ("HZ >= 1000", N),
    ("HZ < 0x1000", Y),
    ('LOCALVERSION = "-toy"', Y),
    ("ABSENT = ABSENT", Y),
    ("$(cc-option,-m(x))", None),
    ("PCI || $(cc-option,-mx)", Y),
    ("ACPI && $(cc-option,-mx)", N),
    ("PCI && $(cc-option,-mx)", None),
    ("$(cc-option,-mx) = y", None),
    ("y", Y),
])
def test_expressions_have_kconfigs_values(text: str, expected: int | None) -> None:
    final = values(PCI="y", SOUND="m", HZ="250", LOCALVERSION='"-toy"')
    assert evaluate(parse(list(tokens(text))), final) == expected


@pytest.mark.parametrize("text", ["A &&", "(A", "A B", "= A", "$(open", "A ; B", ""])
def test_a_malformed_expression_is_refused(text: str) -> None:
    with pytest.raises(Malformed):
        parse(list(tokens(text)))


def test_an_expression_is_written_as_it_was() -> None:
    text = 'A && (B || !C) && D >= "a b" && E > 1'
    assert render(parse(list(tokens(text)))) == text


def test_unmet_names_only_what_is_missing() -> None:
    expression = parse(list(tokens("PCI && (ACPI || SGX) && !SYSFS && HZ > 300 && GONE")))
    assert unmet(expression, values(PCI="y", SYSFS="y", HZ="250")) == [
        "ACPI is n and SGX is n", "SYSFS is y", "HZ is 250, so HZ > 300 is false",
        "GONE does not exist in this kernel"]


def test_the_reader_knows_the_language() -> None:
    tree = read_tree(TOY, "x86_64")
    assert "NOT_A_SYMBOL" not in tree.definitions
    hotplug = tree.definitions["HOTPLUG_PCI_PCIE"][0]
    assert [(each.kind, render(each.expression)) for each in hotplug.needs] == [
        ("depends on", "!HEADLESS"), ("if", "HOTPLUG_PCI"), ("depends on", "PCIEPORTBUS || ACPI")]
    assert (hotplug.type, hotplug.prompt) == ("tristate", "PCIe hot-plug")
    assert render(tree.definitions["HOTPLUG_PCI"][0].needs[1].expression) == "PCI && SYSFS"
    choice = tree.definitions["HZ_100"][0].choice
    assert choice is not None
    assert (choice.prompt, choice.members) == ("Timer frequency", ["HZ_100", "HZ_250"])
    assert tree.definitions["HZ"][0].choice is None
    assert tree.definitions["NR_CPUS"][0].bounds == ("2", "NR_CPUS_MAX")
    assert [each.name for each, _ in tree.selectors["NOTIFIER"]] == ["SGX"]
    assert render(tree.definitions["64BIT"][0].defaults[0][0]) == '"x86_64" != "i386"'


def test_a_tree_that_lacks_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "Kconfig").write_text('source "gone/Kconfig"\n')
    with pytest.raises(StepError, match=r"gone/Kconfig: a Kconfig file cannot be read"):
        read_tree(tmp_path, "x86_64")


def test_a_line_that_is_not_understood_is_named(tmp_path: Path) -> None:
    (tmp_path / "Kconfig").write_text("config A\n\tbool\n\tfrobnicate B\n")
    with pytest.raises(StepError, match=r"Kconfig:3: .* unknown keyword 'frobnicate'"):
        read_tree(tmp_path, "x86_64")


def test_fragments_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    path.write_text('# Why.\n\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="-x y"\n')
    assert [(each.symbol, each.value, each.line) for each in parse_fragment(path)] == [
        ("A", "y", 3), ("B", "n", 4), ("C", '"-x y"', 5)]


@pytest.mark.parametrize(
    "line", ["A=y", "CONFIG_A = y", "CONFIG_A=y # why", "CONFIG_A=", "config A"])
def test_a_line_that_is_no_setting_is_a_user_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.conf"
    path.write_text(f"CONFIG_B=y\n{line}\n")
    with pytest.raises(UserError, match=r"a\.conf:2: "):
        parse_fragment(path)


def test_what_survived_is_no_finding(auditor: Auditor) -> None:
    found = auditor(["CONFIG_NR_CPUS=0x40", 'CONFIG_LOCALVERSION="-toy"'],
                    base='CONFIG_NR_CPUS=64\nCONFIG_LOCALVERSION="-toy"\n# CONFIG_PCI is not set\n')
    assert found == []


@pytest.mark.parametrize(("asked", "config", "why"), [
    ("CONFIG_HOTPLUG_PCI_PCIE=y", ["CONFIG_PCI=y", "CONFIG_ACPI=y"],
     "configuration has n: if HOTPLUG_PCI (Kconfig:31): HOTPLUG_PCI is n"),
    ("CONFIG_HOTPLUG_PCI_PCIE=y", ["CONFIG_PCI=y", "CONFIG_HOTPLUG_PCI=y"],
     "depends on PCIEPORTBUS || ACPI (Kconfig:35): PCIEPORTBUS does not exist in this kernel"
     " and ACPI is n"),
    ("CONFIG_HOTPLUG_PCI=y", [],
     "depends on PCI && SYSFS (Kconfig:27): PCI is n"),
    ("CONFIG_HOTPLUG_PCI_OLD=y", ["CONFIG_PCI=y", "CONFIG_HOTPLUG_PCI=y"],
     "its prompt needs EXPERT (Kconfig:37): EXPERT is n"),
    ("CONFIG_NOTIFIER=y", [],
     "it has no prompt, so no fragment can set it; it is selected by SGX"),
    ("CONFIG_NOBODY=y", [],
     "it has no prompt, so no fragment can set it; its value is PCI && HZ >= 1000"),
    ("CONFIG_HZ_100=y", [], "its choice 'Timer frequency' took HZ_250"),
    ("CONFIG_NR_CPUS=1000", ["CONFIG_NR_CPUS=512", "CONFIG_NR_CPUS_MAX=512"],
     "its range is 2 to 512"),
    ("CONFIG_PCI=m", [], "it is of type bool, which cannot be m"),
    ("CONFIG_NR_CPUS=y", ["CONFIG_NR_CPUS=64"], "it is of type int, which cannot be y"),
    ("CONFIG_SLS=y", [],
     "depends on $(cc-option,-mharden-sls=all) (Kconfig:92): the toolchain may not pass"),
    ("CONFIG_SOUND_CARD=y", ["CONFIG_SOUND=m", "CONFIG_SOUND_CARD=m"],
     "configuration has m: depends on SOUND (Kconfig:99): SOUND is m"),
    ("# CONFIG_NOTIFIER is not set", ["CONFIG_SGX=y", "CONFIG_NOTIFIER=y"],
     "was asked for, but the kernel's configuration has y: it is selected by SGX"),
    ("# CONFIG_SYSFS is not set", [], "its prompt is hidden, and its default is on"),
])
def test_a_lost_request_is_explained(
        auditor: Auditor, asked: str, config: list[str], why: str) -> None:
    found = auditor(config, base=f"# Reason.\n{asked}\n")
    assert [each.kind for each in found] == [Kind.LOST]
    assert why in found[0].message
    assert "base.conf:2: CONFIG_" in found[0].message


def test_a_dependency_that_was_asked_to_be_off_is_traced(auditor: Auditor) -> None:
    found = auditor([], base="# CONFIG_PCI is not set\nCONFIG_HOTPLUG_PCI=y\n")
    assert "PCI is n (asked for by " in found[0].message
    assert "base.conf:1)" in found[0].message


def test_an_unknown_symbol_gets_a_suggestion(auditor: Auditor) -> None:
    found = auditor([], base="CONFIG_HOTPLUG_PCI_PCI=y\n")
    assert found[0].kind is Kind.UNKNOWN
    assert "no such symbol in Linux 6.12.7 (did you mean HOTPLUG_PCI" in found[0].message


def test_a_feature_may_override_and_it_is_said(auditor: Auditor) -> None:
    found = auditor(["CONFIG_PCI=y"], base="# CONFIG_PCI is not set\n", features="CONFIG_PCI=y\n")
    assert [(each.kind, each.fatal) for each in found] == [(Kind.OVERRIDE, False)]
    assert "features.conf:1: CONFIG_PCI=y overrides n of " in found[0].message


def test_a_feature_may_take_another_member_of_a_choice(auditor: Auditor) -> None:
    found = auditor([], base="CONFIG_HZ_100=y\n", features="CONFIG_HZ_250=y\n")
    assert [(each.kind, each.fatal) for each in found] == [(Kind.OVERRIDE, False)]
    assert "gives way to" in found[0].message


def test_two_fragments_of_one_directory_may_not_disagree(tmp_path: Path) -> None:
    first, second, final = (tmp_path / name for name in ("1.conf", "2.conf", "config"))
    first.write_text("CONFIG_PCI=y\n")
    second.write_text("# CONFIG_PCI is not set\n")
    final.write_text("CONFIG_64BIT=y\n")
    found = audit(load_fragments([first, second]), final, TOY, "x86_64", [])
    assert [each.kind for each in found] == [Kind.CONFLICT]
    assert f"{second}:1: CONFIG_PCI=n contradicts y of {first}:1" in found[0].message


def allowance(symbol: str, kernel: str = "6.12.*") -> Allowance:
    return Allowance(symbol=symbol, got="n", reason="not needed", kernels=(kernel,),
                     path=Path("allow.yaml"))


def test_an_allowance_makes_a_loss_harmless_on_its_kernels(auditor: Auditor) -> None:
    found = auditor([], (allowance("ACPI"),), base="CONFIG_ACPI=y\n")
    assert [(each.kind, each.fatal) for each in found] == [(Kind.ALLOWED, False)]
    assert found[0].message.endswith("allowed: not needed")
    found = auditor([], (allowance("ACPI", "6.1.*"),), base="CONFIG_ACPI=y\n")
    assert [each.kind for each in found] == [Kind.LOST]


def test_an_allowance_that_is_not_needed_is_an_error(auditor: Auditor) -> None:
    found = auditor(["CONFIG_ACPI=y"], (allowance("ACPI"),), base="CONFIG_ACPI=y\n")
    assert [(each.kind, each.fatal) for each in found] == [(Kind.STALE, True)]
    assert auditor([], (allowance("SGX"),), base="") == []


def test_the_allow_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "allow.yaml"
    path.write_text("- {symbol: A, got: n, reason: r, kernels: ['6.*']}\n")
    assert load_allowances(path) == [
        Allowance(symbol="A", got="n", reason="r", kernels=("6.*",), path=path)]


@pytest.mark.parametrize("text", [
    "- {symbol: A, got: n, kernels: ['6.*']}",
    "- {symbol: A, got: n, reason: ' ', kernels: ['6.*']}",
    "- {symbol: A, got: n, reason: r, kernels: '6.*'}",
    "- {symbol: A, got: n, reason: r, kernels: ['6.*'], more: 1}",
    "{A: n}",
    "[",
])
def test_a_bad_allow_list_is_a_user_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "allow.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"allow\.yaml"):
        load_allowances(path)


def test_a_32_bit_kernel_and_nouveau_are_refused(tmp_path: Path) -> None:
    final = tmp_path / "config"
    final.write_text("# CONFIG_64BIT is not set\nCONFIG_DRM_NOUVEAU=m\n")
    found = audit([], final, TOY, "x86_64", [])
    assert [(each.kind, each.symbol) for each in found] == [
        (Kind.ASSERTION, "64BIT"), (Kind.ASSERTION, "DRM_NOUVEAU")]


def test_another_architecture_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no kernel configuration for riscv"):
        audit([], tmp_path, TOY, "riscv", [])


def finding(path: Path) -> Finding:
    request = Request(symbol="A", value="y", path=path, line=3)
    return Finding(kind=Kind.LOST, symbol="A", message=f"{request} was lost", request=request)


def test_the_blame_decides_the_kind_of_error() -> None:
    ours, theirs = finding(SHIPPED / "base" / "a.conf"), finding(Path("/home/u/x.conf"))
    harmless = Finding(kind=Kind.OVERRIDE, symbol="A", message="fine")
    require([harmless], SHIPPED)
    with pytest.raises(StepError, match="1 finding"):
        require([ours, harmless], SHIPPED)
    with pytest.raises(UserError, match="2 findings") as caught:
        require([ours, theirs], SHIPPED)
    assert "/home/u/x.conf:3: CONFIG_A=y was lost" in str(caught.value)


def test_the_kernels_version_comes_from_its_makefile() -> None:
    assert kernel_version(TOY) == "6.12.7"


def shipped_fragments() -> list[Path]:
    return sorted(SHIPPED.glob("*/*.conf"))


@pytest.mark.parametrize("path", shipped_fragments(), ids=lambda path: path.stem)
def test_each_shipped_group_has_its_reason(path: Path) -> None:
    """Each block of settings (up to an empty line) begins with a comment, or follows a heading."""
    requests = parse_fragment(path)
    assert requests
    assert path.read_text().startswith("# ")
    names = [each.symbol for each in requests]
    assert len(names) == len(set(names))


def test_the_shipped_base_asks_for_each_symbol_once() -> None:
    names = [each.symbol for each in load_fragments(sorted((SHIPPED / "base").glob("*.conf")))]
    assert sorted(names) == sorted(set(names))


def test_the_shipped_allow_list_names_only_what_is_asked_for() -> None:
    asked = {each.symbol for each in load_fragments(shipped_fragments())}
    assert {each.symbol for each in load_allowances(SHIPPED / "allow.yaml")} <= asked
