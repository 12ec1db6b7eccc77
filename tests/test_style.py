"""How the code must read: sizes, the direction of imports, docstrings, ruff and mypy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "katagpu").rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT / "katagpu").with_suffix("").parts).removesuffix(".__init__"):
    path for path in SOURCES}

LAYERS = (
    ("errors",),
    ("log", "receipt"),
    ("run",),
    ("files", "keys", "store", "tree", "fetch", "download", "neterrors", "sandbox", "enter",
     "yamlfile", "parameters", "reporter", "pgp"),
    ("words", "chips", "sections", "schema", "recipe", "recipe_problems", "recipe_docs", "lock",
     "apt", "resolve", "request", "locks", "hostsetup", "aptview", "keyring", "emulator",
     "driverfile", "lockfile", "lockparts", "committed"),
    ("kconfig", "kconfig_expr", "kconfig_tree", "kconfig_explain", "patches", "disk", "newc",
     "filesystem", "agent", "nvconftest", "guestfiles", "verity", "kataconfig", "kataversions",
     "kernelorg",
     "drivermanifest", "driverparts", "runpayload", "runfile", "nvbranches", "nvcauses",
     "nvinstaller", "nvoutcome", "nvpreflight", "nvsupported", "provenance", "gobuildinfo",
     "debcopyright", "licences", "statement", "modsig", "signingkey"),
    ("boot", "check", "inside", "assembly", "packing", "filelist", "harvest", "vgpu",
     "kconfig_spans", "extension", "contents", "sbom", "sbom_spdx",
     "sbom_cyclonedx", "licencelist"),
    ("stages",),
    ("plan", "guest"),
    ("artifacts", "embed", "booting", "context", "materials"),
    ("release", "host", "finished", "compare", "compare_text", "several", "relock", "supply",
     "reproduce", "sameness", "differences", "vary"),
    ("current", "storetasks", "tasks", "locktasks", "releasetasks", "testtasks", "bench"),
    ("helptext",),
    ("commands",),
    ("__main__",),
)
"""From the ground up. A module imports from its own layer or a lower one."""


def layer(module: str) -> int:
    """A module's layer, by its name or its package's."""
    name = module.split(".")[0]
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"{module} is in no layer: add it to LAYERS in {Path(__file__).name}"
    return found[0]


def imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "katagpu":
                inner = name.removeprefix("katagpu").lstrip(".")
                yield inner if inner in MODULES else inner.rpartition(".")[0]


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_one_way(module: str) -> None:
    wrong = [other for other in imports(MODULES[module])
             if other and layer(other) > layer(module)]
    assert not wrong, f"{module} imports {wrong}, which stand above it"


def test_there_are_no_circles() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"circle: {' → '.join([*way, module])}"
        if module not in done:
            for other in set(imports(MODULES[module])) - {""}:
                visit(other, (*way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes_and_docstrings(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 400, "two jobs?"
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the module has no docstring"
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, functions):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length < 60, f"{node.name} has {length} lines"
    for name, node in public(tree):
        assert ast.get_docstring(node), f"{name} has no docstring"


def public(
    tree: ast.Module | ast.ClassDef,
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Public functions and classes of a module, and the public methods of those."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) \
                and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def test_dodo_is_a_table_of_contents() -> None:
    text = (ROOT / "dodo.py").read_text()
    assert text.count("\n") <= 60
    wrong = [type(node).__name__ for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.If | ast.For | ast.While | ast.Try | ast.With)]
    assert not wrong, "logic belongs into the package"


def test_a_run_with_nothing_to_do_imports_no_heavy_library() -> None:
    heavy = ("{'requests', 'tqdm', 'jinja2', 'debian', 'yaml', 'zstandard', 'elftools', "
             "'cryptography'}")
    code = f"import sys, katagpu.tasks; print(sorted({heavy} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout
    assert said.strip() == "[]"


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["mypy"]], ids=["ruff", "mypy"])
def test_linters(tool: list[str]) -> None:
    said = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
