"""`korder bench --backend native`: its rows run, and a wrong kernel leaves none a speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from korder.experiments import benchmark_native
from korder.experiments.benchmark import run_benchmark
from korder.spec.runs import BenchmarkRun
from korder_native.exact import NativeExactKernel

ROWS = tuple(benchmark_native.ROWS)


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
    found = verdicts(*ROWS)
    assert set(found) == set(ROWS)
    assert set(found.values()) <= {"met", "missed"}, found


def test_a_wrong_output_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeExactKernel.forward

    def wrong(self: Any, operands: Any, **options: Any) -> Any:
        found = right(self, operands, **options)
        return replace(found, output=found.output * 1.001)

    monkeypatch.setattr(NativeExactKernel, "forward", wrong)
    rows = [name for name in ROWS if name not in ("backward", "memory")]
    assert set(verdicts(*rows).values()) == {"WRONG OUTPUT"}


def test_a_wrong_gradient_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = NativeExactKernel.backward

    def wrong(self: Any, *arguments: Any, **options: Any) -> Any:
        found = right(self, *arguments, **options)
        return replace(found, query=found.query * 1.001)

    monkeypatch.setattr(NativeExactKernel, "backward", wrong)
    assert set(verdicts("backward", "sdpa-backward").values()) == {"WRONG OUTPUT"}
