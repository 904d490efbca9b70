"""Plans that prune: for a tolerance where it pays, by a number where one is given, refused where it cannot be."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pytest
import torch

import korder
from korder.errors import SpecError, UnsupportedProblemError
from korder.planning.candidates import candidate_plans
from korder.planning.polynomial import backward_workspace
from korder.spec import AttentionSpec, Polynomial
from korder.spi import NEEDS, OutputGradients
from korder_numpy.polynomial import NumpyPolynomialKernel
from tests.kernels import flat
from tests.polynomial_cases import polynomial_case, xp
from tests.problems import Case
from tests.pruned_cases import measured, pruned_case, pruned_plan, with_degree

Array = Any


def smooth_operands(n: int = 300, width: int = 8, decay: float = 2.0, seed: int = 0) -> tuple[Any, ...]:
    """Return query, keys, values and a scale at which the largest terms of all columns add to 1."""
    rng = np.random.default_rng(seed)
    sizes = np.arange(1.0, width + 1.0) ** -decay
    query, *keys = (rng.uniform(-1, 1, (m, width)) * sizes ** (1 / 3) for m in (n, n - 1, n + 2))
    values = tuple(rng.normal(size=(len(key), 5)) for key in keys)
    return query, tuple(keys), values, 1.0 / sizes.sum()


def spec_of(scale: float, **method: Any) -> AttentionSpec:
    return AttentionSpec(order=2, scale=scale, method=Polynomial(**method))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_a_tolerance_prunes_by_itself_and_is_met(kind: str, tolerance: float) -> None:
    query, keys, values, scale = smooth_operands(120, decay=3.0)
    given = (query, keys, values)
    if kind == "torch":
        given = (torch.asarray(query), tuple(map(torch.asarray, keys)), tuple(map(torch.asarray, values)))
    found = korder.attend_result(*given, spec=spec_of(scale, tolerance=tolerance), backend=kind)
    assert found.provenance is not None
    plan = found.provenance.plan
    assert plan.polynomial is not None
    assert plan.polynomial.pruning is not None
    whole = comb(8 + plan.polynomial.degree, plan.polynomial.degree)
    assert plan.polynomial.features * 1.5 <= whole
    exact = korder.attend(query, keys, values, spec=AttentionSpec(order=2, scale=scale))
    products = values[0][:, None, :] * values[1][None, :, :]
    spread = float(np.ptp(products.reshape(-1, 5), axis=0).max())
    wrong = np.abs(np.asarray(found.output) - exact).max(-1)
    assert np.all(wrong <= np.asarray(found.certificate.bound))  # type: ignore[union-attr]
    assert wrong.max() <= tolerance * spread
    text = plan.explain()
    assert f"{plan.polynomial.features} of {whole}" in text
    assert "note: pruned: " in text
    assert "times fewer" in text
    assert f"pruned to {plan.polynomial.features} features" in plan.name


def test_a_degree_alone_prunes_nothing() -> None:
    query, keys, values, scale = smooth_operands(n=40)
    for method in ({"degree": 4}, {"degree": 4, "prune": 0.0}, {"degree": 4, "tolerance": 0.1}):
        found = korder.attend_result(query, keys, values, spec=spec_of(scale, **method))
        assert found.provenance is not None
        assert found.provenance.plan.polynomial is not None
        assert found.provenance.plan.polynomial.pruning is None
    kept = korder.attend_result(query, keys, values, spec=spec_of(scale, tolerance=1e-4, prune=0.0))
    assert kept.provenance is not None
    assert kept.provenance.plan.polynomial is not None
    assert kept.provenance.plan.polynomial.features == comb(8 + 4, 4)


def test_prune_says_how_much_may_be_left_out() -> None:
    query, keys, values, scale = smooth_operands(n=60)
    whole = korder.attend_result(query, keys, values, spec=spec_of(scale, degree=6))
    features = comb(14, 6)
    for mass in (1e-6, 1e-4, 1e-2):
        found = korder.attend_result(query, keys, values, spec=spec_of(scale, degree=6, prune=mass))
        assert found.provenance is not None
        assert found.provenance.plan.polynomial is not None
        assert found.provenance.plan.polynomial.features < features
        features = found.provenance.plan.polynomial.features
        assert whole.certificate is not None
        assert found.certificate is not None
        extra = (found.certificate.approximation - whole.certificate.approximation).max()
        products = values[0][:, None, :] * values[1][None, :, :]
        assert 0 < extra <= 1.1 * mass * np.ptp(products.reshape(-1, 5), axis=0).max()


@pytest.mark.parametrize("seed", range(6))
def test_a_tolerance_ends_within_an_even_step_of_the_degree_it_needs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    query, keys, values, scale = smooth_operands(60, 5, rng.uniform(0.5, 3.5), seed)
    scale, tolerance = scale * float(rng.uniform(0.5, 4)), float(10 ** rng.uniform(-4, -1.5))
    products = values[0][:, None, :] * values[1][None, :, :]
    spread = float(np.ptp(products.reshape(-1, 5), axis=0).max())

    def is_met(degree: int) -> bool:
        known = korder.attend_result(query, keys, values, spec=spec_of(scale, degree=degree)).certificate
        assert known is not None
        return bool(np.all(known.approximation <= tolerance * spread))

    needed = next(degree for degree in range(2, 30, 2) if is_met(degree))
    found = korder.attend_result(query, keys, values, spec=spec_of(scale, tolerance=tolerance))
    assert found.provenance is not None
    assert found.provenance.plan.polynomial is not None
    assert needed <= found.provenance.plan.polynomial.degree <= needed + 2


def test_what_pruning_alone_misses_is_met_with_all_monomials() -> None:
    """Where a pruned degree misses by what it leaves out, the next higher or the whole degree follows."""
    query, keys, values, scale = smooth_operands(60, 4)
    whole = korder.attend_result(query, keys, values, spec=spec_of(scale, degree=2))
    products = values[0][:, None, :] * values[1][None, :, :]
    spread = float(np.ptp(products.reshape(-1, 5), axis=0).max())
    tolerance = 1.02 * float(whole.certificate.approximation.max()) / spread  # type: ignore[union-attr]
    found = korder.attend_result(query, keys, values, spec=spec_of(scale, tolerance=tolerance, prune=0.4 * tolerance))
    assert found.provenance is not None
    assert "pruned to" in found.provenance.replanned[0]
    assert found.provenance.plan.polynomial is not None
    assert found.provenance.plan.polynomial.degree <= 4


def test_plans_of_a_tolerance_are_cheapest_first() -> None:
    case = pruned_case(2, "plain", "full", query_width=6, seed=3, queries=700)
    plans = candidate_plans(measured(case.with_spec(method=Polynomial(tolerance=1e-3))))
    costs = [plan.cost.flops for plan in plans]
    assert costs == sorted(costs)
    for pruned in (False, True):
        degrees = [x.degree for plan in plans if (x := plan.polynomial) and (x.pruning is not None) == pruned]
        assert degrees == sorted(set(degrees))
        assert degrees


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"degree": 2, "prune": 1.0}, "prune"),
        ({"degree": 2, "prune": -0.1}, "prune"),
        ({"tolerance": 1e-3, "prune": 1e-3}, "use up the tolerance"),
        ({"degree": 2, "prune": 1e-3, "gradient": "closed_form"}, "needs all monomials"),
    ],
)
def test_what_makes_no_sense_is_refused(method: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Polynomial(**method)


def test_pruning_needs_statistics() -> None:
    problem = with_degree(polynomial_case(2, "plain", "full", degree=4), 4, prune=0.01).problem()
    with pytest.raises(UnsupportedProblemError, match="how large each column's terms are") as caught:
        candidate_plans(problem)
    assert caught.value.code == "needs-statistics"
    _, keys, values, scale = smooth_operands(n=9)
    with pytest.raises(UnsupportedProblemError, match="prune=0"):
        korder.prefill(keys, values, spec_of(scale, degree=2, prune=0.01))
    with pytest.raises(UnsupportedProblemError, match="while tensors are traced"):
        torch.func.vmap(lambda x: korder.attend(x, (x, x), (x, x), spec=spec_of(scale, degree=2, prune=0.01)))(
            torch.ones(2, 5, 8)
        )


def test_the_closed_form_is_not_pruned() -> None:
    query, keys, values, scale = smooth_operands(n=60)
    spec = spec_of(scale, tolerance=1e-4, gradient="closed_form")
    found = korder.attend_result(query, keys, values, spec=spec)
    assert found.provenance is not None
    assert found.provenance.plan.polynomial is not None
    assert found.provenance.plan.polynomial.pruning is None


def test_a_backend_that_has_no_pruning_refuses_it_and_gets_all_monomials() -> None:
    from korder_numpy.backend import NumpyBackend

    class Plain(NumpyBackend):
        name = "plain_numpy"

        def capabilities(self) -> Any:
            known = super().capabilities()
            without = tuple(replace(support, pruned=frozenset({"causal"})) for support in known.methods)
            return replace(known, methods=without)

    plan = pruned_plan(pruned_case(2, "plain", "full", seed=3), 0.02)
    (reason,) = Plain().unsupported_reasons(plan)
    assert str(reason) == "features=pruned (supported: all monomials; pruned ones with mask=causal)"
    assert NumpyBackend().unsupported_reasons(plan) == ()
    korder.register_backend(Plain())
    query, keys, values, scale = smooth_operands(60, decay=3.0)
    found = korder.attend_result(query, keys, values, spec=spec_of(scale, tolerance=1e-4), backend="plain_numpy")
    assert found.provenance is not None
    assert found.provenance.plan.polynomial is not None
    assert found.provenance.plan.polynomial.pruning is None
    assert any("features=pruned" in str(rejection) for rejection in found.provenance.rejected)
    with pytest.raises(UnsupportedProblemError, match="features=pruned"):
        korder.attend(query, keys, values, spec=spec_of(scale, degree=4, prune=0.01), backend="plain_numpy")


def test_auto_has_the_pruned_polynomial_among_its_candidates_and_takes_it() -> None:
    query, keys, values, scale = smooth_operands(400, 10, 3.0)
    spec = AttentionSpec(order=2, scale=scale, method=korder.Auto(tolerance=1e-4))
    found = korder.attend_result(query, keys, values, spec=spec)
    assert found.provenance is not None
    plan = found.provenance.plan
    assert plan.split is not None
    assert plan.split.prune > 0
    assert "pruned, 0 + 0 keys" in plan.name
    assert any(text.startswith("split: degree") and "pruned" not in text for text in found.provenance.candidates)
    exact = korder.attend(query, keys, values, spec=AttentionSpec(order=2, scale=scale))
    spread = float(np.ptp((values[0][:, None, :] * values[1][None, :, :]).reshape(-1, 5), axis=0).max())
    assert np.abs(found.output - exact).max() <= 1e-4 * spread


def test_tensors_carry_the_statistics_that_pruning_goes_by() -> None:
    query, keys, values, scale = smooth_operands(13, 5, 2.0)
    spec = spec_of(scale, degree=4, prune=0.01)
    statistics = korder.measure(query, keys, values, spec=spec)
    assert len(statistics.columns) == 5
    q, k, v = torch.asarray(query), tuple(map(torch.asarray, keys)), tuple(map(torch.asarray, values))
    whole = korder.attend(query, keys, values, spec=spec_of(scale, degree=4))
    expected = korder.attend(query, keys, values, spec=spec, statistics=statistics)
    assert np.abs(expected - whole).max() > 1e-9
    for known in (None, statistics):
        np.testing.assert_allclose(korder.attend(q, k, v, spec=spec, statistics=known).numpy(), expected, atol=1e-14)
    mapped = torch.func.vmap(lambda x: korder.attend(x, k, v, spec=spec, statistics=statistics))(q[None])
    np.testing.assert_allclose(mapped[0].numpy(), expected, atol=1e-14)


def test_second_derivatives_of_a_pruned_polynomial() -> None:
    query, keys, values, scale = smooth_operands(4, 3, 2.0)
    spec = spec_of(3 * scale, degree=4, prune=0.1)
    statistics = korder.measure(query, keys, values, spec=spec)
    fixed = (tuple(torch.asarray(x[:3]) for x in keys), tuple(torch.asarray(x[:3, :2]) for x in values))

    def attended(x: torch.Tensor) -> torch.Tensor:
        return korder.attend(torch.asarray(query), fixed[0], (x, fixed[1][1]), spec=spec, statistics=statistics)

    leaf = fixed[1][0].clone().requires_grad_()
    assert torch.autograd.gradcheck(attended, (leaf,), fast_mode=True)
    assert torch.autograd.gradgradcheck(attended, (leaf,), fast_mode=True)


def test_the_workspace_of_a_pruned_plan_is_that_of_what_it_keeps() -> None:
    rng = np.random.default_rng(0)
    sizes = np.arange(1.0, 13.0) ** -0.5
    query, *keys = ((rng.uniform(-1, 1, (1, 1, 2000, 12)) * sizes).astype("float32") for _ in range(3))
    values = tuple(rng.normal(size=(1, 1, 2000, 8)).astype("float32") for _ in range(2))
    spec = AttentionSpec(order=2, scale=0.5, method=Polynomial(degree=4, prune=0.003))
    case = Case(spec=spec, query=query, keys=tuple(keys), values=values, biases=(None, None), key_masks=(None, None))
    (plan,) = candidate_plans(measured(case))
    assert plan.polynomial is not None
    assert plan.polynomial.pruning is not None
    operands = case.operands()
    kernel = NumpyPolynomialKernel(xp, plan)
    saved = kernel.forward(operands, save=True)
    tracemalloc.start()
    forward = kernel.forward(operands, save=False)
    outputs = sum(
        x.nbytes for x in (forward.output, forward.lse, forward.normaliser, forward.moments, forward.magnitude)
    )
    peak = tracemalloc.get_traced_memory()[1] - outputs
    assert 0.5 * kernel.workspace_bytes <= peak <= 1.2 * kernel.workspace_bytes
    del forward
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    found = kernel.backward(operands, saved, OutputGradients(np.ones_like(saved.output)), needs=NEEDS)
    peak = tracemalloc.get_traced_memory()[1] - before - sum(x.nbytes for x in flat(found).values())
    tracemalloc.stop()
    planned = backward_workspace(plan.problem, 4, plan.polynomial.chunk, plan.polynomial.pruning)
    assert 0.4 * planned <= peak <= 1.2 * planned, (peak, planned)
