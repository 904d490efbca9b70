"""What is done with the features of a block of tokens; a backend that makes them where they are used overrides it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import device

from korder.methods.features import parents
from korder.methods.readings import FinishedRows, Reading, ReadTable, centred_coefficients, finish_rows

if TYPE_CHECKING:
    from korder.methods.factors import Factor, Plane
    from korder.methods.features import FeatureTable
    from korder.planning.plan import PolynomialPlan

Array = Any
State = tuple[Array, Array]
"""Sums over keys of u [w v, w] (r, e + 1) and of |u| w (r, 1), float64."""


class FeatureBlock:
    """Columns (w, c) of a block of tokens over their scales, and their features, made when they are asked for."""

    def __init__(self, kernel: Any, columns: Array) -> None:
        self._kernel, self.columns = kernel, columns

    @cached_property
    def features(self) -> Array:
        """The monomials (r, c)."""
        return self._kernel.features(self.columns)


class BlockPasses:
    """The passes over blocks of tokens, in terms of features and products; a mixin of `PolynomialKernel`.

    Sums and tables belong to whoever made them: `new_sums` and `laid_out` say what they are.
    """

    xp: Any
    table: FeatureTable
    polynomial: PolynomialPlan
    dtype: Any
    scale_sign: float

    # the operations of the kernel that these passes are made of
    scaled: Any
    product: Any
    adjoint: Any
    constants: Any

    def add_keys(self, plane: Plane, mode: int, scales: Array, tokens: tuple[int, int], state: State) -> State:
        """Return the state of a mode with a block of keys added; scales (k + 1, w)."""
        block = FeatureBlock(self, self.scaled(plane.keys[mode], scales[mode + 1, ...], *tokens))
        weighted = plane.values_and_weights(self.xp, mode, *tokens)
        sums = self.product(block.features, weighted, state[0])
        return sums, self.absolute_sums(block.columns, block.features, weighted[:, -1:], state[1])

    def finish_block(
        self, query: Factor, scale: Array, tokens: tuple[int, int], table: ReadTable, rows: tuple[Array, Array]
    ) -> FinishedRows:
        """Return what a block of rows comes to, given their centres (c,) and whether they are live (c,)."""
        block = FeatureBlock(self, self.scaled(query, scale, *tokens))
        return finish_rows(self.xp, self.polynomial.values, self.read(block, table), *rows)

    def shares(self, centre: Array) -> list[Array]:
        """Return the coefficients of the score's powers in rows of these centres (c,): one (c,) for each degree."""
        return centred_coefficients(self.polynomial.values, -centre)

    def read(self, block: FeatureBlock, table: ReadTable) -> Reading:
        """Return the means of the score's powers at a block of rows."""
        xp = self.xp
        sums = []
        for s in range(self.polynomial.degree + 1):
            rows = xp.permute_dims(block.features[self.table.rows(s), :], (1, 0))
            sums.append(self.product(rows, table.values[s]) * table.factors[s])
        absolute = self.absolute_read(block.columns, block.features, table.absolute)
        return Reading(sums, [x * factor for x, factor in zip(absolute, table.absolute_factors, strict=True)])

    def new_sums(self, like: list[Array]) -> Any:
        """Return zeros to collect into, one (r_s, e + 1) per degree of the kernel, on the device of `like`."""
        return [self.xp.zeros_like(x, dtype=self.xp.float64) for x in like[: self.polynomial.degree + 1]]

    def collect(self, block: FeatureBlock, shares: list[Array], gradient: Array, sums: Any) -> None:
        """Add to the sums of every degree s the block's features times gradient (c, e + 1), each row by shares[s] (c,).

        The block's features may reach to a higher degree than the kernel's.
        """
        for s, share in enumerate(shares):
            power = self.xp.astype(share[:, None] * gradient * self.scale_sign**s, self.dtype)
            sums[s] = self.product(block.features[self.table.rows(s), :], power, sums[s])

    def joined(self, sums: Any) -> Array:
        """Return collected sums as one (r, e + 1)."""
        return self.xp.concat(sums, axis=0)

    def laid_out(self, table: list[Array]) -> Any:
        """Return a table, one (r_s, e + 1) in the compute dtype per degree, as the passes below want it."""
        return table

    def columns_gradient(
        self, block: FeatureBlock, table: Any, values: Array, shares: list[Array] | None = None
    ) -> Array:
        """Return the gradient of the columns (w, c), that of the features being table @ values (c, e + 1).

        Args:
            block: The tokens.
            table: As `laid_out` returned it.
            values: In the compute dtype; in float64 with shares.
            shares: For each degree what it multiplies each token's values with, (c,) float64.
        """
        xp = self.xp
        parts = []
        for s, entries in enumerate(table):
            part = values if shares is None else xp.astype(shares[s][:, None] * values, self.dtype)
            parts.append(xp.matmul(entries, xp.permute_dims(part, (1, 0))))
        return self.adjoint(block.columns, block.features, xp.concat(parts, axis=0))

    def read_sums(self, block: FeatureBlock, table: Any) -> Array:
        """Return features times a table: (c, e + 1) float64. The block's features may be more than the kernel's."""
        total = None
        for s, entries in enumerate(table):
            rows = self.xp.permute_dims(block.features[self.table.rows(s), :], (1, 0))
            total = self.product(rows, entries, total)
        return total

    def absolute_sums(self, columns: Array, features: Array, weights: Array, total: Array | None = None) -> Array:
        """Return total (r, 1) + the sums over tokens of |features| (r, c) times weights (c, 1), as `product` does.

        Those of the highest degree are products of |columns| with |features| of one degree less, so that no absolute
        value of the many highest ones is ever taken.
        """
        xp, degree = self.xp, self.table.degree
        if degree == 0:
            return self.product(xp.abs(features), weights, total)
        lower = xp.abs(features[: self.table.offsets[degree], :])
        pairs = self.product(lower[self.table.rows(degree - 1), :], xp.permute_dims(xp.abs(columns), (1, 0)) * weights)
        highest = xp.take(xp.reshape(pairs, (-1,)), self._indices(device(pairs))[0], axis=0)
        found = xp.concat([self.product(lower, weights), highest[:, None]], axis=0)
        return found if total is None else total + found

    def absolute_read(self, columns: Array, features: Array, table: list[Array]) -> list[Array]:
        """Return, per degree, the sums over features of |features| (r_s, c) times table[s] (r_s, 1): (c,) float64.

        Those of the highest degree as in `absolute_sums`.
        """
        xp, degree = self.xp, self.table.degree
        lower = xp.abs(features[: self.table.offsets[max(degree, 1)], :])
        rows = [xp.permute_dims(lower[self.table.rows(s), :], (1, 0)) for s in range(max(degree, 1))]
        found = [self.product(part, entries)[:, 0] for part, entries in zip(rows, table, strict=False)]
        if degree == 0:
            return found
        entries = xp.concat([table[degree][:, 0], xp.zeros_like(table[degree][:1, 0])], axis=0)
        pairs = xp.reshape(xp.take(entries, self._indices(device(entries))[1], axis=0), (rows[-1].shape[1], -1))
        spread = self.product(rows[-1], pairs)
        return [*found, xp.sum(spread * xp.permute_dims(xp.abs(columns), (1, 0)), axis=1)]

    def _indices(self, where: Any) -> tuple[Array, Array]:
        """Return, in pairs (parent, variable), where each monomial of the highest degree is; and its inverse.

        A pair that is no monomial, because its variables are not in order, has the index after the last monomial.
        """

        def make() -> tuple[np.ndarray, np.ndarray]:
            above, variables = parents(self.table, self.table.degree)
            pairs = above * self.table.width + variables
            lower = self.table.rows(self.table.degree - 1)
            inverse = np.full((lower.stop - lower.start) * self.table.width, len(pairs))
            inverse[pairs] = np.arange(len(pairs))
            return pairs, inverse

        first, inverse = self.constants("pairs", where, make)
        return first, inverse
