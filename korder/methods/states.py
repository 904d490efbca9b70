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

from korder.methods.features import gathered_features, multinomials
from korder.methods.readings import Reading, finish_rows, nonzero, prod_arrays
from korder.methods.scales import finite_peaks, powers_near, scales_of_peaks
from korder.methods.state_evidence import log_tuples, query_columns, state_bounds
from korder.methods.statistics import extreme_rows
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

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array of a mode."""
        planes, width, channels = self.planes, self.problem.score_width, self.problem.value_width
        features = self.kernel.table.features
        return {
            "sums": (planes, features, channels + 1),
            "absolute": (planes, features, 1),
            "totals": (planes, width, 1),
            "peaks": (planes, width),
            "weights": (planes, width, 1),
            "extremes": (planes, 3 * width + 3, 1),
            "values": (planes, 2 * channels, 1),
        }

    def empty(self, place: Any) -> State:
        """Return the state of no keys, on a device."""
        filled = {"weights": 1.0, "extremes": -float("inf"), "values": -float("inf")}
        arrays = {
            name: self.xp.full(shape, filled.get(name, 0.0), dtype=self.xp.float64, device=place)
            for name, shape in self.shapes().items()
        }
        return (ModeState(**arrays),) * self.problem.order

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
        mode = self._rescaled(mode, xp.maximum(mode.peaks, finite_peaks(xp, columns)))
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
        columns = query_columns(xp, self.problem, query)
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

    def _output(self, state: State, query: Array, parts: list[Array], centre: Array, live: Array) -> KernelOutput:
        """Return the kernel output of output, mean polynomial, moments and magnitude (b, h, n, ..)."""
        xp = self.xp
        output, mean, moments, magnitude = parts
        centre, live = (xp.reshape(x, query.shape[:3]) for x in (centre, live))
        self.kernel.check_normaliser(mean, live)
        log_weights = log_tuples(xp, self.problem, state, query)
        logs = xp.log(xp.where(live, mean, xp.ones_like(mean))) + log_weights + centre
        return KernelOutput(
            output=xp.astype(output, getattr(xp, self.problem.dtype)),
            lse=xp.where(live, logs, xp.full_like(logs, -float("inf"))),
            normaliser=xp.where(live, mean * xp.exp(log_weights), xp.zeros_like(mean)),
            moments=moments,
            magnitude=magnitude,
        )

    def _centres(self, state: State, query: Array, columns: Array) -> Array:
        """Return the centre of every row's scores (P, rows): as `statistics.row_centres`."""
        xp = self.xp
        if self.kernel.polynomial.coefficients != "taylor":
            bounds = state_bounds(xp, self.problem, state, query)
            return xp.reshape(0.5 * (bounds.low + bounds.high), (self.planes, columns.shape[2]))
        mean = prod_arrays([mode.totals / nonzero(xp, mode.counts) for mode in state])
        return self.problem.scale * xp.sum(columns * mean, axis=1)

    def _reading(self, state: State, columns: Array, tables: list[Array]) -> Reading:
        """Return what columns (P, w, c) read of tables (P, r, e + 1) and (P, r, 1), rows of all planes in turn."""
        xp, table = self.xp, self.kernel.table
        peaks = xp.stack([finite_peaks(xp, columns), *(mode.peaks for mode in state)], axis=1)
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


def _selected(xp: Any, rows: Array, live: Array) -> Array:
    """Return rows (P, c, ..) in float64, zero where a key is dead, whatever it holds."""
    wide = xp.astype(rows, xp.float64)
    return xp.where(live[:, :, None], wide, xp.zeros_like(wide))


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
