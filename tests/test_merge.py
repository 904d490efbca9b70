"""Parts over disjoint sets of tuples merge to the whole, certificates included."""

from __future__ import annotations

import numpy as np
import pytest

import korder
from korder import AttentionSpec, OperandError, Polynomial, ShapeError
from tests.limits import assert_agree
from tests.problems import Case, random_case


def halves(case: Case, mode: int, cut: int, **options: object) -> list[korder.Result]:
    """The results over the tuples whose key of `mode` lies before `cut`, and over the others."""
    parts = []
    for part in (slice(None, cut), slice(cut, None)):
        keys, values = list(case.keys), list(case.values)
        keys[mode], values[mode] = keys[mode][:, :, part], values[mode][:, :, part]
        parts.append(korder.attend_result(case.query, keys, values, **options))
    return parts


@pytest.mark.parametrize("order", [1, 2, 3])
def test_parts_make_the_whole(order: int) -> None:
    case = random_case(order, seed=20)
    whole = korder.attend_result(case.query, case.keys, case.values)
    for mode in range(order):
        merged = korder.merge(halves(case, mode, 1))
        assert_agree(merged.output, whole.output, dtype="float64")
        assert_agree(merged.lse, whole.lse, dtype="float64")
        assert merged.certificate is None


@pytest.mark.parametrize("held", [np.nan, np.inf, 7.0])
def test_a_part_without_tuples_does_not_matter(held: float) -> None:
    case = random_case(2, seed=21)
    whole = korder.attend_result(case.query, case.keys, case.values)
    nothing = korder.Result(np.full_like(whole.output, held), np.full_like(whole.lse, -np.inf))
    merged = korder.merge([nothing, whole, nothing])
    np.testing.assert_array_equal(merged.output, whole.output)
    np.testing.assert_array_equal(merged.lse, whole.lse)
    empty = korder.merge([nothing, nothing])
    np.testing.assert_array_equal(empty.output, np.zeros_like(whole.output))
    np.testing.assert_array_equal(empty.lse, nothing.lse)


def test_far_apart_parts_keep_their_precision() -> None:
    case = random_case(2, seed=22, scale=2000.0)
    whole = korder.attend_result(case.query, case.keys, case.values, spec=case.spec)
    merged = korder.merge(halves(case, 0, 3, spec=case.spec))
    assert_agree(merged.output, whole.output, dtype="float64")
    assert_agree(merged.lse, whole.lse, dtype="float64")


@pytest.mark.parametrize("degree", [2, 4])
def test_certificates_merge_to_a_bound(degree: int) -> None:
    for seed in range(20):
        case = random_case(2, seed=seed, spread=0.5 + 0.05 * seed)
        exact, exact_lse = case.oracle()
        spec = AttentionSpec(order=2, method=Polynomial(degree=degree))
        merged = korder.merge(halves(case, 1, 2, spec=spec))
        assert merged.certificate is not None
        error = np.abs(merged.output - exact).max(axis=-1)
        assert (error <= merged.certificate.bound).all()
        assert (np.abs(merged.lse - exact_lse) <= merged.certificate.lse_bound + 1e-13).all()


def test_exact_and_approximate_parts_merge() -> None:
    case = random_case(2, seed=23)
    exact, _ = case.oracle()
    approximate = halves(case, 0, 4, spec=AttentionSpec(order=2, method=Polynomial(degree=4)))[0]
    merged = korder.merge([approximate, halves(case, 0, 4)[1]])
    assert merged.certificate is not None
    assert (np.abs(merged.output - exact).max(axis=-1) <= merged.certificate.bound).all()


def test_parts_of_float32_merge_whatever_their_lse_is_in() -> None:
    case = random_case(2, seed=24, dtype="float32")
    approximate = halves(case, 0, 4, spec=AttentionSpec(order=2, method=Polynomial(degree=6)))[0]
    exact = halves(case, 0, 4)[1]
    assert approximate.lse.dtype != exact.lse.dtype
    merged = korder.merge([approximate, exact])
    assert (merged.output.dtype, merged.lse.dtype) == ("float32", "float64")


def test_parts_must_fit() -> None:
    first, second = random_case(1, seed=1), random_case(1, seed=1, queries=5)
    a, b = (korder.attend_result(case.query, case.keys, case.values) for case in (first, second))
    with pytest.raises(ShapeError, match=r"output of results\[1\]"):
        korder.merge([a, b])
    with pytest.raises(ShapeError, match="nothing to merge"):
        korder.merge([])
    for wrong in (a, None, [a.output], [a, 3]):
        with pytest.raises(OperandError, match="sequence of results"):
            korder.merge(wrong)
    narrow = korder.Result(a.output.astype("float32"), a.lse)
    with pytest.raises(OperandError, match=r"output of results\[1\]"):
        korder.merge([a, narrow])


def certified(output: float, lse: float, lse_bound: float) -> korder.Result:
    def row(value: float) -> np.ndarray:
        return np.full((1, 1, 1), value)

    certificate = korder.Certificate(row(0.1), row(0.1), row(0.0), row(lse_bound), np.zeros((1, 1, 1, 2)), "sup")
    return korder.Result(np.full((1, 1, 1, 2), output), row(lse), certificate)


def test_a_part_that_came_out_weightless_may_be_the_one_that_is_wrong() -> None:
    """Its true lse may be as high as the other's, so its output counts in full."""
    merged = korder.merge([certified(0.0, 0.0, 0.0), certified(5.0, -800.0, np.inf)])
    assert merged.certificate is not None
    assert merged.certificate.bound.item() >= 5.0
    assert merged.certificate.lse_bound.item() == np.inf
    near = korder.merge([certified(0.0, 0.0, 0.0), certified(5.0, -800.0, 1e-3)]).certificate
    assert near is not None
    assert 0.1 < near.bound.item() < 0.1 + 5e-3


def test_one_part_alone_is_not_moved_by_its_own_lse() -> None:
    alone = korder.merge([certified(3.0, 0.0, 2.0), certified(9.0, -np.inf, 0.0)])
    assert alone.certificate is not None
    assert alone.certificate.bound.item() == pytest.approx(0.1, rel=1e-12)
