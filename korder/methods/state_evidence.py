"""What a state of keys says of queries before and beside their reading: bounds of scores, and what certificates need.

Looks at the maxima and counts of a state, never at its sums, so a certificate does not rest on what it is to certify.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import device

from korder.methods.certificates import Evidence, reach_of_peaks, row_sizes
from korder.methods.factors import Factor, Projection
from korder.methods.scales import finite_peaks
from korder.methods.statistics import RowBounds, product_range, score_bounds
from korder.planning.plan import Plan
from korder.problem import Problem
from korder.spi.operands import KernelOutput

if TYPE_CHECKING:
    from korder.methods.states import State

Array = Any


@np.errstate(all="ignore")
def evidence_of_state(xp: Any, plan: Plan, state: State, query: Array, output: KernelOutput) -> Evidence:
    """Return what bounds the error of a reading by queries (b, h, n, d)."""
    problem, polynomial = plan.problem, plan.polynomial
    assert polynomial is not None
    log_weights = log_tuples(xp, problem, state, query)
    reach = xp.zeros((), dtype=xp.float64, device=device(query))
    queries = finite_peaks(xp, query_columns(xp, problem, query))
    sizes: list[tuple[Array, ...]] = []
    for plane, heads in _plane_heads(problem, query):
        low, high = product_range(xp, tuple(mode.values[plane, ...] for mode in state), problem.value_width)
        sizes += [row_sizes(xp, low, high, output.output[batch, head, ...]) for batch, head in heads]
        peaks = xp.stack([queries[plane, :], *(mode.peaks[plane, :] for mode in state)], axis=0)
        reach = xp.maximum(reach, reach_of_peaks(xp, problem, peaks))
    spread, both, largest, farthest = (_by_row(xp, [part[i] for part in sizes], query) for i in range(4))
    return Evidence(
        bounds=state_bounds(xp, problem, state, query),
        live=log_weights > -float("inf"),
        log_weights=log_weights,
        maxima=xp.zeros_like(log_weights),
        spread=spread,
        sizes=both,
        largest=largest,
        farthest=farthest,
        reach=reach,
        tuples=prod(float(mode.length) for mode in state),
        additions=(float(polynomial.features), *(float(mode.joins) for mode in state)),
    )


@np.errstate(all="ignore")
def state_bounds(xp: Any, problem: Problem, state: State, query: Array) -> RowBounds:
    """Return the bounds of every row's scores, as `statistics.row_bounds`."""
    found = []
    for plane, heads in _plane_heads(problem, query):
        extremes = tuple(mode.extremes[plane, ...] for mode in state)
        weights = tuple(mode.weights[plane, ...] for mode in state)
        for batch, head in heads:
            factor = Factor(query[batch, head, ...], Projection(), xp.float64)
            found.append(score_bounds(xp, problem, factor, (0, query.shape[2]), extremes, weights))
    return RowBounds(*(_by_row(xp, [part[i] for part in found], query) for i in range(4)))


def value_references(xp: Any, problem: Problem, state: State, heads: int) -> tuple[Array, Array]:
    """Return the range of value products and the largest absolute one, (b, h) each: what a tolerance refers to."""
    extremes = tuple(xp.permute_dims(mode.values[:, :, 0], (1, 0)) for mode in state)  # (2 e, P)
    low, high = product_range(xp, extremes, problem.value_width)
    spread, largest = xp.max(high - low, axis=0), xp.max(xp.maximum(xp.abs(low), xp.abs(high)), axis=0)
    batch, groups = problem.batch, problem.groups

    def by_head(x: Array) -> Array:
        shared = xp.broadcast_to(xp.reshape(x, (batch, groups, 1)), (batch, groups, heads // groups))
        return xp.reshape(shared, (batch, heads))

    return by_head(spread), by_head(largest)


def is_finite(xp: Any, problem: Problem, state: State) -> bool:
    """Whether no live key and no value of one was NaN or infinite."""
    columns = 2 * problem.score_width
    parts = [part for mode in state for part in (mode.extremes[:, :columns, :], mode.values)]
    return all(bool(xp.all(xp.logical_or(xp.isfinite(part), part == -float("inf")))) for part in parts)


def log_tuples(xp: Any, problem: Problem, state: State, query: Array) -> Array:
    """Return the logarithm of the number of live tuples of every row (b, h, n), -inf for none."""
    logs = xp.sum(xp.stack([xp.log(mode.counts[:, 0, :]) for mode in state], axis=0), axis=0)  # (P, 1)
    rows = query.shape[1] // problem.groups * query.shape[2]
    return xp.reshape(xp.broadcast_to(logs, (logs.shape[0], rows)), query.shape[:3])


def query_columns(xp: Any, problem: Problem, query: Array) -> Array:
    """Return the columns (P, w, rows) of queries (b, h, n, w), the heads of a plane one after the other."""
    planes, rows = problem.batch * problem.groups, query.shape[1] // problem.groups * query.shape[2]
    wide = xp.astype(xp.reshape(query, (planes, rows, query.shape[3])), xp.float64)
    return xp.permute_dims(wide, (0, 2, 1))


def _plane_heads(problem: Problem, query: Array) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield each plane with its query heads, as (batch, head)."""
    share = query.shape[1] // problem.groups
    for plane in range(problem.batch * problem.groups):
        batch, group = divmod(plane, problem.groups)
        yield plane, [(batch, group * share + head) for head in range(share)]


def _by_row(xp: Any, heads: list[Array], query: Array) -> Array:
    """Return (b, h, n) of one array (n,) per head."""
    if not heads:
        return xp.zeros(query.shape[:3], dtype=xp.float64, device=device(query))
    return xp.reshape(xp.stack(heads, axis=0), query.shape[:3])
