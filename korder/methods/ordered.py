"""Ordered tuples in the polynomial method: iterated sums over positions instead of products of sums.

With E_t(i) = u_t [v_t, 1]^T of the key of mode t at position i, the sum over the tuples j1 < .. < jt <= i is

    M_t(i) = M_t(i - 1) + M_{t-1}(i - 1) * E_t(i),    M_0 = 1

elementwise. Inside a block of positions these are running sums in the compute dtype; between blocks they are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from korder.methods.factors import Plane
from korder.methods.readings import Progress, nonzero
from korder.methods.running import Pace, State, add_states, empty_state, keys_block, runs
from korder.methods.sight import Sight
from korder.spi.operands import Operands

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any


@dataclass(frozen=True, slots=True)
class OrderedSums:
    """The iterated sums before a block of positions, one entry for each mode."""

    states: tuple[State, ...]
    counts: tuple[Array, ...]
    """Sums of weights, shrunk, (1,) float64."""
    chains: tuple[Array, ...]
    """Numbers of live tuples, (1,) float64."""

    @classmethod
    def none(cls, kernel: PolynomialKernel, plane: Plane) -> OrderedSums:
        """Return the sums before the first key."""
        empty, order = empty_state(kernel, plane), len(plane.keys)
        return cls((empty,) * order, (empty[1][0, :],) * order, (empty[1][0, :],) * order)


class OrderedRows:
    """A block of positions: the keys at them, and what the rows at them read."""

    def __init__(
        self, kernel: PolynomialKernel, plane: Plane, pace: Pace, before: OrderedSums, block: tuple[int, int]
    ) -> None:
        xp, modes = kernel.xp, range(len(plane.keys))
        self.kernel, self.before, self.block = kernel, before, block
        self.places = [(block[0] + shift, block[1] + shift) for shift in pace.shifts]
        self.streams = [keys_block(kernel, plane, t, pace, *self.places[t]) for t in modes]
        live = [plane.keys[t].live_tokens(xp, *self.places[t]) for t in modes]
        self._chains = _iterated(xp, [xp.astype(x, xp.float64) for x in live], before.chains)
        weights = [xp.astype(part.weighted[:, -1], xp.float64) for part in self.streams]
        self._counts = _iterated(xp, weights, before.counts)
        self._totals: list[list[State]] = [[] for _ in modes]
        self._usable: list[Array] = []
        if not self._all_finite():
            self._usable = [xp.logical_and(live[t], _shifted(xp, self._chains, before.chains, t) > 0.0) for t in modes]

    def _all_finite(self) -> bool:
        xp = self.kernel.xp
        arrays = [x for part in self.streams for x in (part.columns, part.weighted)]
        return all(bool(xp.all(xp.isfinite(x))) for x in (*arrays, *(state for state, _ in self.before.states)))

    def chosen(self, mode: int, terms: Array) -> Array:
        """Return terms (c, ..) of the keys of a mode, zeros where no tuple holds the key: never 0 times NaN."""
        if not self._usable:
            return terms
        usable = self.kernel.xp.reshape(self._usable[mode], (-1, *(1,) * (len(terms.shape) - 1)))
        return self.kernel.xp.where(usable, terms, self.kernel.xp.zeros_like(terms))

    def carry(self, mode: int, start: int, stop: int) -> Array:
        """Return the sums before the block of a run of features, in the compute dtype."""
        return self.kernel.xp.astype(self.before.states[mode][0][start:stop, :], self.kernel.dtype)

    def counts(self) -> Array:
        """Return the sums of weights over the tuples that each row sees."""
        return nonzero(self.kernel.xp, self._counts[-1])

    def states(self, start: int, stop: int) -> tuple[list[Array], list[Array]]:
        """Return, for a run of features, the iterated sums (c, rho, e + 1) of each mode, and the block's own part."""
        kernel, totals = self.kernel, []
        found: list[Array] = []
        for t, part in enumerate(self.streams):
            if t:
                before = self.carry(t - 1, start, stop)
                terms = kernel.chained_terms(part.run(start, stop), found[-1], before)
            else:
                terms = kernel.running_terms(part.run(start, stop))
            states, total = kernel.running_sums(self.chosen(t, terms), self.carry(t, start, stop))
            found.append(states)
            totals.append(total)
        return found, totals

    def sizes(self, start: int, stop: int) -> tuple[list[Array], list[Array]]:
        """Return the same of absolute terms, (c, rho) and (rho, 1)."""
        xp, totals = self.kernel.xp, []
        found: list[Array] = []
        carries = [xp.astype(state[1][None, start:stop, 0], self.kernel.dtype) for state in self.before.states]
        for t, part in enumerate(self.streams):
            terms = xp.permute_dims(xp.abs(part.features[start:stop, :]), (1, 0)) * part.weighted[:, -1:]
            if t:
                terms = terms * xp.concat([carries[t - 1], found[-1][:-1, :]], axis=0)
            sums = xp.cumulative_sum(self.chosen(t, terms), axis=0)
            found.append(carries[t] + sums)
            totals.append(sums[-1, :, None])
        return found, totals

    def products(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return, for a run of features, the sums over tuples (c, rho, e + 1) and the absolute ones (rho, c)."""
        states, totals = self.states(start, stop)
        sizes, parts = self.sizes(start, stop)
        for store, both in zip(self._totals, zip(totals, parts, strict=True), strict=True):
            store.append(both)
        return states[-1], self.kernel.xp.permute_dims(sizes[-1], (1, 0))

    def after(self) -> OrderedSums:
        """Return the sums after the block, of which `products` has made every run."""
        xp, states = self.kernel.xp, []
        for before, totals in zip(self.before.states, self._totals, strict=True):
            state, sizes = (xp.concat(list(parts), axis=0) for parts in zip(*totals, strict=True))
            states.append(add_states(before, (xp.astype(state, xp.float64), xp.astype(sizes, xp.float64))))
        counts, chains = (tuple(x[-1:] for x in sums) for sums in (self._counts, self._chains))
        return OrderedSums(tuple(states), counts, chains)


def ordered_walk(
    kernel: PolynomialKernel,
    operands: Operands,
    plane: Plane,
    pace: Pace,
    states: list[Array],
    progress: Progress,
) -> Iterator[tuple[int, int, OrderedRows]]:
    """Yield (start, stop, what they read) for blocks of rows; backward makes its states again, `states` gets none."""
    sums = OrderedSums.none(kernel, plane)
    states += [state[:0, :] for state, _ in sums.states]
    for start, stop in position_blocks(kernel, operands):
        rows = OrderedRows(kernel, plane, pace, sums, (start, stop))
        if start >= 0:
            yield start, stop, rows
            sums = rows.after()
        else:
            sums = passed(rows)
            progress.advance((stop - start) * len(plane.keys))
        del rows  # before the next block is built


def passed(rows: OrderedRows) -> OrderedSums:
    """Return the sums after a block that nobody reads."""
    for _, start, stop in runs(rows.kernel, rows.block[1] - rows.block[0]):
        rows.products(start, stop)
    return rows.after()


def position_blocks(kernel: PolynomialKernel, operands: Operands) -> Iterator[tuple[int, int]]:
    """Yield blocks of positions, those of rows from 0 on; before them those that hold a key."""
    yield from Sight.of(kernel.problem, operands).early_blocks(kernel.polynomial.chunk)
    yield from kernel.blocks(kernel.problem.queries)


def _iterated(xp: Any, modes: list[Array], carries: tuple[Array, ...]) -> list[Array]:
    """Return the iterated sums (c,) of one number for each key."""
    found: list[Array] = []
    for t, terms in enumerate(modes):
        found.append(carries[t] + xp.cumulative_sum(terms * _shifted(xp, found, carries, t), axis=0))
    return found


def _shifted(xp: Any, found: list[Array], carries: tuple[Array, ...], mode: int) -> Array:
    """Return the iterated sums of the mode before at the position before; ones for the first mode."""
    if mode == 0:
        return xp.ones_like(carries[0])
    return xp.concat([carries[mode - 1], found[mode - 1][:-1]], axis=0)
