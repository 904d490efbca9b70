"""What the tests of the command line share: calling it, and writing what it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from korder.cli.app import app

GOOD = """
schema_version = 1
kind = "attend"
data = { kind = "random", n = 7, lengths = [5, 3], width = 4, value_width = 2, heads = 4, groups = 2, batch = 3 }
attention = { order = 2 }
output = { directory = "out" }
"""


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def write(text: str = GOOD, name: str = "run.toml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def write_arrays(**changes: Any) -> str:
    generator = np.random.default_rng(3)
    shapes = {"query": (7, 4), "key_1": (5, 4), "key_2": (3, 4), "value_1": (5, 2), "value_2": (3, 2)}
    content = {name: generator.standard_normal(shape).astype("float32") for name, shape in shapes.items()} | changes
    np.savez("x.npz", **{name: array for name, array in content.items() if array is not None})
    return write(
        'schema_version = 1\nkind = "attend"\ndata = { kind = "arrays", path = "x.npz" }\nattention = { order = 2 }\n'
        'output = { directory = "out" }\n'
    )


def nan_at(shape: tuple[int, ...], value: float) -> np.ndarray:
    array = np.ones(shape, "float32")
    array[1, 1] = value
    return array


def assert_refused(result: Any, status: int, code: str, before: list[str]) -> dict[str, Any]:
    """One JSON error on stderr, nothing on stdout, the status, and no file more than before."""
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    error: dict[str, Any] = json.loads(result.stderr)
    assert (error["code"], error["exit_status"]) == (code, status)
    assert error["message"]
    assert listing() == before
    return error


def listing() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def stored(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)
