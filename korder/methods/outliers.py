"""Keys whose scores stand far above those of their head, and rows that a polynomial is expected to miss: set aside.

Arrays go through the namespace of the operands, so that what is made of them can be differentiated.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from array_api_compat import device

from korder.methods.expectations import expected_shifts, value_reach
from korder.methods.factors import Factor, planes
from korder.methods.readings import prod_arrays
from korder.methods.sight import TOKENS
from korder.methods.statistics import column_rms, measure
from korder.planning.choices import POLYNOMIAL_SHARE, SPLIT_MASKS, tried_degrees
from korder.problem import OutlierLevel, Problem, ScoreStatistics
from korder.spi.operands import Operands

Array = Any
THRESHOLDS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
"""Multiples of the median above which the typical score of a key may be called an outlier."""
_TINY = 1e-300
MOST_OUTLYING = 0.5
"""Share of the tuples up to which keys are set aside: a split that computes more exactly gains little."""
HOPELESS = 10.0
"""Rows whose weights are expected to be off by this many times the tolerance are not left to the polynomial at all."""


@np.errstate(all="ignore")
def typical_sizes(xp: Any, problem: Problem, operands: Operands) -> tuple[Array, ...]:
    """Return the typical score of every key: its root mean square against partners of root-mean-square columns.

    Shapes:  per mode (b, g, m_t), float64; 0 for dead keys and where a number is not finite.
    Cost:    O((n + m1 + .. + mk) width).
    """
    keys: list[dict[tuple[int, int], Array]] = [{} for _ in range(problem.order)]
    for plane in planes(xp, problem, operands):
        modes = [column_rms(xp, key) for key in plane.keys]
        loudest = xp.max(xp.stack([column_rms(xp, query) for query in plane.queries], axis=0), axis=0)
        for t, key in enumerate(plane.keys):
            partners = prod_arrays([loudest, *(modes[s] for s in range(problem.order) if s != t)])
            found, place = _sizes(xp, key, partners), (plane.batch, plane.group)
            known = keys[t].get(place)  # planes of one key head, where a bias differs between its query heads
            keys[t][place] = found if known is None else xp.maximum(known, found)
    scale = abs(problem.scale)
    return tuple(scale * _stacked(xp, found, problem.groups) for found in keys)


def _sizes(xp: Any, factor: Factor, partners: Array) -> Array:
    """Return the norm of each token's columns times those of its partners: (m,) float64."""
    blocks = []
    for start in range(0, max(factor.length, 1), TOKENS):
        columns = xp.astype(factor.columns(xp, start, min(start + TOKENS, factor.length)), xp.float64)
        blocks.append(xp.sqrt(xp.sum((columns * partners) ** 2, axis=0)))
    sizes = xp.concat(blocks, axis=0)[: factor.length]
    return xp.where(xp.isfinite(sizes), sizes, xp.zeros_like(sizes))


def _stacked(xp: Any, rows: dict[tuple[int, int], Array], heads: int) -> Array:
    flat = xp.stack([rows[place] for place in sorted(rows)], axis=0)
    return xp.reshape(flat, (-1, heads, flat.shape[1]))


def outlying_keys(xp: Any, sizes: tuple[Array, ...], threshold: float) -> tuple[Array, ...]:
    """Return, per mode, which keys stand above `threshold` times the median of their head's live ones: bool."""
    return tuple(found > threshold * _medians(xp, found) for found in sizes)


def _medians(xp: Any, sizes: Array) -> Array:
    """Return the median (b, h, 1) of the sizes above 0; inf where there is none."""
    length = sizes.shape[2]
    if length == 0:
        return xp.zeros_like(xp.sum(sizes, axis=2, keepdims=True))
    ordered = xp.sort(sizes, axis=2)
    live = xp.sum(xp.astype(sizes > 0.0, xp.int64), axis=2, keepdims=True)
    middle = length - 1 - xp.maximum(live - 1, xp.zeros_like(live)) // 2
    found = xp.take_along_axis(ordered, middle, axis=2)
    return xp.where(live > 0, found, xp.full_like(found, float("inf")))


