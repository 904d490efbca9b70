"""Monomial features against brute force: values, multiplicities, adjoint, and the rank identity."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import comb, factorial, prod

import array_api_compat.numpy as xp
import numpy as np
import pytest

from korder.methods.features import feature_adjoint, feature_table, multinomials, polynomial_features

SIZES = [(1, 5), (2, 4), (3, 0), (3, 1), (5, 3), (4, 6)]


def monomials(width: int, degree: int) -> list[tuple[int, ...]]:
    return [m for size in range(degree + 1) for m in combinations_with_replacement(range(width), size)]


@pytest.mark.parametrize(("width", "degree"), SIZES)
def test_features_are_all_monomials_in_graded_order(width: int, degree: int) -> None:
    columns = np.random.default_rng(1).normal(size=(width, 3))
    features = polynomial_features(xp, feature_table(width, degree), columns)
    expected = np.array([[prod(columns[v, c] for v in m) for c in range(3)] for m in monomials(width, degree)])
    assert features.shape == (comb(width + degree, degree), 3)
    np.testing.assert_allclose(features, expected, rtol=1e-13)


@pytest.mark.parametrize(("width", "degree"), SIZES)
def test_multinomials_count_the_orderings(width: int, degree: int) -> None:
    expected = [factorial(len(m)) / prod(factorial(m.count(v)) for v in set(m)) for m in monomials(width, degree)]
    np.testing.assert_allclose(multinomials(feature_table(width, degree)), expected, rtol=1e-14)


@pytest.mark.parametrize(("width", "degree"), SIZES)
def test_adjoint_is_the_transposed_derivative(width: int, degree: int) -> None:
    rng = np.random.default_rng(2)
    table = feature_table(width, degree)
    columns, gradient = rng.normal(size=(width, 3)), rng.normal(size=(table.features, 3))
    found = feature_adjoint(xp, table, columns, polynomial_features(xp, table, columns), gradient)
    expected = np.zeros_like(columns)
    for row, m in enumerate(monomials(width, degree)):
        for place, variable in enumerate(m):
            others = m[:place] + m[place + 1 :]
            expected[variable] += gradient[row] * np.prod(columns[list(others)], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_features_have_the_least_rank_that_a_power_of_the_score_allows() -> None:
    width, degree = 3, 3
    rng = np.random.default_rng(3)
    query, key = rng.normal(size=(width, 31)), rng.normal(size=(width, 37))
    table = feature_table(width, degree)
    weights = np.concatenate([multinomials(table)[table.rows(m)] / factorial(m) for m in range(degree + 1)])
    left, right = (polynomial_features(xp, table, x) for x in (query, key))
    scores = query.T @ key
    expected = sum(scores**m / factorial(m) for m in range(degree + 1))
    np.testing.assert_allclose((left * weights[:, None]).T @ right, expected, rtol=1e-12, atol=1e-12)
    assert np.linalg.matrix_rank(expected) == table.features == comb(width + degree, degree)
