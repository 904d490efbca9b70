"""The tuples that won, for every query: walks the tiles of the exact method and keeps the best few scores of each."""

from __future__ import annotations

from math import inf, prod
from typing import Any

from array_api_compat import device

from korder.methods.exact import ExactKernel
from korder.methods.layout import HeadBlock, by_head, head_blocks, lay_out
from korder.methods.masks import MaskGeometry, OuterBlock, Range, blocks
from korder.methods.tiles import finite_reference
from korder.methods.walk import TileWalk
from korder.planning.expression import outer_modes
from korder.spi.operands import Operands

Array = Any


class TopTuples(ExactKernel):
    """Finds the `count` tuples of largest weight, by the tiles of an exact plan.

    Cost: 2 n m1 .. mk d flop and one pass over each tile; `count` scores and positions per query are kept.
    """

    def top(self, operands: Operands, count: int) -> tuple[Array, Array]:
        """Return the winning tuples and their probabilities, largest first.

        Shapes:
            indices (b, h, n, count, k), -1 where there is no such tuple; probabilities (b, h, n, count), 0 there, and
            NaN for a query that sees NaN.
        """
        xp, problem = self.xp, self.plan.problem
        layout = lay_out(xp, problem, operands)
        walk = self._walk(layout, operands)
        shape, on = (*layout.query.shape[:4], count), device(layout.query)
        scores = xp.full(shape, -inf, dtype=layout.query.dtype, device=on)
        tuples = xp.full(shape, -1, dtype=xp.int64, device=on)
        lse = xp.full(shape[:4], -inf, dtype=layout.query.dtype, device=on)
        for heads in head_blocks(problem, walk.tiling.heads):
            for rows in blocks(0, problem.queries, walk.tiling.queries):
                best = _Best(xp, walk, heads, rows, count)
                for block in walk.outer_blocks(rows):
                    self._visit(walk, best, block)
                where = (heads.batch, heads.groups, heads.heads, rows)
                scores = self.put(scores, where, best.scores)
                tuples = self.put(tuples, where, best.tuples)
                lse = self.put(lse, where, best.lse())
        found = scores > -inf
        probabilities = xp.where(found, xp.exp(scores - finite_reference(xp, lse)[..., None]), xp.zeros_like(scores))
        # a query that sees NaN has no winner, and must not look as if it had few tuples
        probabilities = xp.where(xp.isnan(lse)[..., None], lse[..., None], probabilities)
        tuples = xp.where(found, tuples, -xp.ones_like(tuples))
        return by_head(xp, _indices(xp, tuples, problem.lengths)), by_head(xp, probabilities)

    def _visit(self, walk: TileWalk, best: _Best, block: OuterBlock) -> None:
        side = walk.outer_side(walk.query(best.heads, best.rows), best.heads, best.rows, block)
        if side is None:
            return
        for keys in walk.key_blocks(best.rows, block):
            inner = walk.inner_side(best.heads, best.rows, keys)
            if inner is not None:
                mask = walk.mask(best.rows, block, keys)
                scores = walk.arithmetic.scores(side.folded, inner.contracted, mask)
                best.absorb(scores, _numbers(self.xp, walk.geometry, block, keys, device(scores)))


class _Best:
    """The best scores so far of a block of queries, the numbers of their tuples, and the running sum for lse.

    Shapes:  scores, tuples (b, g, c, I, count); reference, total (b, g, c, I).
    """

    def __init__(self, xp: Any, walk: TileWalk, heads: HeadBlock, rows: Range, count: int) -> None:
        self.xp, self.heads, self.rows, self.count = xp, heads, rows, count
        ranges = (heads.batch, heads.groups, heads.heads, rows)
        shape = tuple(stop - start for start, stop in ranges)
        like, on = walk.layout.query.dtype, device(walk.layout.query)
        self.scores = xp.full((*shape, count), -inf, dtype=like, device=on)
        self.tuples = xp.full((*shape, count), -1, dtype=xp.int64, device=on)
        self.reference = xp.full(shape, -inf, dtype=like, device=on)
        self.total = xp.zeros(shape, dtype=like, device=on)

    def absorb(self, scores: Array, numbers: Array) -> None:
        """Take in a tile, scores (b, g, c, I, F, S) of the tuples numbered (F, S)."""
        xp = self.xp
        flat = xp.reshape(scores, (*scores.shape[:4], prod(scores.shape[4:])))
        highest = xp.max(flat, axis=-1)
        reference = xp.maximum(self.reference, highest)
        shift = finite_reference(xp, reference)
        weights = xp.sum(xp.exp(flat - shift[..., None]), axis=-1)
        self.total = self.total * xp.exp(self.reference - shift) + weights
        self.reference = reference
        # Once the best are known, few tiles hold a better one.
        if bool(xp.any(highest > self.scores[..., -1])):
            self._insert(flat, xp.reshape(numbers, (-1,)))

    def _insert(self, flat: Array, numbers: Array) -> None:
        xp = self.xp
        chosen = largest(xp, flat, min(self.count, flat.shape[-1]))
        scores = xp.concat([self.scores, xp.take_along_axis(flat, chosen, axis=-1)], axis=-1)
        tuples = xp.concat(
            [self.tuples, xp.reshape(xp.take(numbers, xp.reshape(chosen, (-1,))), chosen.shape)], axis=-1
        )
        order = xp.argsort(scores, axis=-1, descending=True)[..., : self.count]
        self.scores = xp.take_along_axis(scores, order, axis=-1)
        self.tuples = xp.take_along_axis(tuples, order, axis=-1)

    def lse(self) -> Array:
        """Natural log of the row sums, -inf where nothing was live."""
        xp = self.xp
        empty = self.total == 0.0
        total = xp.where(empty, xp.ones_like(self.total), self.total)
        return xp.where(empty, self.reference, finite_reference(xp, self.reference) + xp.log(total))


def largest(xp: Any, x: Array, count: int) -> Array:
    """Return the positions of the `count` largest entries along the last axis, in any order.

    Cost: linear where the library has a partial sort, which the Array API standard lacks; else one sort.
    """
    if hasattr(xp, "argpartition"):
        return xp.argpartition(x, -count, axis=-1)[..., -count:]
    if hasattr(xp, "topk"):
        return xp.topk(x, count, dim=-1).indices
    return xp.argsort(x, axis=-1, descending=True)[..., :count]


def _numbers(xp: Any, geometry: MaskGeometry, block: OuterBlock, keys: Range, place: Any) -> Array:
    """Number of every tuple of a tile in row-major order of all tuples, (F, S)."""
    lengths, contracted = geometry.lengths, geometry.contracted
    stride = [prod(lengths[t + 1 :]) for t in range(len(lengths))]
    outer = outer_modes(len(lengths), contracted)
    whole = {"dtype": xp.int64, "device": place}
    numbers = xp.zeros((1,), **whole)
    for t, (start, stop) in zip(outer, block.ranges, strict=True):
        part = xp.arange(start, stop, **whole) * stride[t]
        numbers = xp.reshape(numbers[:, None] + part[None, :], (-1,))
    return numbers[:, None] + (xp.arange(*keys, **whole) * stride[contracted])[None, :]


def _indices(xp: Any, numbers: Array, lengths: tuple[int, ...]) -> Array:
    """Numbers of tuples to one index per mode on a last axis; -1 stays -1."""
    missing = numbers < 0
    rest, indices = numbers, []
    for length in reversed(lengths):
        size = max(length, 1)
        indices.append(xp.where(missing, numbers, rest % size))
        rest = rest // size
    return xp.stack(list(reversed(indices)), axis=-1)
