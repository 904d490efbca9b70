"""Rows under a causal mask, forwards and backwards: sums over keys that come one after another, in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from korder_native import _native
from korder_native.arrays import address, dense, new

if TYPE_CHECKING:
    from korder_native.polynomial import Passes

Array = Any
FORWARD_BLOCK, BACKWARD_BLOCK = 1024, 512
"""Rows that the kernels see together; whole chunks of theirs, so that both ways add up the same sums."""


@dataclass(frozen=True, slots=True)
class Laid:
    """What rows are read against, without gaps, and what each degree of it is multiplied with.

    Shapes:  values (r, e + 1) and sizes (r, 1) in the compute dtype; the others (degree + 1,) float64.
    """

    values: Array
    sizes: Array
    coefficients: Array
    factors: Array
    size_factors: Array


class RunningRows:
    """The rows of a plane, and the keys that come into sight with them."""

    step: int

    def __init__(self, passes: Passes, plane: Any, pace: Any) -> None:
        xp = passes.xp
        self.passes, self.plane, self.pace = passes, plane, pace
        self.weights, self.totals = [], []
        for key, shrink in zip(plane.keys, pace.shrinks, strict=True):
            weights = xp.ones(key.length, dtype=xp.float64) if key.weights is None else key.weights
            self.weights.append(dense(weights * shrink))
            first = xp.zeros(1, dtype=xp.float64)
            self.totals.append(xp.concat([first, xp.cumulative_sum(self.weights[-1], axis=0)], axis=0))
        factors = dense(xp.stack(pace.factors, axis=0))
        coefficients = np.asarray(passes.polynomial.values, np.float64)
        self.table = Laid(None, passes.laid_out(pace.weights), coefficients, factors, xp.abs(factors))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks of rows, the first one first."""
        queries = self.passes.problem.queries
        for start in range(0, queries, self.step):
            yield start, min(start + self.step, queries)

    def keys(self, mode: int, start: int, stop: int) -> tuple[Any, Any]:
        """Return a call about the keys start..stop of a mode, and what it points at."""
        weights = self.weights[mode][start:stop]
        return self.passes.of_keys(self.plane, mode, self.pace.scales, (start, stop), weights)

    def counts(self, start: int, stop: int) -> Array:
        """Return the product of the sums of weights that rows see, ones in place of zeros: (c,) float64."""
        product = 1.0
        for totals, shift in zip(self.totals, self.pace.shifts, strict=True):
            seen = np.clip(np.arange(start, stop) + (shift + 1), 0, totals.shape[0] - 1)
            product = product * totals[seen]
        return self.passes.xp.where(product == 0.0, 1.0, product)

    def call(self, place: int, start: int, stop: int, sums: list[tuple[Array, Array | None]]) -> tuple[Any, Any]:
        """Return a call about rows of one of the plane's heads and the sums (r, e + 1), (r,) of each mode."""
        of_rows, kept = self.passes.of_factor(self.plane.queries[place], (start, stop), self.pace.scales[0, ...])
        call, held = _native.RunningCall(of_rows, address(self.table.sizes)), [kept, sums]
        for mode, shift in enumerate(self.pace.shifts):
            length = self.plane.keys[mode].length
            low, high = (min(max(row + shift, 0), length) for row in (start, stop))
            keys, kept = self.keys(mode, low, high)
            call.add_mode(keys, start + shift - low, *map(address, sums[mode]))
            held.append(kept)
        return call, held

    def is_last(self, place: int) -> bool:
        """Return whether a head is the plane's last, which moves the sums; the others read copies."""
        return place == len(self.plane.heads) - 1


class WayForward(RunningRows):
    """What rows read, the first one first."""

    step = FORWARD_BLOCK

    def __init__(self, passes: Passes, plane: Any, pace: Any) -> None:
        super().__init__(passes, plane, pace)
        like, shape = plane.keys[0].rows, (passes.table.features, passes.problem.value_width + 1)
        self.sums = [new(like, shape, "float64", zeros=True) for _ in pace.shifts]
        self._absolute = [new(like, shape[:1], "float64", zeros=True) for _ in pace.shifts]
        for mode, shift in enumerate(pace.shifts):
            for start, stop in passes.blocks(min(max(shift, 0), plane.keys[mode].length)):
                call, _kept = self.keys(mode, start, stop)
                passes.kernels.feature_sums(call, None, *map(address, (self.sums[mode], self._absolute[mode])))

    def read(self, place: int, start: int, stop: int, rows: list[Array]) -> tuple[Array, Array, Array, Array]:
        """Return output, mean, moments and magnitude of a head's rows, given (centres, live) of them."""
        passes, sums = self.passes, list(zip(self.sums, self._absolute, strict=True))
        if not self.is_last(place):
            sums = [(passes.copied(x), passes.copied(y)) for x, y in sums]
        call, _kept = self.call(place, start, stop, sums)
        finish, (found, moments, magnitude, *_read) = passes.finishing(self.table, rows, self.sums[0])
        passes.kernels.read_running(call, address(found), finish)
        counts = self.counts(start, stop)
        return found[:, :-1], found[:, -1] / counts, moments / counts[:, None], magnitude


class WayBack(RunningRows):
    """The gradients of rows and of the keys that came with them, the last row first."""

    step = BACKWARD_BLOCK

    def __init__(self, passes: Passes, plane: Any, pace: Any, statistics: Any, rows: Any) -> None:
        super().__init__(passes, plane, pace)
        self._centre, _, states = statistics
        self._rows = rows
        self._sums = [passes.copied(states[t, ...]) for t in range(passes.problem.order)]
        self._flows = [[new(state, state.shape, "float64", zeros=True) for state in self._sums] for _ in plane.heads]

    def block(self, start: int, stop: int) -> tuple[list[Array], list[tuple[Array, Array]]]:
        """Return the gradients of the heads' columns (w, c), and for each mode those of the keys of these rows."""
        of_queries, of_keys = [], None
        for place in range(len(self.plane.heads)):
            *keys, query = self._head(place, start, stop)
            of_queries.append(query)
            of_keys = (
                keys if of_keys is None else [(x[0] + y[0], x[1] + y[1]) for x, y in zip(of_keys, keys, strict=True)]
            )
        assert of_keys is not None
        return of_queries, of_keys

    def _head(self, place: int, start: int, stop: int) -> list[Any]:
        """Return for each mode the gradients of columns (w, c) and values (c, e + 1), and last those of the rows."""
        passes, head = self.passes, self.plane.heads[place]
        sums = self._sums if self.is_last(place) else [*map(passes.copied, self._sums)]
        call, _kept = self.call(place, start, stop, [(x, None) for x in sums])
        gradient = self._rows.block(self.plane.batch, head, start, stop) / self.counts(start, stop)[:, None]
        shares = passes.stacked(passes.shares(self._centre[self.plane.batch, head, start:stop]), self.pace.factors)
        gradient, order, count = dense(gradient), passes.problem.order, stop - start
        shape, dtype = (passes.table.width, count), passes.problem.accumulation
        columns = [new(gradient, shape, dtype) for _ in range(order + 1)]
        values = [new(gradient, gradient.shape, "float64") for _ in range(order)]
        addresses = ([x for x in map(address, arrays) if x] for arrays in (self._flows[place], columns, values))
        passes.kernels.running_back(call, address(gradient), address(shares), *addresses)
        return [*zip(columns, values, strict=False), columns[-1]]

    def flows(self) -> list[Array]:
        """Return what the rows so far add to the gradients of the states, (r, e + 1) for each mode."""
        return [sum(flows[1:], flows[0]) for flows in zip(*self._flows, strict=True)]
