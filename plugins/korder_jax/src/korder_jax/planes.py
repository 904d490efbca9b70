"""The polynomial method's view of a key head: rows with dead keys zeroed, weights of biases, statistics of columns.

A plane is the query heads that share their keys and biases. Statistics are constants of the computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import inf
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from korder.spi import Problem
from korder_jax.arrays import HIGHEST
from korder_jax.layout import Variables

Array = Any
LOG_SMALLEST = -69.3
"""Weights of key-only biases below its exponential, relative to the largest, are dropped; certificates count them."""


class Statistics(NamedTuple):
    """What stays fixed in a computation: centre (b, h, n), scales (planes, k + 1, w), maxima (planes, k); float64."""

    centre: Array
    scales: Array
    maxima: Array


class Plane(NamedTuple):
    """The arrays of one plane.

    Shapes:  query (c, n, d); keys[t] (m_t, d_t) and values[t] (m_t, e), zeros for dead keys, in the dtype of products;
        live[t] (m_t,) bool; weights[t] (m_t,) float64, 0 for dead keys; maxima (k,), what biases were reduced by.
    """

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    live: tuple[Array, ...]
    weights: tuple[Array, ...]
    maxima: Array


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """Which heads are a plane: `count` planes of `share` query heads."""

    problem: Problem
    count: int
    share: int

    @classmethod
    def of(cls, problem: Problem, variables: Variables) -> PlaneLayout:
        """Return the layout; a bias that differs between query heads separates their key states."""
        separate = any(bias is not None and bias.shape[1] > 1 for bias in variables.biases)
        share = 1 if separate else problem.heads // problem.groups
        return cls(problem, problem.batch * problem.heads // share, share)

    def plane(self, variables: Variables, masks: tuple[Array | None, ...], index: Array, maxima: Array | None) -> Plane:
        """Return one plane; `maxima` (k,) are measured when None."""
        problem = self.problem
        dtype = jnp.dtype(problem.accumulation)
        per_batch = problem.heads // self.share
        batch, first = index // per_batch, index % per_batch * self.share
        group = first * problem.groups // problem.heads
        heads = variables.query.reshape(self.count, self.share, *variables.query.shape[2:])
        live, weights, found = [], [], []
        for t, length in enumerate(problem.lengths):
            mask, bias = masks[t], variables.biases[t]
            alive = jnp.ones((length,), bool) if mask is None else _entry(mask, batch, group)
            logs = None if bias is None else _entry(bias, batch, first)[0].astype(jnp.float64)
            alive, weight, maximum = _weights(alive, logs, None if maxima is None else maxima[t])
            live.append(alive)
            weights.append(weight)
            found.append(maximum)
        keys = tuple(_selected(x[batch, group].astype(dtype), a) for x, a in zip(variables.keys, live, strict=True))
        values = tuple(_selected(x[batch, group].astype(dtype), a) for x, a in zip(variables.values, live, strict=True))
        query = heads[index].astype(dtype)
        return Plane(query, keys, values, tuple(live), tuple(weights), jnp.stack(found))


def _entry(x: Array, batch: Array, head: Array) -> Array:
    return x[batch if x.shape[0] > 1 else 0, head if x.shape[1] > 1 else 0]


def _selected(x: Array, live: Array) -> Array:
    return jnp.where(live[:, None], x, jnp.zeros_like(x))


def _weights(live: Array, bias: Array | None, maximum: Array | None) -> tuple[Array, Array, Array]:
    """Return liveness, weights and maximum of a mode's keys, given their biases (m_t,)."""
    if bias is None:
        return live, live.astype(jnp.float64), jnp.zeros((), jnp.float64)
    live = live & (bias != -inf)
    if maximum is None:
        largest = jnp.max(jnp.where(live & jnp.isfinite(bias), bias, -inf), initial=-inf)
        maximum = lax.stop_gradient(jnp.where(largest == -inf, 0.0, largest))
    shifted = jnp.where(live, bias - maximum, 2.0 * LOG_SMALLEST)
    dropped = shifted < LOG_SMALLEST
    return live, jnp.where(dropped, 0.0, jnp.exp(jnp.where(dropped, 0.0, shifted))), maximum


class Projections:
    """How rows of operands become columns of factors: unchanged, times a CP factor, or expanded for a full weight."""

    def __init__(self, problem: Problem, weight: Any) -> None:
        self.problem = problem
        self.weight = weight

    def columns(self, position: int, rows: Array) -> Array:
        """Return the columns (w, c) of rows (c, d_t) of the query (position 0) or of mode position - 1."""
        widths = self.problem.key_widths
        if self.weight is None:
            return rows.T
        if isinstance(self.weight, tuple):
            return _times(rows, self.weight[position])
        if position == 0:
            return _times(rows, self.weight.reshape(self.weight.shape[0], -1))
        shape = tuple(size if t == position - 1 else 1 for t, size in enumerate(widths))
        spread = jnp.broadcast_to(rows.reshape(-1, *shape), (rows.shape[0], *widths))
        return spread.reshape(rows.shape[0], -1).T


