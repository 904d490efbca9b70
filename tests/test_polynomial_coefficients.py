"""Coefficients: the published degree table, rigorous relative errors, moment constants, and the plans made of them."""

from __future__ import annotations

from itertools import pairwise
from math import comb, exp

import numpy as np
import pytest

from korder.errors import AccuracyError, UnsupportedProblemError
from korder.planning.candidates import candidate_plans
from korder.planning.coefficients import (
    coefficients_of,
    critical_points,
    minimax_coefficients,
    moment_constants,
    ratio_range,
    relative_error,
    shift_bound,
    taylor_coefficients,
    taylor_remainder,
)
from korder.planning.degrees import tolerance_plans
from korder.planning.polynomial import exact_flops, feature_count, polynomial_plan
from korder.problem import Problem, ScoreStatistics, Shapes, make_problem
from korder.spec import AttentionSpec, Polynomial

ERRORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TAYLOR = {
    0.25: [1, 2, 3, 4, 5, 5],
    0.5: [2, 3, 4, 5, 6, 7],
    1.0: [3, 5, 6, 7, 8, 9],
    2.0: [7, 8, 10, 11, 12, 14],
    4.0: [14, 15, 17, 19, 20, 21],
    8.0: [28, 30, 31, 33, 34, 36],
}
MINIMAX = {
    0.25: [1, 2, 2, 3, 4, 4],
    0.5: [1, 2, 3, 4, 5, 5],
    1.0: [2, 3, 4, 5, 6, 7],
    2.0: [3, 5, 6, 7, 8, 9],
    4.0: [6, 7, 9, 10, 12, 13],
    8.0: [10, 12, 14, 16, 17, 19],
}


def smallest_degree(kind: str, half_width: float, error: float) -> int:
    """Return the lowest degree whose relative error on [-half_width, half_width] is at most `error`."""
    degrees = (g for g in range(65) if relative_error(coefficients_of(kind, g, half_width), half_width) <= error)
    return next(degrees)


@pytest.mark.parametrize("half_width", TAYLOR)
def test_degree_table(half_width: float) -> None:
    assert [smallest_degree("taylor", half_width, error) for error in ERRORS] == TAYLOR[half_width]
    assert [smallest_degree("minimax", half_width, error) for error in ERRORS] == MINIMAX[half_width]


POLYNOMIALS = [taylor_coefficients(g) for g in (0, 1, 2, 4, 7)]
POLYNOMIALS += [minimax_coefficients(g, b) for g, b in ((0, 1.0), (3, 1.0), (4, 3.0), (7, 4.0), (9, 8.0))]


