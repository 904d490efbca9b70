"""What can be said of scores without looking at tuples: rigorous bounds of every row, row means, second moments.

All in float64 and O(n width), over the keys that each row sees; bounds are rounded outward. Statistics choose plans and
centres; certificates compute their own from the operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from typing import Any

import numpy as np
from array_api_compat import device

from korder.methods.factors import Factor, Plane, assemble, planes
from korder.methods.readings import prod_arrays
from korder.methods.sight import TOKENS, Sight, Statistic, key_totals, live_rows, visible_maxima, visible_sums
from korder.methods.sliding import SlidingSums
from korder.problem import Problem, ScoreStatistics
from korder.spi.operands import Operands

Array = Any
UNIT = 2.0**-52
"""Spacing of float64 at 1."""
_WIDEST_GRAM = 1024
WIDEST_LIST = 256
"""Columns of a score up to which each one's largest term is measured: a plan is looked up by them."""
_WINDOW_STEP = 128
"""Rows from one whose second moments are taken to the next, under a window."""


def key_extremes(xp: Any, plane: Plane, scales: tuple[Array, ...]) -> Statistic:
    """Return the statistic whose maxima are: columns, their negatives, absolute sums, and three powers of norms."""

    def statistic(mode: int, start: int, stop: int) -> Array:
        key = plane.keys[mode]
        raw = key.operand_columns(xp, start, stop)
        columns = xp.astype(key.projection.apply(xp, raw), xp.float64)
        magnitudes = xp.astype(key.projection.magnitudes(xp, raw), xp.float64)
        block = extreme_rows(xp, columns, magnitudes, scales[mode], len(plane.keys))
        live = key.live_tokens(xp, start, stop)
        return xp.where(live[None, :], block, xp.full_like(block, -float("inf")))

    return statistic


def extreme_rows(xp: Any, columns: Array, magnitudes: Array, scale: Array, order: int) -> Array:
    """Return the rows (.., 3 w + 3, c) of `key_extremes`, given columns and magnitudes (.., w, c), scale (.., w, 1)."""
    norms = [columns**2, (columns / scale) ** 2, xp.abs(columns) ** (order + 1)]
    sums = [xp.sum(norm, axis=-2, keepdims=True) for norm in norms]
    return xp.concat([columns, -columns, magnitudes, *sums], axis=-2)


def column_peaks(xp: Any, factor: Factor) -> Array:
    """Return the largest finite live entry of each column in absolute value: (w,) float64, 0 where there is none."""
    largest = xp.abs(factor.columns(xp, -1, 0))[:, 0]
    for start in range(0, factor.length, TOKENS):
        columns = xp.abs(factor.columns(xp, start, min(start + TOKENS, factor.length)))
        peaks = xp.max(columns, axis=1)
        if not bool(xp.all(xp.isfinite(peaks))):
            peaks = xp.max(xp.where(xp.isfinite(columns), columns, xp.zeros_like(columns)), axis=1)
        largest = xp.maximum(largest, peaks)
    return xp.astype(largest, xp.float64)


def column_rms(xp: Any, key: Factor) -> Array:
    """Return the root mean square (w, 1) of the finite entries of each column; 1 where it is 0."""
    total = xp.zeros_like(xp.astype(key.columns(xp, -1, 0), xp.float64))
    for start in range(0, key.length, TOKENS):
        columns = xp.astype(key.columns(xp, start, min(start + TOKENS, key.length)), xp.float64)
        squares = xp.where(xp.isfinite(columns), columns, xp.zeros_like(columns)) ** 2
        total = total + xp.sum(squares, axis=1, keepdims=True)
    rms = xp.sqrt(total / max(key.length, 1))
    return xp.where(rms > 0.0, rms, xp.ones_like(rms))


@dataclass(frozen=True, slots=True)
class RowBounds:
    """Rigorous bounds of the live scores of every row, key-only biases apart.

    Shapes:  all (b, h, n), float64; 0 in rows that see no key.
    """

    low: Array
    high: Array
    reach: Array
    """The coordinate bound: sum over columns of absolute factors."""
    perturbation: Array
    """How far rounding the factors (a projection through a weight) may move any score of the row."""


