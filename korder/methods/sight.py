"""Which keys each row sees, and sums and maxima over them: all keys, a growing prefix, or a window that slides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log
from typing import Any

from array_api_compat import device

from korder.methods.factors import Plane, assemble, planes
from korder.methods.sliding import SlidingSums
from korder.problem import Problem
from korder.spec.masks import Window
from korder.spi.operands import Operands

Array = Any
Statistic = Callable[[int, int, int], Array]
"""(mode, start, stop) -> (rows, stop - start), in float64; positions outside the array give the identity."""

TOKENS = 1024
"""Tokens read at a time."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Which keys the rows of a problem see: all, or of mode t those up to `row + shifts[t]`, the last `windows[t]`.

    Under an ordered mask a row sees only those tuples of these keys whose positions grow from mode to mode.
    """

    full: bool
    ordered: bool
    queries: int
    lengths: tuple[int, ...]
    shifts: tuple[int, ...]
    windows: tuple[int, ...]
    """Window of each mode; none where a row sees all keys before its own."""

    @classmethod
    def of(cls, problem: Problem, operands: Operands) -> Sight:
        """Return the sight of a problem at the operands' offsets."""
        offsets = operands.key_offsets or (0,) * problem.order
        shifts = tuple(operands.query_offset - offset for offset in offsets)
        mask = problem.spec.mask
        windows = mask.sizes if isinstance(mask, Window) else ()
        return cls(mask.kind == "full", mask.kind == "ordered", problem.queries, problem.lengths, shifts, windows)

    def early_blocks(self, step: int) -> Iterator[tuple[int, int]]:
        """Yield the rows before the first, in blocks, that bring a key of some mode into sight."""
        done = min((-shift for shift in self.shifts), default=0)
        for first, last in sorted((-shift, m - shift) for shift, m in zip(self.shifts, self.lengths, strict=True)):
            first, last = max(first, done), min(last, 0)
            for start in range(first, last, step):
                yield start, min(start + step, last)
            done = max(done, last)


@dataclass(frozen=True, slots=True)
class _Fold:
    """A way to join columns (rows, c): of all, from the first to each, and two arrays elementwise."""

    total: Callable[[Array], Array]
    running: Callable[[Array], Array]
    merge: Callable[[Array, Array], Array]


def visible_sums(xp: Any, sight: Sight, statistic: Statistic) -> Iterator[tuple[int, int, tuple[Array, ...]]]:
    """Yield (start, stop, sums whose product is that of the modes' statistics over the tuples that each row sees).

    One sum for every mode, over its keys; under an ordered mask a single one, over tuples.

    Args:
        xp: Array API namespace.
        sight: Which keys rows see.
        statistic: Its last row counts live keys.

    Shapes:    (rows, stop - start), under the full mask (rows, 1).
    Cost:      O(rows) for every token, times the logarithm of a window.
    Numerics:  nothing is subtracted: a row's sums hold no rounding of keys that it does not see.
    """

    if sight.ordered:
        return _ordered_sums(xp, sight, statistic)

    def total(block: Array) -> Array:
        return xp.sum(block, axis=1, keepdims=True)

    def running(block: Array) -> Array:
        return xp.cumulative_sum(block, axis=1)

    return _visible(xp, sight, statistic, _Fold(total, running, lambda a, b: a + b))


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

    return _visible(xp, sight, statistic, _Fold(total, running, xp.maximum))


def _visible(xp: Any, sight: Sight, statistic: Statistic, fold: _Fold) -> Iterator[tuple[int, int, tuple[Array, ...]]]:
    modes = [_seen(xp, sight, statistic, fold, t) for t in range(len(sight.lengths))]
    for start in range(0, sight.queries, TOKENS):
        yield start, min(start + TOKENS, sight.queries), tuple(next(mode) for mode in modes)


