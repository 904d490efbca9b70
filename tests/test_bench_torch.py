"""`korder bench --backend torch`: its rows run, and a wrong kernel, gradient, mask or dtype leaves none a speed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from korder import Full  # noqa: E402
from korder.dispatch.cache import BoundedCache  # noqa: E402
from korder.dispatch.registry import default_registry  # noqa: E402
from korder.experiments import benchmark_figures, benchmark_torch  # noqa: E402
from korder.experiments.benchmark import run_benchmark  # noqa: E402
from korder.experiments.benchmark_figures import Measured, Settings  # noqa: E402
from korder.experiments.benchmark_memory import with_growth  # noqa: E402
from korder.planning.candidates import candidate_plans  # noqa: E402
from korder.planning.plan import Plan  # noqa: E402
from korder.spec.runs import BenchmarkRun  # noqa: E402
from tests.command_line import assert_refused, call  # noqa: E402

FORWARD = (
    "sdpa-forward", "bfloat16-forward", "causal-forward", "window-slope", "polynomial-forward", "exact-forward",
    "overhead",
)  # fmt: skip
GRADIENTS = ("sdpa-gradients", "simplicial-gradients", "polynomial-gradients")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KORDER_BACKEND", raising=False)
    monkeypatch.setattr(benchmark_torch, "_torch_product", small_product)
    monkeypatch.setattr(benchmark_torch, "numpy_product", small_product)
    monkeypatch.setattr(
        benchmark_torch, "usable_cores", lambda: 1
    )  # threads wait long for each other on a busy machine


def small_product(*_: Any) -> Callable[[], object]:
    return lambda: torch.ones(8, 8) @ torch.ones(8, 8)


@pytest.fixture
def simplicial(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the package, which is no dependency."""

    def attend(query: Any, keys: Any, values: Any) -> Any:
        scores = torch.einsum("bhid,bhjd,bhkd->bhijk", query * query.shape[-1] ** -0.5, *keys)
        weights = scores.flatten(-2).softmax(-1).view_as(scores)
        return torch.einsum("bhijk,bhje,bhke->bhie", weights, *values)

    module = SimpleNamespace(naive_two_simplicial_attend=attend)
    monkeypatch.setitem(sys.modules, "simplicial_attention", module)
    return module


def measured(*rows: str) -> dict[str, Any]:
    run = BenchmarkRun(schema_version=1, kind="benchmark", rows=rows or None, repeats=1, quick=True, backend="torch")
    return {row.name: row for row in run_benchmark(run).rows}


def assert_no_speed(rows: dict[str, Any], names: tuple[str, ...]) -> None:
    assert set(rows) == set(names)
    for row in rows.values():
        assert (row.verdict, row.measured, row.values) == ("WRONG OUTPUT", "-", {}), row


def spoil(monkeypatch: pytest.MonkeyPatch, kernel: Callable[[Any, Plan], Any]) -> None:
    """Put a kernel between korder and the torch backend, and forget the kernels that were compiled before."""
    backend = type(default_registry().get("torch"))
    compile_plan = backend.compile
    monkeypatch.setattr(backend, "compile", lambda self, plan: kernel(lambda p: compile_plan(self, p), plan))
    monkeypatch.setattr(default_registry(), "prepared", BoundedCache(64))


class Spoiled:
    """A kernel whose output is multiplied and whose value gradients may stand in each other's place."""

    def __init__(self, inner: Any, factor: float = 1.0, swap: bool = False) -> None:
        self.inner, self.factor, self.swap = inner, factor, swap

    def residual_shapes(self, operands: Any) -> Any:
        return self.inner.residual_shapes(operands)

    def forward(self, operands: Any, **options: Any) -> Any:
        output = self.inner.forward(operands, **options)
        return replace(output, output=output.output * self.factor)

    def backward(self, *arguments: Any, **options: Any) -> Any:
        gradients = self.inner.backward(*arguments, **options)
        return replace(gradients, values=gradients.values[::-1]) if self.swap else gradients


def test_every_row_gets_a_verdict(simplicial: SimpleNamespace) -> None:
    rows = measured(*FORWARD, *GRADIENTS)
    for row in rows.values():
        assert row.verdict in ("met", "missed"), row
        assert row.values, row
        assert row.target
    assert "torch.mm" in rows["sdpa-forward"].detail
    assert "NumPy" in rows["sdpa-forward"].detail
    assert rows["bfloat16-forward"].values["error"] > 1e-5, "bfloat16 rounds, so no error means it was not run"


def test_memory_is_measured_in_processes_of_their_own() -> None:
    row = measured("sdpa-memory")["sdpa-memory"]
    assert row.verdict in ("met", "missed")
    materialised = 2 * 240**2 * 64 * 4
    assert 0.8 * materialised < row.values["torch_bytes"] < 4 * materialised
    assert row.values["bytes"] > 0