def measure_levels(xp: Any, problem: Problem, operands: Operands) -> ScoreStatistics:
    """Return the statistics of the scores, and what each threshold of outlying keys leaves to each degree.

    Thresholds fall until nothing is left to gain, or the outliers' own tuples are more than half of all.

    Cost:  that of `measure`, and of 2^18 scores a head, for each threshold that sets other keys aside.
    """
    whole = measure(xp, problem, operands)
    if problem.spec.mask.kind not in SPLIT_MASKS or prod((problem.batch, problem.queries, problem.tuples)) == 0:
        return whole
    sizes, reach = typical_sizes(xp, problem, operands), value_reach(xp, problem, operands)
    levels = [_level(xp, problem, operands, sizes, reach, OutlierLevel(float("inf"), (0,) * problem.order, ()))]
    masked = replace(problem, key_masks=(True,) * problem.order)
    for threshold in reversed(THRESHOLDS):
        found = outlying_keys(xp, sizes, threshold)
        counts = tuple(key_count(xp, x) for x in found)
        if not any(levels[-1].missing[:1]) or outlying_share(problem, counts) > MOST_OUTLYING:
            break
        if counts != levels[-1].keys:
            rest = without_keys(xp, operands, found)
            levels.append(_level(xp, masked, rest, sizes, reach, OutlierLevel(threshold, counts, ())))
    return replace(whole, levels=tuple(levels))


def outlying_share(problem: Problem, counts: tuple[int, ...]) -> float:
    """Return the share of all tuples that the exact parts of so many outlying keys compute."""
    return sum(count / max(length, 1) for count, length in zip(counts, problem.lengths, strict=True))


@np.errstate(all="ignore")
def _level(
    xp: Any, problem: Problem, operands: Operands, sizes: tuple[Array, ...], reach: Array, level: OutlierLevel
) -> OutlierLevel:
    """Return the level with the rows that are expected to miss the tolerance."""
    tolerance = problem.spec.tolerance or 0.0
    allowed = POLYNOMIAL_SHARE * tolerance if any(level.keys) else tolerance
    shifts = expected_shifts(xp, problem, operands, sizes, tried_degrees(problem.score_width))
    about = (shift / xp.maximum(1.0 - shift, xp.full_like(shift, _TINY)) * reach for shift in shifts)
    errors = (xp.minimum(shift, moved) for shift, moved in zip(shifts, about, strict=True))
    # NaN and infinity are missed too
    return replace(level, missing=tuple(row_count(xp, xp.logical_not(error <= allowed)) for error in errors))


def key_count(xp: Any, found: Array) -> int:
    """Return the most found keys of a head, rounded up to a power of two."""
    return _rounded(_largest(xp, found), 0, int(found.shape[2]))


def row_count(xp: Any, found: Array) -> int:
    """Return the most found rows of a head, rounded up to three binary digits: a quarter more at most."""
    return _rounded(_largest(xp, found), 3, int(found.shape[2]))


def _largest(xp: Any, found: Array) -> int:
    return int(xp.max(xp.sum(xp.astype(found, xp.int64), axis=2)))


