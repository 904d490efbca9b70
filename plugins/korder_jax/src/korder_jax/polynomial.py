"""The polynomial method for XLA: loops over planes and blocks of tokens, compiled once; backward is `jax.vjp` of it.

Sums of at most 256 terms are made in the compute dtype and joined in float64, whatever jax_enable_x64 says outside.
"""

from __future__ import annotations

from functools import reduce
from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from korder.spi import KernelOutput, OperandGradients, Operands, OutputGradients, Plan, PolynomialKernel
from korder_jax.arrays import HIGHEST, as_varying, block_count, block_start, joined, part
from korder_jax.layout import Variables, masks_of, variables_of, wanted
from korder_jax.monomials import monomials, multiplicities
from korder_jax.planes import Plane, PlaneLayout, Prefixes, Projections, Statistics, column_scales, mean_centre
from korder_jax.planes import middle_centre as middle_of_range
from korder_jax.positions import Bounds, bounds_of
from korder_jax.runs import Runs, shift_matrix

Array = Any
Masks = tuple[Array | None, ...]


class Rows(NamedTuple):
    """What comes of the rows: as `KernelOutput`, and `mean` (b, h, n), the polynomial's mean, and liveness."""

    output: Array
    lse: Array
    normaliser: Array
    moments: Array
    magnitude: Array
    mean: Array
    live: Array


class Table(NamedTuple):
    """What rows are read against, in runs: entries of at most 1 (g, l, e + 1), (g, l, 1); factors of each degree."""

    values: Array
    absolute: Array
    factors: Array
    absolute_factors: Array


