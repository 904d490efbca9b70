"""Operands as the exact method wants them: by key head, scaled, projected, masked keys zeroed; and the way back.

The query heads that share a key head stand on an axis of their own, so grouped heads never copy keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

from korder.methods.masks import Range, blocks
from korder.problem import Problem
from korder.spi.operands import Operands

Array = Any


@dataclass(frozen=True, slots=True)
class Layout:
    """The operands of one call in the dtype of its sums.

    Shapes:
        query (b, g, c, n, d) with the scale in it, c = h / g; keys[t] (b, g, m_t, d_t); values[t] (b, g, m_t, e);
        biases[t] (b, g, c, n, m_t) or None, any axis but the last may be 1; key_masks[t] (b, g or 1, 1, 1, m_t) or
        None; weight None or the full weight as a matrix (d, d1 * .. * dk). CP factors are multiplied in already.
    """

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    biases: tuple[Array | None, ...]
    key_masks: tuple[Array | None, ...]
    weight: Array | None


@dataclass(frozen=True, slots=True)
class HeadBlock:
    """Heads of one tile: ranges over batch, key heads, and the query heads of one key head."""

    batch: Range
    groups: Range
    heads: Range


def head_blocks(problem: Problem, count: int) -> Iterator[HeadBlock]:
    """Yield blocks of about `count` query heads: whole batches, else whole key heads, else heads of one key head."""
    share = problem.heads // problem.groups
    per_batch = max(count // problem.heads, 1) if problem.heads else 1
    per_group = problem.groups if count >= problem.heads else max(count // share, 1)
    per_share = share if count >= share else max(count, 1)
    for batch in blocks(0, problem.batch, per_batch):
        for groups in blocks(0, problem.groups, per_group):
            for heads in blocks(0, share, per_share):
                yield HeadBlock(batch, groups, heads)


def lay_out(xp: Any, problem: Problem, operands: Operands) -> Layout:
    """Return the operands laid out for the exact method."""
    wide = getattr(xp, problem.accumulation)
    keys = [xp.astype(key, wide, copy=False) for key in operands.keys]
    values = [xp.astype(value, wide, copy=False) for value in operands.values]
    masks = operands.key_masks or (None,) * problem.order
    for t, mask in enumerate(masks):
        if mask is not None:
            keys[t] = select_rows(xp, mask, keys[t])
            values[t] = select_rows(xp, mask, values[t])
    query = xp.astype(operands.query, wide, copy=False) * problem.scale
    weight = None
    if isinstance(operands.weight, tuple):
        factors = [xp.astype(factor, wide, copy=False) for factor in operands.weight]
        query = query @ factors[0]
        keys = [key @ factor for key, factor in zip(keys, factors[1:], strict=True)]
    elif operands.weight is not None:
        weight = xp.astype(operands.weight, wide, copy=False)
        weight = xp.reshape(weight, (weight.shape[0], prod(weight.shape[1:])))
    return Layout(
        query=by_key_head(xp, query, problem.groups),
        keys=tuple(keys),
        values=tuple(values),
        biases=tuple(
            None if bias is None else by_key_head(xp, xp.astype(bias, wide, copy=False), problem.groups)
            for bias in operands.biases or (None,) * problem.order
        ),
        key_masks=tuple(None if mask is None else mask[:, :, None, None, :] for mask in masks),
        weight=weight,
    )


def by_key_head(xp: Any, x: Array, groups: int) -> Array:
    """(b, h, ..) to (b, g, c, ..); a head axis of 1 becomes (1, 1), also when there are several key heads."""
    split = (1, 1) if x.shape[1] == 1 else (groups, x.shape[1] // groups)
    return xp.reshape(x, (x.shape[0], *split, *x.shape[2:]))


def by_head(xp: Any, x: Array) -> Array:
    """(b, g, c, ..) to (b, h, ..)."""
    return xp.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]))


def select_rows(xp: Any, mask: Array, x: Array) -> Array:
    """Zero the rows of masked keys; selected, not multiplied, so that whatever they hold is gone."""
    return xp.where(mask[..., None], x, xp.zeros_like(x))


def block_of(x: Array, ranges: Sequence[Range]) -> Array:
    """Return the block of `x` at `ranges`, one per leading axis."""
    return x[(*(slice(*span) for span in ranges), ...)]


def shared_block(x: Array, ranges: Sequence[Range]) -> Array:
    """Return the block of `x` at `ranges`, one per axis; an axis of length one is shared and taken whole."""
    return block_of(x, [(0, 1) if size == 1 else span for size, span in zip(x.shape, ranges, strict=True)])


def put(xp: Any, total: Array, ranges: Sequence[Range], part: Array, axis: int = 0) -> Array:
    """Return `total` with the block at `ranges` replaced, one range per leading axis; nothing is changed in place."""
    if axis == len(ranges):
        return part
    start, stop = ranges[axis]
    if (start, stop) == (0, total.shape[axis]):
        return put(xp, total, ranges, part, axis + 1)
    before = [(0, size) for size in total.shape[:axis]]
    inner = put(xp, block_of(total, [*before, (start, stop)]), ranges, part, axis + 1)
    outside = [block_of(total, [*before, span]) for span in ((0, start), (stop, total.shape[axis]))]
    return xp.concat([outside[0], inner, outside[1]], axis=axis)


def is_tame(xp: Any, layout: Layout, *cotangents: Array | None) -> bool:
    """Whether no score, value product or gradient can be NaN or infinite, so that a weight of zero times it is zero.

    Cost: one pass over the operands.
    """
    largest = [_largest(xp, x) for x in (layout.query, *layout.keys)]
    scores = prod(largest) * layout.query.shape[-1] * layout.keys[-1].shape[-1]
    if layout.weight is not None:
        scores *= _largest(xp, layout.weight) * layout.weight.shape[1]
    products = prod(_largest(xp, x) for x in layout.values) * layout.values[0].shape[-1]
    for cotangent in cotangents:
        if cotangent is not None:
            products *= max(_largest(xp, cotangent), 1.0)
    limit = float(xp.finfo(layout.query.dtype).max) / 16
    # A bias of -inf is a mask; NaN and +inf are not tame.
    biases = all(bool(xp.all(bias < inf)) for bias in layout.biases if bias is not None)
    return biases and scores < limit and products * max(scores, 1.0) < limit


def _largest(xp: Any, x: Array) -> float:
    return float(xp.max(xp.abs(x))) if prod(x.shape) else 0.0
