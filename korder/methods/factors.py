"""The factors of a score, one head at a time: rows projected through the weight, masked keys cleared, biases weighted.

A score is `scale * sum_l q_l k1_l .. kk_l` over the columns of k + 1 factors; everything that is linear in tokens reads
factors in blocks, columns first, so that no copy of a whole operand is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from array_api_compat import device

from korder.problem import Problem
from korder.spi.operands import Operands

Array = Any

SMALLEST_WEIGHT = 2.0**-100
"""Weights of key-only biases below this, relative to the largest, are dropped; certificates count them."""
_LOG_SMALLEST = -69.3


@dataclass(frozen=True, slots=True)
class Projection:
    """How the columns of an operand become those of its factor: unchanged, times a matrix, or repeated.

    Args:
        matrix: (d_t, w) float64 for a CP factor or the flattened full weight; None otherwise.
        widths: Key widths, given for the keys of a full weight only: the columns of mode `mode` are repeated over the
            others'.
        mode: Position in `widths`.
    """

    matrix: Array | None = None
    widths: tuple[int, ...] = ()
    mode: int = 0

    def apply(self, xp: Any, columns: Array) -> Array:
        """Return the factor's columns (w, c) of the operand's (d_t, c)."""
        if self.matrix is not None:
            wide = xp.matmul(xp.permute_dims(self.matrix, (1, 0)), xp.astype(columns, xp.float64))
            return xp.astype(wide, columns.dtype)
        if self.widths:
            shape = tuple(size if s == self.mode else 1 for s, size in enumerate(self.widths))
            tokens = columns.shape[1]
            spread = xp.broadcast_to(xp.reshape(columns, (*shape, tokens)), (*self.widths, tokens))
            return xp.reshape(spread, (prod(self.widths), tokens))
        return columns

    def adjoint(self, xp: Any, gradient: Array) -> Array:
        """Return the gradient of the operand's columns (d_t, c), given the factor's (w, c)."""
        if self.matrix is not None:
            return xp.astype(xp.matmul(self.matrix, xp.astype(gradient, xp.float64)), gradient.dtype)
        if self.widths:
            split = xp.reshape(gradient, (*self.widths, gradient.shape[1]))
            return xp.sum(split, axis=tuple(s for s in range(len(self.widths)) if s != self.mode))
        return gradient

    def magnitudes(self, xp: Any, columns: Array) -> Array:
        """Return the factor's columns computed from absolute values: what their rounding is relative to."""
        if self.matrix is None:
            return xp.abs(self.apply(xp, columns))
        return replace(self, matrix=xp.abs(self.matrix)).apply(xp, xp.abs(columns))