class JaxPolynomialKernel(PolynomialKernel):
    """A compiled polynomial plan.

    Cost:      2 (k + 1) n r (e + 1) flop, three to four times that backward; one plane after the other.
    Numerics:  as the generic kernel. A row whose polynomial sums to a number that is not positive raises; where the
               operands are traced it is NaN.
    Source:    Alman & Song, arXiv 2310.04064; certificates, centring and layout are korder's.
    """

    def __init__(self, plan: Plan) -> None:
        with jax.enable_x64(True):
            super().__init__(jnp, plan)
        self.chunk = min(self.polynomial.chunk, self.sum_block)
        self.runs = Runs.of(self.table.offsets, self.sum_block)
        self.signs = self.scale_sign ** np.arange(self.polynomial.degree + 1)
        self._forward = jax.jit(self.traced_forward)
        self._backward = jax.jit(self.traced_backward, static_argnames="needs")

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, Any] | None = None) -> KernelOutput:
        """Return output, lse and what certificates need.

        Raises:
            AccuracyError: The polynomial sums to a number that is not positive in a row with a live tuple.
        """
        known = None if residuals is None else Statistics(*(residuals[name] for name in Statistics._fields))
        with jax.enable_x64(True):
            rows, statistics = self._forward(*self._arguments(operands), known)
            if not isinstance(rows.mean, jax.core.Tracer):
                self.check_normaliser(rows.mean, rows.live)
        kept = statistics._asdict() if save else None
        return KernelOutput(rows.output, rows.lse, rows.normaliser, rows.moments, rows.magnitude, kept)

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Return the gradients of the function that forward computed, its statistics held constant."""
        assert saved.residuals is not None, "backward needs the output of forward(..., save=True)"
        statistics = Statistics(*(saved.residuals[name] for name in Statistics._fields))
        with jax.enable_x64(True):
            found = self._backward(*self._arguments(operands), statistics, grads.output, grads.lse, needs=needs)
        return OperandGradients(*found)

    def _arguments(self, operands: Operands) -> tuple[Variables, Masks, Bounds]:
        return variables_of(operands), masks_of(operands), bounds_of(self.problem.spec.mask, operands)

    def traced_forward(
        self, variables: Variables, masks: Masks, bounds: Bounds, known: Statistics | None
    ) -> tuple[Rows, Statistics]:
        """Return the rows, and the statistics that they were computed with."""
        statistics = self.statistics(variables, masks, bounds) if known is None else known
        return self.rows(variables, masks, bounds, lax.stop_gradient(statistics)), statistics

    def traced_backward(
        self,
        variables: Variables,
        masks: Masks,
        bounds: Bounds,
        statistics: Statistics,
        output: Array,
        lse: Array | None,
        *,
        needs: frozenset[str],
    ) -> Variables:
        """Return the gradients of the operands, given those of output and lse."""

        def function(variables: Variables) -> tuple[Array, Array]:
            rows = self.rows(variables, masks, bounds, statistics, sizes=False)
            return rows.output, rows.lse

        (_, found_lse), pull = jax.vjp(function, variables)
        lse = jnp.zeros_like(found_lse) if lse is None else lse.astype(found_lse.dtype)
        (found,) = pull((output, jnp.where(found_lse == -inf, 0.0, lse)))
        return wanted(found, needs)

    def _empty(self) -> bool:
        problem = self.problem
        return problem.batch * problem.queries * problem.tuples == 0

    def statistics(self, variables: Variables, masks: Masks, bounds: Bounds) -> Statistics:
        """Return centre, column scales and bias maxima of every plane."""
        problem = self.problem
        planes = PlaneLayout.of(problem, variables)
        shape = (problem.batch, problem.heads, problem.queries)
        if self._empty():
            scales = jnp.ones((planes.count, problem.order + 1, self.table.width), jnp.float64)
            return Statistics(jnp.zeros(shape, jnp.float64), scales, jnp.zeros((planes.count, problem.order)))
        projections = Projections(problem, variables.weight)

        def one(index: Array) -> tuple[Array, Array, Array]:
            plane = planes.plane(variables, masks, index, None)
            query = jnp.stack([projections.columns(0, rows) for rows in plane.query])
            keys = [projections.columns(t + 1, key) for t, key in enumerate(plane.keys)]
            prefixes = self._prefixes(bounds)
            if self.polynomial.coefficients == "taylor":
                centre = problem.scale * mean_centre(query, keys, plane.weights, prefixes)
            else:
                centre = middle_of_range(query, keys, plane.live, prefixes, problem.scale)
            flat = jnp.concatenate(list(query), axis=1)
            return centre, column_scales([flat, *keys]), plane.maxima

        centre, scales, maxima = lax.map(one, jnp.arange(planes.count))
        return Statistics(centre.reshape(shape), scales, maxima)

    def _prefixes(self, bounds: Bounds) -> list[Prefixes]:
        problem = self.problem
        causal = problem.spec.mask.kind == "causal"
        return [Prefixes(causal, problem.queries, m, bounds.last[t]) for t, m in enumerate(problem.lengths)]

    def rows(
        self, variables: Variables, masks: Masks, bounds: Bounds, statistics: Statistics, *, sizes: bool = True
    ) -> Rows:
        """Return what comes of all rows, statistics given; differentiable, and without magnitudes unless `sizes`."""
        problem = self.problem
        shape = (problem.batch, problem.heads, problem.queries)
        if self._empty():
            zeros = jnp.zeros(shape, jnp.float64)
            output = jnp.zeros((*shape, problem.value_width), variables.query.dtype)
            moments = jnp.zeros((*shape, self.polynomial.degree + 1), jnp.float64)
            return Rows(output, zeros - inf, zeros, moments, zeros, zeros, jnp.zeros(shape, bool))
        planes = PlaneLayout.of(problem, variables)
        projections = Projections(problem, variables.weight)
        centre = statistics.centre.reshape(planes.count, planes.share, problem.queries)

        def one(index: Array) -> Rows:
            plane = planes.plane(variables, masks, index, statistics.maxima[index])
            return self._plane_rows(plane, projections, bounds, statistics.scales[index], centre[index], sizes)

        found = lax.map(jax.checkpoint(one) if planes.count > 1 else one, jnp.arange(planes.count))
        return Rows(*(x.reshape(*shape, *x.shape[3:]) for x in found))

    def _plane_rows(
        self, plane: Plane, projections: Projections, bounds: Bounds, scales: Array, centre: Array, sizes: bool
    ) -> Rows:
        prefixes = self._prefixes(bounds)
        pairs = zip(prefixes, plane.live, strict=True)
        seen = [prefix.sums(alive.astype(jnp.float64)) > 0.0 for prefix, alive in pairs]
        live = jnp.broadcast_to(reduce(jnp.logical_and, seen), centre.shape)
        sums = [prefix.sums(weight) for prefix, weight in zip(prefixes, plane.weights, strict=True)]
        # Weights may sum to zero in a row that sees a key: those of its keys were dropped.
        logs = reduce(jnp.add, [jnp.where(x == 0.0, -inf, jnp.log(jnp.where(x == 0.0, 1.0, x))) for x in sums])
        if self.problem.spec.mask.kind == "causal":
            from korder_jax.running import CausalRows, causal_rows

            found = causal_rows(CausalRows(self, plane, projections, bounds, scales, sizes), centre, live)
        else:
            found = self._full_rows(plane, projections, scales, centre, live, sizes)
        output, mean, moments, magnitude = found
        bad = live & jnp.isfinite(mean) & (mean <= 0.0)
        safe = jnp.where(live & ~bad, mean, 1.0)
        lse = jnp.log(safe) + logs + centre + jnp.sum(plane.maxima)
        return Rows(
            output=jnp.where(bad[..., None], jnp.nan, output).astype(output.dtype),
            lse=jnp.where(live, jnp.where(bad, jnp.nan, lse), -inf),
            normaliser=jnp.where(live, mean * jnp.exp(logs), 0.0),
            moments=moments,
            magnitude=magnitude,
            mean=mean,
            live=live,
        )

    def features(self, columns: Array) -> Array:
        """Return the monomials (r, c) of columns (w, c)."""
        return monomials(self.table.starts, columns)

    def monomial_weights(self, scales: Array) -> Array:
        """Return multiplicities times the monomials of |scale| times all column scales: (r, 1) float64."""
        product = jnp.prod(scales, axis=0) * abs(self.problem.scale)
        return jnp.asarray(multiplicities(self.table.starts))[:, None] * self.features(product[:, None])

    def scaled_features(self, projections: Projections, position: int, rows: Array, scales: Array) -> Array:
        """Return the monomials (r, c) of rows (c, d_t) of an operand, its columns over their scales."""
        columns = projections.columns(position, rows)
        return self.features(columns / scales[position].astype(columns.dtype)[:, None])

    def _full_rows(
        self, plane: Plane, projections: Projections, scales: Array, centre: Array, live: Array, sizes: bool
    ) -> tuple[Array, ...]:
        """Return output, mean, moments and magnitude (c, n, ..) of rows that see every key."""
        states = [self._key_state(plane, projections, t, scales, sizes) for t in range(self.problem.order)]
        table = self._table(states, scales)
        length = self.problem.queries
        size = min(self.chunk, length)

        def block(rows: Array, centre: Array, live: Array) -> tuple[Array, ...]:
            features = self.scaled_features(projections, 0, rows, scales)
            return self.finished(*self._read(features, table, sizes), centre, live)

        rows_block = jax.checkpoint(block)

        def head(query: Array, centre: Array, live: Array) -> tuple[Array, ...]:
            def one(number: Array) -> tuple[Array, ...]:
                start = block_start(number, size, length)
                rows: tuple[Array, ...] = rows_block(*(part(x, 0, start, size) for x in (query, centre, live)))
                return rows

            blocks = lax.map(one, jnp.arange(block_count(length, size)))
            return tuple(joined(x, length, 0) for x in blocks)

        output, mean, moments, magnitude = lax.map(lambda x: head(*x), (plane.query, centre, live))
        return output, mean, moments, magnitude

    def _key_state(
        self, plane: Plane, projections: Projections, mode: int, scales: Array, sizes: bool
    ) -> tuple[Array, Array]:
        """Return the sums over keys of u [w v, w] (r, e + 1) and of |u| w (r, 1), in float64."""
        length = self.problem.lengths[mode]
        size = min(self.chunk, length)

        def block(keys: Array, values: Array, weights: Array) -> tuple[Array, Array]:
            features = self.scaled_features(projections, mode + 1, keys, scales)
            weighted = with_weights(values, weights)
            state = summed(features.T, weighted)
            return state, summed(jnp.abs(features).T, weighted[:, -1:]) if sizes else jnp.zeros_like(state[:, -1:])

        keys_block = jax.checkpoint(block)

        def add(total: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            start = block_start(number, size, length)
            weights = part(plane.weights[mode], 0, start, size)
            weights = jnp.where(start + jnp.arange(size) >= number * size, weights, 0.0)
            keys, values = part(plane.keys[mode], 0, start, size), part(plane.values[mode], 0, start, size)
            found = keys_block(keys, values, weights)
            return (total[0] + found[0], total[1] + found[1]), None

        shape = (self.table.features, self.problem.value_width + 1)
        zeros = as_varying(jnp.zeros(shape, jnp.float64), plane.keys[mode])
        state, absolute = lax.scan(add, (zeros, zeros[:, -1:]), jnp.arange(block_count(length, size)))[0]
        return state, absolute

    def _table(self, states: list[tuple[Array, Array]], scales: Array) -> Table:
        """Return the table that the key states make together: mean products, times multiplicities and scales."""
        counts = [jnp.where(state[:1, -1:] == 0.0, 1.0, state[:1, -1:]) for state, _ in states]
        values = reduce(jnp.multiply, [state / n for (state, _), n in zip(states, counts, strict=True)])
        absolute = reduce(jnp.multiply, [total / n for (_, total), n in zip(states, counts, strict=True)])
        monomials = self.monomial_weights(scales)
        entries, factors = self.unit_entries(self.runs, values * monomials)
        absolute, absolute_factors = self.unit_entries(self.runs, absolute * monomials)
        return Table(entries, absolute, factors * self.signs, absolute_factors)

    def unit_entries(self, runs: Runs, block: Array) -> tuple[Array, Array]:
        """Return a block (r, ..) in runs, in the compute dtype, over the largest entry of its degree; and those."""
        block = runs.split(block)
        largest = lax.stop_gradient(runs.largest(block))
        return (block / largest[runs.degrees][:, None, None]).astype(self.dtype), largest

    def _read(self, features: Array, table: Table, sizes: bool) -> tuple[Array, Array]:
        """Return the means of the score's powers (s, c, e + 1), and of their absolute terms (s, c), at some rows."""
        rows = self.runs.split(features)

        def read(rows: Array, entries: Array, factors: Array) -> Array:
            found = jnp.einsum("glc,gle->gce", rows, entries, precision=HIGHEST)
            return self.runs.by_degree(found.astype(jnp.float64)) * factors[:, None, None]

        sums = read(rows, table.values, table.factors)
        if not sizes:
            return sums, jnp.zeros_like(sums[..., 0])
        return sums, read(jnp.abs(rows), table.absolute, table.absolute_factors)[..., 0]

    def finished(self, sums: Array, absolute: Array, centre: Array, live: Array) -> tuple[Array, ...]:
        """Return output, mean polynomial, moments and magnitude of rows, given the means of powers as `_read` does."""
        degree, values = self.polynomial.degree, np.asarray(self.polynomial.values)[:, None]
        about = shift_matrix(-centre, degree)
        total = jnp.sum(jnp.sum(values[:, None] * about, axis=0)[..., None] * sums, axis=0)
        mean = total[:, -1]
        safe = jnp.where(live, mean, 1.0)
        moments = jnp.sum(about * sums[None, :, :, -1], axis=1).T
        sizes = jnp.sum(shift_matrix(jnp.abs(centre), degree) * absolute, axis=1)
        magnitude = jnp.sum(np.abs(values) * sizes, axis=0) / safe
        output = jnp.where(live[:, None], total[:, :-1] / safe[:, None], 0.0).astype(self.problem.dtype)
        rows = (jnp.where(live, mean, 0.0), jnp.where(live[:, None], moments, 0.0), jnp.where(live, magnitude, 0.0))
        return output, *rows


def with_weights(values: Array, weights: Array) -> Array:
    """Return [w v, w] (c, e + 1) in the dtype of the values."""
    narrow = weights.astype(values.dtype)[:, None]
    return jnp.concatenate([values * narrow, narrow], axis=1)


def summed(left: Array, right: Array, terms: int = 256) -> Array:
    """Return left (q, p).T @ right (q, s): sums of `terms` terms in the operands' dtype, joined in float64."""
    whole = left.shape[0] // terms * terms
    parts = []
    if whole:
        shape = (whole // terms, terms)
        blocks = (left[:whole].reshape(*shape, -1), right[:whole].reshape(*shape, -1))
        found = jnp.einsum("bqp,bqs->bps", *blocks, precision=HIGHEST)
        parts.append(jnp.sum(found.astype(jnp.float64), axis=0))
    if whole < left.shape[0] or not whole:
        parts.append(jnp.matmul(left[whole:].T, right[whole:], precision=HIGHEST).astype(jnp.float64))
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]
