"""The rules that the layout stands on: import direction, sizes, import weight, public names, texts."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import korder

ROOT = Path(__file__).resolve().parents[1]
BESIDE = sorted(path for part in ("tests", "benchmarks") for path in (ROOT / "plugins").glob(f"*/{part}/*.py"))
MODULES = sorted({*(ROOT / "korder").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")} - {*BESIDE})
PYTHON = sorted([*MODULES, *BESIDE, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])

# Lower may not import higher. The contract's records stand below the methods, its generic backend above them.
LAYERS = [
    ("korder.errors",),
    ("korder.spec.runs", "korder.spec.files"),
    ("korder.spec",),
    ("korder.problem",),
    ("korder.planning",),
    ("korder.spi",),
    ("korder.result",),
    ("korder.methods", "korder.operators"),
    ("korder.spi.namespace",),
    ("korder.dispatch",),
    ("korder.api", "korder.weights", "korder.decoding"),
    ("korder.experiments",),
    ("korder.cli",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
RANK["korder.spec.runs"] = RANK["korder.spec.files"] = RANK["korder.spec"]
RANK["korder"] = RANK["korder.api"]  # the lazy face leads to everything up to here


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT if path.is_relative_to(ROOT / "korder") else ROOT / "plugins")
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(name: str) -> int:
    while name not in RANK:
        name = name.rpartition(".")[0]
    return RANK[name]


def type_checking_nodes(tree: ast.Module) -> set[ast.AST]:
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside.update(ast.walk(node))
    return inside


def imports(path: Path, *, top_level_only: bool = False) -> list[str]:
    tree = ast.parse(path.read_text())
    skipped = type_checking_nodes(tree)
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = []
    for node in nodes:
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {module_name(module) for module in MODULES}
            found += [name if name in known else str(node.module) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    for imported in imports(path):
        root = imported.split(".")[0]
        if name.startswith("korder_"):
            outside = root != "korder" or imported.startswith("korder.spi")
            assert outside, f"{name} imports {imported}: plugins import only korder.spi"
        elif root.startswith("korder"):
            assert root == "korder", f"{name} imports the plugin {imported}"
            # the lazy face and the contract's own lazy attribute are not imports of their package
            if name in ("korder", "korder.spi"):
                continue
            assert layer(imported) <= layer(name), f"{name} imports {imported}, which stands above it"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and path in MODULES:
            body_start = node.body[0].end_lineno + 1 if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
            assert node.end_lineno - body_start + 1 <= 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "a module opens with what it answers"
    assert len(docstring.splitlines()) <= 8


def test_opt_einsum_is_imported_in_one_place() -> None:
    users = [module_name(path) for path in MODULES if any(name.split(".")[0] == "opt_einsum" for name in imports(path))]
    assert users == ["korder.planning.path"]


HEAVY = ("torch", "jax", "triton", "matplotlib", "opt_einsum", "pandas", "scipy")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import korder",
        "from korder import attend, AttentionSpec, merge, marginals",
        "import korder.spi",
        "import korder.cli",
    ],
)
def test_import_loads_no_framework(statement: str) -> None:
    assert not loaded_after(statement) & set(HEAVY)


def test_import_korder_loads_nothing_at_all() -> None:
    assert not loaded_after("import korder") & {"numpy", "pydantic", "pluggy", "typer", "rich"}


def test_every_public_name_resolves_and_none_is_a_submodule() -> None:
    submodules = {path.stem for path in (ROOT / "korder").glob("*.py")}
    submodules |= {path.name for path in (ROOT / "korder").iterdir() if path.is_dir()}
    for name in korder.__all__:
        assert getattr(korder, name) is not None
        assert name not in submodules


@pytest.mark.parametrize("name", ["conformance", "spec", "spi", "torch"])
def test_parts_are_attributes_that_load_on_first_use(name: str) -> None:
    code = f"import sys, korder; assert 'korder.{name}' not in sys.modules; print(korder.{name}.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == f"korder.{name}\n"


def test_type_checkers_see_the_names_that_load_lazily() -> None:
    tree = ast.parse((ROOT / "korder" / "__init__.py").read_text())
    seen = {
        alias.name: node.module
        for node in type_checking_nodes(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == korder._HOME
    assert set(seen) | {"__version__"} == set(korder.__all__)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'atend'"):
        _ = korder.atend


def test_top_level_holds_what_the_design_names() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    allowed = {
        "korder",
        "plugins",
        "tests",
        "docs",
        "examples",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "constraints.txt",
    }
    assert {name.split("/")[0] for name in tracked if not name.startswith(".")} <= allowed


@pytest.mark.parametrize("name", [name for name in korder.__all__ if name != "__version__"])
def test_public_names_are_documented(name: str) -> None:
    assert getattr(korder, name).__doc__
    pages = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert name in pages, f"{name} is in no page of the docs"


def test_docs_link_to_files_that_exist() -> None:
    import re

    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
