"""Score statistics: bounds hold for every live tuple, are rounded outward, and centres are the rows' means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from korder.methods.statistics import measure, round_outward, row_bounds, row_centres
from tests.oracle_polynomial import dense_scores
from tests.polynomial_cases import COMBINATIONS, polynomial_case, xp
from tests.problems import Case


def live_scores(case: Case) -> tuple[Any, Any, Any]:
    """Return scores, weights and whether tuples are live, (b, h, n, tuples)."""
    scores, bias = dense_scores(case)
    live = bias != -np.inf
    return scores, np.where(live, np.exp(np.where(live, bias, 0)), 0), live


@pytest.mark.parametrize(("order", "variant", "mask"), COMBINATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_hold_and_centres_are_means(order: int, variant: str, mask: str, dtype: str) -> None:
    case = polynomial_case(order, variant, mask, degree=2, dtype=dtype, scale=-0.4, seed=order)
    scores, weights, live = live_scores(case)
    problem, operands = case.problem(), case.operands()
    bounds = row_bounds(xp, problem, operands)
    assert np.all((scores >= bounds.low[..., None]) | ~live)
    assert np.all((scores <= bounds.high[..., None]) | ~live)
    assert np.all((np.abs(scores) <= bounds.reach[..., None]) | ~live)
    count = weights.sum(-1)
    mean = (weights * scores).sum(-1) / np.where(count == 0, 1, count)
    centres = row_centres(xp, problem, operands, "taylor")
    np.testing.assert_allclose(centres, mean.astype(float), rtol=1e-5, atol=1e-6)
    middle = row_centres(xp, problem, operands, "minimax")
    np.testing.assert_allclose(middle, 0.5 * (bounds.low + bounds.high), atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_interval_bounds_are_attained_by_matching_signs(seed: int) -> None:
    case = polynomial_case(2, "plain", "full", degree=2, seed=seed, query_width=1, scale=1.0)
    scores, _, _ = live_scores(case)
    bounds = row_bounds(xp, case.problem(), case.operands())
    np.testing.assert_allclose(bounds.low, scores.min(-1).astype(float), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(bounds.high, scores.max(-1).astype(float), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_measure_bounds_what_it_measures(order: int, mask: str) -> None:
    case = polynomial_case(order, "biases", mask, degree=2, scale=0.3)
    scores, weights, live = live_scores(case)
    found = measure(xp, case.problem(), case.operands())
    mean = (weights * scores).sum(-1) / weights.sum(-1)
    assert found.score_low <= scores[live].min()
    assert found.score_high >= scores[live].max()
    assert found.half_width >= np.abs(np.where(live, scores - mean[..., None], 0)).max()
    rms = np.sqrt((weights * (scores - mean[..., None]) ** 2).sum(-1) / weights.sum(-1))
    if mask == "full":
        assert rms.max() <= found.rms <= 1.11 * rms.max()
    for value in (found.score_low, found.score_high, found.half_width, found.rms):
        assert float(f"{value:.2g}") == value


def test_measure_of_nothing_is_zero() -> None:
    case = polynomial_case(2, "plain", "causal", degree=2, key_offsets=(40, 40))
    found = measure(xp, case.problem(), case.operands())
    assert (found.score_low, found.score_high, found.half_width) == (0.0, 0.0, 0.0)


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=-1e30, max_value=1e30, allow_nan=False, allow_subnormal=False), st.sampled_from([-1, 1]))
def test_rounding_is_outward_and_close(x: float, direction: int) -> None:
    if 0 < abs(x) < 1e-290:
        return
    rounded = round_outward(x, direction)
    assert (rounded - x) * direction >= 0
    assert abs(rounded - x) <= 0.1001 * abs(x)
    assert float(f"{rounded:.2g}") == rounded
