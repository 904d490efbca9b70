"""Masks by tiles: which tuples of a tile are live, trimmed ranges, and boolean masks only where a tile is cut.

A mask is decided by positions, index + offset. Every function works on one tile: a range of queries and a range of keys
for each mode. Tiles with no live tuple are never computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from korder.planning.expression import outer_modes
from korder.planning.plan import Tiling
from korder.spec.masks import Causal, Full, Mask, Ordered, Window

Array = Any
Range = tuple[int, int]
"""First index and the index after the last."""


@dataclass(frozen=True, slots=True)
class OuterBlock:
    """Keys of the folded modes in a tile, ascending, and the contracted keys that are live with them."""

    ranges: tuple[Range, ...]
    keys: Range

    @property
    def count(self) -> int:
        """Tuples of outer keys."""
        return prod(stop - start for start, stop in self.ranges)


@dataclass(frozen=True, slots=True)
class TileMask:
    """Which tuples of a cut tile are live: those for which `outer` (None: all) and every part of `inner` hold.

    Shapes:  outer (I or 1, F), queries and tuples of outer keys; inner (I, 1, S) or (1, F, S), with contracted keys.
    """

    outer: Array | None
    inner: tuple[Array, ...]


@dataclass(frozen=True, slots=True)
class MaskGeometry:
    """A mask laid over queries and keys at given offsets, cut into tiles as the tiling says."""

    mask: Mask
    queries: int
    lengths: tuple[int, ...]
    contracted: int
    query_offset: int = 0
    key_offsets: tuple[int, ...] = ()

    def trim(self, rows: Range, ranges: Sequence[Range]) -> tuple[Range, ...] | None:
        """Return the ranges of keys that some query of `rows` may see within `ranges`, None if no tuple is live."""
        if rows[0] >= rows[1] or any(start >= stop for start, stop in ranges):
            return None
        if isinstance(self.mask, Full):
            return tuple(ranges)
        low, high = rows[0] + self.query_offset, rows[1] - 1 + self.query_offset
        spans = [
            (start + offset, stop - 1 + offset) for (start, stop), offset in zip(ranges, self._offsets, strict=True)
        ]
        live = _live_spans(self.mask, low, high, spans)
        if live is None:
            return None
        return tuple(
            (first - offset, last + 1 - offset) for (first, last), offset in zip(live, self._offsets, strict=True)
        )

    def is_full(self, rows: Range, ranges: Sequence[Range]) -> bool:
        """Whether every query of `rows` may see every tuple of `ranges`."""
        if isinstance(self.mask, Full):
            return True
        low, high = rows[0] + self.query_offset, rows[1] - 1 + self.query_offset
        spans = [
            (start + offset, stop - 1 + offset) for (start, stop), offset in zip(ranges, self._offsets, strict=True)
        ]
        return _all_live(self.mask, low, high, spans)

    def outer_blocks(self, rows: Range, tiling: Tiling) -> Iterator[OuterBlock]:
        """Yield the blocks of outer keys that hold a live tuple for some query of `rows`."""
        whole = self.trim(rows, [(0, m) for m in self.lengths])
        if whole is None:
            return
        outer = outer_modes(len(self.lengths), self.contracted)
        blocked = [list(blocks(*whole[t], size)) for t, size in zip(outer, tiling.folded, strict=True)]
        for chosen in product(*blocked):
            ranges = list(whole)
            for t, span in zip(outer, chosen, strict=True):
                ranges[t] = span
            live = self.trim(rows, ranges)
            if live is not None:
                yield OuterBlock(tuple(live[t] for t in outer), live[self.contracted])

    def key_blocks(self, rows: Range, block: OuterBlock, tiling: Tiling) -> Iterator[Range]:
        """Yield the ranges of contracted keys of the tiles of an outer block that hold a live tuple."""
        for span in blocks(*block.keys, tiling.keys):
            live = self.trim(rows, self._ranges(block, span))
            if live is not None:
                yield live[self.contracted]

    def tile_mask(self, xp: Any, rows: Range, block: OuterBlock, keys: Range, *, device: Any = None) -> TileMask | None:
        """Return the mask of one tile, None if every tuple of it is live."""
        ranges = self._ranges(block, keys)
        if self.is_full(rows, ranges):
            return None
        return _cut(xp, self, rows, ranges, device)

    def _ranges(self, block: OuterBlock, keys: Range) -> tuple[Range, ...]:
        ranges = list(block.ranges)
        ranges.insert(self.contracted, keys)
        return tuple(ranges)

    @property
    def _offsets(self) -> tuple[int, ...]:
        return self.key_offsets or (0,) * len(self.lengths)


def blocks(start: int, stop: int, size: int) -> Iterator[Range]:
    """Yield [start, stop) in pieces of `size`, the last one shorter."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def count_tiles(geometry: MaskGeometry, tiling: Tiling) -> int:
    """Return how many tiles of one head block are computed; the rest hold no live tuple."""
    return sum(
        1
        for rows in blocks(0, geometry.queries, tiling.queries)
        for block in geometry.outer_blocks(rows, tiling)
        for _ in geometry.key_blocks(rows, block, tiling)
    )