@pytest.mark.parametrize(("entry", "verdict"), [(2.0, "met"), (2.1, "WRONG OUTPUT")])
def test_memory_of_different_outputs_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, entry: float, verdict: str
) -> None:
    printed = {"ours": [10, [1.0, entry]], "theirs": [100, [1.0, 2.0]]}
    monkeypatch.setattr(benchmark_torch, "run_python", lambda _, which, *rest: json.dumps(printed[which]))
    assert measured("sdpa-memory")["sdpa-memory"].verdict == verdict


def test_a_wrong_kernel_has_no_speed(monkeypatch: pytest.MonkeyPatch, simplicial: SimpleNamespace) -> None:
    spoil(monkeypatch, lambda compiled, plan: Spoiled(compiled(plan), factor=1.001))
    names = (*FORWARD, *GRADIENTS)
    assert_no_speed(measured(*names), names)
    result = call("bench", "--backend", "torch", "--quick", "--row", "overhead")
    assert result.exit_code == 1
    assert "WRONG OUTPUT" in result.stdout


def test_a_wrong_gradient_has_no_speed(monkeypatch: pytest.MonkeyPatch, simplicial: SimpleNamespace) -> None:
    spoil(monkeypatch, lambda compiled, plan: Spoiled(compiled(plan), swap=True))
    assert_no_speed(measured(*GRADIENTS), GRADIENTS)


def test_a_kernel_that_is_wrong_in_bfloat16_alone_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(
        monkeypatch,
        lambda compiled, plan: Spoiled(compiled(plan), 1.02 if plan.problem.dtype == "bfloat16" else 1.0),
    )
    assert_no_speed(measured("bfloat16-forward"), ("bfloat16-forward",))
    assert measured("exact-forward")["exact-forward"].verdict in ("met", "missed")


def test_a_kernel_that_ignores_the_mask_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(compiled: Any, plan: Plan) -> Any:
        spec = plan.problem.spec.model_copy(update={"mask": Full()})
        return compiled(candidate_plans(replace(plan.problem, spec=spec))[0])

    spoil(monkeypatch, unmasked)
    names = ("causal-forward", "window-slope")
    assert_no_speed(measured(*names), names)


def test_a_peer_that_computes_something_else_is_not_compared(simplicial: SimpleNamespace) -> None:
    right = simplicial.naive_two_simplicial_attend
    simplicial.naive_two_simplicial_attend = lambda query, keys, values: right(query, keys, values[::-1])
    assert_no_speed(measured("simplicial-gradients"), ("simplicial-gradients",))


def test_without_the_optional_package_its_row_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplicial_attention", None)
    row = measured("simplicial-gradients")["simplicial-gradients"]
    assert (row.verdict, row.measured, row.values) == ("not run", "-", {})
    assert "pip install simplicial-attention==0.1.6" in row.detail
    assert row.target == ">= 5.00 x its speed"


def test_rows_run_on_all_cores_and_leave_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def row(settings: Settings) -> Measured:
        seen.append(torch.get_num_threads())
        raise RuntimeError

    monkeypatch.setattr(benchmark_figures, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(RuntimeError):
            benchmark_figures.on_all_cores(row)(Settings(True, 1, "torch"))
        assert torch.get_num_threads() == 1
        assert seen == [2]
    finally:
        torch.set_num_threads(before)


def test_each_backend_has_its_rows() -> None:
    error = assert_refused(call("bench", "--row", "sdpa-forward", "--format", "json"), 2, "row-unknown", [])
    assert "--backend torch" in error["hint"]
    refused = call("bench", "--backend", "torch", "--row", "exact-against-torch", "--format", "json")
    assert "sdpa-forward" in assert_refused(refused, 2, "row-unknown", [])["expected"]
    assert call("bench", "--backend", "trch", "--row", "overhead").exit_code == 2
    for backend in ("numpy", "torch"):
        result = call("bench", "--backend", backend, "--quick", "--row", "exact-forward", "--format", "json")
        (row,) = json.loads(result.stdout)["rows"]
        assert row["detail"].startswith(f"{backend}, exact")


def test_the_environment_names_the_backend_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORDER_BACKEND", "torch")
    result = call("bench", "--quick", "--row", "causal-forward", "--format", "json")
    assert json.loads(result.stdout)["rows"][0]["detail"].startswith("torch, exact")


def test_every_row_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    own = text[text.index("`korder bench --backend torch`") :]
    for name in benchmark_torch.ROWS:
        assert f"`{name}`" in own, name


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak from before hides growth")
def test_growth_counts_what_was_freed_again() -> None:
    size = 64 * 2**20

    def work() -> int:
        return len(b"x" * size)

    result, growth = with_growth(work)
    assert result == size
    assert 0.9 * size < growth < 1.5 * size
    assert with_growth(int)[1] < size / 8, "an earlier peak does not count"