def _seen(xp: Any, sight: Sight, statistic: Statistic, fold: _Fold, mode: int) -> Iterator[Array]:
    """Yield what each block of rows sees of one mode."""
    shift, length = sight.shifts[mode], sight.lengths[mode]
    blocks = [(start, min(start + TOKENS, sight.queries)) for start in range(0, sight.queries, TOKENS)]

    def over(start: int, stop: int) -> Array:
        found = statistic(mode, -1, 0)
        for first in range(max(start, 0), min(stop, length), TOKENS):
            found = fold.merge(found, fold.total(statistic(mode, first, min(first + TOKENS, stop, length))))
        return found

    if sight.full:
        whole = over(0, length)
        yield from (whole for _ in blocks)
    elif not sight.windows:
        carry = over(0, shift)
        for start, stop in blocks:
            seen = fold.merge(carry, fold.running(statistic(mode, start + shift, stop + shift)))
            carry = seen[:, -1:]
            yield seen
    elif sight.windows[mode] <= TOKENS:
        window = sight.windows[mode]
        for start, stop in blocks:
            yield trailing(statistic(mode, start + shift - window + 1, stop + shift), window, fold.merge)
    else:
        middle = SlidingSums(over, fold.merge, statistic(mode, -1, 0), TOKENS)
        for start, stop in blocks:
            first, last = start + shift - sight.windows[mode], stop + shift - sight.windows[mode]
            leaving = xp.concat([statistic(mode, first + 1, last), statistic(mode, -1, 0)], axis=1)
            leaving = xp.flip(fold.running(xp.flip(leaving, axis=1)), axis=1)
            arriving = fold.running(statistic(mode, start + shift, stop + shift))
            yield fold.merge(fold.merge(middle.over(last, start + shift), leaving), arriving)


def _ordered_sums(xp: Any, sight: Sight, statistic: Statistic) -> Iterator[tuple[int, int, tuple[Array, ...]]]:
    """Yield (start, stop, the iterated sum of the statistics, M_t(i) = M_t(i - 1) + M_{t-1}(i - 1) s_t(i))."""
    carries = [statistic(t, -1, 0) for t in range(len(sight.lengths))]
    rows = range(0, sight.queries, TOKENS)
    for start, stop in (*sight.early_blocks(TOKENS), *((a, min(a + TOKENS, sight.queries)) for a in rows)):
        seen = before = None
        for t, shift in enumerate(sight.shifts):
            block = statistic(t, start + shift, stop + shift)
            if before is not None:
                # chosen, not multiplied: a NaN that no tuple holds must not be seen
                chained = xp.logical_and(before[-1:, :] > 0.0, block[-1:, :] > 0.0)
                block = xp.where(chained, before * block, xp.zeros_like(block))
            seen = carries[t] + xp.cumulative_sum(block, axis=1)
            before = xp.concat([carries[t], seen[:, :-1]], axis=1)
            carries[t] = seen[:, -1:]
        if start >= 0:
            yield start, stop, (seen,)


def trailing(block: Array, window: int, merge: Callable[[Array, Array], Array]) -> Array:
    """Return the merge of every `window` columns that follow each other: (rows, c) of a block (rows, c + window - 1).

    Every merge doubles the columns that an entry stands for; a window is made of the powers of two in it.
    """
    count = block.shape[1] - window + 1
    found, reach, span = None, 0, 1
    while True:
        if window & span:
            part = block[:, reach : reach + count]
            found = part if found is None else merge(found, part)
            reach += span
        if 2 * span > window:
            return found
        block = merge(block[:, :-span], block[:, span:])
        span *= 2


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
    if sight.full and all(x is None for x in (*operands.key_masks, *operands.biases)):
        shape, place = (problem.batch, problem.heads, problem.queries), device(operands.query)
        logarithm = sum(log(length) for length in problem.lengths) if problem.tuples else -float("inf")
        live = xp.full(shape, problem.tuples > 0, dtype=xp.bool, device=place)
        return live, xp.full(shape, logarithm, dtype=xp.float64, device=place)
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
