"""Masks by tiles against the plain predicate: trimmed ranges, full and cut tiles, and how many tiles are computed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

from korder.methods.masks import MaskGeometry, OuterBlock, Range, blocks, count_tiles
from korder.planning.exact import exact_plan
from korder.planning.plan import Tiling
from korder.problem import Problem, Shapes, make_problem
from korder.spec import AttentionSpec, Causal, Full, Ordered, Window
from tests.oracle import live

GEOMETRIES: dict[str, MaskGeometry] = {
    "full": MaskGeometry(Full(), 7, (5, 3), 0),
    "causal": MaskGeometry(Causal(), 7, (5, 11), 1),
    "causal-offsets": MaskGeometry(Causal(), 7, (5, 11), 0, 2, (3, -1)),
    "causal-late": MaskGeometry(Causal(), 5, (3, 2), 0, -2, (0, 1)),
    "window": MaskGeometry(Window(sizes=(2, 4)), 11, (7, 13), 1),
    "window-apart": MaskGeometry(Window(sizes=(2, 3)), 11, (7, 5), 0, 1, (0, 4)),
    "ordered": MaskGeometry(Ordered(), 11, (7, 13), 1),
    "ordered-first": MaskGeometry(Ordered(), 7, (11, 5), 0, 1, (0, 1)),
    "ordered-3": MaskGeometry(Ordered(), 7, (3, 7, 5), 1, 0, (1, 0, -1)),
    "one-mode": MaskGeometry(Causal(), 7, (11,), 0),
}


def dense(geometry: MaskGeometry) -> np.ndarray:
    """The mask by its definition, (n, m1, .., mk)."""
    offsets = geometry.key_offsets or (0,) * len(geometry.lengths)
    shape = (geometry.queries, *geometry.lengths)
    cells = product(*(range(size) for size in shape))
    flags = [
        live(geometry.mask, i + geometry.query_offset, [j + o for j, o in zip(js, offsets, strict=True)])
        for i, *js in cells
    ]
    return np.array(flags).reshape(shape)


def painted(geometry: MaskGeometry, tiling: Tiling) -> tuple[np.ndarray, int, int]:
    """The mask as the tiles of a walk give it, with the numbers of full and of cut tiles."""
    result = np.zeros((geometry.queries, *geometry.lengths), dtype=int)
    full = cut = 0
    for rows in blocks(0, geometry.queries, tiling.queries):
        for block in geometry.outer_blocks(rows, tiling):
            for keys in geometry.key_blocks(rows, block, tiling):
                mask = geometry.tile_mask(xp, rows, block, keys)
                full, cut = full + (mask is None), cut + (mask is not None)
                tile = tile_flags(geometry, rows, block, keys, mask)
                where = [*block.ranges]
                where.insert(geometry.contracted, keys)
                result[tuple(slice(*span) for span in (rows, *where))] += tile
    return result, full, cut


def tile_flags(geometry: MaskGeometry, rows: Range, block: OuterBlock, keys: Range, mask: Any) -> np.ndarray:
    lengths = [stop - start for start, stop in block.ranges]
    flags = np.ones((rows[1] - rows[0], block.count, keys[1] - keys[0]), dtype=bool)
    if mask is not None:
        if mask.outer is not None:
            flags &= np.asarray(mask.outer)[..., None]
        for part in mask.inner:
            flags &= np.asarray(part)
    flags = flags.reshape(flags.shape[0], *lengths, flags.shape[-1])
    return np.moveaxis(flags, -1, 1 + geometry.contracted)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 4), (16, 16, 16)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_tiles_paint_the_mask_once(name: str, sizes: tuple[int, int, int]) -> None:
    geometry = GEOMETRIES[name]
    outer = len(geometry.lengths) - 1
    tiling = Tiling((), geometry.contracted, sizes[0], (sizes[1],) * outer, sizes[2])
    expected = dense(geometry)
    result, full, cut = painted(geometry, tiling)
    assert np.array_equal(result, expected.astype(int))
    assert full + cut == count_tiles(geometry, tiling)
    if sizes == (1, 1, 1):  # single tuples: every tile is live, none is cut
        assert cut == 0
        assert full == expected.sum()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_trimmed_ranges_are_the_smallest(name: str) -> None:
    geometry = GEOMETRIES[name]
    flags = dense(geometry)
    rng = np.random.default_rng(0)
    for _ in range(60):
        spans = [tuple(sorted(rng.integers(0, size + 1, 2))) for size in flags.shape]
        rows, ranges = spans[0], spans[1:]
        part = flags[tuple(slice(*span) for span in spans)]
        found = geometry.trim(rows, ranges)
        if not part.any():
            assert found is None
            continue
        assert found is not None
        assert geometry.is_full(rows, ranges) == part.all()
        for axis, ((start, _), span) in enumerate(zip(ranges, found, strict=True)):
            seen = np.flatnonzero(part.any(axis=tuple(a for a in range(part.ndim) if a != axis + 1))) + start
            if not isinstance(geometry.mask, Window):
                assert span == (seen[0], seen[-1] + 1)
            assert span[0] <= seen[0]
            assert span[1] >= seen[-1] + 1


def planned(mask: Any, n: int, order: int) -> tuple[Problem, Tiling]:
    spec = AttentionSpec(order=order, mask=mask)
    shape = (1, 1, n, 8)
    problem = make_problem(spec, Shapes(shape, (shape,) * order, (shape,) * order, offsets_given=True), "float32")
    tiling = exact_plan(problem).tiling
    assert tiling is not None
    return problem, tiling


@pytest.mark.parametrize(
    ("mask", "order", "share"),
    [(Causal(), 2, 0.45), (Ordered(), 2, 0.35), (Ordered(), 3, 0.2), (Window(sizes=(17, 29)), 2, 0.05)],
)
def test_computed_tuples_stay_near_the_live_ones(mask: Any, order: int, share: float) -> None:
    n = 211 if order == 2 else 89
    problem, tiling = planned(mask, n, order)
    geometry = MaskGeometry(mask, n, problem.lengths, tiling.contracted)
    computed = 0
    for rows in blocks(0, n, tiling.queries):
        for block in geometry.outer_blocks(rows, tiling):
            for first, last in geometry.key_blocks(rows, block, tiling):
                computed += (rows[1] - rows[0]) * block.count * (last - first)
    assert computed <= share * n * problem.tuples


def test_tiles_outside_are_skipped() -> None:
    geometry = MaskGeometry(Causal(), 64, (64, 64), 1)
    tiling = Tiling((0,), 1, 8, (8,), 8)
    assert count_tiles(replace(geometry, mask=Full()), tiling) == 8**3
    assert count_tiles(geometry, tiling) == sum(i * i for i in range(1, 9))
    ordered = count_tiles(replace(geometry, mask=Ordered()), tiling)
    assert ordered == sum(i * (i + 1) // 2 for i in range(1, 9))
    window = count_tiles(replace(geometry, mask=Window(sizes=(8, 8))), tiling)
    assert window == 1 + 4 * 7
