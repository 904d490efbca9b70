"""The causal form of the polynomial method for XLA: key states that grow with the rows, never stored for all of them.

Tokens go in blocks with a carry in float64, and inside a block features go in runs, so that the states of a block's
rows stay small. Which keys a row brings into sight depends on offsets at run time.
"""

from __future__ import annotations

from functools import reduce
from math import isqrt, log2
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from korder_jax.arrays import HIGHEST, as_varying, block_count
from korder_jax.planes import Plane, Projections
from korder_jax.polynomial import summed, with_weights
from korder_jax.positions import Bounds
from korder_jax.runs import Runs

if TYPE_CHECKING:
    from korder_jax.polynomial import JaxPolynomialKernel

Array = Any
Carry = tuple[tuple[Array, Array], ...]
"""Per mode the sums (R, e + 1) and absolute sums (R, 1) over the keys in sight, float64, features in runs."""
RUNNING_ELEMENTS = 2**17
"""Elements of the running states of a run: tokens by features by channels."""
FEW_BLOCKS = 16
"""Blocks of rows of which backward keeps every state; of more, those of about the square root twice."""


class Stream(NamedTuple):
    """The keys of one mode that a block of rows brings into sight; features (R, c) in runs, weighted (c, e + 1)."""

    features: Array
    weighted: Array


