"""The command line: what it runs, prints and writes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from korder.cli.app import app
from tests.command_line import GOOD, call, stored, write, write_arrays

ROOT = Path(__file__).parents[1]
BAR = "━"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KORDER_BACKEND", raising=False)


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
    arrays = stored("out/arrays.npz")
    expected = korder.attend_result(inputs.query, inputs.keys, inputs.values)
    np.testing.assert_array_equal(arrays["output"], expected.output)
    np.testing.assert_array_equal(arrays["lse"], expected.lse)
    assert arrays["output"].shape == (3, 4, 7, 2)


def test_a_written_run_repeats_itself() -> None:
    assert call("run", write(), "--set", "data.seed=5", "--output", "first").exit_code == 0
    assert call("run", "first/run.toml", "--output", "second").exit_code == 0
    first, second = (stored(f"{name}/arrays.npz") for name in ("first", "second"))
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
    arrays = stored("out/arrays.npz")
    assert arrays["bound"].shape == (3, 4, 7)


def test_a_causal_polynomial_run_measures_the_right_rows() -> None:
    """Sampled rows keep their position: a causal row computed alone as row 0 would see one key only."""
    overrides = (
        "attention.mask={kind='causal'}", "data.lengths=[7, 7]", "data.score_rms=0.1",
        "attention.method={kind='polynomial', degree=6, estimate_rows=9}",
    )  # fmt: skip
    result = call("run", write(), "--format", "json", *(part for text in overrides for part in ("--set", text)))
    assert result.exit_code == 0, result.output
    assert max(json.loads(result.stdout)["measured_rows"]["errors"]) < 1e-4


def test_a_tolerance_met_by_the_exact_method_leaves_nothing_to_estimate() -> None:
    method = "attention.method={kind='polynomial', tolerance=1e-6, on_exceed='exact', estimate_rows=3}"
    result = call("run", write(), "--set", method, "--set", "attention.scale=40.0", "--format", "json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["certificate"] is record["measured_rows"] is record["exact_would_need"] is None
    assert record["warnings"] == ["the exact method ran; nothing to estimate"]


@pytest.mark.parametrize("method", ["{kind='exact'}", "{kind='polynomial', degree=2, estimate_rows=4}"])
@pytest.mark.parametrize("empty", ["query", "key"])
def test_empty_operands_run(method: str, empty: str) -> None:
    none = np.ones((0, 4), "float32")
    path = write_arrays(**({"query": none} if empty == "query" else {"key_1": none, "value_1": none[:, :2]}))
    result = call("run", path, "--set", f"attention.method={method}", "--format", "json")
    assert result.exit_code == 0, result.output
    arrays = stored("out/arrays.npz")
    assert arrays["output"].shape == ((0, 2) if empty == "query" else (7, 2))
    assert (arrays["output"] == 0).all()
    assert (arrays["lse"] == -np.inf).all()


def test_plan_computes_nothing_and_needs_no_arrays() -> None:
    write(GOOD.replace("n = 7, lengths = [5, 3]", "n = 100003, lengths = [100019, 100043]"))
    result = call("plan", "run.toml")
    assert result.exit_code == 0, result.output
    assert "n=100003, m=100019 x 100043" in result.stdout
    assert "backend: " in result.stdout
    record = json.loads(call("plan", "run.toml", "--format", "json").stdout)
    assert record["plans"][0]["cost"]["flops"] > 1e15
    assert [path.name for path in Path().iterdir()] == ["run.toml"]


def test_plan_for_a_tolerance_lists_the_degrees() -> None:
    result = call(
        "plan", write(), "--set", "attention.method={kind='polynomial', tolerance=0.1}", "--set", "data.score_rms=0.1",
        "--format", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert all(plan["method"] == "polynomial" for plan in record["plans"])
    assert 0.0 < record["regime"]["ratio"] < 1.0


def test_plan_of_a_choice_lists_what_there_is_by_time() -> None:
    write(GOOD.replace("order = 2", 'order = 2, scale = 0.1, method = { kind = "auto", tolerance = 0.1 }'))
    text = call("plan", "run.toml").output
    assert "or: split: degree " in text
    assert "backend: numpy" in text
    record = json.loads(call("plan", "run.toml", "--format", "json").output)
    assert record["chosen"] == 0
    assert {plan["method"] for plan in record["plans"]} == {"exact", "split"}
    assert call("run", "run.toml").exit_code == 0


def test_plan_for_a_tolerance_reports_the_regime_and_says_what_it_is() -> None:
    tolerance = "attention.method={kind='polynomial', tolerance=0.1}"
    text = call("plan", write(), "--set", tolerance, "--set", "data.score_rms=0.1").stdout
    assert "below (ln n)^(1/3)" in text
    assert "conditional on SETH" in text
    assert "SETH" not in call("plan", write()).stdout, "without measured scores there is nothing to report"


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


class Terminal(io.StringIO):
    """A stream that says it is a terminal, or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_for_terminals_and_for_what_takes_time(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    import korder.cli.output as module

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal(is_terminal))
    with module.TerminalProgress() as progress:
        progress.stage("a short stage")
    assert "short" not in sys.stderr.getvalue()
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.0)
    with module.TerminalProgress() as progress:
        progress.stage("computing rows", total=3)
        progress.advance()
        if is_terminal:
            progress._timer.join()
            progress._bar.refresh()
    shown = sys.stderr.getvalue()
    assert ("computing rows" in shown) is is_terminal
    assert "0:00:0" in shown or not is_terminal