@pytest.mark.parametrize("coefficients", POLYNOMIALS)
@pytest.mark.parametrize(("low", "high"), [(-1.3, 0.4), (-0.2, 2.9), (-5.0, 5.0), (0.5, 0.6)])
def test_ratio_range_holds_every_ratio_and_is_attained(
    coefficients: tuple[float, ...], low: float, high: float
) -> None:
    x = np.linspace(low, high, 20001)
    ratios = np.polynomial.polynomial.polyval(x, coefficients) * np.exp(-x)
    least, most = ratio_range(coefficients, low, high)
    assert least <= ratios.min()
    assert most >= ratios.max()
    np.testing.assert_allclose([least, most], [ratios.min(), ratios.max()], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("coefficients", POLYNOMIALS)
@pytest.mark.parametrize("half_width", [0.3, 1.7, 6.0])
def test_moment_constants_bound_the_error_everywhere(coefficients: tuple[float, ...], half_width: float) -> None:
    x = np.linspace(-half_width, half_width, 30011)
    errors = np.abs(np.polynomial.polynomial.polyval(x, coefficients) - np.exp(x))
    constants = moment_constants(coefficients, half_width)
    for floor, slope, power in constants:
        assert np.all(errors <= floor + slope * x**power + 1e-15)
    assert min(floor for floor, _, _ in constants) <= errors.max() * 1.02 + 1e-15


@pytest.mark.parametrize("degree", [0, 2, 4, 8])
@pytest.mark.parametrize("half_width", [0.1, 1.0, 7.0])
def test_taylor_remainder_is_the_least_constant(degree: int, half_width: float) -> None:
    x = np.linspace(-half_width, half_width, 4001, dtype=np.longdouble)
    x = x[np.abs(x) > 0.05 * half_width]
    rest = sum(x**m / np.longdouble(float(np.prod(np.arange(1.0, m + 1)))) for m in range(degree + 1, degree + 60))
    ratios = np.abs(rest) / x**degree
    assert taylor_remainder(degree, half_width) >= float(ratios.max()) * (1 - 1e-9)
    assert taylor_remainder(degree, half_width) <= float(ratios.max()) * (1 + 1e-6)


def test_minimax_beats_taylor_and_levels_its_error() -> None:
    coefficients = minimax_coefficients(5, 2.0)
    assert relative_error(coefficients, 2.0) < 0.1 * relative_error(taylor_coefficients(5), 2.0)
    extremes = [-2.0, *(x for x in critical_points(coefficients) if abs(x) < 2.0), 2.0]
    errors = [np.polynomial.polynomial.polyval(x, coefficients) * exp(-x) - 1.0 for x in extremes]
    assert len(errors) == 7
    assert all(a * b < 0 for a, b in pairwise(errors))
    np.testing.assert_allclose(np.abs(errors), abs(errors[0]), rtol=2e-3)


def test_shift_bound_is_attained_by_two_atoms() -> None:
    low, high = 0.7, 1.9
    share = np.sqrt(low) / (np.sqrt(low) + np.sqrt(high))
    shifted = share * high / (share * high + (1 - share) * low)
    assert shift_bound(low, high) == pytest.approx(shifted - share, rel=1e-12)
    assert shift_bound(0.0, 1.0) == float("inf")


def problem(method: Polynomial, *, statistics: ScoreStatistics | None = None, n: int = 4096, **spec: object):  # type: ignore[no-untyped-def]
    shapes = Shapes((1, 2, n, 16), ((1, 1, n + 1, 16), (1, 1, n + 2, 16)), ((1, 1, n + 1, 8), (1, 1, n + 2, 8)))
    return make_problem(
        AttentionSpec(order=2, method=method, **spec),
        shapes,
        "float32",
        statistics=statistics,  # type: ignore[arg-type]
    )


def polynomial_degrees(given: Problem) -> tuple[int, ...]:
    method = given.spec.polynomial
    assert method is not None
    return tuple(plan.polynomial.degree for plan in tolerance_plans(given, method) if plan.polynomial is not None)


def test_plan_counts_features_flops_and_state() -> None:
    given = problem(Polynomial(degree=3))
    plan = polynomial_plan(given, 3)
    features = comb(19, 3)
    assert plan.polynomial is not None
    assert plan.polynomial.features == features == feature_count(16, 3)
    assert plan.polynomial.state == 2 * features * 9
    tokens = 2 * 4096 + 4097 + 4098
    assert plan.cost.flops == 2 * features * 9 * tokens + features * tokens
    assert exact_flops(given) == 2 * 2 * 4096 * 4097 * 4098 * 24


def test_memory_limit_shrinks_the_chunk_and_then_refuses() -> None:
    generous = polynomial_plan(problem(Polynomial(degree=4)), 4)
    tight = polynomial_plan(problem(Polynomial(degree=4), policy={"memory_limit": "5MiB"}), 4)
    assert generous.polynomial is not None
    assert tight.polynomial is not None
    assert tight.polynomial.chunk < generous.polynomial.chunk
    assert tight.cost.peak_memory <= 5 * 2**20 < generous.cost.peak_memory
    with pytest.raises(UnsupportedProblemError, match="memory") as caught:
        polynomial_plan(problem(Polynomial(degree=4), policy={"memory_limit": "100KiB"}), 4)
    assert caught.value.code == "memory-limit"


def test_degrees_for_a_tolerance_start_where_they_may_meet_it_and_stop_at_the_exact_cost() -> None:
    narrow = ScoreStatistics(-2.0, 2.0, 2.0, 0.3)
    given = problem(Polynomial(tolerance=1e-3), statistics=narrow)
    degrees = polynomial_degrees(given)
    assert degrees == (2, 4, 6)
    assert polynomial_plan(given, degrees[-1]).cost.flops < exact_flops(given)
    wider = problem(Polynomial(tolerance=1e-3), statistics=ScoreStatistics(-3.0, 3.0, 3.0, 0.8), n=10**5)
    assert polynomial_degrees(wider)[0] == 4
    small = polynomial_degrees(problem(Polynomial(tolerance=1e-3), statistics=narrow, n=8))
    assert small == (2, 4, 6)  # all cost more than the exact answer, and less than a second


def test_a_hopeless_tolerance_is_refused_or_met_otherwise() -> None:
    hopeless = ScoreStatistics(-29.0, 29.0, 29.0, 9.0)
    with pytest.raises(AccuracyError, match="no degree") as caught:
        candidate_plans(problem(Polynomial(tolerance=1e-3), statistics=hopeless))
    assert "29" in (caught.value.got or "")
    exact = candidate_plans(problem(Polynomial(tolerance=1e-3, on_exceed="exact"), statistics=hopeless))
    assert [plan.method for plan in exact] == ["exact"]
    warned = candidate_plans(problem(Polynomial(tolerance=1e-3, on_exceed="warn"), statistics=hopeless))
    assert [plan.method for plan in warned] == ["polynomial"]


def test_minimax_takes_the_interval_of_the_method_or_the_statistics() -> None:
    given = polynomial_plan(problem(Polynomial(degree=3, coefficients="minimax", interval=1.5)), 3)
    measured = polynomial_plan(
        problem(Polynomial(degree=3, coefficients="minimax"), statistics=ScoreStatistics(-3, 3, 2.5, 0.2)), 3
    )
    assert given.polynomial is not None
    assert measured.polynomial is not None
    assert (given.polynomial.interval, measured.polynomial.interval) == (1.5, 2.5)
    assert given.polynomial.values == minimax_coefficients(3, 1.5)
    with pytest.raises(UnsupportedProblemError, match="interval") as caught:
        polynomial_plan(problem(Polynomial(degree=3, coefficients="minimax")), 3)
    assert caught.value.code == "interval-missing"
    tolerance = Polynomial(tolerance=1e-3, coefficients="minimax")
    degrees = polynomial_degrees(problem(tolerance, statistics=ScoreStatistics(-1, 1, 1.0, 0.3)))
    assert degrees[0] == smallest_degree("minimax", 1.0, 2e-3)


def test_bytes_moved_count_every_operand() -> None:
    shapes = {"query": (1, 1, 100, 6), "keys": ((1, 1, 90, 6),) * 2, "values": ((1, 1, 90, 4),) * 2}
    spec = AttentionSpec(order=2, method=Polynomial(degree=2))
    plain = polynomial_plan(make_problem(spec, Shapes(**shapes), dtype="float32"), 2)
    biased = Shapes(**shapes, biases=((1, 1, 1, 90), None))
    moved = polynomial_plan(make_problem(spec, biased, dtype="float32"), 2).cost.bytes_moved
    assert moved == plain.cost.bytes_moved + 4 * 90


def test_many_tokens_need_no_more_memory() -> None:
    n = 2**22
    shapes = Shapes((1, 1, n, 6), ((1, 1, n, 6),) * 2, ((1, 1, n, 4),) * 2)
    spec = AttentionSpec(order=2, method=Polynomial(degree=2))
    plan = polynomial_plan(make_problem(spec, shapes, dtype="float32"), 2)
    assert plan.cost.peak_memory < 2**23
    assert plan.polynomial is not None
    assert plan.polynomial.chunk == 1024