def _times(rows: Array, matrix: Array) -> Array:
    """Return (rows @ matrix).T, summed in float64."""
    wide = jnp.matmul(rows.astype(jnp.float64), matrix.astype(jnp.float64), precision=HIGHEST)
    return wide.T.astype(rows.dtype)


def column_scales(columns: list[Array]) -> Array:
    """Return powers of two near the largest finite entry of every column of every factor: (k + 1, w) float64."""
    finite = [jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0) for x in columns]
    largest = jnp.stack([jnp.max(x, axis=1, initial=0.0).astype(jnp.float64) for x in finite])
    positive = largest > 0.0
    scales = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(positive, largest, 1.0))))
    # a column that is zero in some factor adds nothing, and must not set the size of monomials either
    product = jnp.prod(scales, axis=0, keepdims=True)
    alive = jnp.all(positive, axis=0, keepdims=True)
    target = jnp.max(jnp.where(alive, product, 0.0))
    target = jnp.where(target == 0.0, 1.0, target)
    first = ~positive & (jnp.cumsum(~positive, axis=0) == 1)
    return jnp.where(first, scales * (target / product), scales)


class Prefixes:
    """Sums and maxima over the keys that each row sees: all keys, or those up to `row + last`."""

    def __init__(self, causal: bool, queries: int, length: int, last: Array) -> None:
        self._end: Array | None = jnp.clip(jnp.arange(queries) + last, -1, length - 1) if causal else None

    def sums(self, x: Array) -> Array:
        """Return the sums of x (.., m) over the keys that each row sees: (.., n), or (.., 1) where all see all."""
        if self._end is None:
            return jnp.sum(x, axis=-1, keepdims=True)
        return self._read(jnp.cumsum(x, axis=-1), 0.0)

    def maxima(self, x: Array) -> Array:
        """Return the largest of x (.., m) over the keys that each row sees, -inf for none; shapes as `sums`."""
        if self._end is None:
            return jnp.max(x, axis=-1, keepdims=True)
        return self._read(lax.cummax(x, axis=x.ndim - 1), -inf)

    def _read(self, running: Array, nothing: float) -> Array:
        assert self._end is not None
        return jnp.where(self._end >= 0, running[..., jnp.maximum(self._end, 0)], nothing)


def mean_centre(query: Array, keys: list[Array], weights: tuple[Array, ...], prefixes: list[Prefixes]) -> Array:
    """Return the mean over tuples of sum_l q_l k1_l .. kk_l, weighted: (c, n); query (c, w, n), keys (w, m_t)."""
    means = []
    for key, weight, prefix in zip(keys, weights, prefixes, strict=True):
        total = prefix.sums(weight)
        means.append(prefix.sums(key.astype(jnp.float64) * weight) / jnp.where(total == 0.0, 1.0, total))
    return jnp.sum(query.astype(jnp.float64) * reduce(jnp.multiply, means), axis=1)


def middle_centre(
    query: Array, keys: list[Array], live: tuple[Array, ...], prefixes: list[Prefixes], scale: float
) -> Array:
    """Return the middle of an interval that holds every score of a row: (c, n).

    The tighter, at either end, of the interval of each column and the norm bound |q Prod peaks| |k_t|.
    """
    columns = scale * query.astype(jnp.float64)
    lows, highs, norms = [], [], []
    for key, alive, prefix in zip(keys, live, prefixes, strict=True):
        wide = key.astype(jnp.float64)
        above = prefix.maxima(jnp.where(alive, wide, -inf))
        below = prefix.maxima(jnp.where(alive, -wide, -inf))
        highs.append(jnp.where(above == -inf, 0.0, above))
        lows.append(jnp.where(below == -inf, 0.0, -below))
        norm = prefix.maxima(jnp.where(alive, jnp.sum(wide**2, axis=0), -inf))
        norms.append(jnp.sqrt(jnp.maximum(norm, 0.0)))
    low, high = lows[0], highs[0]
    for a, b in zip(lows[1:], highs[1:], strict=True):
        ends = jnp.stack([low * a, low * b, high * a, high * b])
        low, high = jnp.min(ends, axis=0), jnp.max(ends, axis=0)
    ends = jnp.stack([columns * low, columns * high])
    low, high = jnp.sum(jnp.min(ends, axis=0), axis=1), jnp.sum(jnp.max(ends, axis=0), axis=1)
    peaks = [jnp.maximum(jnp.abs(a), jnp.abs(b)) for a, b in zip(lows, highs, strict=True)]
    for t, norm in enumerate(norms):
        folded = reduce(jnp.multiply, [peak for s, peak in enumerate(peaks) if s != t], columns)
        reach = jnp.sqrt(jnp.sum(folded**2, axis=1)) * norm
        low, high = jnp.maximum(low, -reach), jnp.minimum(high, reach)
    return 0.5 * (low + high)
