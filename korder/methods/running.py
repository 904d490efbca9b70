"""The causal form of the polynomial method: key states that grow with the rows, never stored for all of them.

Every row sees the product set of its prefixes, so its reading is against the product of the modes' running sums. Tokens
go in blocks, with a carry in float64; inside a block, features go in runs whose states stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from typing import TYPE_CHECKING, Any

from array_api_compat import device

from korder.methods.factors import Plane
from korder.methods.readings import Progress, Reading, nonzero, prod_arrays
from korder.methods.sight import Sight
from korder.planning.polynomial import RUNNING_ELEMENTS
from korder.spi.operands import Operands

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any


@dataclass(frozen=True, slots=True)
class Stream:
    """The keys of one mode that a block of rows brings into sight, one per row; zeros where a row brings none."""

    columns: Array
    """(w, c), scaled."""
    features: Array
    """(r, c)."""
    weighted: Array
    """[w v, w] (c, e + 1), shrunk."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What stays fixed while the rows of a plane are walked."""

    scales: Array
    shifts: tuple[int, ...]
    shrinks: tuple[float, ...]
    """Powers of two about 1 / sqrt(m_t) that keep products of k states inside float32."""
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
        shrinks = tuple(2.0 ** -round(log2(max(m, 1)) / 2) for m in sight.lengths)
        return cls(scales, sight.shifts, shrinks, table.values, table.factors)


def causal_readings(
    kernel: PolynomialKernel, operands: Operands, plane: Plane, scales: Array, states: list[Array], progress: Progress
) -> Iterator[tuple[int, int, int, Reading]]:
    """Yield (head, start, stop, reading) for the rows of a plane; puts the modes' last states into `states`.

    Cost:    (3 k + 1) r (e + 1) elementwise operations a token; workspace k r (e + 1) and a block of features.
    Source:  prefix sums of low-rank factors for order 1, Liang et al., arXiv 2405.05219; products of them are ours.
    """
    pace = Pace.of(kernel, operands, scales)
    carries = [initial_carry(kernel, plane, t, pace, progress) for t in range(kernel.problem.order)]
    for start, stop in kernel.blocks(kernel.problem.queries):
        streams = [stream(kernel, plane, t, pace, start, stop) for t in range(kernel.problem.order)]
        queries = [kernel.features(kernel.scaled(q, scales[0, ...], start, stop)) for q in plane.queries]
        yield from _read_block(kernel, plane, pace, (start, stop), streams, carries, queries)
        carries = [advance(kernel, carry, part) for carry, part in zip(carries, streams, strict=True)]
        progress.advance((stop - start) * (len(plane.heads) + len(streams)))
    states += [state for state, _ in carries]


def initial_carry(
    kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, progress: Progress
) -> tuple[Array, Array]:
    """Return the sums (r, e + 1) and absolute sums (r, 1) over the keys before the first row's own, float64."""
    xp, key = kernel.xp, plane.keys[mode]
    shape = (kernel.table.features, kernel.problem.value_width + 1)
    state = xp.zeros(shape, dtype=xp.float64, device=device(key.rows))
    carry = (state, state[:, -1:])
    end = min(max(pace.shifts[mode], 0), key.length)
    for start, stop in kernel.blocks(end):
        carry = advance(kernel, carry, keys_block(kernel, plane, mode, pace, start, stop))
        progress.advance(stop - start)
    return carry


def stream(kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, start: int, stop: int) -> Stream:
    """Return the keys that rows start..stop bring into sight."""
    return keys_block(kernel, plane, mode, pace, start + pace.shifts[mode], stop + pace.shifts[mode])


def keys_block(kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, start: int, stop: int) -> Stream:
    """Return keys start..stop of a mode; zeros outside the array."""
    columns = kernel.scaled(plane.keys[mode], pace.scales[mode + 1, ...], start, stop)
    weighted = plane.values_and_weights(kernel.xp, mode, start, stop) * pace.shrinks[mode]
    return Stream(columns, kernel.features(columns), weighted)


def advance(kernel: PolynomialKernel, carry: tuple[Array, Array], part: Stream) -> tuple[Array, Array]:
    """Return the carry with a block of keys added."""
    state, absolute = carry
    return (
        state + kernel.product(part.features, part.weighted),
        absolute + kernel.absolute_sums(part.columns, part.features, part.weighted[:, -1:]),
    )


def runs(kernel: PolynomialKernel, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield (degree, start, stop) of the runs of features, none across degrees, whose states stay in cache."""
    length = max(1, RUNNING_ELEMENTS // (tokens * (kernel.problem.value_width + 1)))
    length = min(length, kernel.sum_block)
    for s in range(kernel.polynomial.degree + 1):
        rows = kernel.table.rows(s)
        for start in range(rows.start, rows.stop, length):
            yield s, start, min(start + length, rows.stop)


def block_counts(kernel: PolynomialKernel, streams: list[Stream], carries: list[tuple[Array, Array]]) -> Array:
    """Return the product of the weights that each row of a block sees, shrunk: (c,) float64."""
    xp = kernel.xp
    totals = [
        carry[0][0, -1] + xp.cumulative_sum(xp.astype(part.weighted[:, -1], xp.float64), axis=0)
        for carry, part in zip(carries, streams, strict=True)
    ]
    return nonzero(xp, prod_arrays(totals))


def _read_block(
    kernel: PolynomialKernel,
    plane: Plane,
    pace: Pace,
    rows: tuple[int, int],
    streams: list[Stream],
    carries: list[tuple[Array, Array]],
    queries: list[Array],
) -> Iterator[tuple[int, int, int, Reading]]:
    xp = kernel.xp
    counts = block_counts(kernel, streams, carries)
    found = [Reading([], []) for _ in plane.heads]
    for s, start, stop in runs(kernel, rows[1] - rows[0]):
        first = start == kernel.table.offsets[s]
        product, absolute = running_products(kernel, streams, carries, start, stop)
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
        yield head, *rows, reading


def running_products(
    kernel: PolynomialKernel, streams: list[Stream], carries: list[tuple[Array, Array]], start: int, stop: int
) -> tuple[Array, Array]:
    """Return the product over modes of a run's running states (c, rho, e + 1), and of its absolute sums (rho, c)."""
    xp = kernel.xp
    states, sizes = [], []
    for part, (state, absolute) in zip(streams, carries, strict=True):
        features = part.features[start:stop, :]
        states.append(kernel.running_state(features, part.weighted, xp.astype(state[start:stop, :], kernel.dtype)))
        terms = xp.abs(features) * part.weighted[None, :, -1]
        sizes.append(xp.astype(absolute[start:stop, :], kernel.dtype) + xp.cumulative_sum(terms, axis=1))
    return prod_arrays(states), prod_arrays(sizes)