@np.errstate(all="ignore")
def row_bounds(xp: Any, problem: Problem, operands: Operands) -> RowBounds:
    """Return the elementwise best of the interval, coordinate, mixed l2 and Holder bounds of every row.

    Cost:      O((n + m1 + .. + mk) width).
    Numerics:  float64, rounded outward; [low, high] holds the scores of the rounded factors and the exact ones alike.
    """
    sight = Sight.of(problem, operands)
    pieces: list[dict[tuple[int, int], list[Array]]] = [{}, {}, {}, {}]
    for plane in planes(xp, problem, operands):
        scales = tuple(column_rms(xp, key) for key in plane.keys)
        for start, stop, extremes in visible_maxima(xp, sight, key_extremes(xp, plane, scales)):
            for head, query in zip(plane.heads, plane.queries, strict=True):
                parts = score_bounds(xp, problem, query, (start, stop), extremes, scales)
                for store, part in zip(pieces, parts, strict=True):
                    store.setdefault((plane.batch, head), []).append(part)
    return RowBounds(*(assemble(xp, store, problem, device(operands.query)) for store in pieces))


def score_bounds(
    xp: Any,
    problem: Problem,
    query: Factor,
    rows: tuple[int, int],
    extremes: tuple[Array, ...],
    scales: tuple[Array, ...],
) -> tuple[Array, Array, Array, Array]:
    """Return the parts of `RowBounds` for rows of one head, given per mode the maxima of `key_extremes`."""
    width, order = problem.score_width, problem.order
    raw = query.operand_columns(xp, *rows)
    columns = problem.scale * xp.astype(query.projection.apply(xp, raw), xp.float64)
    seen = [xp.where(extreme == -float("inf"), xp.zeros_like(extreme), extreme) for extreme in extremes]
    highs, lows = [x[:width, :] for x in seen], [-x[width : 2 * width, :] for x in seen]
    # a mode of which nothing is seen has -inf for both, hence zeros: its rows are dead
    low, high = intervalprod_arrays(xp, lows, highs)
    ends = xp.stack([columns * low, columns * high], axis=0)
    low, high = xp.sum(xp.min(ends, axis=0), axis=0), xp.sum(xp.max(ends, axis=0), axis=0)
    peaks = [xp.maximum(xp.abs(a), xp.abs(b)) for a, b in zip(lows, highs, strict=True)]
    reach = xp.sum(xp.abs(columns) * prod_arrays(peaks), axis=0)
    best = xp.minimum(reach, _norm_bounds(xp, columns, peaks, [x[3 * width :, :] for x in seen], scales))
    slack = (width + 4 * order + 16) * UNIT * reach
    moved = _perturbation(xp, problem, query, raw, reach, [x[2 * width : 3 * width, :] for x in seen])
    spread = slack + moved
    return xp.maximum(low, -best) - spread, xp.minimum(high, best) + spread, reach + spread, moved


def _norm_bounds(xp: Any, columns: Array, peaks: list[Array], powers: list[Array], scales: tuple[Array, ...]) -> Array:
    """Return the smallest of the mixed l2 bounds (each mode, two column weights) and the Holder bound."""
    order = len(peaks)
    best = xp.sum(xp.abs(columns) ** (order + 1), axis=0) ** (1.0 / (order + 1))
    for power in powers:
        best = best * power[2, :] ** (1.0 / (order + 1))
    for t in range(order):
        folded = columns
        for s in range(order):
            folded = folded if s == t else folded * peaks[s]
        for power, scaled in zip((powers[t][0, :], powers[t][1, :]), (folded, folded * scales[t]), strict=True):
            best = xp.minimum(best, xp.sqrt(xp.sum(scaled**2, axis=0) * power))
    return best * (1.0 + 64 * UNIT)


def _perturbation(xp: Any, problem: Problem, query: Factor, raw: Array, reach: Array, magnitudes: list[Array]) -> Array:
    """Return how far the rounding of projected factors may move a score; 0 without a weight."""
    if problem.weight == "none":
        return xp.zeros_like(reach)
    sums = problem.scale * xp.astype(query.projection.magnitudes(xp, raw), xp.float64)
    absolute = xp.sum(xp.abs(sums) * prod_arrays(magnitudes), axis=0)
    rounding = 0.5 * float(xp.finfo(query.dtype).eps)
    widest = max(problem.query_width, *problem.key_widths) + 4
    return 1.01 * (problem.order + 1) * (rounding * reach + widest * UNIT * absolute)


def intervalprod_arrays(xp: Any, lows: list[Array], highs: list[Array]) -> tuple[Array, Array]:
    """Return the bounds of products of one number from each interval."""
    low, high = lows[0], highs[0]
    for a, b in zip(lows[1:], highs[1:], strict=True):
        ends = xp.stack([low * a, low * b, high * a, high * b], axis=0)
        low, high = xp.min(ends, axis=0), xp.max(ends, axis=0)
    return low, high


