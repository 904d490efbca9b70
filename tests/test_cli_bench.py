"""`korder bench`: figures beside their targets, and no speed without equal outputs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from korder.experiments import benchmark_plugins
from korder.experiments.benchmark_cases import Disagreement
from korder.experiments.benchmark_figures import Settings
from tests.command_line import assert_refused, call, write


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KORDER_BACKEND", raising=False)


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


def test_bench_compares_a_late_token_with_an_early_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from korder.experiments import benchmark_decode

    monkeypatch.setattr(benchmark_decode, "QUICK_SIZES", (40, 160))
    arguments = ("bench", "--quick", "--row", "decode", "--format", "json")
    (row,) = json.loads(call(*arguments).stdout)["rows"]
    assert row["verdict"] in ("met", "missed")
    assert row["values"]["ratio"] == row["values"]["late_seconds"] / row["values"]["early_seconds"]
    decode = benchmark_decode.decode
    monkeypatch.setattr(benchmark_decode, "decode", lambda query, state: decode(query, state) * 1.001)
    result = call(*arguments)
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["verdict"], row["values"]) == ("WRONG OUTPUT", {})


def test_bench_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:

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


def test_the_backend_on_the_command_line_wins_over_the_files() -> None:
    path = write('schema_version = 1\nkind = "benchmark"\nrows = ["import-time"]\nrepeats = 1\nbackend = "nobody"\n')
    assert_refused(call("bench", path, "--format", "json"), 2, "backend-unknown", ["run.toml"])
    result = call("bench", path, "--backend", "numpy", "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["spec"]["backend"] == "numpy"


def test_a_backend_without_rows_of_its_own_has_the_generic_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import korder.experiments.benchmark as benchmark

    monkeypatch.setattr(benchmark, "_row", lambda name, measure, settings: benchmark.Row(name, "", "", "met", ""))
    plain, named = (
        json.loads(call("bench", *extra, "--format", "json").stdout) for extra in ((), ("--backend", "numpy"))
    )
    assert [row["name"] for row in plain["rows"]] == [row["name"] for row in named["rows"]]
    assert "exact-against-torch" in [row["name"] for row in named["rows"]]


def test_bench_measures_what_plugins_add() -> None:
    row = benchmark_plugins.plugins(Settings(quick=True, repeats=1, backend="auto"))
    assert row.text.endswith(" ms")
    assert row.target == "<= 20 ms"
    assert row.met in (True, False)
    assert row.values["collection_seconds_with"] > 0
    assert row.values["attend_seconds_without"] > row.values["collection_seconds_without"]


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (('probe_{number}"}})', 'numpy"}})'), "asked for availability, unsupported_reasons"),
        (("import Availability", "import Nothing, Availability"), "0 of 5 plugins were loaded"),
    ],
)
def test_bench_gives_no_figure_of_plugins_that_are_asked_or_broken(
    change: tuple[str, str], finding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = benchmark_plugins._PLUGIN.replace("super().unsupported_reasons(plan)", "('never',)").replace(*change)
    monkeypatch.setattr(benchmark_plugins, "_PLUGIN", source)
    with pytest.raises(Disagreement, match=finding):
        benchmark_plugins.plugins(Settings(quick=True, repeats=1, backend="auto"))
