"""What the formats of run files have in common: keys once, numbers as numbers, and helpful misses."""

from __future__ import annotations

from pathlib import Path

import pytest

from korder.errors import SpecError
from korder.spec.files import format_run, read_mapping, read_run
from korder.spec.runs import parse_run


def written(folder: Path, text: str, name: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"kind": "attend", "data": {"n": 1, "n": 2, "n": 3}}'),
        ("a.yaml", "kind: attend\ndata:\n  n: 1\n  n: 2\n  n: 3\n"),
        ("a.yaml", "kind: attend\ndata: {n: 1, n: 2, n: 3}\n"),
    ],
)
def test_a_key_that_stands_twice(tmp_path: Path, name: str, text: str) -> None:
    path = written(tmp_path, text, name)
    with pytest.raises(SpecError) as caught:
        read_run(path)
    assert caught.value.code == "file-syntax"
    assert str(path) in caught.value.message
    assert caught.value.expected == "every key once in a table"
    assert caught.value.got == "'n' 3 times"


def test_a_yaml_merge_may_be_overridden(tmp_path: Path) -> None:
    text = "base: &b {n: 1, m: 2}\nother: {<<: *b, n: 3}\n"
    assert read_mapping(written(tmp_path, text, "a.yaml"))["other"] == {"n": 3, "m": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-2E5", -2e5), ("1.5e3", 1.5e3), ("+1e+2", 100.0), ("1.0e-3", 1e-3), ("'1e-3'", "1e-3"),
        ("3", 3), ("1e", "1e"), ("e5", "e5"), ("1e3x", "1e3x"),
    ],
)  # fmt: skip
def test_numbers_in_yaml(tmp_path: Path, text: str, value: object) -> None:
    found = read_mapping(written(tmp_path, f"a: {text}\n", "a.yaml"))["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("directory", ["1e3", "1e-3", "12", "1.5", "true", "null", "plain"])
def test_a_text_that_looks_like_a_number_stays_one(tmp_path: Path, directory: str) -> None:
    run = parse_run(
        {"schema_version": 1, "kind": "benchmark", "output": {"directory": directory, "overwrite": True}}
    )  # fmt: skip
    for suffix in (".toml", ".json", ".yaml"):
        assert read_run(written(tmp_path, format_run(run, suffix), f"a{suffix}")) == run


def test_only_similar_neighbours_are_named(tmp_path: Path) -> None:
    for name in ("quickstart.toml", "quickstart.json", "unrelated.toml", "b.toml"):
        written(tmp_path, "x = 1", name)
    with pytest.raises(SpecError) as caught:
        read_run(tmp_path / "quikstart.toml")
    assert caught.value.hint == "that folder has quickstart.json, quickstart.toml."
    with pytest.raises(SpecError) as caught:
        read_run(tmp_path / "zzz.toml")
    assert caught.value.hint == "paths are relative to the working directory."
