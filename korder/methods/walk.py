"""Walks the tiles of the exact method: builds both sides of every tile from the laid-out operands, once each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any

from array_api_compat import device

from korder.methods.contraction import adjoint_contraction, trace_contraction
from korder.methods.layout import HeadBlock, Layout, block_of, select_rows, shared_block
from korder.methods.masks import MaskGeometry, OuterBlock, Range, TileMask
from korder.methods.tiles import Contracted, Folded, TileArithmetic, add_biases
from korder.planning.expression import outer_modes
from korder.planning.memory import fold_steps, gate_steps
from korder.planning.plan import ContractionStep, Tiling
from korder.problem import Problem
from korder.spec.masks import Ordered

Array = Any
Trace = list[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class OuterSide:
    """The outer side of a tile, with what its adjoint wants."""

    folded: Folded
    fold_trace: Trace
    gate_trace: Trace
    counts: tuple[int, ...]
    """Outer keys of each folded mode."""
    seen: tuple[Array | None, ...]
    """Per folded mode, which keys of the tile its one query may see; None where rows are not walked one by one."""


@dataclass(frozen=True, slots=True)
class InnerSide:
    """The contracted side of a tile, with which of its keys are seen, as in `OuterSide`."""

    contracted: Contracted
    seen: Array | None


@dataclass(frozen=True, slots=True)
class ModeBlock:
    """A range of one mode for a block of rows: keys, values, biases with -inf for what is masked, and what is seen."""

    keys: Array
    values: Array
    biases: Array | None
    seen: Array | None


@dataclass(frozen=True, slots=True)
class Steps:
    """Pairwise steps that fold outer keys into the query, and that multiply outer values."""

    fold: tuple[ContractionStep, ...]
    gate: tuple[ContractionStep, ...]

    @classmethod
    def of(cls, problem: Problem, tiling: Tiling) -> Steps:
        """Return the steps for the tiles of a plan."""
        return cls(fold_steps(problem, tiling), gate_steps(problem, tiling))


@dataclass(slots=True)
class TileWalk:
    """One call's tiles."""

    xp: Any
    layout: Layout
    geometry: MaskGeometry
    tiling: Tiling
    steps: Steps
    arithmetic: TileArithmetic
    tame: bool
    """Whether a weight of zero makes a term zero; otherwise rows are walked one by one and unseen keys zeroed."""
    _inner: dict[tuple[HeadBlock, Range | None, Range], InnerSide] = field(default_factory=dict)

    def query(self, heads: HeadBlock, rows: Range) -> Array:
        """Return the queries of a block of rows, (b, g, c, I, d); times a full weight (b, g, c, I, d1, .., dk)."""
        query = block_of(self.layout.query, (heads.batch, heads.groups, heads.heads, rows))
        if self.layout.weight is None:
            return query
        widths = tuple(key.shape[-1] for key in self.layout.keys)
        return self.xp.reshape(query @ self.layout.weight, (*query.shape[:-1], *widths))

    def outer_blocks(self, rows: Range) -> Iterator[OuterBlock]:
        """Yield the outer blocks that hold a live tuple."""
        return self.geometry.outer_blocks(rows, self.tiling)

    def key_blocks(self, rows: Range, block: OuterBlock) -> Iterator[Range]:
        """Yield the ranges of contracted keys that hold a live tuple."""
        return self.geometry.key_blocks(rows, block, self.tiling)

    def mask(self, rows: Range, block: OuterBlock, keys: Range) -> TileMask | None:
        """Return the mask of a tile, None if all of it is live."""
        return self.geometry.tile_mask(self.xp, rows, block, keys, device=device(self.layout.query))

    def outer_side(self, query: Array, heads: HeadBlock, rows: Range, block: OuterBlock) -> OuterSide | None:
        """Return the outer side of the tiles of a block; None if every tuple of it is closed by a mask or bias."""
        outer = outer_modes(len(self.layout.keys), self.geometry.contracted)
        modes = [self._mode(t, heads, rows, span) for t, span in zip(outer, block.ranges, strict=True)]
        if any(mode is None for mode in modes):
            return None
        parts = [mode for mode in modes if mode is not None]
        counts = tuple(stop - start for start, stop in block.ranges)
        query, fold_trace = trace_contraction(self.xp, self.steps.fold, [query, *(part.keys for part in parts)])
        query = self.xp.reshape(query, (*query.shape[:4], block.count, query.shape[-1]))
        gate, gate_trace = None, Trace()
        if parts:
            gate, gate_trace = trace_contraction(self.xp, self.steps.gate, [part.values for part in parts])
            gate = self.xp.reshape(gate, (*gate.shape[:2], block.count, gate.shape[-1]))
        biases = self._outer_biases([part.biases for part in parts], counts)
        folded = self.arithmetic.folded(query, gate, biases)
        return OuterSide(folded, fold_trace, gate_trace, counts, tuple(part.seen for part in parts))

    def inner_side(self, heads: HeadBlock, rows: Range, keys: Range) -> InnerSide | None:
        """Return the contracted side of a tile; None if every key of it is closed."""
        contracted = self.geometry.contracted
        bias = self.layout.biases[contracted]
        bound = not self.tame or (bias is not None and bias.shape[3] > 1)
        name = (heads, rows if bound else None, keys)
        if name not in self._inner:
            # At most one pass over the keys is kept, for the other outer blocks and rows.
            if (
                sum(stop - start for _, _, (start, stop) in (*self._inner, name))
                > self.layout.keys[contracted].shape[2]
            ):
                self._inner.clear()
            part = self._mode(contracted, heads, rows, keys)
            if part is None:
                return None
            self._inner[name] = InnerSide(self.arithmetic.contracted(part.keys, part.values, part.biases), part.seen)
        return self._inner[name]

    def unfold(self, side: OuterSide, gradient: Array) -> list[Array]:
        """Return the gradients of the query block and of each outer key, given that of the effective queries."""
        gradient = self.xp.reshape(gradient, (*gradient.shape[:4], *side.counts, gradient.shape[-1]))
        return adjoint_contraction(self.xp, self.steps.fold, side.fold_trace, gradient)

    def ungate(self, side: OuterSide, gradient: Array) -> list[Array]:
        """Return the gradient of each outer value, given that of the gates."""
        gradient = self.xp.reshape(gradient, (*gradient.shape[:2], *side.counts, gradient.shape[-1]))
        return adjoint_contraction(self.xp, self.steps.gate, side.gate_trace, gradient)

    def _mode(self, mode: int, heads: HeadBlock, rows: Range, span: Range) -> ModeBlock | None:
        """Return a range of one mode; None if none of its keys may be seen."""
        xp = self.xp
        where = (heads.batch, heads.groups, span)
        key, value = block_of(self.layout.keys[mode], where), block_of(self.layout.values[mode], where)
        bias = self._bias(mode, heads, rows, span)
        if self.tame or bias is None:
            return ModeBlock(key, value, bias, None)
        # One head and one query here, so that what its bias closes can be zeroed in the keys themselves.
        seen = xp.reshape(bias, (span[1] - span[0],)) != -inf
        if not bool(xp.any(seen)):
            return None
        return ModeBlock(select_rows(xp, seen, key), select_rows(xp, seen, value), bias, seen)

    def _bias(self, mode: int, heads: HeadBlock, rows: Range, span: Range) -> Array | None:
        """Biases of a mode with -inf for its masked keys, (b, g, c, I, m), axes of 1 kept."""
        xp, layout = self.xp, self.layout
        where = (heads.batch, heads.groups, heads.heads, rows, span)
        bias, mask = layout.biases[mode], layout.key_masks[mode]
        bias = None if bias is None else shared_block(bias, where)
        if mask is None:
            return bias
        mask = shared_block(mask, where)
        options = {"dtype": layout.query.dtype, "device": device(layout.query)}
        closed = xp.asarray(-inf, **options)
        return xp.where(mask, xp.asarray(0.0, **options) if bias is None else bias, closed)

    def _outer_biases(self, biases: list[Array | None], counts: tuple[int, ...]) -> Array | None:
        """Sum the biases of the outer modes over their tuples, (b, g, c, I, F)."""
        xp = self.xp
        total = None
        for axis, bias in enumerate(biases):
            if bias is None:
                continue
            shape = [1] * len(counts)
            shape[axis] = counts[axis]
            bias = xp.reshape(bias, (*bias.shape[:4], *shape))
            # Both ways round, so that -inf in either wins over NaN in the other.
            total = bias if total is None else xp.where(total == -inf, total, add_biases(xp, total, bias))
        if total is None:
            return None
        total = xp.broadcast_to(total, (*total.shape[:4], *counts))
        return xp.reshape(total, (*total.shape[:4], prod(counts)))


def row_by_row(tiling: Tiling, geometry: MaskGeometry) -> Tiling:
    """Return the tiling in which a tile holds nothing that its one query may not see."""
    # An ordered mask ties the modes together, so only single outer tuples have live keys in a range of their own.
    folded = (1,) * len(tiling.folded) if isinstance(geometry.mask, Ordered) else tiling.folded
    return replace(tiling, queries=1, heads=1, folded=folded)
