"""Rows that see some of the keys: key states that move with the rows, never stored for all of them.

Under a causal mask or a window every row sees a product set, so its reading is against the product of the modes' sums.
Tokens go in blocks, with sums over what all rows of a block see in float64; inside a block, features go in runs whose
states stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from typing import TYPE_CHECKING, Any, Protocol

from array_api_compat import device

from korder.methods.factors import Plane
from korder.methods.readings import Progress, Reading, nonzero, prod_arrays
from korder.methods.running_arrays import Tokens
from korder.methods.sight import Sight
from korder.planning.polynomial import RUNNING_ELEMENTS
from korder.spi.operands import Operands

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any
State = tuple[Array, Array]
"""Sums over keys of u [w v, w] (r, e + 1) and of |u| w (r, 1), float64."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Keys of one mode that a block of rows brings into sight or out of it, one per row; zeros where there is none."""

    columns: Array
    """(w, c), scaled."""
    features: Array
    """(r, c)."""
    weighted: Array
    """[w v, w] (c, e + 1), shrunk."""

    def run(self, start: int, stop: int) -> Tokens:
        """Return a run of the features, with the weighted values."""
        return self.features[start:stop, :], self.weighted


@dataclass(frozen=True, slots=True)
class Pace:
    """What stays fixed while the rows of a plane are walked."""

    scales: Array
    shifts: tuple[int, ...]
    windows: tuple[int, ...]
    shrinks: tuple[float, ...]
    """Powers of two about 1 / sqrt(keys seen) that keep products of k states inside float32."""
    weights: list[Array]
    """Multiplicities and scales of each degree's monomials, (r_s, 1) in the compute dtype, at most 1."""
    factors: list[Array]
    """What each degree's reading is to be multiplied with, 0-d float64."""

    @classmethod
    def of(cls, kernel: PolynomialKernel, operands: Operands, scales: Array) -> Pace:
        """Return the pace of a plane."""
        sight = Sight.of(kernel.problem, operands)
        ones = kernel.xp.ones((kernel.table.features, 1), dtype=kernel.xp.float64, device=device(scales))
        table = kernel.normalised(ones, ones, scales)
        seen = [min(pair) for pair in zip(sight.lengths, sight.windows or sight.lengths, strict=True)]
        shrinks = tuple(2.0 ** -round(log2(max(m, 1)) / 2) for m in seen)
        return cls(scales, sight.shifts, sight.windows, shrinks, table.values, table.factors)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a block of rows sees of one mode: keys that all its rows see, and those that come and go with the rows."""

    state: Array
    absolute: Array
    arriving: Stream
    """Key q is seen by the rows from q on."""
    leaving: Stream | None = None
    """Under a window: key q is seen by the rows up to q."""
    still: Tokens | None = None
    """Features and weighted values of `leaving`, those of the last key cleared: the sums over all rows have it."""

    def counts(self, xp: Any) -> Array:
        """Return the sum of weights that each row sees, shrunk: (c,) float64."""
        counts = self.state[0, -1] + xp.cumulative_sum(xp.astype(self.arriving.weighted[:, -1], xp.float64), axis=0)
        if self.still is None:
            return counts
        leaving = xp.flip(xp.astype(self.still[1][:, -1], xp.float64), axis=0)
        return counts + xp.flip(xp.cumulative_sum(leaving, axis=0), axis=0)

    def states(self, kernel: PolynomialKernel, start: int, stop: int) -> Array:
        """Return the states (c, rho, e + 1) that the rows see of a run of features."""
        carry = kernel.xp.astype(self.state[start:stop, :], kernel.dtype)
        if self.still is None:
            return kernel.running_state(self.arriving.run(start, stop), carry)
        features, weighted = self.still
        return kernel.sliding_state(self.arriving.run(start, stop), (features[start:stop, :], weighted), carry)

    def sizes(self, kernel: PolynomialKernel, start: int, stop: int) -> Array:
        """Return the absolute sums (rho, c) that the rows see of a run of features."""
        xp = kernel.xp
        found = xp.astype(self.absolute[start:stop, :], kernel.dtype)
        found = found + xp.cumulative_sum(_sizes(xp, *self.arriving.run(start, stop)), axis=1)
        if self.still is None:
            return found
        features, weighted = self.still
        terms = xp.flip(_sizes(xp, features[start:stop, :], weighted), axis=1)
        return found + xp.flip(xp.cumulative_sum(terms, axis=1), axis=1)


def _sizes(xp: Any, features: Array, weighted: Array) -> Array:
    return xp.abs(features) * weighted[None, :, -1]


class Rows(Protocol):
    """What a block of rows reads: sums over the tuples that each row sees."""

    def counts(self) -> Array:
        """Return the sums of weights, shrunk, ones in place of zeros: (c,) float64."""

    def products(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return, for a run of features, the sums over tuples (c, rho, e + 1) and the absolute ones (rho, c)."""


