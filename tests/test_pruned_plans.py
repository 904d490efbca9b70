"""Plans that prune: for a tolerance where it pays, by a number where one is given, refused where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pytest
import torch

import korder
from korder.errors import SpecError, UnsupportedProblemError
from korder.planning.candidates import candidate_plans
from korder.spec import AttentionSpec, Polynomial
from tests.polynomial_cases import polynomial_case
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