def _rounded(count: int, digits: int, length: int) -> int:
    """Return a count rounded up to so many binary digits below its leading power of two, at most the length."""
    unit = 1 << max((count - 1).bit_length() - digits, 0)
    return min(-(-count // unit) * unit, length)


def without_keys(xp: Any, operands: Operands, found: tuple[Array, ...]) -> Operands:
    """Return the operands with some keys masked."""
    masks = tuple(_mask_of(xp, operands, t, xp.logical_not(heavy)) for t, heavy in enumerate(found))
    return replace(operands, key_masks=masks)


def without_queries(xp: Any, operands: Operands, found: Array) -> Operands:
    """Return the operands with some queries zero."""
    return replace(operands, query=xp.where(found[..., None], xp.zeros_like(operands.query), operands.query))


def gather(xp: Any, array: Array, positions: Array) -> Array:
    """Return rows (b, h, c, d) of an array (b, h, n, d) at positions (b, h, c)."""
    shape = (*positions.shape, array.shape[3])
    return xp.take_along_axis(array, xp.broadcast_to(positions[..., None], shape), axis=2)


def first_positions(xp: Any, found: Array, count: int) -> Array:
    """Return (b, h, count) positions: those that are found, in order, then others."""
    order = xp.argsort(xp.astype(xp.logical_not(found), xp.int8), axis=2, stable=True)
    return order[:, :, :count]


def with_outlier(
    xp: Any, problem: Problem, operands: Operands, found: tuple[Array, ...], mode: int, count: int
) -> Operands:
    """Return the operands of the tuples whose first outlying key is that of a mode.

    The modes before it keep their other keys, those after it all of theirs; the mode itself keeps `count` keys, its
    outliers and, masked, others. Under a causal mask these lie before every query, and a bias hides the later ones.
    """
    heavy = found[mode]
    positions = first_positions(xp, heavy, count)
    live = xp.take_along_axis(_mask_of(xp, operands, mode, heavy), positions, axis=2)
    keys, values = list(operands.keys), list(operands.values)
    keys[mode], values[mode] = (gather(xp, array, positions) for array in (operands.keys[mode], operands.values[mode]))
    masks = list(operands.key_masks or (None,) * problem.order)
    for t in range(mode):
        masks[t] = _mask_of(xp, operands, t, xp.logical_not(found[t]))
    masks[mode] = live
    biases, offsets = list(operands.biases or (None,) * problem.order), list(operands.key_offsets)
    per_head = _per_query_head(xp, positions, problem.heads)
    biases[mode] = _gathered_bias(xp, biases[mode], problem, per_head)
    if problem.spec.mask.kind == "causal":
        hidden = (
            _positions(xp, problem.queries, operands.query_offset, per_head)[None, None, :, None]
            < (per_head + offsets[mode])[:, :, None, :]
        )
        biases[mode] = _hiding_bias(xp, biases[mode], hidden, operands.query.dtype)
        offsets[mode] = operands.query_offset - count
    return replace(
        operands,
        keys=tuple(keys),
        values=tuple(values),
        key_masks=tuple(masks),
        biases=tuple(biases),
        key_offsets=tuple(offsets),
    )


def of_queries(xp: Any, problem: Problem, operands: Operands, found: Array, count: int) -> Operands:
    """Return the operands of the rows of `count` queries a head, the found ones first; for the full mask.

    Under a causal mask biases hide what those rows do not see.
    """
    positions = first_positions(xp, found, count)
    biases = list(operands.biases or (None,) * problem.order)
    if problem.spec.mask.kind == "causal":
        rows = positions + operands.query_offset
        for t, length in enumerate(problem.lengths):
            keys = _positions(xp, length, operands.key_offsets[t], positions)
            hidden = rows[..., None] < keys[None, None, None, :]
            biases[t] = _hiding_bias(xp, biases[t], hidden, operands.query.dtype)
    return replace(operands, query=gather(xp, operands.query, positions), biases=tuple(biases))


def spread_rows(xp: Any, rows: Array, found: Array, whole: Array) -> Array:
    """Return `whole` (b, h, n, ..) with the found (b, h, n) rows taken, in order, from `rows` (b, h, c, ..)."""
    slots = xp.cumulative_sum(xp.astype(found, xp.int64), axis=2) - 1
    slots = xp.where(found, slots, xp.zeros_like(slots))
    if whole.ndim == 3:
        return xp.where(found, xp.astype(xp.take_along_axis(rows, slots, axis=2), whole.dtype), whole)
    return xp.where(found[..., None], xp.astype(gather(xp, rows, slots), whole.dtype), whole)


def _mask_of(xp: Any, operands: Operands, mode: int, wanted: Array) -> Array:
    """Return the wanted keys of a mode that its key mask leaves: (b, g, m) bool."""
    mask = operands.key_masks[mode] if operands.key_masks else None
    return wanted if mask is None else xp.logical_and(wanted, mask)


def _per_query_head(xp: Any, positions: Array, heads: int) -> Array:
    """Return positions (b, h, c) of each query head, given those (b, g, c) of key heads."""
    batch, groups, count = positions.shape
    spread = xp.broadcast_to(positions[:, :, None, :], (batch, groups, heads // groups, count))
    return xp.reshape(spread, (batch, heads, count))


def _gathered_bias(xp: Any, bias: Array | None, problem: Problem, positions: Array) -> Array | None:
    if bias is None:
        return None
    shape = (problem.batch, problem.heads, bias.shape[2], bias.shape[3])
    wide = xp.broadcast_to(bias, shape)
    at = xp.broadcast_to(positions[:, :, None, :], (*shape[:3], positions.shape[2]))
    return xp.take_along_axis(wide, at, axis=3)


def _hiding_bias(xp: Any, bias: Array | None, hidden: Array, dtype: Any) -> Array:
    """Return a bias (b, h, n, m) that is -inf where a key is hidden, else the bias or 0."""
    known = xp.zeros_like(hidden, dtype=dtype) if bias is None else xp.broadcast_to(bias, hidden.shape)
    return xp.where(hidden, xp.full_like(known, -float("inf")), known)


def _positions(xp: Any, length: int, offset: int, like: Array) -> Array:
    return xp.arange(length, dtype=like.dtype, device=device(like)) + offset