def product_range(xp: Any, extremes: tuple[Array, ...], width: int) -> tuple[Array, Array]:
    """Return the lowest and highest value product of each channel, given per mode maxima of values and negatives.

    Shapes:  extremes[t] (2 e, c); both (e, c), 0 where no key is seen.
    """
    seen = [xp.where(extreme == -float("inf"), xp.zeros_like(extreme), extreme) for extreme in extremes]
    return intervalprod_arrays(xp, [-x[width:, :] for x in seen], [x[:width, :] for x in seen])


@np.errstate(all="ignore")
def row_centres(xp: Any, problem: Problem, operands: Operands, kind: str) -> Array:
    """Return the centre of every row's scores: their mean over live tuples for "taylor", else the range's midpoint.

    Shapes:  (b, h, n), float64; 0 in rows that see no key.
    """
    if kind != "taylor":
        bounds = row_bounds(xp, problem, operands)
        return 0.5 * (bounds.low + bounds.high)
    sight = Sight.of(problem, operands)
    pieces: dict[tuple[int, int], list[Array]] = {}
    for plane in planes(xp, problem, operands):
        for start, stop, totals in visible_sums(xp, sight, key_totals(xp, plane)):
            mean = prod_arrays([_mean(xp, total) for total in totals])
            for head, query in zip(plane.heads, plane.queries, strict=True):
                columns = xp.astype(query.columns(xp, start, stop), xp.float64)
                part = problem.scale * xp.sum(columns * mean, axis=0)
                pieces.setdefault((plane.batch, head), []).append(part)
    return assemble(xp, pieces, problem, device(operands.query))


def _mean(xp: Any, totals: Array) -> Array:
    weights = totals[-2:-1, :]
    return totals[:-2, :] / xp.where(weights == 0.0, xp.ones_like(weights), weights)


@np.errstate(all="ignore")
def measure(xp: Any, problem: Problem, operands: Operands) -> ScoreStatistics:
    """Return score range, half-width, rms, centres and columns, over live rows, rounded outward to two digits.

    Cost:      O(n width^2) for the rms, O(n width) for the rest.
    Numerics:  Bounds are rigorous; the rms is of what each block's last row sees, under an ordered mask in any order.
    """
    method = problem.spec.polynomial
    kind = "taylor" if method is None else method.coefficients
    bounds = row_bounds(xp, problem, operands)
    centres = row_centres(xp, problem, operands, kind)
    live, _ = live_rows(xp, problem, operands)
    live = xp.logical_and(live, xp.isfinite(bounds.low + bounds.high + centres))

    def largest(x: Array, otherwise: float) -> float:
        count = x.shape[0] * x.shape[1] * x.shape[2]
        return float(xp.max(xp.where(live, x, xp.full_like(x, otherwise)))) if count else otherwise

    width = largest(xp.maximum(bounds.high - centres, centres - bounds.low), 0.0)
    low, high = -largest(-bounds.low, -float("inf")), largest(bounds.high, -float("inf"))
    if low > high:
        low = high = 0.0
    return ScoreStatistics(
        round_outward(low, -1),
        round_outward(high, 1),
        round_outward(width, 1),
        round_outward(_rms(xp, problem, operands), 1),
        columns=tuple(round_outward(float(x), 1) for x in _column_terms(xp, problem, operands)),
        centres=(-round_outward(largest(-centres, 0.0), 1), round_outward(largest(centres, 0.0), 1)),
    )


def _column_terms(xp: Any, problem: Problem, operands: Operands) -> list[Array]:
    """Return, for each column, the largest absolute term of a score; none where there are too many columns."""
    if problem.score_width > WIDEST_LIST:
        return []
    terms = xp.zeros((problem.score_width,), dtype=xp.float64, device=device(operands.query))
    for plane in planes(xp, problem, operands):
        queries = xp.max(xp.stack([column_peaks(xp, query) for query in plane.queries], axis=0), axis=0)
        peaks = [queries, *(column_peaks(xp, key) for key in plane.keys)]
        terms = xp.maximum(terms, abs(problem.scale) * prod_arrays(peaks))
    return [terms[column] for column in range(problem.score_width)]


def round_outward(x: float, direction: int) -> float:
    """Return the nearest number of two significant digits that is not below (direction 1) or not above (-1) x."""
    if x == 0.0 or not isfinite(x):
        return x
    step = 10.0 ** (floor(log10(abs(x))) - 1)
    count = ceil(x / step) if direction > 0 else floor(x / step)
    for digits in (count, count + direction):  # the division may have rounded onto the wrong side
        text = float(f"{digits * step:.2g}")
        if (text - x) * direction >= 0:
            return text
    raise AssertionError(f"no two-digit bound of {x!r}")


