"""Which keys each row sees, and sums and maxima over them: of all keys at once, or of a causal prefix as it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from array_api_compat import device

from korder.methods.factors import Plane, assemble, planes
from korder.problem import Problem
from korder.spi.operands import Operands

Array = Any
Statistic = Callable[[int, int, int], Array]
"""(mode, start, stop) -> (rows, stop - start), in float64; positions outside the array give the identity."""

TOKENS = 1024
"""Tokens read at a time."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Which keys the rows of a problem see: all of them, or those up to `row + shifts[t]`."""

    causal: bool
    queries: int
    lengths: tuple[int, ...]
    shifts: tuple[int, ...]

    @classmethod
    def of(cls, problem: Problem, operands: Operands) -> Sight:
        """Return the sight of a problem at the operands' offsets."""
        offsets = operands.key_offsets or (0,) * problem.order
        shifts = tuple(operands.query_offset - offset for offset in offsets)
        return cls(problem.spec.mask.kind == "causal", problem.queries, problem.lengths, shifts)


def visible_sums(xp: Any, sight: Sight, statistic: Statistic) -> Iterator[tuple[int, int, tuple[Array, ...]]]:
    """Yield (start, stop, per mode the sum of a statistic over the keys that each row sees).

    Shapes:  (rows, stop - start) under a causal mask, else (rows, 1).
    """

    def total(block: Array) -> Array:
        return xp.sum(block, axis=1, keepdims=True)

    def running(block: Array) -> Array:
        return xp.cumulative_sum(block, axis=1)

    return _visible(sight, statistic, total, running, lambda a, b: a + b)


def visible_maxima(xp: Any, sight: Sight, statistic: Statistic) -> Iterator[tuple[int, int, tuple[Array, ...]]]:
    """Yield (start, stop, per mode the largest of a statistic over the keys that each row sees); shapes as sums."""

    def total(block: Array) -> Array:
        return xp.max(block, axis=1, keepdims=True)

    def running(block: Array) -> Array:
        reach = 1
        while reach < block.shape[1]:  # each step doubles how far back an entry has looked
            block = xp.concat([block[:, :reach], xp.maximum(block[:, reach:], block[:, :-reach])], axis=1)
            reach *= 2
        return block

    return _visible(sight, statistic, total, running, xp.maximum)


def _visible(
    sight: Sight,
    statistic: Statistic,
    total: Callable[[Array], Array],
    running: Callable[[Array], Array],
    merge: Callable[[Array, Array], Array],
) -> Iterator[tuple[int, int, tuple[Array, ...]]]:
    carries = []
    for t, length in enumerate(sight.lengths):
        carry = statistic(t, -1, 0)
        end = min(max(sight.shifts[t], 0), length) if sight.causal else length
        for start in range(0, end, TOKENS):
            carry = merge(carry, total(statistic(t, start, min(start + TOKENS, end))))
        carries.append(carry)
    for start in range(0, sight.queries, TOKENS):
        stop = min(start + TOKENS, sight.queries)
        if not sight.causal:
            yield start, stop, tuple(carries)
            continue
        seen = []
        for t, shift in enumerate(sight.shifts):
            seen.append(merge(carries[t], running(statistic(t, start + shift, stop + shift))))
            carries[t] = seen[t][:, -1:]
        yield start, stop, tuple(seen)


def key_totals(xp: Any, plane: Plane) -> Statistic:
    """Return the statistic whose sums are: weighted columns (w), weights (1), live keys (1)."""

    def statistic(mode: int, start: int, stop: int) -> Array:
        key = plane.keys[mode]
        weights = key.token_weights(xp, start, stop)[None, :]
        live = xp.astype(key.live_tokens(xp, start, stop), xp.float64)[None, :]
        return xp.concat([xp.astype(key.columns(xp, start, stop), xp.float64) * weights, weights, live], axis=0)

    return statistic


def live_rows(xp: Any, problem: Problem, operands: Operands, maxima: Array | None = None) -> tuple[Array, Array]:
    """Return whether each row sees a live tuple, and the logarithm of its sum of weights (-inf for none).

    Shapes:  (b, h, n) bool; (b, h, n) float64.
    Args:    maxima: (planes, k), what weights are relative to; measured when None.
    """
    sight = Sight.of(problem, operands)
    lives: dict[tuple[int, int], list[Array]] = {}
    weights: dict[tuple[int, int], list[Array]] = {}
    for plane in planes(xp, problem, operands, maxima):
        for start, stop, totals in visible_sums(xp, sight, _counts(xp, plane)):
            live = xp.min(xp.stack([total[1, :] for total in totals], axis=0), axis=0) > 0.0
            logarithm = xp.sum(xp.stack([_log(xp, total[0, :]) for total in totals], axis=0), axis=0)
            for head in plane.heads:
                lives.setdefault((plane.batch, head), []).append(xp.broadcast_to(live, (stop - start,)))
                weights.setdefault((plane.batch, head), []).append(xp.broadcast_to(logarithm, (stop - start,)))
    place = device(operands.query)
    return assemble(xp, lives, problem, place, dtype=xp.bool), assemble(xp, weights, problem, place)


def _counts(xp: Any, plane: Plane) -> Statistic:
    def statistic(mode: int, start: int, stop: int) -> Array:
        key = plane.keys[mode]
        live = xp.astype(key.live_tokens(xp, start, stop), xp.float64)
        return xp.stack([key.token_weights(xp, start, stop), live], axis=0)

    return statistic


def _log(xp: Any, x: Array) -> Array:
    safe = xp.where(x > 0.0, x, xp.ones_like(x))
    return xp.where(x == 0.0, xp.full_like(x, -float("inf")), xp.where(x > 0.0, xp.log(safe), x))