@pytest.mark.parametrize(("method", "reports"), [("{kind='exact'}", False), ("{kind='polynomial', degree=2}", True)])
def test_a_bar_where_the_kernel_says_how_far_it_is_and_a_spinner_elsewhere(
    monkeypatch: pytest.MonkeyPatch, method: str, reports: bool
) -> None:
    import korder.cli.output as module

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.0)
    shown: dict[str, str] = {}
    share = module.TerminalProgress.share
    stage = module.TerminalProgress.stage

    def picture(progress: module.TerminalProgress) -> str:
        console = Console(file=io.StringIO(), width=100)
        console.print(progress._bar.get_renderable())
        return console.file.getvalue()  # type: ignore[attr-defined]

    def halfway(progress: module.TerminalProgress, done: float) -> None:
        share(progress, done)
        if 0 < done < 1:
            shown["share"] = picture(progress)

    def begin(progress: module.TerminalProgress, text: str, total: int | None = None) -> None:
        stage(progress, text, total)
        shown.setdefault(text, picture(progress))

    monkeypatch.setattr(module.TerminalProgress, "share", halfway)
    monkeypatch.setattr(module.TerminalProgress, "stage", begin)
    result = call("run", write(), "--set", f"attention.method={method}", "--set", "data.score_rms=0.1")
    assert result.exit_code == 0, result.output
    assert BAR not in shown["attending"]
    assert "%" not in shown["attending"]
    assert "0:00:0" in shown["attending"]
    assert ("share" in shown) is reports
    if reports:
        assert BAR in shown["share"]
        assert "%" in shown["share"]
        assert "attending" in shown["share"]


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


def test_without_matplotlib_there_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    import korder.experiments.results as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert call("run", write()).exit_code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["arrays.npz", "result.json", "run.toml"]


def test_a_named_backend_that_takes_no_numpy_arrays_gets_its_own() -> None:
    from korder.experiments.data import build_inputs
    from korder.experiments.placement import Placement, place, to_numpy
    from korder.spec.files import read_run

    pytest.importorskip("torch")
    inputs = build_inputs(read_run(write()))  # type: ignore[arg-type]
    placed = place(inputs, Placement("torch"))
    assert type(placed.keys[1]).__name__ == "Tensor"
    np.testing.assert_array_equal(to_numpy(placed.keys[1]), inputs.keys[1])
    assert place(inputs, Placement()) is inputs
