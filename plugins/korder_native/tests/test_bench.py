"""`korder bench --backend native`: its rows run, and a wrong kernel leaves none a speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from korder.experiments import benchmark_native, benchmark_native_polynomial
from korder.experiments.benchmark import run_benchmark
from korder.spec.runs import BenchmarkRun
from korder_native.exact import NativeExactKernel
from korder_native.polynomial import NativePolynomialKernel

ROWS = tuple(benchmark_native.ROWS)
POLYNOMIAL_ROWS = tuple(benchmark_native_polynomial.ROWS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    square = np.ones((8, 8))
    product: Callable[[], Any] = lambda: square @ square  # noqa: E731
    monkeypatch.setattr(benchmark_native, "products", lambda dtype: [product, product])
    monkeypatch.setattr(benchmark_native, "REST", 0.0)
    monkeypatch.setattr(benchmark_native, "usable_cores", lambda: 1)  # threads wait long on a busy machine


def verdicts(*rows: str) -> dict[str, str]:
    report = run_benchmark(
        BenchmarkRun(schema_version=1, kind="benchmark", rows=rows, quick=True, repeats=1, backend="native")
    )
    return {row.name: row.verdict for row in report.rows}


def test_rows_run() -> None:
    found = verdicts(*ROWS, *POLYNOMIAL_ROWS)
    assert set(found) == {*ROWS, *POLYNOMIAL_ROWS}
    assert found.pop("bfloat16") in ("met", "missed", "not judged")
    assert set(found.values()) <= {"met", "missed"}, found


def test_the_roofline_shows_every_row_that_has_a_speed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ("order-1", "order-3", "bfloat16", "sdpa-backward", *POLYNOMIAL_ROWS[:3])
    run = BenchmarkRun(schema_version=1, kind="benchmark", rows=names, quick=True, repeats=1, backend="native")
    path = tmp_path / "roofs.svg"
    report = run_benchmark(run, plot=path)
    assert report.roofs is not None
    assert set(report.roofs.products) == {"float32", "float64"}
    assert report.roofs.bandwidth > 0
    drawn = path.read_text(encoding="utf-8")
    for row in report.rows:
        assert row.points
        assert all(point.rate > 0 for point in row.points)
        assert f"<!-- {row.name}, {row.points[0].dtype} -->" in drawn


def test_bfloat16_is_judged_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_native, "multiplies_bfloat16", lambda case: False)
    assert verdicts("bfloat16") == {"bfloat16": "not judged"}
    monkeypatch.setattr(benchmark_native, "multiplies_bfloat16", lambda case: True)
    assert verdicts("bfloat16")["bfloat16"] in ("met", "missed")


def damage(monkeypatch: pytest.MonkeyPatch, kernel: type[Any], direction: str, field: str) -> None:
    right = getattr(kernel, direction)

    def wrong(self: Any, *arguments: Any, **options: Any) -> Any:
        found = right(self, *arguments, **options)
        return replace(found, **{field: getattr(found, field) * 1.001})

    monkeypatch.setattr(kernel, direction, wrong)


def test_a_wrong_output_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, NativeExactKernel, "forward", "output")
    rows = [name for name in ROWS if name not in ("backward", "memory")]
    assert set(verdicts(*rows).values()) == {"WRONG OUTPUT"}
    damage(monkeypatch, NativePolynomialKernel, "forward", "output")
    assert verdicts("polynomial-forward") == {"polynomial-forward": "WRONG OUTPUT"}


def test_a_wrong_gradient_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, NativeExactKernel, "backward", "query")
    damage(monkeypatch, NativePolynomialKernel, "backward", "query")
    assert set(verdicts("backward", "sdpa-backward", "polynomial-backward").values()) == {"WRONG OUTPUT"}
