"""What the moment certificate of a degree is expected to say of every row, before anything is run. It bounds nothing.

The second moment of a row's scores is known; the higher ones are estimated from a few tuples. Heavy tails are what a
small sample misses, so tuples are drawn by the sizes of their keys, and count by how likely they were.
"""

from __future__ import annotations

from dataclasses import replace
from math import factorial
from typing import Any

import numpy as np
from array_api_compat import device

from korder.methods.approximation import taylor_slopes
from korder.methods.certificates import value_sizes
from korder.methods.factors import Plane, assemble, planes
from korder.methods.readings import prod_arrays
from korder.methods.sight import TOKENS, live_rows
from korder.methods.statistics import plane_moments, row_bounds, row_centres, row_rms
from korder.methods.tolerances import head_values
from korder.problem import Problem
from korder.spi.operands import KernelOutput, Operands

Array = Any
TUPLES = 256
"""Tuples that are drawn for each head."""
ROWS = 1024
"""Rows of a head, evenly spaced, whose scores of those tuples are looked at."""
_BLOCK = 256
"""Rows whose scores are raised to powers at a time: they stay in cache."""


@np.errstate(all="ignore")
def expected_shifts(
    xp: Any, problem: Problem, operands: Operands, sizes: tuple[Array, ...], degrees: tuple[int, ...]
) -> list[Array]:
    """Return how far the moment certificate of each degree is expected to say that the weights are off in sum.

    Shapes:  per degree (b, h, n), float64; 0 in rows that see nothing.
    Args:
        xp: Array API namespace.
        problem: A full or a causal one.
        operands: Arrays in the kernel layout.
        sizes: Typical sizes of the keys, per mode (b, g, m_t): what tuples are drawn by.
        degrees: 2, 4, 6, ..: even, from 2 on, none left out.
    """
    bounds, centre = row_bounds(xp, problem, operands), row_centres(xp, problem, operands, "taylor")
    live, _ = live_rows(xp, problem, operands)
    low, high = bounds.low - centre, bounds.high - centre
    widest = xp.maximum(xp.abs(low), xp.abs(high))
    rms = row_rms(xp, problem, operands)
    tails = [xp.ones_like(centre)] * len(degrees)
    if rms is None:
        rms = widest
    elif len(degrees) > 1:
        tails = tail_factors(xp, problem, operands, sizes, len(degrees))
    mean, found = xp.ones_like(centre), []
    for degree, tail, slope in zip(degrees, tails, taylor_slopes(xp, degrees, low, high), strict=True):
        moment = xp.minimum(rms**degree * tail, widest**degree)
        mean = mean + moment / factorial(degree)
        found.append(xp.where(live, slope * moment / mean, xp.zeros_like(moment)))
    return found


