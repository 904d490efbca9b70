"""How the exact method cuts the score tensor for XLA: sizes of tiles, and what one tile reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import inf, prod
from typing import Any, NamedTuple

import jax.numpy as jnp

from korder.spi import Plan
from korder_jax.arrays import HIGHEST, block_count, block_start, cleaned, part
from korder_jax.positions import Sight

Array = Any
MASKED_QUERIES = 32
MASKED_KEYS = 128
"""Most queries and contracted keys in a tile under a mask, so that whole tiles can be left out."""
_ROWS, _COLUMNS = "abdefg", "ABCDEF"


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of a tile; `folded` are those of the modes in `outer`, ascending."""

    together: int
    """Key heads in a tile."""
    queries: int
    outer: tuple[int, ...]
    folded: tuple[int, ...]
    contracted: int
    keys: int

    @classmethod
    def of(cls, plan: Plan) -> Tiles:
        """Return the tiles of a plan: as many scores as the plan has in one, so its memory limit holds."""
        problem, tiling = plan.problem, plan.tiling
        assert tiling is not None
        share = problem.heads // problem.groups
        together = max(tiling.heads // share, 1)
        queries = max(tiling.queries * min(tiling.heads, share) // share, 1)
        keys, folded = tiling.keys, tiling.folded
        outer = tuple(t for t in range(problem.order) if t != tiling.contracted)
        lengths = [max(problem.lengths[t], 1) for t in outer]
        if problem.spec.mask.kind != "full" and tiling.looped:
            scores = queries * keys * prod(folded)
            keys = _even(max(problem.lengths[tiling.contracted], 1), MASKED_KEYS)
            queries = _even(max(problem.queries, 1), min(MASKED_QUERIES, max(scores // keys, 1)))
            folded = _folded(lengths, max(scores // (keys * queries), 1))
        keys = min(keys, max(problem.lengths[tiling.contracted], 1))
        folded = tuple(min(size, length) for size, length in zip(folded, lengths, strict=True))
        return cls(together, min(queries, max(problem.queries, 1)), outer, folded, tiling.contracted, keys)

    def blocks(self, lengths: tuple[int, ...]) -> int:
        """Return how many blocks of outer keys there are."""
        return prod(block_count(lengths[t], size) for t, size in zip(self.outer, self.folded, strict=True))


def _even(length: int, size: int) -> int:
    return block_count(length, block_count(length, size))


def _folded(lengths: list[int], count: int) -> tuple[int, ...]:
    sizes: list[int] = []
    for length in reversed(lengths):
        sizes.insert(0, _even(length, max(count, 1)))
        count //= sizes[0]
    return tuple(sizes)


class Unit(NamedTuple):
    """One key head: the arrays of a `Layout` without their first axis, its biases (c, n, m_t), its key masks (m_t,)."""

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    biases: tuple[Array | None, ...]
    weight: Array | None
    masks: tuple[Array | None, ...]


class KeyBlock(NamedTuple):
    """A block of one mode.

    Shapes:  index (S,); key (S, d); value (S, e); extra (c or 1, I or 1, S), what scores get added, -inf where closed.
    """

    start: Array
    index: Array
    key: Array
    value: Array
    extra: Array | None


class UnitTiles:
    """The tiles of one key head while a function of them is traced."""

    def __init__(self, tiles: Tiles, sight: Sight, unit: Unit) -> None:
        self.tiles, self.sight, self.unit = tiles, sight, unit
        self.lengths = tuple(key.shape[0] for key in unit.keys)
        self.queries = unit.query.shape[1]
        self.row_blocks = block_count(self.queries, tiles.queries)

    def rows(self, block: Array) -> tuple[Array, Array]:
        """Return the first row and the rows' indices (I,) of a block."""
        start = block_start(block, self.tiles.queries, self.queries)
        return start, start + jnp.arange(self.tiles.queries, dtype=jnp.int32)

    def query(self, start: Array) -> Array:
        """Return the queries of a block (c, I, d); times a full weight (c, I, d1, .., dk)."""
        return weighted_query(part(self.unit.query, 1, start, self.tiles.queries), self.unit.weight)

    def key_block(self, mode: int, block: Array, size: int, rows: tuple[Array, Array]) -> KeyBlock:
        """Return a block of a mode as a block of rows sees it."""
        length = self.lengths[mode]
        start = block_start(block, size, length)
        index = start + jnp.arange(size, dtype=jnp.int32)
        key, value = part(self.unit.keys[mode], 0, start, size), part(self.unit.values[mode], 0, start, size)
        extra = self._bias(mode, start, size, rows[0])
        open_ = [x[None, None, :] for x in self._key_conditions(mode, block, start, size, index)]
        seen = self.sight.open(mode, rows[1], index)
        open_ += [] if seen is None else [seen[None]]
        if open_:
            wide = jnp.zeros((), key.dtype) if extra is None else extra
            extra = jnp.where(reduce(jnp.logical_and, open_), wide, -inf)
        return KeyBlock(start, index, key, value, extra)

    def _key_conditions(self, mode: int, block: Array, start: Array, size: int, index: Array) -> list[Array]:
        conditions = []
        if self.lengths[mode] % size:  # the last block reaches back over keys that the one before it had
            conditions.append(index >= block * size)
        mask = self.unit.masks[mode]
        if mask is not None:
            conditions.append(part(mask, 0, start, size))
        return conditions

    def _bias(self, mode: int, start: Array, size: int, row: Array) -> Array | None:
        bias = self.unit.biases[mode]
        if bias is None:
            return None
        return part(part(bias, 2, start, size), 1, row, self.tiles.queries)

    def outer(self, block: Array, rows: tuple[Array, Array]) -> list[KeyBlock]:
        """Return the blocks of the outer modes of outer block number `block`."""
        found: list[KeyBlock] = []
        for mode, size in reversed(list(zip(self.tiles.outer, self.tiles.folded, strict=True))):
            count = block_count(self.lengths[mode], size)
            found.insert(0, self.key_block(mode, block % count, size, rows))
            block = block // count
        return found

    def contracted(self, block: Array, rows: tuple[Array, Array]) -> KeyBlock:
        """Return a block of the contracted mode."""
        return self.key_block(self.tiles.contracted, block, self.tiles.keys, rows)

    @property
    def key_blocks(self) -> int:
        """Blocks of the contracted mode."""
        return block_count(self.lengths[self.tiles.contracted], self.tiles.keys)

    def alive(self, rows: tuple[Array, Array], outer: list[KeyBlock], inner: KeyBlock) -> Array:
        """Return whether a tile holds a tuple that its rows may see, as far as positions say."""
        ends = [(block.index[0], block.index[-1]) for block in self._by_mode(outer, inner)]
        return self.sight.alive(rows[1], ends)

    def _by_mode(self, outer: list[KeyBlock], inner: KeyBlock) -> list[KeyBlock]:
        blocks = list(outer)
        blocks.insert(self.tiles.contracted, inner)
        return blocks

    def outer_extra(self, outer: list[KeyBlock]) -> Array | None:
        """Return what the outer modes add to scores, -inf where they close them: (c or 1, I or 1, F)."""
        total = None
        for axis, block in enumerate(outer):
            if block.extra is None:
                continue
            shape = [1] * len(outer)
            shape[axis] = block.extra.shape[-1]
            extra = block.extra.reshape(*block.extra.shape[:2], *shape)
            total = extra if total is None else added(total, extra)
        pairs = [
            self.sight.in_order(t, self._along(outer, t), self._along(outer, t + 1))
            for t in self._ordered_pairs()
            if self.tiles.contracted not in (t, t + 1)
        ]
        if pairs:
            seen = reduce(jnp.logical_and, pairs)
            dtype = self.unit.query.dtype
            total = jnp.where(seen, jnp.zeros((1, 1, *([1] * len(outer))), dtype) if total is None else total, -inf)
        if total is None:
            return None
        total = jnp.broadcast_to(total, (*total.shape[:2], *self.tiles.folded))
        return total.reshape(*total.shape[:2], prod(self.tiles.folded))

    def _ordered_pairs(self) -> range:
        return range(len(self.lengths) - 1) if self.sight.kind == "ordered" else range(0)

    def _along(self, outer: list[KeyBlock], mode: int) -> Array:
        """Indices of an outer mode along its own axis of (F1, ..)."""
        axis = self.tiles.outer.index(mode)
        shape = [1] * len(outer)
        shape[axis] = self.tiles.folded[axis]
        return outer[axis].index.reshape(shape)

    def scores(self, query: Array, extra: Array | None, outer: list[KeyBlock], inner: KeyBlock) -> Array:
        """Return the scores of a tile (c, I, F, S), -inf where closed; `query` are the effective ones (c, I, F, d)."""
        scores = jnp.einsum("cifd,sd->cifs", query, inner.key, precision=HIGHEST)
        if extra is not None:
            scores = added(extra[..., None], scores)
        if inner.extra is not None:
            scores = added(inner.extra[:, :, None, :], scores)
        contracted = self.tiles.contracted
        for t in self._ordered_pairs():
            if contracted in (t, t + 1):
                mode = t + 1 if contracted == t else t
                other = jnp.broadcast_to(self._along(outer, mode), self.tiles.folded).reshape(-1, 1)
                here = inner.index[None, :]
                pair = (here, other) if contracted == t else (other, here)
                scores = jnp.where(self.sight.in_order(t, *pair), scores, -inf)
        return scores


def added(extra: Array, scores: Array) -> Array:
    """Return the sum, -inf wherever `extra` is -inf, or `scores` is."""
    return jnp.where((extra == -inf) | (scores == -inf), -inf, scores + extra)


def weighted_query(query: Array, weight: Array | None) -> Array:
    """Return queries (c, I, d), times a full weight (c, I, d1, .., dk)."""
    if weight is None:
        return query
    return jnp.tensordot(query, weight, axes=1, precision=HIGHEST)


def fold(query: Array, keys: list[Array], modes: tuple[int, ...], *, full: bool) -> Array:
    """Return the effective queries (c, I, F, d): outer keys folded into queries (c, I, d) or (c, I, d1, .., dk)."""
    if full:
        columns, rows = _COLUMNS[: query.ndim - 2], _ROWS[: len(keys)]
        kept = next(column for t, column in enumerate(columns) if t not in modes)
        sides = ",".join([f"ci{columns}", *(f"{row}{columns[t]}" for row, t in zip(rows, modes, strict=True))])
        found = jnp.einsum(f"{sides}->ci{rows}{kept}", query, *keys, precision=HIGHEST)
    else:
        found = query.reshape(*query.shape[:2], *([1] * len(keys)), query.shape[2])
        found = reduce(jnp.multiply, _spread(keys), found)
    return found.reshape(*found.shape[:2], prod(found.shape[2:-1]), found.shape[-1])


def gate(values: list[Array]) -> Array | None:
    """Return the products of the outer values (F, e); None for order 1."""
    if not values:
        return None
    found = reduce(jnp.multiply, _spread(values))
    return found.reshape(prod(found.shape[:-1]), found.shape[-1])


def _spread(arrays: list[Array]) -> list[Array]:
    """(F_t, w) each, with axes of length one for the other outer modes."""
    count = len(arrays)
    return [
        x.reshape(*([1] * axis), x.shape[0], *([1] * (count - 1 - axis)), x.shape[1]) for axis, x in enumerate(arrays)
    ]


def clean(block: KeyBlock) -> KeyBlock:
    """Return a block whose keys and values are finite, for products with weights."""
    return block._replace(key=cleaned(block.key), value=cleaned(block.value))
