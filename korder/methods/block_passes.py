"""What is done with the features of a block of tokens; a backend that makes them where they are used overrides it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from korder.methods.readings import FinishedRows, Reading, ReadTable, finish_rows

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
    absolute_sums: Any
    absolute_read: Any

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
