"""The regime report: the paper's threshold, the degree by brute force, and no more promised than is proved."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, comb, exp, factorial, log
from typing import Any

import pytest

import korder


@pytest.mark.parametrize(
    ("n", "thresholds"),
    [(10**3, (2.63, 1.90, 1.62, 1.47)), (10**4, (3.03, 2.10, 1.74, 1.56)), (10**6, (3.72, 2.40, 1.93, 1.69))],
)
def test_the_threshold_is_the_papers(n: int, thresholds: tuple[float, ...]) -> None:
    assert [round(korder.regime(n, k, 1.0).threshold, 2) for k in (1, 2, 3, 4)] == list(thresholds)


@pytest.mark.parametrize("n", [2, 100, 65536, 10**9])
@pytest.mark.parametrize("bound", [0.0, 0.01, 0.5, 1.0, 1.7, 2.3, 4.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_degree_is_the_least_even_one_that_is_enough(n: int, bound: float, order: int) -> None:
    found = korder.regime(n, order, bound)
    scores = bound ** (order + 1)

    allowed = Fraction(exp(-scores)) / n  # exact fractions, because powers and factorials overflow

    def term(degree: int) -> Fraction:
        return Fraction(scores) ** (degree + 1) / factorial(degree + 1)

    assert found.degree % 2 == 0
    assert term(found.degree) <= allowed * (1 + Fraction(1, 10**9))
    assert found.degree == 0 or term(found.degree - 2) > allowed * (1 - Fraction(1, 10**9))
    width = ceil(log(n))
    assert found.features == comb(width + found.degree, found.degree)
    exact = 2 * n ** (order + 1) * 2 * width
    assert found.cost_ratio == pytest.approx(2 * (order + 1) * n * found.features * (width + 1) / exact)
    assert found.bounded == (found.ratio < 1.0)


def test_near_linear_below_the_threshold_and_hopeless_far_above() -> None:
    below = [korder.regime(2**p, 2, 0.5).cost_ratio for p in (10, 20, 30)]
    assert below[0] > below[1] > below[2]
    far = korder.regime(10**6, 2, 50.0)
    assert not far.bounded
    assert far.cost_ratio > 1.0


def test_the_report_says_what_it_is() -> None:
    text = korder.regime(10_000, 2, 3.0).explain()
    assert "not below (ln n)^(1/3) = 2.096" in text
    assert "asymptotic" in text
    assert "conditional on SETH" in text
    assert "chooses nothing" in text
    assert "more than 1e+300" in korder.regime(10**6, 6, 1e40).explain()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((1, 2, 1.0), "n"),
        ((10.0, 2, 1.0), "n"),
        ((True, 2, 1.0), "n"),
        ((10, 0, 1.0), "order"),
        ((10, 7, 1.0), "order"),
        ((10, 2, -1.0), "entry_bound"),
        ((10, 2, float("nan")), "entry_bound"),
        ((10, 2, float("inf")), "entry_bound"),
        ((10, 2, "1"), "entry_bound"),
    ],
)
def test_numbers_out_of_range(arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(korder.SpecError, match=f"{name} is out of range"):
        korder.regime(*arguments)
