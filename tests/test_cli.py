"""The command line: what it prints, its exit statuses, and for every bad input one clear error and nothing written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from korder.cli.app import app
from korder.cli.output import exit_status
from korder.errors import (
    AccuracyError,
    BackendUnavailableError,
    OperandError,
    ShapeError,
    SpecError,
    UnknownBackendError,
    UnsupportedProblemError,
)

ROOT = Path(__file__).parents[1]
GOOD = """
schema_version = 1
kind = "attend"
data = { kind = "random", n = 7, lengths = [5, 3], width = 4, value_width = 2, heads = 4, groups = 2, batch = 3 }
attention = { order = 2 }
output = { directory = "out" }
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KORDER_BACKEND", raising=False)


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


def test_run_writes_and_reports() -> None:
    import korder

    result = call("run", write())
    assert result.exit_code == 0, result.output
    assert "backend: " in result.stdout
    assert "order=2, method=exact" in result.stdout
    assert "ok    finite" in result.stdout
    assert result.stderr == ""
    names = {path.name for path in Path("out").iterdir()}
    assert {"result.json", "arrays.npz", "run.toml"} <= names
    record = json.loads(Path("out/result.json").read_text())
    assert set(record["files"]) == names
    assert record["passed"] is True
    assert record["backend"] == korder.backends()[0].name or record["backend"] == "numpy"
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["versions"]["numpy"] == np.__version__
    assert record["timings"]["attend_seconds"] > 0
    assert "peak memory" in record["plan"]


def test_the_written_output_is_the_attention_of_the_data() -> None:
    import korder
    from korder.experiments.data import build_inputs
    from korder.spec.files import read_run

    assert call("run", write()).exit_code == 0
    inputs = build_inputs(read_run("run.toml"))  # type: ignore[arg-type]
    stored = np.load("out/arrays.npz", allow_pickle=False)
    expected = korder.attend_result(inputs.query, inputs.keys, inputs.values)
    np.testing.assert_array_equal(stored["output"], expected.output)
    np.testing.assert_array_equal(stored["lse"], expected.lse)
    assert stored["output"].shape == (3, 4, 7, 2)


def test_a_written_run_repeats_itself() -> None:
    assert call("run", write(), "--set", "data.seed=5", "--output", "first").exit_code == 0
    assert call("run", "first/run.toml", "--output", "second").exit_code == 0
    first, second = (np.load(f"{name}/arrays.npz", allow_pickle=False) for name in ("first", "second"))
    np.testing.assert_array_equal(first["output"], second["output"])


def test_run_in_json() -> None:
    result = call("run", write(), "--format", "json", "--set", "output.plot=false")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["passed"]
    assert record["files"] == ["out/arrays.npz", "out/run.toml", "out/result.json"]
    assert record["spec"]["data"]["lengths"] == [5, 3]


def test_options_win_over_set_and_set_over_the_file() -> None:
    result = call("run", write(), "--set", "output.directory=set", "--set", "data.n=2", "--output", "option")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path().iterdir()) == ["option", "run.toml"]
    assert json.loads(Path("option/result.json").read_text())["spec"]["data"]["n"] == 2


def test_without_a_directory_nothing_is_written() -> None:
    write(GOOD.replace('output = { directory = "out" }', ""))
    result = call("run", "run.toml")
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path().iterdir()] == ["run.toml"]
    assert "written" not in result.stdout