@np.errstate(all="ignore")
def row_rms(xp: Any, problem: Problem, operands: Operands) -> Array | None:
    """Return the root mean square of every row's centred scores, from the keys' second moments; None if too wide.

    Shapes:    (b, h, n), float64; 0 where it is not finite. Full and causal masks.
    Cost:      O(n width^2).
    Numerics:  Under a causal mask over what the last row of the block sees.
    """
    if problem.score_width > _WIDEST_GRAM:
        return None
    pieces: dict[tuple[int, int], list[Array]] = {}
    for place, part in _row_rms(xp, problem, operands):
        pieces.setdefault(place, []).append(part)
    return assemble(xp, pieces, problem, device(operands.query))


def _rms(xp: Any, problem: Problem, operands: Operands) -> float:
    """Return the largest root mean square of the rows that are looked at; 0 if too wide."""
    if problem.score_width > _WIDEST_GRAM:
        return 0.0
    return max((float(xp.max(part)) for _, part in _row_rms(xp, problem, operands)), default=0.0)


def _row_rms(xp: Any, problem: Problem, operands: Operands) -> Iterator[tuple[tuple[int, int], Array]]:
    """Yield (batch, head) and the root mean squares of blocks of rows, or under a window of one row of each."""
    sight = Sight.of(problem, operands)
    for plane in planes(xp, problem, operands):
        for start, stop, gram, mean in _second_moments(xp, sight, plane):
            for head, query in zip(plane.heads, plane.queries, strict=True):
                columns = problem.scale * xp.astype(query.columns(xp, start, stop), xp.float64)
                squares = xp.sum(columns * xp.matmul(gram, columns), axis=0) - xp.sum(columns * mean, axis=0) ** 2
                usable = xp.logical_and(xp.isfinite(squares), squares > 0.0)
                yield (plane.batch, head), xp.sqrt(xp.where(usable, squares, xp.zeros_like(squares)))


def _second_moments(xp: Any, sight: Sight, plane: Plane) -> Iterator[tuple[int, int, Array, Array]]:
    """Yield (start, stop, second moments (w, w), means (w, 1)) of key products over what row `stop - 1` sees.

    Under a window the rows are that one alone: others see other keys.
    """
    step = _WINDOW_STEP if sight.windows else TOKENS
    walks = [_gram_sums(xp, key, step) for key in plane.keys]
    for start in range(0, sight.queries, step):
        stop = min(start + step, sight.queries)
        totals = []
        for t, (key, walk) in enumerate(zip(plane.keys, walks, strict=True)):
            last = key.length if sight.full else min(max(stop + sight.shifts[t], 0), key.length)
            first = max(stop + sight.shifts[t] - sight.windows[t], 0) if sight.windows else 0
            totals.append(walk.over(min(first, last), last))
        yield stop - 1 if sight.windows else start, stop, *_products(xp, totals)


def plane_moments(xp: Any, plane: Plane) -> tuple[Array, Array]:
    """Return the second moments (w, w) and the means (w, 1) of the key products of all live tuples."""
    return _products(xp, [_gram_sums(xp, key, TOKENS).over(0, key.length) for key in plane.keys])


def _products(xp: Any, totals: list[Array]) -> tuple[Array, Array]:
    """Return the second moments and means of key products, given the sums that `_gram` makes of each mode's keys."""
    counts = [xp.where(total[-1:, -1:] == 0.0, 1.0, total[-1:, -1:]) for total in totals]
    product = prod_arrays([total / count for total, count in zip(totals, counts, strict=True)])
    return product[:-1, :-1], product[:-1, -1:]


def _gram_sums(xp: Any, key: Factor, step: int) -> SlidingSums[Array]:
    """Return the sums of `_gram` over intervals of keys."""
    empty = 0.0 * _gram(xp, key, -1, 0)

    def over(start: int, stop: int) -> Array:
        found = empty
        for first in range(start, stop, TOKENS):
            found = found + _gram(xp, key, first, min(first + TOKENS, stop))
        return found

    return SlidingSums(over, lambda a, b: a + b, empty, step)


def _gram(xp: Any, key: Factor, start: int, stop: int) -> Array:
    """Return the weighted Gram matrix (w + 1, w + 1) of the columns and a column of ones."""
    columns = xp.astype(key.columns(xp, start, stop), xp.float64)
    extended = xp.concat([columns, xp.ones_like(columns[:1, :])], axis=0)
    return xp.matmul(extended * key.token_weights(xp, start, stop)[None, :], xp.permute_dims(extended, (1, 0)))