@dataclass(frozen=True, slots=True)
class ProductRows:
    """Rows that see a product set."""

    kernel: PolynomialKernel
    seen: list[Seen]

    def counts(self) -> Array:
        """Return the product of the modes' sums of weights."""
        return nonzero(self.kernel.xp, prod_arrays([part.counts(self.kernel.xp) for part in self.seen]))

    def products(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the product of the modes' states, and of their absolute sums."""
        states = [part.states(self.kernel, start, stop) for part in self.seen]
        return prod_arrays(states), prod_arrays([part.sizes(self.kernel, start, stop) for part in self.seen])


class PrefixKeys:
    """The keys of one mode under a causal mask, as rows go by."""

    def __init__(self, kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, progress: Progress) -> None:
        self._kernel, self._plane, self._mode, self._pace = kernel, plane, mode, pace
        end = min(max(pace.shifts[mode], 0), plane.keys[mode].length)
        self.carry = keys_state(kernel, plane, mode, pace, (0, end))
        progress.advance(end)

    @property
    def last(self) -> Array:
        """The state after the last row, which backward starts from."""
        return self.carry[0]

    def block(self, start: int, stop: int) -> Seen:
        """Return what rows start..stop see."""
        shift = self._pace.shifts[self._mode]
        arriving = keys_block(self._kernel, self._plane, self._mode, self._pace, start + shift, stop + shift)
        return Seen(*self.carry, arriving)

    def take(self, seen: Seen) -> None:
        """Add what a block brought into sight."""
        self.carry = add_states(self.carry, stream_state(self._kernel, seen.arriving))


def running_readings(
    kernel: PolynomialKernel, operands: Operands, plane: Plane, scales: Array, states: list[Array], progress: Progress
) -> Iterator[tuple[int, int, int, Reading]]:
    """Yield (head, start, stop, reading) for the rows of a plane; puts the modes' last states into `states`.

    Cost:    (3 k + 1) r (e + 1) elementwise operations a token, (6 k + 1) under a window of any size; workspace
             k r (e + 1), under a window times the logarithm of its size, and a block of features.
    Source:  prefix sums of low-rank factors for order 1, Liang et al., arXiv 2405.05219; products of them are ours.
    """
    pace = Pace.of(kernel, operands, scales)
    walk: Iterator[tuple[int, int, Rows]]
    if kernel.problem.spec.mask.kind == "ordered":
        from korder.methods.ordered import ordered_walk

        walk = ordered_walk(kernel, operands, plane, pace, states, progress)
    else:
        walk = _product_walk(kernel, plane, pace, states, progress)
    for start, stop, rows in walk:
        queries = [kernel.features(kernel.scaled(q, scales[0, ...], start, stop)) for q in plane.queries]
        yield from _read_block(kernel, plane, pace, (start, stop), rows, queries)
        del rows, queries  # before the next block is built
        progress.advance((stop - start) * (len(plane.heads) + len(plane.keys)))


def _product_walk(
    kernel: PolynomialKernel, plane: Plane, pace: Pace, states: list[Array], progress: Progress
) -> Iterator[tuple[int, int, Rows]]:
    """Yield (start, stop, what they read) for blocks of rows."""
    from korder.methods.windows import WindowKeys, row_blocks

    kind = WindowKeys if pace.windows else PrefixKeys
    modes = [kind(kernel, plane, t, pace, progress) for t in range(kernel.problem.order)]
    for start, stop in row_blocks(kernel, pace):
        seen = [mode.block(start, stop) for mode in modes]
        yield start, stop, ProductRows(kernel, seen)
        for mode in modes:
            mode.take(seen.pop(0))
    states += [mode.last for mode in modes]


def keys_block(kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, start: int, stop: int) -> Stream:
    """Return keys start..stop of a mode; zeros outside the array."""
    columns = kernel.scaled(plane.keys[mode], pace.scales[mode + 1, ...], start, stop)
    weighted = plane.values_and_weights(kernel.xp, mode, start, stop) * pace.shrinks[mode]
    return Stream(columns, kernel.features(columns), weighted)


def stream_state(kernel: PolynomialKernel, part: Stream) -> State:
    """Return the sums over a block of keys."""
    state = kernel.product(part.features, part.weighted)
    return state, kernel.absolute_sums(part.columns, part.features, part.weighted[:, -1:])


def keys_state(kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, keys: tuple[int, int]) -> State:
    """Return the sums over keys start..stop of a mode, which lie inside the array."""
    state = empty_state(kernel, plane)
    for first in range(*keys, kernel.polynomial.chunk):
        last = min(first + kernel.polynomial.chunk, keys[1])
        state = add_states(state, stream_state(kernel, keys_block(kernel, plane, mode, pace, first, last)))
    return state


def empty_state(kernel: PolynomialKernel, plane: Plane) -> State:
    """Return the sums over no keys."""
    xp = kernel.xp
    shape = (kernel.table.features, kernel.problem.value_width + 1)
    state = xp.zeros(shape, dtype=xp.float64, device=device(plane.keys[0].rows))
    return state, state[:, -1:]


def add_states(one: State, other: State) -> State:
    """Return the sums over two disjoint sets of keys."""
    return one[0] + other[0], one[1] + other[1]


def runs(kernel: PolynomialKernel, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield (degree, start, stop) of the runs of features, none across degrees, whose states stay in cache."""
    length = max(1, RUNNING_ELEMENTS // (tokens * (kernel.problem.value_width + 1)))
    length = min(length, kernel.sum_block)
    for s in range(kernel.polynomial.degree + 1):
        rows = kernel.table.rows(s)
        for start in range(rows.start, rows.stop, length):
            yield s, start, min(start + length, rows.stop)


def _read_block(
    kernel: PolynomialKernel,
    plane: Plane,
    pace: Pace,
    block: tuple[int, int],
    rows: Rows,
    queries: list[Array],
) -> Iterator[tuple[int, int, int, Reading]]:
    xp = kernel.xp
    counts = rows.counts()
    found = [Reading([], []) for _ in plane.heads]
    for s, start, stop in runs(kernel, block[1] - block[0]):
        first = start == kernel.table.offsets[s]
        product, absolute = rows.products(start, stop)
        weights = pace.weights[s][start - kernel.table.offsets[s] : stop - kernel.table.offsets[s], :1]
        for reading, features in zip(found, queries, strict=True):
            query = features[start:stop, :] * weights
            part = kernel.running_read(query, product) * (pace.factors[s] / counts[:, None])
            sizes = xp.astype(xp.sum(xp.abs(query) * absolute, axis=0), xp.float64) * xp.abs(pace.factors[s]) / counts
            if first:
                reading.sums.append(part)
                reading.absolute.append(sizes)
            else:
                reading.sums[s] = reading.sums[s] + part
                reading.absolute[s] = reading.absolute[s] + sizes
    for head, reading in zip(plane.heads, found, strict=True):
        yield head, *block, reading
