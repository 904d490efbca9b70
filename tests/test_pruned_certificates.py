"""Certificates of pruned polynomials: never below the true error, whatever was left out and by whose statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest

from korder.errors import AccuracyError
from korder.methods.certificates import certify
from korder.methods.left_out import left_out_sums
from korder.spec import Polynomial
from korder.spi import KernelOutput, Plan
from tests.oracle_polynomial import dense_exact, dense_scores
from tests.polynomial_cases import KERNELS, centre_of, judge_many, polynomial_case, xp
from tests.problems import Case, random_case
from tests.pruned_cases import (
    anisotropic,
    dense_pruned,
    kept_powers,
    monomials_of,
    pruned_plan,
    score_terms,
    with_degree,
)
from tests.test_certificates import SOURCES, adversarial_problem

Array = Any


def true_rests(case: Case, plan: Plan) -> list[Array]:
    """Return, per degree, the largest |x^s - what is kept of it| over the tuples that a row sees: (b, h, n)."""
    assert plan.polynomial is not None
    terms = score_terms(case)
    live = dense_scores(case)[1] != -np.inf
    powers = kept_powers(terms, monomials_of(plan), plan.polynomial.degree)
    rests = [np.abs(terms.sum(-1) ** s - kept) for s, kept in enumerate(powers)]
    return [np.where(live, rest, 0).max(-1, initial=0) for rest in rests]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_left_out_is_bounded_power_by_power(seed: int) -> None:
    rng = np.random.default_rng(seed)
    order, dtype = 1 + seed % 3, "float32" if seed % 2 else "float64"
    variant = ("plain", "key_masks", "one_group", "cp", "full_weight")[seed % 5]
    mask = ("full", "causal_offsets", "window", "ordered")[seed % 4]
    case = polynomial_case(order, variant, mask, degree=4, seed=seed, query_width=4, dtype=dtype)
    if variant in ("plain", "key_masks", "one_group"):
        case = anisotropic(case, rng, 2.0)
    plan = pruned_plan(case, 0.1)
    assert plan.polynomial is not None
    found = left_out_sums(xp, plan.problem, plan.polynomial, case.operands())
    for bound, rest, power in zip(found, true_rests(case, plan), range(9), strict=False):
        slack = 1e-15 * np.abs(score_terms(case)).sum(-1).max(-1, initial=0) ** power  # of the oracle's own difference
        assert np.all(rest <= bound + slack)


def test_the_bound_is_attained_where_all_terms_have_one_sign() -> None:
    width, degree = 5, 4
    sizes = 0.5 ** np.arange(width)
    ones = np.ones((1, 1, 3, width))
    case = replace(
        random_case(2, seed=1, batch=1, heads=1, groups=1, queries=3, lengths=(3, 3), query_width=width,
                    method=Polynomial(degree=degree), scale=1.0),
        query=ones * sizes * np.asarray([1.0, 0.5, 0.25])[:, None], keys=(ones, 0.5 * ones),
    )  # fmt: skip
    plan = pruned_plan(case, 0.02)
    assert plan.polynomial is not None
    assert plan.polynomial.pruning is not None
    found = left_out_sums(xp, plan.problem, plan.polynomial, case.operands())
    for bound, rest in zip(found, true_rests(case, plan), strict=True):
        np.testing.assert_allclose(bound, rest.astype(float), rtol=1e-9, atol=1e-13)


def test_the_bound_needs_nothing_but_the_array_api() -> None:
    case = anisotropic(polynomial_case(2, "plain", "full", degree=4, query_width=4), np.random.default_rng(3), 1.0)
    plan = pruned_plan(case, 0.05)
    assert plan.polynomial is not None
    strict = case.operands(array_api_strict.asarray)
    found = left_out_sums(array_api_strict, plan.problem, plan.polynomial, strict)
    for bound, same in zip(found, left_out_sums(xp, plan.problem, plan.polynomial, case.operands()), strict=True):
        np.testing.assert_allclose(np.asarray(bound), same, rtol=1e-12)


def hard_case(seed: int, dtype: str) -> Case:
    """Return a small problem with uneven columns, heavy rows, every mask and form, and scores from 0.05 to 12."""
    rng = np.random.default_rng(seed)
    case = adversarial_problem(rng, seed, int(rng.integers(1, 4)), widest=5, weighted=0.15)
    coefficients: dict[str, Any] = {}
    if rng.random() < 0.2:
        coefficients = {"coefficients": "minimax", "interval": float(rng.uniform(0.2, 6.0))}
    case = with_degree(case, int(rng.choice([1, 2, 2, 3, 4, 4, 5, 6])), **coefficients)
    if rng.random() < 0.3:
        source = SOURCES[rng.integers(len(SOURCES))]
        case = replace(case, query=source(rng, *case.query.shape), keys=tuple(source(rng, *x.shape) for x in case.keys))
    case = replace(case, biases=tuple(None if x is None else x * rng.choice([1.0, 20.0, 80.0]) for x in case.biases))
    return anisotropic(case, rng, float(10 ** rng.uniform(np.log10(0.05), np.log10(12.0)))).astype(dtype)


def assert_holds(case: Case, plan: Plan, output: KernelOutput, unit: float) -> bool:
    """Assert that the bounds of output and lse hold, and each part for its own error; return whether all are finite."""
    found = certify(xp, plan, case.operands(), output, rounding_unit=unit)
    exact, lse = dense_exact(case)
    pruned = dense_pruned(case, plan, centre_of(output))
    assert np.all(np.abs(output.output - exact).max(-1) <= found.bound)
    assert np.all(np.abs(pruned["output"] - exact).max(-1) <= found.approximation + 1e-3 * found.rounding)
    assert np.all(np.abs(output.output - pruned["output"]).max(-1) <= found.rounding)
    live = np.isfinite(lse)
    assert np.all(np.abs(output.lse[live] - lse[live]) <= found.lse_bound[live])
    return bool(np.all(found.bound < np.inf))


def judge(seed: int, dtype: str) -> str:
    """Run one hard case, by a plan for these operands or for others; return what came of it."""
    rng = np.random.default_rng(seed + 10**6)
    case = hard_case(seed, dtype)
    planned = case
    if rng.random() < 0.3:  # statistics of other operands, which may be smaller by far
        scales = [rng.uniform(0.05, 1.0, (1, 1, 1, x.shape[-1])) for x in (case.query, *case.keys)]
        moved = [(x * scale).astype(dtype) for x, scale in zip((case.query, *case.keys), scales, strict=True)]
        planned = replace(case, query=moved[0], keys=tuple(moved[1:]))
    plan = pruned_plan(planned, float(10 ** rng.uniform(-5, -0.05)), chunk=int(1 + seed % 5))
    assert plan.polynomial is not None
    kernel = KERNELS["numpy"](xp, plan)
    try:
        output = kernel.forward(case.operands(), save=True)
    except AccuracyError:
        return "refused"
    if not assert_holds(case, plan, output, kernel.rounding_unit):
        return "hopeless"
    return "useful" if plan.polynomial.pruning is not None else "whole"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_hold_whatever_is_left_out(dtype: str) -> None:
    counts = judge_many(judge, range(100), dtype)
    assert counts["useful"] > 40, counts


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_hold_in_many_cases(dtype: str) -> None:
    counts = judge_many(judge, range(1000, 5000), dtype)
    assert counts["useful"] > 1500, counts
