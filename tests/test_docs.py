"""What the docs show is run: Python blocks of the pages, examples in docstrings, and every environment variable."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from tests.test_architecture import MODULES, ROOT, module_name

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
WITH_EXAMPLES = [path for path in MODULES if ">>> " in path.read_text()]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from korder import api, weights
    from korder.dispatch.registry import Registry

    monkeypatch.chdir(tmp_path)
    own = Registry.from_entry_points()  # what a block registers is gone after it
    monkeypatch.setattr(api, "default_registry", lambda: own)
    monkeypatch.setattr(weights, "default_registry", lambda: own)
    setup = (
        "import numpy as np, korder\n"
        "rng = np.random.default_rng(0)\n"
        "query, *rest = (0.5 * rng.standard_normal((2, 13, 4)) for _ in range(5))\n"
        "keys, values = tuple(rest[:2]), tuple(rest[2:])\n"
    )
    exec(compile(setup + block, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_name)
def test_docstring_examples(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    tested = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tested.attempted > 0
    assert tested.failed == 0


def test_environment_variables_are_documented() -> None:
    code = "\n".join(path.read_text() for path in MODULES)
    pages = "\n".join(path.read_text() for path in PAGES)
    variables = set(re.findall(r"KORDER_[A-Z_]+", code))
    of_korder = {"KORDER_BACKEND", "KORDER_DISABLE_PLUGINS", "KORDER_RATES", "KORDER_STRICT_PLUGINS"}
    assert variables == of_korder | {"KORDER_NATIVE_ISA"}
    assert all(variable in pages for variable in variables)


def test_every_page_is_reachable_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme]
    assert not missing