@dataclass(frozen=True, slots=True)
class Factor:
    """One head's rows of one operand, with what a key may carry: a live mask and weights."""

    rows: Array
    projection: Projection
    dtype: Any
    live: Array | None = None
    """(m,) bool; None when every key is live."""
    weights: Array | None = None
    """(m,) float64: exp(bias - its largest), 0 for a dead key; None when all are 1."""
    bias_maximum: Array | None = None
    """0-d float64, what was subtracted from the bias; None without one."""

    @property
    def length(self) -> int:
        """Tokens."""
        return int(self.rows.shape[0])

    def taken(self, xp: Any, positions: Array) -> Factor:
        """Return the factor of the rows at some positions (c,)."""
        live, weights = (None if x is None else xp.take(x, positions, axis=0) for x in (self.live, self.weights))
        return replace(self, rows=xp.take(self.rows, positions, axis=0), live=live, weights=weights)

    def operand_columns(self, xp: Any, start: int, stop: int) -> Array:
        """Return the operand's columns (d_t, stop - start); dead keys and positions outside the array are zero."""
        low, high = min(max(start, 0), self.length), max(min(stop, self.length), 0)
        if high <= low:
            return xp.zeros((self.rows.shape[1], stop - start), dtype=self.dtype, device=device(self.rows))
        block = xp.astype(self.rows[low:high, :], self.dtype)
        if self.live is not None:
            block = xp.where(self.live[low:high, None], block, xp.zeros_like(block))
        return pad_columns(xp, xp.permute_dims(block, (1, 0)), low - start, stop - high)

    def columns(self, xp: Any, start: int, stop: int) -> Array:
        """Return the factor's columns (w, stop - start), projected."""
        return self.projection.apply(xp, self.operand_columns(xp, start, stop))

    def token_weights(self, xp: Any, start: int, stop: int) -> Array:
        """Return the weights (stop - start,) in float64: zero for dead keys and outside the array."""
        return self._tokens(xp, self.weights, start, stop)

    def live_tokens(self, xp: Any, start: int, stop: int) -> Array:
        """Return (stop - start,) bool: whether a key may be attended to; False outside the array."""
        return self._tokens(xp, self.live, start, stop) > 0.0

    def _tokens(self, xp: Any, tokens: Array | None, start: int, stop: int) -> Array:
        low, high = min(max(start, 0), self.length), max(min(stop, self.length), 0)
        if high <= low:
            return xp.zeros((stop - start,), dtype=xp.float64, device=device(self.rows))
        if tokens is None:
            inside = xp.ones((high - low,), dtype=xp.float64, device=device(self.rows))
        else:
            inside = xp.astype(tokens[low:high], xp.float64)
        return pad_columns(xp, inside[None, :], low - start, stop - high)[0, :]


def pad_columns(xp: Any, columns: Array, front: int, back: int) -> Array:
    """Return the columns with zero columns in front and behind."""
    if front == 0 and back == 0:
        return columns
    sizes = (front, back)
    ends = [xp.zeros((columns.shape[0], size), dtype=columns.dtype, device=device(columns)) for size in sizes]
    return xp.concat([ends[0], columns, ends[1]], axis=1)


@dataclass(frozen=True, slots=True)
class Plane:
    """The heads that share their keys: one batch entry, one key head, and the query heads that read it."""

    batch: int
    group: int
    heads: tuple[int, ...]
    queries: tuple[Factor, ...]
    """One per query head of the plane."""
    keys: tuple[Factor, ...]
    """One per mode."""
    values: tuple[Array, ...]
    """One (m_t, e) per mode."""

    def values_and_weights(self, xp: Any, mode: int, start: int, stop: int) -> Array:
        """Return [w v, w] (stop - start, e + 1) of one mode in the factor's dtype; dead keys give zeros."""
        key = self.keys[mode]
        weights = xp.astype(key.token_weights(xp, start, stop), key.dtype)
        return xp.concat([self.live_values(xp, mode, start, stop) * weights[:, None], weights[:, None]], axis=1)

    def live_values(self, xp: Any, mode: int, start: int, stop: int) -> Array:
        """Return the values (stop - start, e); zeros for dead keys and outside the array."""
        rows = Factor(self.values[mode], Projection(), self.keys[mode].dtype, self.keys[mode].live)
        return xp.permute_dims(rows.operand_columns(xp, start, stop), (1, 0))


def planes(xp: Any, problem: Problem, operands: Operands, maxima: Array | None = None) -> Iterator[Plane]:
    """Yield the planes of a problem, batch outermost.

    Args:
        xp: Array API namespace.
        problem: The problem that the operands were checked against.
        operands: Arrays in the kernel layout.
        maxima: (planes, k) bias maxima of an earlier call; measured when None.
    """
    dtype = getattr(xp, problem.accumulation)
    projections = _projections(xp, problem, operands)
    shared, width = problem.heads // problem.groups, _plane_heads(problem, operands)
    starts = [(batch, first) for batch in range(problem.batch) for first in range(0, problem.heads, width)]
    for index, (batch, first) in enumerate(starts):
        group = first // shared
        keys = []
        for t in range(problem.order):
            known = None if maxima is None else maxima[index, t]
            plain = Factor(operands.keys[t][batch, group, ...], projections[t + 1], dtype)
            keys.append(_with_liveness(xp, plain, operands, t, (batch, group, first), known))
        heads = tuple(range(first, first + width))
        queries = tuple(Factor(operands.query[batch, head, ...], projections[0], dtype) for head in heads)
        values = tuple(value[batch, group, ...] for value in operands.values)
        yield Plane(batch, group, heads, queries, tuple(keys), values)


