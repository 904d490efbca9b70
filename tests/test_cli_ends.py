"""How the command line ends where no command decides it: usage, version, Ctrl-C, full outputs, places not to write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import korder
from tests.command_line import GOOD, assert_refused, call, listing, write, write_arrays

FULL = Path("/dev/full")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KORDER_BACKEND", raising=False)


def test_the_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"korder {korder.__version__}\n", "")


@pytest.mark.parametrize("form", [("--format", "json"), ("--format=json",)])
def test_wrong_usage_in_json(form: tuple[str, ...]) -> None:
    error = assert_refused(call("plan", "--nope", *form), 2, "usage", [])
    assert "--nope" in error["message"]
    assert error["got"] == " ".join(["korder plan --nope", *form])
    assert error["hint"]


def test_wrong_usage_in_text() -> None:
    result = call("plan", "--nope")
    assert result.exit_code == 2
    assert "No such option: --nope" in result.stderr
    assert call().exit_code == 2


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import korder.experiments.attend as module

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "build_inputs", interrupt)
    result = call("run", write())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")
    assert listing() == ["run.toml"]


def test_another_error_of_the_system_is_not_taken_for_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    import korder.experiments.attend as module

    def fail(*_: Any) -> None:
        raise OSError("a bug")

    monkeypatch.setattr(module, "build_inputs", fail)
    assert isinstance(call("run", write()).exception, OSError)


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("plan", "run.toml"), ("backends",), ("--help",), ("schema", "--format=json")])
def test_a_standard_output_that_is_full(arguments: tuple[str, ...], unbuffered: str) -> None:
    write()
    program = "from korder.cli import main; main()"
    with FULL.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "standard output cannot be written: No space left" in done.stderr


@pytest.mark.parametrize("place", ["", ".", "..", "/", "sub/..", "here", "absolute"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_the_working_directory_and_those_above_it_are_no_output(place: str, overwrite: tuple[str, ...]) -> None:
    path = write()
    Path("sub").mkdir()
    Path("here").symlink_to(".")
    before, inode = os.listdir(), Path().stat().st_ino
    place = str(Path.cwd()) if place == "absolute" else place
    result = call("run", path, "--output", place, *overwrite, "--format", "json")
    assert (result.exit_code, json.loads(result.stderr)["code"]) == (2, "output-place")
    assert (os.listdir(), Path.cwd().stat().st_ino) == (before, inode)


def test_an_empty_working_directory_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(Path(write()).absolute())
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    assert call("run", path, "--output", ".").exit_code == 2
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("place", ["loose", "loose/below"])
def test_a_link_to_nothing_is_no_output(place: str) -> None:
    path = write()
    Path("loose").symlink_to("gone")
    error = assert_refused(call("run", path, "--output", place, "--format", "json"), 2, "output-place", listing())
    assert error["got"] == "loose -> gone"


def test_a_stored_run_never_replaces_by_itself() -> None:
    path = write()
    assert call("run", path).exit_code == 0
    assert call("run", path, "--overwrite").exit_code == 0
    assert "overwrite" not in Path("out/run.toml").read_text()
    assert json.loads(Path("out/result.json").read_text())["spec"]["output"]["overwrite"] is True
    assert call("run", "out/run.toml").exit_code == 2
    assert call("run", "out/run.toml", "--output", "again").exit_code == 0
    assert (Path("again/run.toml").read_text()) == Path("out/run.toml").read_text().replace('"out"', '"again"')


def test_queries_that_see_nothing_are_noted() -> None:
    path = write(GOOD.replace("lengths = [5, 3]", "lengths = [5, 0]"))
    result = call("run", path)
    assert result.exit_code == 0, result.output
    assert "note: 84 of 84 queries see no tuple" in result.stdout
    assert "see no tuple" not in call("run", write(), "--output", "other").stdout


def test_a_long_check_of_rows_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    import korder.experiments.attend as module

    method = ("--set", "attention.method={kind='polynomial', degree=2, estimate_rows=4}", "--set", "data.score_rms=0.1")
    path = write()
    assert call("run", path, *method, "--output", "quick").stderr == ""
    monkeypatch.setattr(module, "_LONG_SECONDS", 0.0)
    assert "checking 4 rows against the exact method" in call("run", path, *method, "--output", "text").stderr
    assert call("run", path, *method, "--output", "json", "--format", "json").stderr == ""


def test_errors_of_a_file_use_its_names() -> None:
    import numpy as np

    result = call("run", write_arrays(key_1=np.ones((5, 6), "float32")), "--format", "json")
    error = assert_refused(result, 2, "shape-mismatch", listing())
    text = " ".join(str(value) for value in error.values())
    assert "key_1" in text
    assert "keys[" not in text
    mixed = call("run", write_arrays(value_2=np.ones((3, 2), "float64")), "--format", "json").stderr
    assert "value_2" in mixed
    assert "[1]" not in mixed
