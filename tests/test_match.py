"""Match3, the task that order 2 is for: exact attention solves it, the polynomial method refuses its large scores."""

from __future__ import annotations

from math import cos, log, pi
from typing import Any

import numpy as np
import pytest

import korder
from korder import AttentionSpec, Auto, Exact, Polynomial, Split

MODULUS = 11


def weights(order: int, x: np.ndarray) -> tuple[Any, tuple[Any, ...], float]:
    """Return query, keys and scale whose scores are the scale times cos(2 pi (x_i + x_j1 + .. + x_jk) / MODULUS)."""
    shifts = pi * np.arange(order + 1) / (order + 1)
    waves = np.cos(2 * pi * x[:, None] / MODULUS - shifts)
    query = (-1.0) ** np.arange(order + 1) * (2.0**order / (order + 1)) * waves
    gap = 1.0 - cos(2 * pi / MODULUS)
    return query, (waves,) * order, 2.0 / gap * (order * log(len(x)) + log(3.0))


def has_match(order: int, x: np.ndarray) -> np.ndarray:
    sums = x
    for _ in range(order):
        sums = sums[..., None] + x
    return (sums % MODULUS == 0).reshape(len(x), -1).any(axis=1)


def drawn(order: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice([1, 2, 3, 8, 9], size=14 if order < 3 else 8)


def attended(order: int, x: np.ndarray, method: Any) -> korder.Result:
    query, keys, scale = weights(order, x)
    values = tuple(np.random.default_rng(t).normal(size=(len(x), 2)) for t in range(order))
    return korder.attend_result(query, keys, values, spec=AttentionSpec(order=order, scale=scale, method=method))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("order", [1, 2, 3])
def test_exact_attention_finds_who_takes_part_in_a_match(order: int, seed: int) -> None:
    x = drawn(order, seed)
    scale = weights(order, x)[2]
    lse = attended(order, x, Exact()).lse
    found = lse > scale * (1.0 - (1.0 - cos(2 * pi / MODULUS)) / 4.0)
    np.testing.assert_array_equal(found, has_match(order, x))


def test_the_cases_hold_both_answers() -> None:
    answers = np.concatenate([has_match(order, drawn(order, seed)) for order in (1, 2, 3) for seed in range(5)])
    assert 0.1 < answers.mean() < 0.95


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-6])
def test_the_polynomial_method_refuses_it(order: int, tolerance: float) -> None:
    with pytest.raises(korder.AccuracyError) as refusal:
        attended(order, drawn(order, 0), Polynomial(tolerance=tolerance))
    assert f"{tolerance:g}" in str(refusal.value)


@pytest.mark.parametrize("degree", [2, 8])
def test_a_degree_that_is_forced_is_never_certified(degree: int) -> None:
    x = drawn(2, 0)
    exact = attended(2, x, Exact()).output
    forced = attended(2, x, Polynomial(degree=degree))
    assert forced.certificate is not None
    assert (np.abs(forced.output - exact).max(axis=-1) <= forced.certificate.bound).all()
    assert forced.certificate.bound.min() > 0.1


@pytest.mark.parametrize("method", [Split(tolerance=1e-3, on_exceed="exact"), Auto(tolerance=1e-3)])
def test_methods_that_choose_answer_it_exactly(method: Any) -> None:
    x = drawn(2, 0)
    np.testing.assert_allclose(attended(2, x, method).output, attended(2, x, Exact()).output, rtol=1e-9, atol=1e-12)