def _live_spans(mask: Mask, low: int, high: int, spans: list[Range]) -> list[Range] | None:
    """Positions (inclusive) that some query in [low, high] may see within `spans`."""
    if isinstance(mask, Ordered):
        return _increasing_spans(high, spans)
    live = [(first, min(last, high)) for first, last in spans]
    if isinstance(mask, Window):
        live = [(max(first, low - w + 1), last) for (first, last), w in zip(live, mask.sizes, strict=True)]
        # The ranges of two modes may only be live for different queries; a query must see all modes at once.
        earliest = max(first for first, _ in live)
        latest = min(last + w - 1 for (_, last), w in zip(live, mask.sizes, strict=True))
        if max(earliest, low) > min(latest, high):
            return None
    return None if any(first > last for first, last in live) else live


def _increasing_spans(high: int, spans: list[Range]) -> list[Range] | None:
    """Positions that stand in some chain p_1 < .. < p_k <= high with every p_t in its span."""
    firsts: list[int] = []
    for first, _ in spans:
        firsts.append(max(first, firsts[-1] + 1) if firsts else first)
    lasts: list[int] = []
    for _, last in reversed(spans):
        lasts.append(min(last, lasts[-1] - 1) if lasts else min(last, high))
    live = list(zip(firsts, reversed(lasts), strict=True))
    return None if any(first > last for first, last in live) else live


def _all_live(mask: Mask, low: int, high: int, spans: list[Range]) -> bool:
    if isinstance(mask, Ordered):
        apart = all(spans[t][1] < spans[t + 1][0] for t in range(len(spans) - 1))
        return apart and spans[-1][1] <= low
    if isinstance(mask, Window) and any(first <= high - w for (first, _), w in zip(spans, mask.sizes, strict=True)):
        return False
    return all(last <= low for _, last in spans)


def _cut(xp: Any, geometry: MaskGeometry, rows: Range, ranges: tuple[Range, ...], device: Any) -> TileMask:
    order, contracted = len(ranges), geometry.contracted
    outer_axes = outer_modes(order, contracted)
    lengths = [ranges[t][1] - ranges[t][0] for t in outer_axes]

    def positions(start: int, stop: int, offset: int, axis: int) -> Array:
        """Positions along one of the axes (queries, outer keys.., contracted keys)."""
        shape = [1] * (order + 1)
        shape[axis] = stop - start
        return xp.reshape(xp.arange(start + offset, stop + offset, device=device), tuple(shape))

    axis_of = {t: 1 + index for index, t in enumerate(outer_axes)} | {contracted: order}
    query = positions(*rows, geometry.query_offset, 0)
    keys = [positions(*ranges[t], geometry._offsets[t], axis_of[t]) for t in range(order)]
    outer: list[Array] = []
    by_query: list[Array] = []
    by_outer: list[Array] = []
    for modes, holds in _conditions(geometry.mask, query, keys):
        group = outer if contracted not in modes else by_query if len(modes) == 1 else by_outer
        group.append(holds)
    inner = [_flat_outer(xp, _all(xp, group), lengths) for group in (by_query, by_outer) if group]
    return TileMask(_flat_outer(xp, _all(xp, outer), lengths)[..., 0] if outer else None, tuple(inner))


def _all(xp: Any, conditions: list[Array]) -> Array:
    holds = conditions[0]
    for condition in conditions[1:]:
        holds = xp.logical_and(holds, condition)
    return holds


def _conditions(mask: Mask, query: Array, keys: list[Array]) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Yield every condition of a mask with the modes that it reads."""
    if isinstance(mask, Ordered):
        for t in range(len(keys) - 1):
            yield (t, t + 1), keys[t] < keys[t + 1]
        yield (len(keys) - 1,), keys[-1] <= query
    elif isinstance(mask, Causal | Window):
        for t, key in enumerate(keys):
            yield (t,), key <= query
            if isinstance(mask, Window):
                yield (t,), key > query - mask.sizes[t]


def _flat_outer(xp: Any, x: Array, lengths: list[int]) -> Array:
    """(I, m.., S) with the outer axes made one, left at length 1 where nothing depends on them."""
    if all(size == 1 for size in x.shape[1:-1]):
        return xp.reshape(x, (x.shape[0], 1, x.shape[-1]))
    x = xp.broadcast_to(x, (x.shape[0], *lengths, x.shape[-1]))
    return xp.reshape(x, (x.shape[0], prod(lengths), x.shape[-1]))
