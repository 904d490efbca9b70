"""Gradients under windows: a key's is a sum over the rows that see it, made without subtraction in two walks.

The rows that see a key of mode t are w_t in a row. They are cut at the one multiple of w_t among them: a walk forwards
sums those behind the cut, from the cut on, and reads the sum off when the key leaves. The walk over the plane turned
round does the same for those before the cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from korder.methods.factors import Factor, Plane
from korder.methods.feature_gradients import GradientStore, KeyPart, RowGradients
from korder.methods.readings import Progress
from korder.methods.running import Pace, ProductRows
from korder.methods.running_gradients import KeyReads, RowsBack, cut_part, read_runs, shared_part, unseen_part
from korder.methods.windows import WindowKeys
from korder.spi.operands import Operands

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any


def window_plane_backward(
    kernel: PolynomialKernel,
    operands: Operands,
    plane: Plane,
    statistics: tuple[Array, Array, Array],
    rows: RowGradients,
    store: GradientStore,
) -> None:
    """Add a plane's gradients to the store."""
    centre, scales, _ = statistics
    pace = Pace.of(kernel, operands, scales)
    forwards = _Walk(kernel, plane, pace, centre, rows, turned=False)
    late = forwards.leaving_keys(store)
    early = forwards.turned_round().leaving_keys(None)
    for mode, (one, other) in enumerate(zip(late, early, strict=True)):
        raw, *behind = one
        _, *before = _turned_part(kernel.xp, other)
        columns, values, weights = (a + b for a, b in zip(behind, before, strict=True))
        store.add_keys(plane, mode, 0, (raw, columns, values, weights))


@dataclass(frozen=True, slots=True)
class _Walk:
    """A walk over the rows of a plane, forwards, or over the plane turned round."""

    kernel: PolynomialKernel
    plane: Plane
    pace: Pace
    centre: Array
    rows: RowGradients
    turned: bool

    def turned_round(self) -> _Walk:
        """Return the walk whose first row is the last of this one; what enters sight in one leaves it in the other."""
        xp, problem, pace = self.kernel.xp, self.kernel.problem, self.pace
        shifts = tuple(
            m - problem.queries - shift + w - 1
            for m, shift, w in zip(problem.lengths, pace.shifts, pace.windows, strict=True)
        )
        plane = replace(
            self.plane,
            queries=tuple(_turned_factor(xp, query) for query in self.plane.queries),
            keys=tuple(_turned_factor(xp, key) for key in self.plane.keys),
            values=tuple(xp.flip(value, axis=0) for value in self.plane.values),
        )
        rows, centre = self.rows.turned_round(), xp.flip(self.centre, axis=2)
        return _Walk(self.kernel, plane, replace(pace, shifts=shifts), centre, rows, not self.turned)

    def leaving_keys(self, store: GradientStore | None) -> list[KeyPart]:
        """Return, per mode, what rows from the cut on add to the gradients of all keys.

        Given a store, hands it the gradients of the queries.
        """
        kernel, order = self.kernel, len(self.plane.keys)
        modes = [WindowKeys(kernel, self.plane, t, self.pace, Progress(0, None, [])) for t in range(order)]
        flows = [mode.empty[0] for mode in modes]
        found = [self._unseen(t, 0, self._leaving(t, 0)) for t in range(order)]
        for start, stop in self._blocks():
            flows = [modes[t].empty[0] if self._is_cut(t, start) else flow for t, flow in enumerate(flows)]
            seen = [mode.block(start, stop) for mode in modes]
            counts = ProductRows(kernel, seen).counts()
            block = RowsBack(kernel, self.plane, self.pace, (start, stop), counts, self.centre, self.rows)
            reads = [KeyReads(kernel, part.leaving) for part in seen if part.leaving is not None]
            flows = read_runs(block, seen, reads, flows, kernel.running_sums, queries=store is not None)
            for t in range(order):
                found[t] += self._leaving_part(t, start, stop, reads.pop(0))
            if store is not None:
                block.store_queries(store)
            for mode in modes:
                mode.take(seen.pop(0))
            del block  # before the next block is built
        return [_joined(kernel.xp, [*found[t], *self._remaining(t, flow)]) for t, flow in enumerate(flows)]

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Yield blocks of rows, none across a cut of any mode."""
        start, queries = 0, self.kernel.problem.queries
        while start < queries:
            cuts = (self._next_cut(t, start) for t in range(len(self.pace.windows)))
            stop = min(start + self.kernel.polynomial.chunk, queries, *cuts)
            yield start, stop
            start = stop

    def _next_cut(self, mode: int, row: int) -> int:
        window = self.pace.windows[mode]
        first = self.kernel.problem.queries % window if self.turned else 0
        return row + window - (row - first) % window

    def _is_cut(self, mode: int, row: int) -> bool:
        return self._next_cut(mode, row) == row + self.pace.windows[mode]

    def _leaving(self, mode: int, row: int) -> int:
        """Return the key that row `row` is the last to see; inside the array or at its end."""
        position = row + self.pace.shifts[mode] - self.pace.windows[mode] + 1
        return min(max(position, 0), self.plane.keys[mode].length)

    def _leaving_part(self, mode: int, start: int, stop: int, read: KeyReads) -> list[KeyPart]:
        """Return the gradients of the keys inside the array that leave after the rows of a block."""
        low, high = self._leaving(mode, start), self._leaving(mode, stop)
        if low == high:
            return []
        first = start + self.pace.shifts[mode] - self.pace.windows[mode] + 1
        part = read.part(self.plane, mode, self.pace, (first, first + stop - start))
        part = cut_part(part, low - first, high - first)
        if not self.turned or not self._is_cut(mode, stop) or high < first + stop - start:
            return [part]
        # the last key's rows all lie between two cuts: they count in the walk forwards
        return [cut_part(part, 0, high - low - 1), *self._unseen(mode, high - 1, high)]

    def _remaining(self, mode: int, flow: Array) -> list[KeyPart]:
        """Return the gradients of the keys that the last row still sees, and of those that no row sees."""
        queries, length = self.kernel.problem.queries, self.plane.keys[mode].length
        start = stop = self._leaving(mode, queries)
        if queries and not self._is_cut(mode, queries):
            stop = max(self._leaving(mode, self._next_cut(mode, queries) - int(self.turned)), start)
        chunk, narrow = self.kernel.polynomial.chunk, self.kernel.xp.astype(flow, self.kernel.dtype)
        parts = [
            shared_part(self.kernel, self.plane, mode, self.pace, (first, min(first + chunk, stop)), narrow)
            for first in range(start, stop, chunk)
        ]
        return [*parts, *self._unseen(mode, stop, length)]

    def _unseen(self, mode: int, start: int, stop: int) -> list[KeyPart]:
        return [unseen_part(self.kernel, self.plane, mode, (start, stop))]


def _joined(xp: Any, parts: list[KeyPart]) -> KeyPart:
    axes = (1, 1, 0, 0)
    return tuple(xp.concat(list(group), axis=axis) for group, axis in zip(zip(*parts, strict=True), axes, strict=True))


def _turned_part(xp: Any, part: KeyPart) -> KeyPart:
    return tuple(xp.flip(x, axis=axis) for x, axis in zip(part, (1, 1, 0, 0), strict=True))


def _turned_factor(xp: Any, factor: Factor) -> Factor:
    live, weights = (None if x is None else xp.flip(x, axis=0) for x in (factor.live, factor.weights))
    return replace(factor, rows=xp.flip(factor.rows, axis=0), live=live, weights=weights)
