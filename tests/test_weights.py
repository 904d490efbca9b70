"""Marginals and winning tuples equal what the stored weights say, and never store them."""

from __future__ import annotations

import tracemalloc
from itertools import product
from typing import Any

import numpy as np
import pytest

import korder
from korder import AttentionSpec, Causal, Ordered, Polynomial, UnsupportedProblemError, Window
from tests.oracle import oracle_scores
from tests.problems import Case, random_case

CASES = {
    "order 1": {"order": 1},
    "order 2": {"order": 2},
    "order 3": {"order": 3, "queries": 5},
    "causal": {"mask": Causal(), "query_offset": 3},
    "window": {"mask": Window(sizes=(3, 2))},
    "ordered": {"mask": Ordered(), "key_offsets": (0, 1)},
    "masks and biases": {"key_masks": (True, True), "biases": ("full", "key")},
    "cp weight": {"weight": "cp"},
    "full weight": {"weight": "full"},
    "float32": {"dtype": "float32"},
}


def weights_of(case: Case) -> Any:
    """Every weight (b, h, n, m1, .., mk), zero where nothing may be attended to."""
    scores = oracle_scores(
        case.query, case.keys, scale=case.spec.score_factor(case.query.shape[-1]), mask=case.spec.mask,
        weight=case.weight, biases=case.biases or None, key_masks=case.key_masks or None,
        query_offset=case.query_offset, key_offsets=case.key_offsets or None,
    )  # fmt: skip
    axes = tuple(range(3, scores.ndim))
    top = scores.max(axis=axes, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=axes, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def options(case: Case) -> dict[str, Any]:
    return {
        "spec": case.spec,
        "weight": case.weight,
        "biases": case.biases or None,
        "key_masks": case.key_masks or None,
        "query_offset": case.query_offset,
        "key_offsets": case.key_offsets or None,
    }


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_marginals(given: dict[str, Any]) -> None:
    case = random_case(**given, seed=30)
    weights = weights_of(case)
    found = korder.marginals(case.query, case.keys, **options(case))
    assert len(found) == len(case.keys)
    for mode, marginal in enumerate(found):
        others = tuple(3 + t for t in range(len(case.keys)) if t != mode)
        np.testing.assert_allclose(
            marginal, weights.sum(axis=others), rtol=0, atol=1e-6 if case.dtype == "float32" else 1e-14
        )


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_top_tuples(given: dict[str, Any]) -> None:
    case = random_case(**given, seed=31)
    weights = weights_of(case)
    indices, probabilities = korder.top_tuples(case.query, case.keys, count=4, **options(case))
    assert indices.shape == (*weights.shape[:3], 4, len(case.keys))
    assert probabilities.shape == indices.shape[:-1]
    tolerance = 1e-6 if case.dtype == "float32" else 1e-13
    for row in product(*map(range, weights.shape[:3])):
        best = np.sort(weights[row].reshape(-1))[::-1][:4]
        best = np.pad(best, (0, 4 - len(best)))
        np.testing.assert_allclose(probabilities[row], best, rtol=0, atol=tolerance)
        for js, probability in zip(indices[row], probabilities[row], strict=True):
            if probability > 0:
                assert weights[row][tuple(js)] == pytest.approx(probability, abs=tolerance)
            else:
                assert (js == -1).all(), "no tuple stands for no probability"
        assert len({tuple(js) for js in indices[row] if js[0] >= 0}) == (probabilities[row] > 0).sum()


def test_more_tuples_asked_for_than_there_are() -> None:
    case = random_case(2, seed=32, lengths=(2, 3))
    indices, probabilities = korder.top_tuples(case.query, case.keys, count=np.int64(10**9))
    assert indices.shape[-2:] == (6, 2)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-14)


def test_tuples_are_never_stored() -> None:
    rng = np.random.default_rng(0)
    query, first, second = (rng.standard_normal((n, 8), dtype="float32") for n in (60, 401, 499))
    stored = 60 * 401 * 499 * 4
    spec = AttentionSpec(order=2, policy={"memory_limit": "2MiB"})
    tracemalloc.start()
    korder.top_tuples(query, (first, second), count=3, spec=spec)
    korder.marginals(query, (first, second), spec=spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < stored / 6


def test_only_the_exact_method_has_weights_to_show() -> None:
    case = random_case(2, seed=33)
    spec = AttentionSpec(order=2, method=Polynomial(degree=2))
    with pytest.raises(UnsupportedProblemError, match="marginals are those of the exact"):
        korder.marginals(case.query, case.keys, spec=spec)
    with pytest.raises(UnsupportedProblemError, match="top tuples are those of the exact"):
        korder.top_tuples(case.query, case.keys, count=1, spec=spec)
    with pytest.raises(korder.SpecError, match="count"):
        korder.top_tuples(case.query, case.keys, count=0)


def test_a_query_that_sees_nan_has_no_winner_and_the_others_have() -> None:
    case = random_case(2, seed=34, mask=Causal(), batch=1, heads=1, groups=1, queries=5, lengths=(5, 5))
    keys = [key.copy() for key in case.keys]
    keys[1][0, 0, 3] = np.nan
    indices, probabilities = korder.top_tuples(case.query, keys, count=2, spec=case.spec)
    clean = korder.top_tuples(case.query, case.keys, count=2, spec=case.spec)
    assert np.isnan(probabilities[0, 0, 3:]).all()
    np.testing.assert_array_equal(indices[0, 0, :3], clean[0][0, 0, :3])
    np.testing.assert_array_equal(probabilities[0, 0, :3], clean[1][0, 0, :3])
