"""Polynomial states: sums over keys that come one after another, of a size that does not depend on how many came.

Everything is float64 and batched over planes (pairs of batch entry and key head), because a token costs little more
than passing over the state. Columns are divided by powers of two that follow the largest key so far: a larger key
rescales the sums, which is exact, so that no monomial overflows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import device

from korder.methods.certificates import Evidence, reach_of_peaks, value_sizes
from korder.methods.factors import Factor, Projection
from korder.methods.features import gathered_features, multinomials
from korder.methods.readings import Reading, finish_rows, nonzero, prod_arrays
from korder.methods.scales import powers_near, scales_of_peaks
from korder.methods.statistics import RowBounds, extreme_rows, product_range, score_bounds
from korder.spi.operands import KernelOutput

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any
LONGEST_BLOCK = 256
"""Tokens of a plane that one product sums; blocks join in float64 additions, which certificates count."""

FEW_COLUMNS = 8
"""Columns up to which gathering their monomials is faster than one multiplication for each variable and degree."""


@dataclass(frozen=True, slots=True)
class ModeState:
    """What is kept of the keys of one mode.

    Shapes:  P planes, w columns, r features, e value columns; float64.
    """

    sums: Array
    """(P, r, e + 1): the sums over live keys of u [v, 1], u of the columns over their scales."""
    absolute: Array
    """(P, r, 1): the sums of |u|."""
    totals: Array
    """(P, w, 1): the sums of columns."""
    peaks: Array
    """(P, w): the largest finite entries in absolute value, which set the scales."""
    weights: Array
    """(P, w, 1): what columns are divided by in one norm of `extremes`; fixed by the first keys."""
    extremes: Array
    """(P, 3 w + 3, 1): the maxima of `statistics.extreme_rows`, -inf where no key is live."""
    values: Array
    """(P, 2 e, 1): the maxima of values and of their negatives."""
    length: int = 0
    """Keys, masked ones counted."""
    joins: int = 0
    """Blocks that were added, each one float64 addition."""

    @property
    def counts(self) -> Array:
        """Live keys (P, 1, 1)."""
        return self.sums[:, :1, -1:]


State = tuple[ModeState, ...]


class PolynomialStates:
    """Keeps and reads the states of a polynomial kernel that sums in float64.

    Cost:    whatever the number of keys, extending by a token 2 r (e + 2) flop a mode, reading 2 k r (e + 2) for the
             first row of a plane and 2 r (e + 2) for each more.
    Source:  docs/decode.md; the factorisation is that of Alman & Song, arXiv 2310.04064.
    """

    def __init__(self, kernel: PolynomialKernel) -> None:
        assert kernel.problem.accumulation == "float64", "states are kept in float64"
        self.kernel = kernel
        self.xp = kernel.xp
        self.problem = kernel.problem
        self.planes = kernel.problem.batch * kernel.problem.groups

    def empty(self, place: Any) -> State:
        """Return the state of no keys, on a device."""
        xp, width, channels = self.xp, self.problem.score_width, self.problem.value_width

        def full(rows: int, columns: int, value: float) -> Array:
            return xp.full((self.planes, rows, columns), value, dtype=xp.float64, device=place)

        features = self.kernel.table.features
        mode = ModeState(
            sums=full(features, channels + 1, 0.0),
            absolute=full(features, 1, 0.0),
            totals=full(width, 1, 0.0),
            peaks=full(width, 1, 0.0)[:, :, 0],
            weights=full(width, 1, 1.0),
            extremes=full(3 * width + 3, 1, -float("inf")),
            values=full(2 * channels, 1, -float("inf")),
        )
        return (mode,) * self.problem.order

    @np.errstate(all="ignore")
    def extend(
        self, state: State, keys: tuple[Array, ...], values: tuple[Array, ...], key_masks: tuple[Array | None, ...]
    ) -> State:
        """Return a state with more keys in every mode; shapes as in `korder.spi.Operands`."""
        parts = zip(state, keys, values, key_masks, strict=True)
        extended = tuple(self._extend_mode(*part) for part in parts)
        self.kernel.release()
        return extended

    def _extend_mode(self, mode: ModeState, keys: Array, values: Array, mask: Array | None) -> ModeState:
        xp, count = self.xp, keys.shape[2]
        shape = (*keys.shape[:2], count)
        live = xp.ones(shape, dtype=xp.bool, device=device(keys)) if mask is None else xp.broadcast_to(mask, shape)
        flat = [xp.reshape(x, (self.planes, *x.shape[2:])) for x in (keys, values, live)]
        for start, stop in self._blocks(count):
            key, value, alive = (x[:, start:stop, ...] for x in flat)
            columns = xp.permute_dims(_selected(xp, key, alive), (0, 2, 1))
            mode = self._with_block(mode, columns, _selected(xp, value, alive), alive)
        return mode

    def _blocks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Yield blocks of tokens whose features, for all planes, take no more memory than the plan allows for."""
        length = max(min(self.kernel.polynomial.chunk // max(self.planes, 1), LONGEST_BLOCK), 1)
        for start in range(0, tokens, length):
            yield start, min(start + length, tokens)

    def _with_block(self, mode: ModeState, columns: Array, values: Array, live: Array) -> ModeState:
        """Return a mode with a block more: columns (P, w, c), values (P, c, e), both zero in dead keys; live (P, c)."""
        xp = self.xp
        alive = xp.astype(live, xp.float64)[:, :, None]
        mode = self._rescaled(mode, xp.maximum(mode.peaks, _peaks(xp, columns)))
        features = self._features(columns / powers_near(xp, mode.peaks)[:, :, None])  # (P, r, c)
        sums = xp.matmul(features, xp.concat([values, alive], axis=2))
        weights = mode.weights if mode.length else _column_weights(xp, columns)
        rows = extreme_rows(xp, columns, xp.abs(columns), weights, self.problem.order)
        value_columns = xp.permute_dims(values, (0, 2, 1))
        return replace(
            mode,
            sums=mode.sums + sums,
            absolute=mode.absolute + xp.matmul(xp.abs(features), alive),
            totals=mode.totals + xp.sum(columns, axis=2, keepdims=True),
            weights=weights,
            extremes=xp.maximum(mode.extremes, _live_maxima(xp, rows, live)),
            values=xp.maximum(mode.values, _live_maxima(xp, xp.concat([value_columns, -value_columns], axis=1), live)),
            length=mode.length + columns.shape[2],
            joins=mode.joins + 1,
        )

    def _rescaled(self, mode: ModeState, peaks: Array) -> ModeState:
        """Return a mode whose scales are those of larger peaks; exact but for what becomes too small for float64."""
        xp = self.xp
        ratio = powers_near(xp, mode.peaks) / powers_near(xp, peaks)
        # a column that was zero has only zeros in the sums that it enters
        ratio = xp.where(mode.peaks > 0.0, ratio, xp.ones_like(ratio))
        if bool(xp.all(ratio == 1.0)):
            return replace(mode, peaks=peaks)
        factors = self._of_planes(ratio)[:, :, None]
        return replace(mode, peaks=peaks, sums=mode.sums * factors, absolute=mode.absolute * factors)

    def _of_planes(self, columns: Array) -> Array:
        """Return the monomials (P, r) of one column vector per plane (P, w)."""
        xp = self.xp
        return xp.permute_dims(self._monomials(xp.permute_dims(columns, (1, 0))), (1, 0))

    def _features(self, columns: Array) -> Array:
        """Return the monomials (P, r, c) of columns (P, w, c)."""
        xp, (planes, width, count) = self.xp, columns.shape
        features = self._monomials(xp.reshape(xp.permute_dims(columns, (1, 0, 2)), (width, planes * count)))
        return xp.permute_dims(xp.reshape(features, (features.shape[0], planes, count)), (1, 0, 2))

    def _monomials(self, columns: Array) -> Array:
        """Return the monomials (r, c) of columns (w, c), in memory that the next call may overwrite."""
        table, place = self.kernel.table, device(columns)
        if columns.shape[1] > FEW_COLUMNS:
            return self.kernel.features(columns)
        indices = [self.kernel.parents(degree, place) for degree in range(1, table.degree + 1)]
        return gathered_features(self.xp, table, columns, indices)

    @np.errstate(all="ignore")
    def read(self, state: State, query: Array) -> KernelOutput:
        """Return what queries (b, h, n, d) make of all keys of a state.

        Raises:
            AccuracyError: The polynomial sums to a number that is not positive in a row with a live tuple.
        """
        xp, kernel = self.xp, self.kernel
        columns = self._query_columns(query)
        rows = columns.shape[2]
        counts = [mode.counts for mode in state]
        live = xp.min(xp.stack(counts, axis=0), axis=0)[:, 0, :] > 0.0  # (P, 1)
        live = xp.broadcast_to(live, (self.planes, rows))
        centre = self._centres(state, query, columns)
        tables = [
            prod_arrays([part / nonzero(xp, count) for part, count in zip(parts, counts, strict=True)])
            for parts in ([mode.sums for mode in state], [mode.absolute for mode in state])
        ]
        found = []
        for start, stop in self._blocks(rows) if rows else [(0, 0)]:
            reading = self._reading(state, columns[:, :, start:stop], tables)
            flat = [xp.reshape(x[:, start:stop], (-1,)) for x in (centre, live)]
            parts = finish_rows(xp, kernel.polynomial.values, reading, *flat)
            found.append([xp.reshape(x, (self.planes, stop - start, *x.shape[1:])) for x in parts])
        kernel.release()
        shaped = [
            xp.reshape(xp.concat(list(parts), axis=1), (*query.shape[:3], *parts[0].shape[2:]))
            for parts in zip(*found, strict=True)
        ]
        return self._output(state, query, shaped, centre, live)

    def _query_columns(self, query: Array) -> Array:
        """Return the columns (P, w, rows) of queries (b, h, n, w), the heads of a plane one after the other."""
        xp, rows = self.xp, query.shape[1] // self.problem.groups * query.shape[2]
        wide = xp.astype(xp.reshape(query, (self.planes, rows, query.shape[3])), xp.float64)
        return xp.permute_dims(wide, (0, 2, 1))

    def _output(self, state: State, query: Array, parts: list[Array], centre: Array, live: Array) -> KernelOutput:
        """Return the kernel output of output, mean polynomial, moments and magnitude (b, h, n, ..)."""
        xp = self.xp
        output, mean, moments, magnitude = parts
        centre, live = (xp.reshape(x, query.shape[:3]) for x in (centre, live))
        self.kernel.check_normaliser(mean, live)
        log_weights = self._log_weights(state, query)
        logs = xp.log(xp.where(live, mean, xp.ones_like(mean))) + log_weights + centre
        return KernelOutput(
            output=xp.astype(output, getattr(xp, self.problem.dtype)),
            lse=xp.where(live, logs, xp.full_like(logs, -float("inf"))),
            normaliser=xp.where(live, mean * xp.exp(log_weights), xp.zeros_like(mean)),
            moments=moments,
            magnitude=magnitude,
        )

    def _log_weights(self, state: State, query: Array) -> Array:
        """Return the logarithm of the number of live tuples of every row (b, h, n), -inf for none."""
        xp = self.xp
        logs = xp.sum(xp.stack([xp.log(mode.counts[:, 0, :]) for mode in state], axis=0), axis=0)  # (P, 1)
        rows = query.shape[1] // self.problem.groups * query.shape[2]
        return xp.reshape(xp.broadcast_to(logs, (self.planes, rows)), query.shape[:3])

    def _centres(self, state: State, query: Array, columns: Array) -> Array:
        """Return the centre of every row's scores (P, rows): as `statistics.row_centres`."""
        xp = self.xp
        if self.kernel.polynomial.coefficients != "taylor":
            bounds = self._bounds(state, query)
            return xp.reshape(0.5 * (bounds.low + bounds.high), (self.planes, columns.shape[2]))
        mean = prod_arrays([mode.totals / nonzero(xp, mode.counts) for mode in state])
        return self.problem.scale * xp.sum(columns * mean, axis=1)

    def _reading(self, state: State, columns: Array, tables: list[Array]) -> Reading:
        """Return what columns (P, w, c) read of tables (P, r, e + 1) and (P, r, 1), rows of all planes in turn."""
        xp, table = self.xp, self.kernel.table
        peaks = xp.stack([_peaks(xp, columns), *(mode.peaks for mode in state)], axis=1)
        scales = scales_of_peaks(xp, peaks)
        # the scale goes with the columns, because a power of it alone may overflow where the scores are small
        product = prod_arrays([scales[:, t, :] for t in range(peaks.shape[1])]) * abs(self.problem.scale)
        counts = xp.asarray(multinomials(table).copy(), device=device(columns))
        weights = (self._of_planes(product) * counts[None, :])[:, None, :]
        features = xp.permute_dims(self._features(columns / scales[:, 0, :, None]), (0, 2, 1)) * weights
        reading = Reading([], [])
        for s in range(table.degree + 1):
            rows, sign = table.rows(s), self.kernel.scale_sign**s
            part = features[:, :, rows]
            sums = xp.matmul(part, tables[0][:, rows, :]) * sign
            absolute = xp.matmul(xp.abs(part), tables[1][:, rows, :])
            reading.sums.append(xp.reshape(sums, (-1, sums.shape[2])))
            reading.absolute.append(xp.reshape(absolute, (-1,)))
        return reading

    @np.errstate(all="ignore")
    def evidence(self, state: State, query: Array, output: KernelOutput) -> Evidence:
        """Return what bounds the error of a reading beside the reading itself."""
        xp, problem = self.xp, self.problem
        log_weights = self._log_weights(state, query)
        reach = xp.zeros((), dtype=xp.float64, device=device(query))
        queries = _peaks(xp, self._query_columns(query))
        sizes: list[tuple[Array, ...]] = []
        for plane, heads in self._heads(query):
            low, high = product_range(xp, tuple(mode.values[plane, ...] for mode in state), problem.value_width)
            sizes += [value_sizes(xp, low, high, output.output[batch, head, ...]) for batch, head in heads]
            peaks = xp.stack([queries[plane, :], *(mode.peaks[plane, :] for mode in state)], axis=0)
            reach = xp.maximum(reach, reach_of_peaks(xp, problem, peaks))
        spread, both, largest = (_by_row(xp, [part[i] for part in sizes], query) for i in range(3))
        return Evidence(
            bounds=self._bounds(state, query),
            live=log_weights > -float("inf"),
            log_weights=log_weights,
            maxima=xp.zeros_like(log_weights),
            spread=spread,
            sizes=both,
            largest=largest,
            reach=reach,
            tuples=float(np.prod([float(mode.length) for mode in state])),
            additions=(float(self.kernel.table.features), *(float(mode.joins) for mode in state)),
        )

    def value_references(self, state: State, heads: int) -> tuple[Array, Array]:
        """Return the range of value products and the largest absolute one, (b, h) each: what a tolerance refers to."""
        xp, (batch, groups) = self.xp, (self.problem.batch, self.problem.groups)
        extremes = tuple(xp.permute_dims(mode.values[:, :, 0], (1, 0)) for mode in state)  # (2 e, P)
        low, high = product_range(xp, extremes, self.problem.value_width)
        spread, largest = xp.max(high - low, axis=0), xp.max(xp.maximum(xp.abs(low), xp.abs(high)), axis=0)
        shape = (batch, groups, heads // groups)

        def by_head(x: Array) -> Array:
            return xp.reshape(xp.broadcast_to(xp.reshape(x, (batch, groups, 1)), shape), (batch, heads))

        return by_head(spread), by_head(largest)

    def is_finite(self, state: State) -> bool:
        """Whether no live key and no value of one was NaN or infinite."""
        xp, width = self.xp, self.problem.score_width
        parts = [part for mode in state for part in (mode.extremes[:, : 2 * width, :], mode.values)]
        return all(bool(xp.all(xp.logical_or(xp.isfinite(part), part == -float("inf")))) for part in parts)

    def _heads(self, query: Array) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield each plane with its query heads, as (batch, head)."""
        groups, share = self.problem.groups, query.shape[1] // self.problem.groups
        for plane in range(self.planes):
            batch, group = divmod(plane, groups)
            yield plane, [(batch, group * share + head) for head in range(share)]

    def _bounds(self, state: State, query: Array) -> RowBounds:
        """Return the bounds of every row's scores, as `statistics.row_bounds`."""
        xp, found = self.xp, []
        for plane, heads in self._heads(query):
            extremes = tuple(mode.extremes[plane, ...] for mode in state)
            weights = tuple(mode.weights[plane, ...] for mode in state)
            for batch, head in heads:
                factor = Factor(query[batch, head, ...], Projection(), xp.float64)
                found.append(score_bounds(xp, self.problem, factor, (0, query.shape[2]), extremes, weights))
        return RowBounds(*(_by_row(xp, [part[i] for part in found], query) for i in range(4)))


def _by_row(xp: Any, heads: list[Array], query: Array) -> Array:
    """Return (b, h, n) of one array (n,) per head."""
    if not heads:
        return xp.zeros(query.shape[:3], dtype=xp.float64, device=device(query))
    return xp.reshape(xp.stack(heads, axis=0), query.shape[:3])


def _selected(xp: Any, rows: Array, live: Array) -> Array:
    """Return rows (P, c, ..) in float64, zero where a key is dead, whatever it holds."""
    wide = xp.astype(rows, xp.float64)
    return xp.where(live[:, :, None], wide, xp.zeros_like(wide))


def _peaks(xp: Any, columns: Array) -> Array:
    """Return the largest finite absolute entries (P, w) of columns (P, w, c), 0 where there are none."""
    sizes = xp.where(xp.isfinite(columns), xp.abs(columns), xp.zeros_like(columns))
    return xp.max(sizes, axis=2) if columns.shape[2] else xp.sum(sizes, axis=2)


def _column_weights(xp: Any, columns: Array) -> Array:
    """Return the root mean squares (P, w, 1) of the finite entries over the largest of them, within a millionth.

    Any positive weights will do; near 1, neither a later key over them nor a query times them overflows.
    """
    sizes = xp.where(xp.isfinite(columns), xp.abs(columns), xp.zeros_like(columns))
    largest = nonzero(xp, xp.max(sizes, axis=(1, 2), keepdims=True))
    found = xp.sqrt(xp.mean((sizes / largest) ** 2, axis=2, keepdims=True))
    return xp.maximum(found, xp.full_like(found, 1e-6))


def _live_maxima(xp: Any, rows: Array, live: Array) -> Array:
    """Return the maxima (P, .., 1) of rows (P, .., c) over live keys, -inf for none."""
    return xp.max(xp.where(live[:, None, :], rows, xp.full_like(rows, -float("inf"))), axis=2, keepdims=True)