def test_a_polynomial_run_reports_its_certificate() -> None:
    result = call(
        "run", write(), "--set", 'attention.method={kind="polynomial", degree=4, estimate_rows=5}',
        "--set", "data.score_rms=0.1", "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["certificate"]["bound_largest"] > 0
    assert len(record["measured_rows"]["errors"]) == 5
    assert all(e <= c for e, c in zip(*(record["measured_rows"][k] for k in ("errors", "certified")), strict=True))
    assert record["exact_would_need"]["flops"] > 0
    stored = np.load("out/arrays.npz", allow_pickle=False)
    assert stored["bound"].shape == (3, 4, 7)


def test_a_causal_polynomial_run_measures_the_right_rows() -> None:
    """Sampled rows keep their position: a causal row computed alone as row 0 would see one key only."""
    overrides = (
        "attention.mask={kind='causal'}", "data.lengths=[7, 7]", "data.score_rms=0.1",
        "attention.method={kind='polynomial', degree=6, estimate_rows=9}",
    )  # fmt: skip
    result = call("run", write(), "--format", "json", *(part for text in overrides for part in ("--set", text)))
    assert result.exit_code == 0, result.output
    assert max(json.loads(result.stdout)["measured_rows"]["errors"]) < 1e-4


def test_plan_computes_nothing_and_needs_no_arrays() -> None:
    write(GOOD.replace("n = 7, lengths = [5, 3]", "n = 1000003, lengths = [1000033, 1000037]"))
    result = call("plan", "run.toml")
    assert result.exit_code == 0, result.output
    assert "n=1000003, m=1000033 x 1000037" in result.stdout
    assert "backend: " in result.stdout
    record = json.loads(call("plan", "run.toml", "--format", "json").stdout)
    assert record["plans"][0]["cost"]["flops"] > 1e18
    assert [path.name for path in Path().iterdir()] == ["run.toml"]


def test_plan_for_a_tolerance_lists_the_degrees() -> None:
    result = call(
        "plan", write(), "--set", "attention.method={kind='polynomial', tolerance=0.1}", "--set", "data.score_rms=0.1",
        "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert all(plan["method"] == "polynomial" for plan in json.loads(result.stdout)["plans"])


def test_validate() -> None:
    result = call("validate", write())
    assert result.exit_code == 0
    assert "valid: order=2" in result.stdout
    record = json.loads(call("validate", "run.toml", "--format", "json").stdout)
    assert record["valid"] is True
    assert call("validate", "run.toml", "--set", "data.groups=3").exit_code == 2
    assert call("validate", write('schema_version = 1\nkind = "benchmark"')).exit_code == 0
    assert [path.name for path in Path().iterdir()] == ["run.toml"]


def test_schema_is_json() -> None:
    assert "attention" in json.dumps(json.loads(call("schema").stdout))
    assert call("schema", "--format", "json").stdout == call("schema").stdout


def test_backends_are_listed() -> None:
    text = call("backends")
    assert text.exit_code == 0
    assert "numpy" in text.stdout
    records = json.loads(call("backends", "--format", "json").stdout)
    numpy = next(record for record in records if record["name"] == "numpy")
    assert numpy["available"] is True
    assert numpy["methods"].keys() >= {"exact", "polynomial"}


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
    assert np.isnan(np.load("out/arrays.npz", allow_pickle=False)["output"]).any()


def test_a_masked_nan_needs_no_more_than_the_permission() -> None:
    path = write_arrays(key_2=nan_at((3, 4), np.nan), key_mask_2=np.array([True, False, True]))
    result = call("run", path, "--set", "data.allow_nonfinite=true")
    assert result.exit_code == 0, result.output
    assert "outputs are finite" in result.stdout


def test_an_output_that_overflows_is_an_accuracy_missed() -> None:
    path = write_arrays(value_1=np.full((5, 2), 3e38, "float32"), value_2=np.full((3, 2), 3e38, "float32"))
    with np.errstate(over="ignore"):
        result = call("run", path, "--format", "json")
    assert_refused(result, 1, "output-nonfinite", ["run.toml", "x.npz"])


def test_a_tolerance_that_no_degree_can_meet() -> None:
    path = write()
    method = "attention.method={kind='polynomial', tolerance=1e-6}"
    result = call("run", path, "--set", method, "--set", "attention.scale=40.0", "--format", "json")
    assert_refused(result, 1, "accuracy-missed", ["run.toml"])


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


def test_a_benchmark_file_does_not_plan() -> None:
    path = write('schema_version = 1\nkind = "benchmark"\n')
    assert_refused(call("plan", path, "--format", "json"), 2, "spec-kind", ["run.toml"])
    assert_refused(call("bench", write(), "--format", "json"), 2, "spec-kind", ["run.toml"])


def test_an_unknown_row_comes_with_the_nearest() -> None:
    error = assert_refused(call("bench", "--row", "overhed", "--format", "json"), 2, "row-unknown", [])
    assert "overhead" in error["hint"]


def test_bench_prints_rows_beside_their_targets() -> None:
    result = call("bench", "--quick", "--row", "overhead", "--format", "json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    (row,) = record["rows"]
    assert row["name"] == "overhead"
    assert row["verdict"] in ("met", "missed")
    assert row["target"]
    assert row["values"]["kernel_seconds"] > 0
    text = call("bench", "--quick", "--row", "overhead")
    assert re.search(r"cores \d+", text.stdout)
    assert "target" in text.stdout


def test_bench_warns_of_a_misleading_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert "warning: OPENBLAS_CORETYPE=Haswell" in call("bench", "--quick", "--row", "overhead").stdout


def test_bench_prints_no_speed_when_outputs_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import korder.experiments.benchmark_cases as cases

    forward = cases.Case.forward

    def wrong(self: Any, save: bool = False) -> Any:
        from dataclasses import replace

        output = forward(self, save)
        return replace(output, output=output.output * 1.001)

    monkeypatch.setattr(cases.Case, "forward", wrong)
    rows = ("exact-forward", "exact-backward", "polynomial-forward", "overhead")
    result = call("bench", "--quick", *(part for row in rows for part in ("--row", row)), "--format", "json")
    assert result.exit_code == 1
    for row in json.loads(result.stdout)["rows"]:
        assert row["verdict"] == "WRONG OUTPUT", row
        assert row["measured"] == "-"
        assert row["values"] == {}


def test_bench_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import korder.experiments.benchmark_cases as cases

    backward = cases.Case.backward

    def swapped(self: Any, saved: Any) -> Any:
        gradients = backward(self, saved)
        return replace(gradients, values=gradients.values[::-1])

    monkeypatch.setattr(cases.Case, "backward", swapped)
    result = call("bench", "--quick", "--row", "exact-backward", "--format", "json")
    assert json.loads(result.stdout)["rows"][0]["verdict"] == "WRONG OUTPUT"


def test_a_benchmark_is_written_where_its_file_says() -> None:
    path = write(
        'schema_version = 1\nkind = "benchmark"\nquick = true\nrows = ["import-time"]\nrepeats = 1\n'
        'output = { directory = "out" }\n'
    )
    assert call("run", path).exit_code == 0
    record = json.loads(Path("out/result.json").read_text())
    assert record["rows"][0]["values"]["seconds"] > 0
    assert call("bench", path).exit_code == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SpecError("x"), 2), (ShapeError("x"), 2), (OperandError("x"), 2), (UnknownBackendError("x"), 2),
        (AccuracyError("x"), 1), (UnsupportedProblemError("x"), 3), (BackendUnavailableError("x"), 3),
    ],
)  # fmt: skip
def test_exit_statuses(error: Any, status: int) -> None:
    assert exit_status(error) == status


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "KORDER_BACKEND"}
    program = "from korder.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_the_console_script() -> None:
    good = run_process("validate", write())
    assert (good.returncode, good.stderr) == (0, "")
    bad = run_process("run", "gone.toml")
    assert bad.returncode == 2
    assert bad.stderr.startswith("SpecError [file-missing]")
    assert run_process("no-such-command").returncode == 2
    assert run_process("run").returncode == 2
    assert run_process("--help").returncode == 0


def test_importing_the_entry_point_loads_little() -> None:
    program = "import sys, korder.cli; print(sorted({'typer', 'rich', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_and_option_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    from korder.experiments.benchmark_rows import ROWS

    for command in app.registered_commands:
        assert f"korder {command.name}" in text
        assert command.name is not None
        options = set(re.findall(r"--[a-z]+", call(command.name, "--help").stdout)) - {"--help"}
        for option in options:
            assert f"`{option}" in text, f"{command.name} {option}"
    for row in ROWS:
        assert f"`{row}`" in text