class CausalRows:
    """One plane under a causal mask, while a function of it is traced."""

    def __init__(
        self,
        kernel: JaxPolynomialKernel,
        plane: Plane,
        projections: Projections,
        bounds: Bounds,
        scales: Array,
        sizes: bool,
    ) -> None:
        self.kernel, self.plane, self.projections, self.scales = kernel, plane, projections, scales
        self.sizes = sizes
        self.shifts = bounds.last
        self.lengths = kernel.problem.lengths
        self.rows = min(kernel.chunk, kernel.problem.queries)
        self.shrinks = tuple(2.0 ** -round(log2(max(m, 1)) / 2) for m in self.lengths)
        length = max(1, RUNNING_ELEMENTS // (self.rows * (kernel.problem.value_width + 1)))
        self.runs = Runs.of(kernel.table.offsets, min(length, kernel.sum_block))
        self.run = self.runs.index.shape[1]
        weights, factors = kernel.unit_entries(self.runs, kernel.monomial_weights(scales))
        self.weights, self.factors = weights.reshape(-1, 1), factors * kernel.signs

    def features(self, position: int, rows: Array) -> Array:
        """Return the features of rows (c, d_t) in runs: (R, c)."""
        found = self.runs.split(self.kernel.scaled_features(self.projections, position, rows, self.scales))
        return found.reshape(-1, found.shape[-1])

    def stream(self, mode: int, index: Array, wanted: Array) -> Stream:
        """Return the keys at `index` (c,) where they are wanted and there; zeros elsewhere."""
        length = self.lengths[mode]
        there = wanted & (index >= 0) & (index < length)
        at = jnp.clip(index, 0, length - 1)
        keys, values = (jnp.where(there[:, None], x[mode][at], 0.0) for x in (self.plane.keys, self.plane.values))
        weights = jnp.where(there, self.plane.weights[mode][at], 0.0)
        weighted = with_weights(values, weights) * jnp.asarray(self.shrinks[mode], values.dtype)
        return Stream(self.features(mode + 1, keys), weighted)

    def initial(self) -> Carry:
        """Return the sums over the keys before the first row's own, which every row sees."""
        channels = self.kernel.problem.value_width + 1
        carries = []
        for mode, length in enumerate(self.lengths):
            size, shift = min(self.kernel.sum_block, length), self.shifts[mode]
            zeros = as_varying(jnp.zeros((self.weights.shape[0], channels), jnp.float64), self.plane.keys[mode])

            def add(
                carry: tuple[Array, Array], number: Array, mode: int = mode, size: int = size, shift: Array = shift
            ) -> tuple[tuple[Array, Array], None]:
                index = number * size + jnp.arange(size)

                def added(carry: tuple[Array, Array]) -> tuple[Array, Array]:
                    return self.advanced((carry,), (self.stream(mode, index, index < shift),))[0]

                return lax.cond(number * size < shift, jax.checkpoint(added), lambda same: same, carry), None

            carry, _ = lax.scan(add, (zeros, zeros[:, -1:]), jnp.arange(block_count(length, size)))
            carries.append(carry)
        return tuple(carries)

    def block(self, carry: Carry, number: Array, centre: Array, live: Array) -> tuple[Carry, tuple[Array, ...]]:
        """Return the carry after a block of rows, and output, mean, moments and magnitude of the rows (h, c, ..)."""
        index = number * self.rows + jnp.arange(self.rows)
        at = jnp.minimum(index, self.kernel.problem.queries - 1)
        every = jnp.ones(index.shape, bool)
        streams = tuple(self.stream(t, index + self.shifts[t], every) for t in range(len(self.lengths)))
        query = jax.vmap(lambda rows: self.features(0, rows[at]))(self.plane.query) * self.weights
        counts = [
            state[0, -1] + jnp.cumsum(part.weighted[:, -1].astype(jnp.float64))
            for (state, _), part in zip(carry, streams, strict=True)
        ]
        total = reduce(jnp.multiply, counts)
        total = jnp.where(total == 0.0, 1.0, total)
        sums, absolute = self._readings(query, streams, carry)
        sums = sums * self.factors[:, None, None, None] / total[:, None]
        absolute = absolute * jnp.abs(self.factors)[:, None, None] / total
        rows = jax.vmap(self.kernel.finished, in_axes=(1, 1, 0, 0))(sums, absolute, centre[:, at], live[:, at])
        return self.advanced(carry, streams), rows

    def _readings(self, query: Array, streams: tuple[Stream, ...], carry: Carry) -> tuple[Array, Array]:
        """Return per degree the readings (s, h, c, e + 1), and those of absolute terms (s, h, c), not over counts."""
        dtype = query.dtype

        def one(number: Array) -> tuple[Array, Array]:
            start = number * self.run
            states, sizes = [], []
            for stream, (state, absolute) in zip(streams, carry, strict=True):
                features = lax.dynamic_slice_in_dim(stream.features, start, self.run)
                terms = features.T[:, :, None] * stream.weighted[:, None, :]
                state = lax.dynamic_slice_in_dim(state, start, self.run).astype(dtype)
                states.append(state[None] + jnp.cumsum(terms, axis=0))
                if self.sizes:
                    absolute = lax.dynamic_slice_in_dim(absolute, start, self.run).astype(dtype)
                    sizes.append(absolute + jnp.cumsum(jnp.abs(features) * stream.weighted[:, -1], axis=1))
            rows = lax.dynamic_slice_in_dim(query, start, self.run, axis=1)
            product = reduce(jnp.multiply, states)
            read = jnp.einsum("hlc,cle->hce", rows, product, precision=HIGHEST)
            if not self.sizes:
                return read.astype(jnp.float64), jnp.zeros(read.shape[:2], jnp.float64)
            size = jnp.sum(jnp.abs(rows) * reduce(jnp.multiply, sizes), axis=1)
            return read.astype(jnp.float64), size.astype(jnp.float64)

        found, sizes = lax.map(jax.checkpoint(one), jnp.arange(len(self.runs.degrees)))
        return self.runs.by_degree(found), self.runs.by_degree(sizes)

    def advanced(self, carry: Carry, streams: tuple[Stream, ...]) -> Carry:
        """Return the carry with the keys of a block added."""
        new = []
        for (state, absolute), stream in zip(carry, streams, strict=True):
            if self.sizes:
                absolute = absolute + summed(jnp.abs(stream.features).T, stream.weighted[:, -1:])
            new.append((state + summed(stream.features.T, stream.weighted), absolute))
        return tuple(new)


def causal_rows(walk: CausalRows, centre: Array, live: Array) -> tuple[Array, ...]:
    """Return output, mean, moments and magnitude (c, n, ..) of the rows of a plane.

    Cost:    (3 k + 1) r (e + 1) elementwise operations a token; workspace k r (e + 1) and a block of features.
             Backward keeps the states of about 2 sqrt(blocks) blocks, or of 16.
    Source:  prefix sums of low-rank factors for order 1, Liang et al., arXiv 2405.05219; products of them are ours.
    """
    queries = walk.kernel.problem.queries
    count = block_count(queries, walk.rows)
    inner = count if count <= FEW_BLOCKS else isqrt(count - 1) + 1
    outer = block_count(count, inner)

    def block(carry: Carry, number: Array) -> tuple[Carry, tuple[Array, ...]]:
        return walk.block(carry, number, centre, live)

    def blocks(carry: Carry, numbers: Array) -> tuple[Carry, tuple[Array, ...]]:
        carry, rows = lax.scan(jax.checkpoint(block, prevent_cse=False), carry, numbers)
        return carry, rows

    numbers = jnp.arange(outer * inner).reshape(outer, inner)
    kept_once = blocks if outer == 1 else jax.checkpoint(blocks, prevent_cse=False)
    _, found = lax.scan(kept_once, walk.initial(), numbers)

    def in_order(x: Array) -> Array:
        """(outer, inner, h, c, ..) to (h, n, ..)."""
        x = jnp.moveaxis(x, 2, 0)
        return x.reshape(x.shape[0], -1, *x.shape[4:])[:, :queries]

    return tuple(in_order(x) for x in found)
