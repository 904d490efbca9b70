"""Inputs that broke, or nearly broke, an answer or a certificate: each stays here as a case."""

from __future__ import annotations

import numpy as np
import pytest

import korder
from korder import AttentionSpec, Causal, KhatriRao, Kronecker, OperandError, Polynomial

QUERY = np.ones((3, 1))
KEYS = np.array([[0.1], [0.2], [0.3]])
VALUES = np.array([[1.0], [2.0], [3.0]])
CAUSAL = AttentionSpec(order=1, mask=Causal(), method=Polynomial(degree=2))


@pytest.mark.parametrize("size", [1e-12, 1e4, 1e5, 1e6, 1e12])
@pytest.mark.parametrize("method", [Polynomial(degree=30), Polynomial(tolerance=1e-3)])
def test_a_scale_that_undoes_the_size_of_the_query(size: float, method: Polynomial) -> None:
    query = np.array([[size], [-size]], "float32")
    keys, values = np.array([[1.0], [-1.0], [0.5]], "float32"), np.array([[1.0], [2.0], [3.0]], "float32")
    spec = AttentionSpec(order=1, scale=1 / size, method=method)
    found = korder.attend(query, (keys,), (values,), spec=spec)
    exact = korder.attend(query, (keys,), (values,), spec=AttentionSpec(order=1, scale=1 / size))
    np.testing.assert_allclose(found, exact, rtol=2e-3)


def test_nan_that_came_of_finite_operands_misses_a_tolerance() -> None:
    query, keys = np.full((1, 1), 1e200), np.full((2, 1), 1e200)
    spec = AttentionSpec(order=1, scale=1.0, method=Polynomial(degree=8, tolerance=0.5))
    with np.errstate(all="ignore"), pytest.raises(korder.KorderError):
        korder.attend(query, (keys,), (VALUES[:2],), spec=spec)


def test_the_exact_method_stands_in_for_a_normaliser_that_is_not_positive() -> None:
    keys, values = np.array([[-9.0], [3.0], [3.0], [3.0]]), np.arange(4.0)[:, None]
    method = Polynomial(degree=3, tolerance=0.1, on_exceed="exact")
    result = korder.attend_result(QUERY[:1], (keys,), (values,), spec=AttentionSpec(order=1, scale=1.0, method=method))
    np.testing.assert_allclose(result.output, [[2.0]], atol=1e-4)
    assert result.provenance is not None
    assert "not positive" in result.provenance.replanned[0]
    alone = AttentionSpec(order=1, scale=1.0, method=Polynomial(degree=3, tolerance=0.1))
    with pytest.raises(korder.AccuracyError, match="not positive"):
        korder.attend(QUERY[:1], (keys,), (values,), spec=alone)


def test_a_bias_far_below_the_others_is_alone_in_its_row() -> None:
    bias = np.array([[-100.0, 0.0, 0.0]])
    method = Polynomial(tolerance=0.01, on_exceed="exact")
    spec = AttentionSpec(order=1, mask=Causal(), method=method)
    found = korder.attend(QUERY, (KEYS,), (VALUES,), spec=spec, biases=(bias,))
    exact = AttentionSpec(order=1, mask=Causal())
    np.testing.assert_allclose(found, korder.attend(QUERY, (KEYS,), (VALUES,), spec=exact, biases=(bias,)), rtol=1e-2)


def test_a_nan_bias_reaches_the_rows_that_see_it_and_no_other() -> None:
    found = korder.attend(QUERY, (KEYS,), (VALUES,), spec=CAUSAL, biases=(np.array([[0.0, 0.0, np.nan]]),))
    clean = korder.attend(QUERY, (KEYS,), (VALUES,), spec=CAUSAL, biases=(np.zeros((1, 3)),))
    np.testing.assert_allclose(found[:2], clean[:2], rtol=1e-14)
    assert np.isnan(found[2]).all()


def test_a_merge_counts_the_cast_of_its_own_output() -> None:
    rng = np.random.default_rng(954)
    keys = (rng.standard_normal((4, 1)) * 1e-4).astype("float32")
    values = rng.standard_normal((4, 1)).astype("float32")
    spec = AttentionSpec(order=1, scale=1.0, method=Polynomial(degree=6), policy={"precision": "float64"})
    half = np.array([True, True, False, False])
    parts = [
        korder.attend_result(np.ones((1, 1), "float32"), (keys,), (values,), spec=spec, key_masks=(mask,))
        for mask in (half, ~half)
    ]
    merged = korder.merge(parts)
    weights = np.exp(keys[:, 0].astype("float64"))
    truth = weights @ values[:, 0].astype("float64") / weights.sum()
    assert merged.certificate is not None
    assert abs(merged.output.item() - truth) <= merged.certificate.bound.item()


def test_values_near_the_smallest_numbers_stay_within_the_bound() -> None:
    rng = np.random.default_rng(3)
    for seed_scale in (1e-42, 1e-38, 1e-30):
        query, first, second = (rng.standard_normal((n, 2)).astype("float32") * 0.3 for n in (3, 5, 4))
        values = [(rng.standard_normal((n, 2)) * seed_scale).astype("float32") for n in (5, 4)]
        spec = AttentionSpec(order=2, method=Polynomial(degree=6))
        result = korder.attend_result(query, (first, second), values, spec=spec)
        wide = [x.astype("float64") for x in (query, first, second, *values)]
        exact = korder.attend(wide[0], wide[1:3], wide[3:])
        assert result.certificate is not None
        assert (np.abs(result.output - exact).max(axis=-1) <= result.certificate.bound).all()


def test_offsets_beyond_what_positions_can_hold_are_refused() -> None:
    with pytest.raises(OperandError, match="too far"):
        korder.attend(QUERY, (KEYS,), (VALUES,), spec=AttentionSpec(order=1, mask=Causal()), query_offset=2**63 - 1)


def test_lazy_products_of_nothing() -> None:
    empty, full = np.ones((0, 2)), np.ones((3, 2))
    np.testing.assert_array_equal(KhatriRao(empty, full).T @ np.ones((0, 1)), np.zeros((2, 1)))
    np.testing.assert_array_equal(Kronecker(empty, full).T @ np.ones((0, 1)), np.zeros((4, 1)))
    assert (KhatriRao(full, full).T @ np.ones((9, 0))).shape == (2, 0)
