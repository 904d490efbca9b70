"""Sums over sliding intervals: right, without subtraction, at the stated cost and memory; what rows see by them."""

from __future__ import annotations

import numpy as np
import pytest

from korder.methods import sight
from korder.methods.factors import planes
from korder.methods.sight import Sight, key_totals, visible_maxima, visible_sums
from korder.methods.sliding import SlidingSums
from korder.methods.statistics import key_extremes
from tests.polynomial_cases import MASKS, polynomial_case, xp


class Tokens:
    """Sets of tokens as sums: merging two that overlap, or a set that came from a subtraction, cannot go unnoticed."""

    def __init__(self, length: int) -> None:
        self.length, self.visits = length, 0

    def total(self, start: int, stop: int) -> frozenset[int]:
        self.visits += stop - start
        return frozenset(range(start, stop))

    def merge(self, one: frozenset[int], other: frozenset[int]) -> frozenset[int]:
        assert not one & other
        return one | other

    def sums(self, step: int) -> SlidingSums[frozenset[int]]:
        return SlidingSums(self.total, self.merge, frozenset(), step)


@pytest.mark.parametrize("seed", range(50))
def test_every_interval_is_summed_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens, step = Tokens(200), int(rng.integers(1, 9))
    sums, start, stop = tokens.sums(step), 0, int(rng.integers(0, 5))
    while start < tokens.length:
        assert sums.over(start, stop) == frozenset(range(start, stop))
        if rng.random() < 0.5:
            arrived = min(stop + step, tokens.length)
            sums.append(arrived, frozenset(range(stop, arrived)))
            stop = arrived
        start = min(start + int(rng.integers(1, 2 * step)), tokens.length)
        stop = max(start, min(stop + int(rng.integers(0, 2 * step)), tokens.length))


@pytest.mark.parametrize("length", [0, 32, 64, 100, 1024])
def test_visits_and_kept_sums_grow_with_the_logarithm(length: int) -> None:
    tokens, step = Tokens(2**14), 32
    sums, most = tokens.sums(step), 0
    for start in range(0, tokens.length - length, step):
        sums.over(start, start + length)
        most = max(most, len(sums._points))
    halvings = np.log2(max(length / step, 1))
    assert tokens.visits <= (2 + halvings / 2) * tokens.length
    assert most <= np.ceil(halvings) + 2


@pytest.mark.parametrize("mask", MASKS)
def test_what_rows_see_does_not_depend_on_the_block(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = polynomial_case(3, "biases", mask, degree=2, lengths=(13, 11, 9), queries=17)
    problem, operands = case.problem(), case.operands()
    seen = Sight.of(problem, operands)
    plane = next(planes(xp, problem, operands))
    scales = (np.ones((6, 1)),) * 3
    found: list[list[list[np.ndarray]]] = []
    for size in (1024, 4, 1):
        monkeypatch.setattr(sight, "TOKENS", size)
        parts = [[*visible_sums(xp, seen, key_totals(xp, plane))]]
        parts += [[*visible_maxima(xp, seen, key_extremes(xp, plane, scales))]]
        spread = [[np.broadcast_to(x, (len(x), b - a)) for x in group] for part in parts for a, b, group in part]
        blocks = len(parts[0])
        joined = [[np.concatenate(x, axis=1) for x in zip(*s, strict=True)] for s in (spread[:blocks], spread[blocks:])]
        found.append(joined)
    for other in found[1:]:
        for one, two in zip(found[0][0], other[0], strict=True):
            np.testing.assert_allclose(two, one, rtol=1e-12, atol=1e-13)
        for one, two in zip(found[0][1], other[1], strict=True):
            np.testing.assert_array_equal(two, one)
