"""Sums the gradients of the exact method's tiles and brings them back to the shapes and dtype of the operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from array_api_compat import device

from korder.methods.layout import HeadBlock, Layout, block_of, by_head, select_rows
from korder.methods.masks import OuterBlock, Range
from korder.methods.tiles import TileGradients, Wanted
from korder.methods.walk import InnerSide, OuterSide, TileWalk
from korder.planning.expression import outer_modes
from korder.problem import Problem
from korder.spi.operands import OperandGradients, Operands

Array = Any
Add = Callable[[Array, Sequence[Range], Array], Array]


class GradientSums:
    """Running sums of one backward call, laid out as `Layout`."""

    def __init__(
        self, xp: Any, problem: Problem, layout: Layout, contracted: int, add: Add, needs: frozenset[str]
    ) -> None:
        self.xp, self.problem, self.layout, self.needs = xp, problem, layout, needs
        self.contracted, self.outer = contracted, outer_modes(problem.order, contracted)
        self._add = add
        # The gradient of CP factors comes through the projected query and keys.
        projected = "weight" in needs and problem.weight == "cp"
        self.query = self._zeros(layout.query, "query" in needs or projected)
        self.keys = [self._zeros(key, "keys" in needs or projected) for key in layout.keys]
        self.values = [self._zeros(value, "values" in needs) for value in layout.values]
        self.biases = [self._zeros(bias, "biases" in needs) for bias in layout.biases]
        self.weight = self._zeros(layout.weight, "weight" in needs)

    def _zeros(self, like: Array | None, wanted: bool) -> Array | None:
        if like is None or not wanted:
            return None
        return self.xp.zeros(like.shape, dtype=like.dtype, device=device(like))

    def set(self, query: Array, keys: Sequence[Array], values: Sequence[Array]) -> None:
        """Take gradients of laid-out operands that were computed whole, as far as they are wanted."""
        self.query = None if self.query is None else query
        for sums, found in ((self.keys, keys), (self.values, values)):
            sums[:] = [None if old is None else new for old, new in zip(sums, found, strict=True)]

    def wanted(self) -> Wanted:
        """Return which gradients of a tile these sums take."""
        through_query = self.query is not None or self.weight is not None
        return Wanted(
            queries=through_query or any(self.keys[t] is not None for t in self.outer),
            keys=self.keys[self.contracted] is not None,
            values=self.values[self.contracted] is not None,
            outer_biases=any(self.biases[t] is not None for t in self.outer),
            inner_biases=self.biases[self.contracted] is not None,
        )

    def add_contracted(self, heads: HeadBlock, rows: Range, keys: Range, inner: InnerSide, tile: TileGradients) -> None:
        """Add what a tile gives to the contracted mode."""
        self._add_mode(self.contracted, heads, keys, inner.seen, tile.keys, tile.values)
        self._add_bias(self.contracted, heads, rows, keys, inner.seen, tile.inner_biases)

    def add_outer(
        self, walk: TileWalk, side: OuterSide, heads: HeadBlock, rows: Range, block: OuterBlock, tile: TileGradients
    ) -> Array | None:
        """Add what the tiles of an outer block give to the outer modes, and return the gradient of the query block."""
        query, *keys = [None] * (len(self.outer) + 1) if tile.query is None else walk.unfold(side, tile.query)
        values = [None] * len(self.outer) if tile.gate is None else walk.ungate(side, tile.gate)
        for axis, (t, span) in enumerate(zip(self.outer, block.ranges, strict=True)):
            self._add_mode(t, heads, span, side.seen[axis], keys[axis], values[axis])
            if tile.outer_biases is not None and self.biases[t] is not None:
                bias = self._one_outer_mode(tile.outer_biases, side.counts, axis)
                self._add_bias(t, heads, rows, span, side.seen[axis], bias)
        return query

    def add_rows(self, heads: HeadBlock, rows: Range, gradient: Array) -> None:
        """Add the gradient of a block of queries, or of its product with a full weight."""
        where = (heads.batch, heads.groups, heads.heads, rows)
        xp, weight = self.xp, self.layout.weight
        if weight is not None:
            gradient = xp.reshape(gradient, (*gradient.shape[:4], weight.shape[1]))
            if self.weight is not None:
                query = block_of(self.layout.query, where)
                self.weight = self.weight + _as_rows(xp, query).T @ _as_rows(xp, gradient)
            gradient = gradient @ weight.T
        if self.query is not None:
            self.query = self._add(self.query, where, gradient)

    def _add_mode(
        self, mode: int, heads: HeadBlock, span: Range, seen: Array | None, key: Array | None, value: Array | None
    ) -> None:
        where = (heads.batch, heads.groups, span)
        for sums, part in ((self.keys, key), (self.values, value)):
            if part is not None and sums[mode] is not None:
                chosen = part if seen is None else select_rows(self.xp, seen, part)
                sums[mode] = self._add(sums[mode], where, chosen)

    def _add_bias(
        self, mode: int, heads: HeadBlock, rows: Range, span: Range, seen: Array | None, part: Array | None
    ) -> None:
        """Add the gradient of the biases of a mode, (b, g, c, I, m), summed over the axes that a bias shares."""
        total = self.biases[mode]
        if total is None or part is None:
            return
        if seen is not None:
            part = self.xp.where(seen, part, self.xp.zeros_like(part))
        where = [heads.batch, heads.groups, heads.heads, rows, span]
        shared = tuple(axis for axis in range(4) if total.shape[axis] == 1)
        if shared:
            part = self.xp.sum(part, axis=shared, keepdims=True)
        for axis in shared:
            where[axis] = (0, 1)
        self.biases[mode] = self._add(total, where, part)

    def _one_outer_mode(self, part: Array, counts: tuple[int, ...], axis: int) -> Array:
        part = self.xp.reshape(part, (*part.shape[:4], *counts))
        others = tuple(4 + other for other in range(len(counts)) if other != axis)
        return self.xp.sum(part, axis=others) if others else part

    def finish(self, operands: Operands, *, tame: bool) -> OperandGradients:
        """Return the gradients in the operands' shapes and dtype."""
        xp, needs = self.xp, self.needs
        query = None if self.query is None else by_head(xp, self.query)
        keys: list[Array | None] = list(self.keys)
        weight: Array | tuple[Array, ...] | None = None
        if isinstance(operands.weight, tuple):
            if "weight" in needs:
                weight = self._factors(operands, query, keys, tame)
            wide = [xp.astype(factor, self.layout.query.dtype, copy=False) for factor in operands.weight]
            query = None if query is None else query @ wide[0].T
            keys = [None if key is None else key @ u.T for key, u in zip(keys, wide[1:], strict=True)]
        elif self.weight is not None and operands.weight is not None:
            weight = xp.reshape(self.weight, operands.weight.shape)
        if "query" in needs and query is not None:
            query = self._narrow(query * self.problem.scale, operands)
        keys = (
            [self._of_mode(t, key, operands) for t, key in enumerate(keys)] if "keys" in needs else [None] * len(keys)
        )
        return OperandGradients(
            query=query if "query" in needs else None,
            keys=tuple(keys),
            values=tuple(self._of_mode(t, value, operands) for t, value in enumerate(self.values)),
            biases=tuple(
                None if total is None or given is None else self._narrow(xp.reshape(total, given.shape), operands)
                for total, given in zip(self.biases, operands.biases or (None,) * len(keys), strict=True)
            ),
            weight=tuple(self._narrow(x, operands) for x in weight)
            if isinstance(weight, tuple)
            else self._narrow(weight, operands),
        )

    def _factors(self, operands: Operands, query: Array, keys: list[Array | None], tame: bool) -> tuple[Array, ...]:
        """Gradients of the CP factors: operand transposed times the gradient of its projection."""
        xp = self.xp
        given = [(operands.query, query * self.problem.scale), *zip(operands.keys, keys, strict=True)]
        factors = []
        for t, (operand, gradient) in enumerate(given):
            operand = xp.astype(operand, gradient.dtype, copy=False)
            mask = operands.key_masks[t - 1] if t and operands.key_masks else None
            if mask is not None:
                operand = select_rows(xp, mask, operand)
            if not tame:  # rows that nothing sees may hold anything
                operand = select_rows(xp, xp.any(gradient != 0.0, axis=-1), operand)
            factors.append(_as_rows(xp, operand).T @ _as_rows(xp, gradient))
        return tuple(factors)

    def _of_mode(self, mode: int, gradient: Array | None, operands: Operands) -> Array | None:
        mask = operands.key_masks[mode] if operands.key_masks else None
        if gradient is not None and mask is not None:
            gradient = select_rows(self.xp, mask, gradient)
        return self._narrow(gradient, operands)

    def _narrow(self, gradient: Array | None, operands: Operands) -> Array | None:
        return None if gradient is None else self.xp.astype(gradient, operands.query.dtype, copy=False)


def merged(held: TileGradients | None, tile: TileGradients) -> TileGradients:
    """Return the sum of the outer gradients of two tiles that share their outer side."""
    if held is None:
        return tile
    return TileGradients(
        query=_plus(held.query, tile.query),
        gate=_plus(held.gate, tile.gate),
        keys=None,
        values=None,
        outer_biases=_plus(held.outer_biases, tile.outer_biases),
        inner_biases=None,
    )


def _plus(left: Array | None, right: Array | None) -> Array | None:
    return right if left is None else left if right is None else left + right


def _as_rows(xp: Any, x: Array) -> Array:
    return xp.reshape(x, (prod(x.shape[:-1]), x.shape[-1]))