@np.errstate(all="ignore")
def tail_factors(xp: Any, problem: Problem, operands: Operands, sizes: tuple[Array, ...], count: int) -> list[Array]:
    """Return estimates of the mean of x^(2 p) over the mean of x^2 to the power p, p = 1 .. count, x a centred score.

    Over all live keys, whichever of them a row sees. A row that was not looked at takes what the nearest before it has.

    Shapes:  per power (b, h, n), float64, at least 1.
    Cost:    O(m width^2) for each mode, and ROWS * TUPLES * width for each head.
    """
    pieces: dict[tuple[int, int], list[Array]] = {}
    step = max(-(-problem.queries // ROWS), 1)
    for plane in planes(xp, problem, operands):
        own = tuple(size[plane.batch, plane.group, :] for size in sizes)
        products, weights = _drawn_tuples(xp, plane, own, count)
        gram, mean = plane_moments(xp, plane)
        largest = xp.max(xp.abs(products), axis=1, keepdims=True)
        largest = xp.where(largest > 0.0, largest, xp.ones_like(largest))
        drawn = xp.astype(products / largest, xp.float32)
        for head, query in zip(plane.heads, plane.queries, strict=True):
            rows = replace(query, rows=query.rows[::step, :])
            columns = problem.scale * xp.astype(rows.columns(xp, 0, rows.length), xp.float64)
            centre = xp.sum(columns * mean, axis=0)
            squares = xp.sum(columns * xp.matmul(gram, columns), axis=0) - centre**2
            unit = xp.where(squares > 0.0, 1.0 / xp.sqrt(squares), xp.zeros_like(squares))
            scores = xp.matmul(xp.astype(xp.permute_dims(columns * unit * largest, (1, 0)), xp.float32), drawn)
            scores = scores - xp.astype(centre * unit, xp.float32)[:, None]
            factors = _means_of_powers(xp, scores, weights, count)
            pieces[plane.batch, head] = [xp.repeat(factors, step, axis=0)[: problem.queries, :]]
    found = assemble(xp, pieces, problem, device(operands.query), (count,))
    return [found[..., place] for place in range(count)]


def _means_of_powers(xp: Any, scores: Array, weights: Array, count: int) -> Array:
    """Return the weighted means of scores^(2 p), p = 1 .. count, 1 where less: (rows, count) of (rows, tuples)."""
    weights = xp.astype(weights, scores.dtype)[:, None]
    blocks = []
    for start in range(0, scores.shape[0], _BLOCK):
        squares = scores[start : min(start + _BLOCK, scores.shape[0]), :] ** 2
        means, power = [xp.ones_like(squares[:, :1])], squares
        for _ in range(1, count):
            power = power * squares
            means.append(xp.matmul(power, weights))
        blocks.append(xp.astype(xp.concat(means, axis=1), xp.float64))
    found = xp.concat(blocks, axis=0)
    return xp.where(found < 1.0, xp.ones_like(found), found)


def _drawn_tuples(xp: Any, plane: Plane, sizes: tuple[Array, ...], count: int) -> tuple[Array, Array]:
    """Return the key products (w, tuples) of the drawn tuples, and what each of them counts in a mean over all tuples.

    Each power of the squared sizes up to `count` has its turn as the chance by which tuples are drawn.
    """
    place = device(sizes[0])
    turns = xp.arange(TUPLES, device=place) % count
    chances = xp.ones((count, TUPLES), dtype=xp.float64, device=place)
    shares = xp.ones((TUPLES,), dtype=xp.float64, device=place)
    drawn = []
    for mode, (key, size) in enumerate(zip(plane.keys, sizes, strict=True)):
        weights = key.token_weights(xp, 0, key.length)
        largest = xp.max(xp.where(weights > 0.0, size, xp.zeros_like(size)))
        relative = xp.where(largest > 0.0, size / largest, xp.ones_like(size))
        relative = xp.where(weights > 0.0, relative, xp.zeros_like(size))
        tables = [xp.cumulative_sum(weights * relative ** (2 * power)) for power in range(1, count + 1)]
        at = _picks(xp, tables, _even_points(xp, plane, mode), turns)
        drawn.append(xp.astype(key.taken(xp, at).columns(xp, 0, TUPLES), xp.float64))
        picked, size = xp.take(weights, at), xp.take(relative, at)
        shares = shares * picked / xp.sum(weights)
        rows = [picked * size ** (2 * power) / table[-1] for power, table in enumerate(tables, 1)]
        chances = chances * xp.stack(rows, axis=0)
    return prod_arrays(drawn), shares / (TUPLES * xp.mean(chances, axis=0))


def _picks(xp: Any, tables: list[Array], points: Array, turns: Array) -> Array:
    """Return the positions at which the points, as shares of a table's total, fall into the table whose turn it is."""
    found = xp.zeros_like(turns)
    for turn, table in enumerate(tables):
        found = xp.where(turns == turn, xp.astype(xp.searchsorted(table, points * table[-1]), turns.dtype), found)
    return xp.minimum(found, xp.full_like(found, tables[0].shape[0] - 1))


def _even_points(xp: Any, plane: Plane, mode: int) -> Array:
    """Return numbers in (0, 1) that are spread evenly, those of all modes together too.

    Source:  Roberts, The unreasonable effectiveness of quasirandom sequences (2018): multiples of powers of 1 / g,
             where g^(k + 1) = g + 1.
    """
    root = 2.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (len(plane.keys) + 1))
    step = root ** -(mode + 1)
    return xp.asarray(
        [(0.5 + step * place) % 1.0 for place in range(TUPLES)], dtype=xp.float64, device=device(plane.keys[0].rows)
    )


@np.errstate(all="ignore")
def value_reach(xp: Any, problem: Problem, operands: Operands) -> Array:
    """Return how far a value product lies from the mean of all, the farthest a row sees, over the range of its head's.

    What an error of the weights in sum moves an output by, as long as outputs lie near that mean.

    Shapes:  (b, h, n), float64; 0 where all products agree.
    Cost:    O((n + m1 + .. + mk) e).
    """
    rows = []
    for plane in planes(xp, problem, operands):
        row = prod_arrays([_mean_value(xp, plane, mode) for mode in range(problem.order)])
        rows += [row for _ in plane.heads]
    shape = (problem.batch, problem.heads, 1, problem.value_width)
    outputs = xp.broadcast_to(xp.reshape(xp.stack(rows, axis=0), shape), (*shape[:2], problem.queries, shape[3]))
    *_, farthest = value_sizes(xp, problem, operands, KernelOutput(outputs, outputs[..., 0]))
    spread = head_values(xp, operands)[0][:, :, None] + 0.0 * farthest
    return xp.where(spread > 0.0, farthest / spread, 0.0 * spread)


def _mean_value(xp: Any, plane: Plane, mode: int) -> Array:
    """Return the weighted mean of the live values of a mode, (e,) float64; 0 where there is none."""
    total = xp.astype(plane.values_and_weights(xp, mode, -1, 0)[0, :], xp.float64)
    for start in range(0, plane.keys[mode].length, TOKENS):
        block = plane.values_and_weights(xp, mode, start, min(start + TOKENS, plane.keys[mode].length))
        total = total + xp.sum(xp.astype(block, xp.float64), axis=0)
    return total[:-1] / xp.where(total[-1] > 0.0, total[-1], xp.ones_like(total[-1]))