def plane_count(problem: Problem, operands: Operands) -> int:
    """Return how many planes `planes` yields."""
    return problem.batch * problem.heads // _plane_heads(problem, operands)


def _plane_heads(problem: Problem, operands: Operands) -> int:
    """Return the query heads of a plane: those of a key head, or one if a bias differs between them."""
    separate = any(bias is not None and bias.shape[1] > 1 for bias in operands.biases)
    return 1 if separate else problem.heads // problem.groups


def _projections(xp: Any, problem: Problem, operands: Operands) -> tuple[Projection, ...]:
    weight = operands.weight
    if weight is None:
        return (Projection(),) * (problem.order + 1)
    if isinstance(weight, tuple):
        return tuple(Projection(xp.astype(factor, xp.float64)) for factor in weight)
    flat = xp.astype(xp.reshape(weight, (problem.query_width, prod(problem.key_widths))), xp.float64)
    keys = tuple(Projection(widths=problem.key_widths, mode=t) for t in range(problem.order))
    return Projection(flat), *keys


def _with_liveness(
    xp: Any, key: Factor, operands: Operands, mode: int, place: tuple[int, int, int], known: Array | None
) -> Factor:
    """Return the key factor with its live mask and weights; `place` is (batch, key head, query head)."""
    batch, group, head = place
    mask = operands.key_masks[mode] if operands.key_masks else None
    bias = operands.biases[mode] if operands.biases else None
    live = None if mask is None else mask[batch, group if mask.shape[1] > 1 else 0, ...]
    if bias is None:
        return replace(key, live=live, weights=None if live is None else xp.astype(live, xp.float64))
    bias = xp.astype(bias[batch if bias.shape[0] > 1 else 0, head if bias.shape[1] > 1 else 0, 0, ...], xp.float64)
    finite = bias != -float("inf")
    live = finite if live is None else xp.logical_and(live, finite)
    maximum = _bias_maximum(xp, bias, live) if known is None else known
    shifted = xp.where(live, bias - maximum, xp.full_like(bias, 2.0 * _LOG_SMALLEST))
    weights = xp.where(shifted < _LOG_SMALLEST, xp.zeros_like(bias), xp.exp(shifted))
    return replace(key, live=live, weights=weights, bias_maximum=maximum)


def _bias_maximum(xp: Any, bias: Array, live: Array) -> Array:
    if bias.shape[0] == 0:
        return xp.zeros((), dtype=xp.float64, device=device(bias))
    # NaN and infinity are left to the queries that see them
    largest = xp.max(xp.where(xp.logical_and(live, xp.isfinite(bias)), bias, xp.full_like(bias, -float("inf"))))
    return xp.where(largest == -float("inf"), xp.zeros_like(largest), largest)


def assemble(
    xp: Any,
    pieces: dict[tuple[int, int], list[Array]],
    problem: Problem,
    place: Any,
    empty: tuple[int, ...] = (),
    dtype: Any = None,
) -> Array:
    """Return (b, h, n, ..) from lists of row blocks (c, ..), one list per batch entry and head.

    `place`, `empty` and `dtype` are the device, trailing shape and dtype (float64 when None) of a result without a row.
    """
    batch, heads = problem.batch, problem.heads
    if not pieces:
        return xp.zeros((batch, heads, problem.queries, *empty), dtype=dtype or xp.float64, device=place)
    rows = xp.concat([part for b in range(batch) for h in range(heads) for part in pieces[b, h]], axis=0)
    return xp.reshape(rows, (batch, heads, problem.queries, *rows.shape[1:]))
