"""A generated backend installs and conforms before a line is changed; one that is refused leaves nothing behind."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from korder.cli import new_backend
from tests.command_line import assert_refused, call, listing
from tests.installed import environment, in_a_process

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "korder" / "cli" / "templates"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    assert call("new-backend", "acme", "--directory", str(directory)).exit_code == 0
    return directory / "korder-acme"


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip put the distribution, unedited."""
    target = tmp_path_factory.mktemp("site")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return target


def test_it_conforms_unedited(site: Path) -> None:
    done = in_a_process(site, "conformance", "acme", "--quick", "--format", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout)
    assert record["passed"]
    assert record["verified"]
    assert record["counts"]["core"]["passed"] > 20
    assert record["counts"]["core"]["unverified"] == 0
    assert record["counts"]["claimed"]["passed"] > 500


def test_it_is_listed_and_takes_over_from_nobody(site: Path) -> None:
    done = in_a_process(site, "backends", "--format", "json")
    assert done.returncode == 0, done.stderr
    names = [record["name"] for record in json.loads(done.stdout)]
    assert names.index("acme") > names.index("numpy")
    program = (
        "import numpy as np, korder; x = np.arange(6.0).reshape(3, 2)\n"
        "for backend in ('auto', 'acme', 'numpy'):\n"
        "    result = korder.attend_result(x, (x[:2], x), (x[1:], x), backend=backend)\n"
        "    print(result.provenance.backend, result.output.sum().round(9))\n"
    )

    def backends(**variables: str) -> list[list[str]]:
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment(site, **variables),
            check=True,
        )  # fmt: skip
        return [line.split() for line in run.stdout.splitlines()]

    plain = backends()
    assert [backend for backend, _ in plain] == ["numpy", "acme", "numpy"]
    assert len({total for _, total in plain}) == 1
    assert [backend for backend, _ in backends(KORDER_BACKEND="acme")] == ["acme", "acme", "numpy"]


def test_its_own_test_runs_the_kit(source: Path, site: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "contract.name or contract.core"],
        cwd=source, env=environment(site), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout


def test_everything_is_written_for_the_name() -> None:
    result = call("new-backend", "my_chip", "--format", "json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    root = Path("korder-my-chip")
    assert (record["name"], record["distribution"], record["directory"]) == ("my_chip", "korder-my-chip", str(root))
    assert record["next"] == ["pip install -e ./korder-my-chip", "korder conformance my_chip"]
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == sorted(record["files"])
    assert listing()[0] == str(root)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["name"] == "korder-my-chip"
    assert project["entry-points"] == {"korder.backends": {"my_chip": "korder_my_chip"}}
    backend = ast.parse((root / "src/korder_my_chip/backend.py").read_text())
    (made,) = [node for node in backend.body if isinstance(node, ast.ClassDef)]
    assert made.name == "MyChipBackend"
    assert [node.target.id for node in made.body if isinstance(node, ast.AnnAssign)] == [  # type: ignore[union-attr]
        "name", "array_kinds", "priority",
    ]  # fmt: skip
    assert [node.name for node in made.body if isinstance(node, ast.FunctionDef)] == [
        "namespace", "availability", "capabilities",
    ]  # fmt: skip
    for file in record["files"]:
        assert "$" not in (root / file).read_text(), file


def test_lines_stay_short_for_the_longest_name() -> None:
    name = "a" * new_backend.LONGEST_NAME
    assert call("new-backend", name).exit_code == 0
    for path in Path(f"korder-{name}").rglob("*.py"):
        ast.parse(path.read_text())
        assert max(map(len, [*path.read_text().splitlines(), ""])) <= 120, path


def test_text_says_what_is_next() -> None:
    result = call("new-backend", "acme", "--directory", ".")
    assert "wrote korder-acme\n" in result.stdout
    assert "  src/korder_acme/backend.py\n" in result.stdout
    assert "  pip install -e ./korder-acme\n  korder conformance acme\n" in result.stdout


@pytest.mark.parametrize(
    "name",
    ["Acme", "3d", "a-b", "a__b", "_a", "a_", "class", "async", "auto", "", "a" * 41, "é", "a/b", "a\n"],
)  # fmt: skip
def test_names_that_cannot_be(name: str) -> None:
    error = assert_refused(call("new-backend", "--format", "json", "--", name), 2, "backend-name", [])
    assert error["got"] == repr(name)
    assert "a-z" in error["expected"]
    assert error["hint"].startswith("for example '")


def test_the_hint_is_a_name_near_by() -> None:
    error = assert_refused(call("new-backend", "My-Chip 2", "--format", "json"), 2, "backend-name", [])
    assert error["hint"] == "for example 'my_chip'."


@pytest.mark.parametrize("name", ["numpy", "torch", "cuda"])
def test_names_that_are_taken(name: str) -> None:
    error = assert_refused(call("new-backend", name, "--format", "json"), 2, "backend-name-taken", [])
    assert "numpy" in error["expected"]


def test_a_package_of_that_name_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "korder_left.py").write_text("")
    monkeypatch.syspath_prepend(str(place))
    error = assert_refused(call("new-backend", "left", "--format", "json"), 2, "backend-name-taken", listing())
    assert error["got"] == "an installed package korder_left"


def make_directory(path: Path) -> None:
    path.mkdir()


def make_file(path: Path) -> None:
    path.write_text("mine")


def make_link(path: Path) -> None:
    path.symlink_to("gone")


@pytest.mark.parametrize("make", [make_directory, make_file, make_link])
def test_what_is_there_already_stays(make: Any) -> None:
    make(Path("korder-acme"))
    assert_refused(call("new-backend", "acme", "--format", "json"), 2, "output-exists", ["korder-acme"])


def test_a_place_that_is_not_there() -> None:
    error = assert_refused(
        call("new-backend", "acme", "--directory", "nowhere", "--format", "json"), 2, "output-unwritable", []
    )
    assert "No such file or directory" in error["got"]


@pytest.mark.parametrize("step", ["write_text", "rename"])
def test_nothing_is_half_written(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real = Path.write_text

    def third_fails(path: Path, *arguments: Any, **options: Any) -> int:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(path))
        return real(path, *arguments, **options)

    def fails(*_: object) -> None:
        calls.append(_)
        raise OSError(13, "Permission denied")

    if step == "rename":
        monkeypatch.setattr(os, "rename", fails)
    else:
        monkeypatch.setattr(Path, "write_text", third_fails)
    result = call("new-backend", "acme", "--format", "json")
    assert calls
    assert_refused(result, 2, "output-unwritable", [])


def test_the_wheel_has_the_templates() -> None:
    from hatchling.builders.wheel import WheelBuilder

    shipped = {Path(file.distribution_path) for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    templates = {path.relative_to(ROOT) for path in TEMPLATES.iterdir()}
    assert len(templates) == len(new_backend._FILES)
    assert templates <= shipped
