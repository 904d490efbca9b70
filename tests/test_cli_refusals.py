"""Every bad input gives one clear error and the right exit status, and writes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from korder import errors
from korder.cli.output import exit_status
from tests.command_line import GOOD, assert_refused, call, listing, nan_at, stored, write, write_arrays


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KORDER_BACKEND", raising=False)


BAD_FILES: dict[str, tuple[str | None, str]] = {
    "missing file": (None, "file-missing"),
    "empty file": ("", "file-empty"),
    "broken TOML": ("schema_version = 1\nkind = attend", "file-syntax"),
    "unknown key": (GOOD + "colour = 3\n", "spec-unknown-key"),
    "unknown kind": (GOOD.replace('"attend"', '"atend"'), "spec-unknown-kind"),
    "unknown data": (GOOD.replace('"random"', '"radnom"'), "spec-invalid"),
    "wrong type": (GOOD.replace("n = 7", 'n = "seven"'), "spec-invalid"),
    "order 0": (GOOD.replace("order = 2", "order = 0"), "spec-invalid"),
    "order 7": (GOOD.replace("order = 2", "order = 7"), "spec-invalid"),
    "shapes": (GOOD.replace("groups = 2", "groups = 3"), "heads-mismatch"),
    "alignment": (GOOD.replace("order = 2", "order = 2, mask = { kind = 'causal' }"), "alignment-missing"),
    "unknown backend": (GOOD + 'backend = "nmupy"\n', "backend-unknown"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_bad_files(case: str, command: str) -> None:
    text, code = BAD_FILES[case]
    if text is not None:
        write(text)
    before = listing()
    error = assert_refused(call(command, "run.toml", "--format", "json"), 2, code, before)
    assert error["expected"]
    plain = call(command, "run.toml")
    assert plain.exit_code == 2
    assert plain.stdout == ""
    assert plain.stderr.count(f"[{code}]") == 1
    assert "Traceback" not in plain.stderr
    assert listing() == before


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str, str]] = {
    "NaN": ({"key_2": nan_at((3, 4), np.nan)}, "operand-nonfinite", "key_2[1, 1] = nan"),
    "infinity": ({"query": nan_at((7, 4), np.inf)}, "operand-nonfinite", "query[1, 1] = inf"),
    "shapes": ({"value_2": np.ones((4, 2), "float32")}, "shape-mismatch", "(4, 2)"),
    "widths": ({"key_1": np.ones((5, 6), "float32")}, "shape-mismatch", "d = 6"),
    "integers": ({"key_1": np.ones((5, 4), "int32")}, "dtype-unsupported", "int32"),
    "objects": ({"key_1": np.array([[None] * 4] * 5)}, "operand-objects", "object"),
    "no key matrix": (dict.fromkeys(("key_1", "key_2", "value_1", "value_2")), "keys-missing", "query"),
    "mixed dtypes": ({"key_1": np.ones((5, 4), "float64")}, "dtype-mismatch", "float64"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(case: str) -> None:
    changes, code, words = BAD_ARRAYS[case]
    path = write_arrays(**changes)
    error = assert_refused(call("run", path, "--format", "json"), 2, code, listing())
    assert words in error["got"]


def test_nonfinite_data_that_are_allowed_are_reported() -> None:
    path = write_arrays(key_2=nan_at((3, 4), np.nan))
    result = call("run", path, "--set", "data.allow_nonfinite=true")
    assert result.exit_code == 0, result.output
    assert "rows are not finite" in result.stdout
    assert np.isnan(stored("out/arrays.npz")["output"]).any()


def test_a_masked_nan_needs_no_more_than_the_permission() -> None:
    path = write_arrays(key_2=nan_at((3, 4), np.nan), key_mask_2=np.array([True, False, True]))
    result = call("run", path, "--set", "data.allow_nonfinite=true")
    assert result.exit_code == 0, result.output
    assert "outputs are finite" in result.stdout


def test_an_output_that_overflows_is_an_accuracy_missed() -> None:
    path = write_arrays(value_1=np.full((5, 2), 3e38, "float32"), value_2=np.full((3, 2), 3e38, "float32"))
    with np.errstate(over="ignore"):
        result = call("run", path, "--format", "json")
    error = assert_refused(result, 1, "output-nonfinite", ["run.toml", "x.npz"])
    assert "products of values overflow in float32" in error["hint"]


def test_scores_that_overflow_name_their_keys() -> None:
    arguments = ("--set", "attention.scale=1e39", "--set", "data.score_rms=1.0", "--format", "json")
    with np.errstate(all="ignore"):
        error = assert_refused(call("run", write(), *arguments), 1, "output-nonfinite", ["run.toml"])
    assert "attention.scale = 1e+39 and data.score_rms = 1" in error["hint"]


def test_a_tolerance_that_no_degree_can_meet() -> None:
    path = write()
    method = "attention.method={kind='polynomial', tolerance=1e-6}"
    result = call("run", path, "--set", method, "--set", "attention.scale=40.0", "--format", "json")
    assert result.exit_code == 1, result.output
    assert json.loads(result.stderr)["error"] == "AccuracyError"
    assert listing() == ["run.toml"]


def test_a_tolerance_missed_with_a_warning_is_written_and_told() -> None:
    method = "attention.method={kind='polynomial', degree=2, tolerance=1e-6, on_exceed='warn'}"
    result = call("run", write(), "--set", method, "--format", "json")
    assert result.exit_code == 1, result.output
    record = json.loads(result.stdout)
    assert record["passed"] is False
    assert record["warnings"]
    assert Path("out/result.json").exists()


def test_a_memory_limit_that_no_block_size_can_meet() -> None:
    path = write()
    for command in ("run", "plan"):
        result = call(command, path, "--set", "attention.policy={memory_limit=16}", "--format", "json")
        assert result.exit_code == 3, result.output
        assert json.loads(result.stderr)["error"] == "UnsupportedProblemError"
    assert listing() == ["run.toml"]


def test_an_existing_output_directory() -> None:
    path = write()
    assert call("run", path).exit_code == 0
    before = {str(p): p.stat().st_mtime_ns for p in Path("out").iterdir()}
    result = call("run", path)
    assert result.exit_code == 2
    assert "[output-exists]" in result.stderr
    assert {str(p): p.stat().st_mtime_ns for p in Path("out").iterdir()} == before
    assert call("run", path, "--overwrite").exit_code == 0
    Path("out/notes.txt").write_text("mine")
    result = call("run", path, "--overwrite")
    assert result.exit_code == 2
    assert "notes.txt" in result.stderr
    assert Path("out/notes.txt").read_text() == "mine"


def test_the_existing_directory_is_found_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import korder.experiments.attend as module

    path = write()
    Path("out").mkdir()
    Path("out/mine.txt").write_text("x")

    def never(*_: Any) -> None:
        raise AssertionError("data were made for a run that cannot be written")

    monkeypatch.setattr(module, "build_inputs", never)
    assert call("run", path).exit_code == 2


def test_an_output_that_cannot_be_made() -> None:
    path = write()
    Path("file").write_text("x")
    result = call("run", path, "--output", "file/below", "--format", "json")
    assert_refused(result, 2, "output-unwritable", ["file", "run.toml"])


def test_too_little_memory_is_no_traceback() -> None:
    path = write(GOOD.replace("n = 7", "n = 1000000000000"))
    result = call("run", path, "--format", "json")
    assert_refused(result, 3, "memory-exhausted", ["run.toml"])


def documented_statuses() -> dict[str, str]:
    """The class and the last cell of every line of the table of errors."""
    page = (Path(__file__).parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `(\w+)` \|.* \| ?(\d?) ?\|$", page, flags=re.MULTILINE))


@pytest.mark.parametrize(("name", "status"), documented_statuses().items())
def test_exit_statuses_are_the_documented_ones(name: str, status: str) -> None:
    if status:
        assert exit_status(getattr(errors, name)("x")) == int(status)


def test_every_error_has_a_documented_status() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(documented_statuses()) == classes - {"AccuracyWarning"}
    assert [name for name, status in documented_statuses().items() if not status] == ["KorderError"]
