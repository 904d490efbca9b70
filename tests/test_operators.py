"""Lazy products equal the dense ones, by every rule that they use."""

from __future__ import annotations

import numpy as np
import pytest

from korder import KhatriRao, Kronecker, ShapeError

RNG = np.random.default_rng(5)


def matrices(*shapes: tuple[int, int]) -> list[np.ndarray]:
    return [RNG.standard_normal(shape) for shape in shapes]


def dense_khatri_rao(*factors: np.ndarray) -> np.ndarray:
    rows = np.ndindex(*(factor.shape[0] for factor in factors))
    return np.array([np.prod([factor[j] for factor, j in zip(factors, js, strict=True)], axis=0) for js in rows])


def dense_kronecker(*factors: np.ndarray) -> np.ndarray:
    product = np.ones((1, 1))
    for factor in factors:
        product = np.kron(product, factor)
    return product


def close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_khatri_rao(count: int) -> None:
    factors = matrices((3, 4), (5, 4), (2, 4))[:count]
    dense, lazy = dense_khatri_rao(*factors), KhatriRao(*factors)
    right, vector, left = RNG.standard_normal((4, 7)), RNG.standard_normal(4), RNG.standard_normal((6, dense.shape[0]))
    assert lazy.shape == dense.shape
    close(lazy.to_dense(), dense)
    close(lazy @ right, dense @ right)
    close(lazy @ vector, dense @ vector)
    close(lazy.T.to_dense(), dense.T)
    close(lazy.T @ left.T, dense.T @ left.T)
    close(left @ lazy, left @ dense)
    close(left[0] @ lazy, left[0] @ dense)
    close(lazy.T.T.to_dense(), dense)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_kronecker(count: int) -> None:
    factors = matrices((3, 4), (5, 2), (2, 3))[:count]
    dense, lazy = dense_kronecker(*factors), Kronecker(*factors)
    right, left = RNG.standard_normal((dense.shape[1], 7)), RNG.standard_normal((6, dense.shape[0]))
    assert lazy.shape == dense.shape
    close(lazy.to_dense(), dense)
    close(lazy @ right, dense @ right)
    close(lazy @ right[:, 0], dense @ right[:, 0])
    close(lazy.T @ left.T, dense.T @ left.T)
    close(left @ lazy, left @ dense)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_identity_of_khatri_rao_products(count: int) -> None:
    """(U1 (.) U2)^T (V1 (.) V2) = (U1^T V1) * (U2^T V2)."""
    left = matrices((3, 4), (5, 4), (2, 4))[:count]
    right = matrices((3, 6), (5, 6), (2, 6))[:count]
    close(KhatriRao(*left).T @ KhatriRao(*right), dense_khatri_rao(*left).T @ dense_khatri_rao(*right))


def test_kronecker_composes_factor_by_factor() -> None:
    outer, inner, columns = matrices((3, 4), (5, 2)), matrices((4, 6), (2, 3)), matrices((4, 7), (2, 7))
    product = Kronecker(*outer) @ Kronecker(*inner)
    assert isinstance(product, Kronecker)
    close(product.to_dense(), dense_kronecker(*outer) @ dense_kronecker(*inner))
    swapped = Kronecker(*outer) @ KhatriRao(*columns)
    assert isinstance(swapped, KhatriRao)
    close(swapped.to_dense(), dense_kronecker(*outer) @ dense_khatri_rao(*columns))


def test_a_transposed_khatri_rao_takes_a_kronecker_factor_by_factor() -> None:
    columns, factors = matrices((3, 4), (5, 4)), matrices((3, 2), (5, 6))
    product = KhatriRao(*columns).T @ Kronecker(*factors)
    assert not isinstance(product, np.ndarray)
    close(product.to_dense(), dense_khatri_rao(*columns).T @ dense_kronecker(*factors))


def test_factors_that_do_not_pair_are_multiplied_all_the_same() -> None:
    left, right = Kronecker(*matrices((3, 4), (5, 3))), Kronecker(*matrices((6, 2), (2, 2)))
    close(left @ right, left.to_dense() @ right.to_dense())
    tall, other = KhatriRao(*matrices((3, 4), (4, 4))), KhatriRao(*matrices((2, 5), (6, 5)))
    close(tall.T @ other, tall.to_dense().T @ other.to_dense())


def test_order_2_scores_are_a_khatri_rao_product() -> None:
    query, first, second = matrices((5, 4), (3, 4), (7, 4))
    scores = query @ KhatriRao(first, second).T
    close(scores.reshape(5, 3, 7), np.einsum("il,al,bl->iab", query, first, second))


def test_other_namespaces() -> None:
    strict = pytest.importorskip("array_api_strict")
    factors = matrices((3, 4), (5, 4))
    lazy = KhatriRao(*(strict.asarray(factor) for factor in factors))
    right = RNG.standard_normal((15, 2))
    close(np.asarray(lazy.T @ strict.asarray(right)), dense_khatri_rao(*factors).T @ right)
    close(np.asarray(lazy.to_dense()), dense_khatri_rao(*factors))


def test_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="same number of columns"):
        KhatriRao(*matrices((3, 4), (3, 5)))
    with pytest.raises(ShapeError, match="at least one factor"):
        Kronecker()
    with pytest.raises(ShapeError, match="factor 1"):
        Kronecker(np.ones((2, 2)), np.ones(3))
    with pytest.raises(ShapeError, match="do not fit") as caught:
        _ = KhatriRao(*matrices((3, 4), (5, 4))) @ np.ones((5, 2))
    assert "4 rows" in (caught.value.expected or "")
    operator = KhatriRao(*matrices((3, 4), (5, 4)))
    for wrong in (np.float64(2.0), np.ones((2, 4, 3))):
        with pytest.raises(ShapeError, match="do not fit"):
            _ = operator @ wrong
        with pytest.raises(ShapeError, match="do not fit"):
            _ = wrong @ operator
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = operator @ [1.0, 2.0, 3.0, 4.0]
