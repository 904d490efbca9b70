"""The exact method over any Array API namespace: sliced contraction with an online softmax, never the score tensor.

The outer keys are folded into the query, so every tile is ordinary attention of effective queries, gated by the outer
values. Functional: nothing is changed in place. The hot arithmetic is in `TileArithmetic`, which a backend replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, ClassVar

from array_api_compat import device

from korder.errors import KernelError
from korder.methods.gradients import GradientSums, merged
from korder.methods.layout import HeadBlock, Layout, block_of, by_head, by_key_head, head_blocks, is_tame, lay_out, put
from korder.methods.masks import MaskGeometry, Range, blocks
from korder.methods.tiles import RowCotangent, RowState, TileArithmetic, Wanted, finite_reference
from korder.methods.walk import Steps, TileWalk, row_by_row
from korder.planning.memory import forward_workspace
from korder.planning.plan import Plan, Tiling
from korder.spi.operands import KernelOutput, OperandGradients, Operands, OutputGradients

Array = Any


class ExactKernel:
    """Order-k attention to rounding, any order, mask, bias and weight.

    Shapes:   `Operands` of the plan's problem; output (b, h, n, e); lse (b, h, n).
    Cost:     2 n m1..mk (d + e) flop a head forward, three times that backward, times the live share of the tuples;
              workspace as the plan's `cost.peak_memory`, less where the weights overwrite the scores.
    Numerics: sums in `problem.accumulation`; a tuple that is masked never matters, not even NaN.
    Source:   online softmax; order 2: Alman & Song, arXiv 2310.04064; its gradient: Liang et al., arXiv 2405.16411.
    """

    in_place: ClassVar[bool] = False
    """Whether the arithmetic lets the weights of a tile overwrite its scores; it sets `workspace_bytes`."""

    def __init__(self, xp: Any, plan: Plan, tiling: Tiling | None = None) -> None:
        """Make the kernel of a plan, with a tiling of its own instead of the plan's if one is given."""
        if plan.tiling is None:
            raise KernelError(
                "the exact kernel needs a plan with a tiling.", expected="exact_plan(problem)", got=plan.method
            )
        self.xp = xp
        self.plan = plan
        self.tiling = tiling or plan.tiling
        self.steps = Steps.of(plan.problem, self.tiling)

    @property
    def workspace_bytes(self) -> int:
        """Bytes beyond inputs and outputs that a forward needs."""
        return forward_workspace(self.plan.problem, self.tiling, in_place=self.in_place)

    def residual_shapes(self, operands: Operands) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of lse, and of the output before it is narrowed, which backward wants."""
        problem = self.plan.problem
        rows = (problem.batch, problem.heads, problem.queries)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {"lse": (rows, problem.accumulation)}
        if problem.dtype != problem.accumulation:
            shapes["output"] = ((*rows, problem.value_width), problem.accumulation)
        return shapes

    def arithmetic(self, layout: Layout) -> TileArithmetic:
        """Return the arithmetic of one call on laid-out operands; a subclass may return one with buffers."""
        return TileArithmetic(self.xp)

    def put(self, total: Array, ranges: Sequence[Range], part: Array) -> Array:
        """Return `total` with a block replaced; a subclass may write in place."""
        return put(self.xp, total, ranges, part)

    def add(self, total: Array, ranges: Sequence[Range], part: Array) -> Array:
        """Return `total` with `part` added to a block; a subclass may add in place."""
        return self.put(total, ranges, block_of(total, ranges) + part)

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, object] | None = None) -> KernelOutput:
        """Compute output and lse; `residuals` are ignored, the exact method has no statistics to fix."""
        xp, problem = self.xp, self.plan.problem
        output, lse = (by_head(xp, x) for x in self.attend(lay_out(xp, problem, operands), operands))
        narrow = xp.astype(output, operands.query.dtype, copy=False)
        kept = {"output": output} if narrow.dtype != output.dtype else {}
        return KernelOutput(narrow, lse, residuals=kept if save else None)

    def attend(self, layout: Layout, operands: Operands) -> tuple[Array, Array]:
        """Return output (b, g, c, n, e) and lse (b, g, c, n) of laid-out operands; a subclass may know another way."""
        xp, problem = self.xp, self.plan.problem
        walk = self._walk(layout, operands)
        shape = layout.query.shape[:4]
        options = {"dtype": layout.query.dtype, "device": device(layout.query)}
        output = xp.zeros((*shape, problem.value_width), **options)
        lse = xp.full(shape, -inf, **options)
        for heads in head_blocks(problem, walk.tiling.heads):
            for rows in blocks(0, problem.queries, walk.tiling.queries):
                state = self._attend_rows(walk, heads, rows)
                if state is not None:
                    where = (heads.batch, heads.groups, heads.heads, rows)
                    row_output, row_lse = walk.arithmetic.finish(state)
                    output, lse = self.put(output, where, row_output), self.put(lse, where, row_lse)
        return output, lse

    def _attend_rows(self, walk: TileWalk, heads: HeadBlock, rows: Range) -> RowState | None:
        """Return the softmax state of a block of rows after every live tile, None if there is none."""
        state = None
        query = walk.query(heads, rows)
        for block in walk.outer_blocks(rows):
            side = walk.outer_side(query, heads, rows, block)
            if side is None:
                continue
            for keys in walk.key_blocks(rows, block):
                inner = walk.inner_side(heads, rows, keys)
                if inner is None:
                    continue
                if state is None:
                    state = walk.arithmetic.start(query.shape[:4], self.plan.problem.value_width, query)
                state = walk.arithmetic.absorb(state, side.folded, inner.contracted, walk.mask(rows, block, keys))
        return state

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names, from the saved output and lse; weights are computed again."""
        xp, problem = self.xp, self.plan.problem
        layout = lay_out(xp, problem, operands)
        sums = GradientSums(xp, problem, layout, self.tiling.contracted, self.add, needs)
        tame = self.differentiate(layout, operands, saved, grads, sums)
        return sums.finish(operands, tame=tame)

    def differentiate(
        self, layout: Layout, operands: Operands, saved: KernelOutput, grads: OutputGradients, sums: GradientSums
    ) -> bool:
        """Add the gradients of laid-out operands to `sums`, and return whether a weight of zero makes a term zero."""
        problem = self.plan.problem
        cotangent = self._cotangent(layout, saved, grads)
        walk = self._walk(layout, operands, cotangent.output, cotangent.delta)
        wanted = sums.wanted()
        for heads in head_blocks(problem, walk.tiling.heads):
            for rows in blocks(0, problem.queries, walk.tiling.queries):
                where = (heads.batch, heads.groups, heads.heads, rows)
                row = RowCotangent(*(block_of(x, where) for x in (cotangent.output, cotangent.lse, cotangent.delta)))
                self._gradients_of_rows(walk, sums, wanted, row, heads, rows)
        return walk.tame

    def _gradients_of_rows(
        self, walk: TileWalk, sums: GradientSums, wanted: Wanted, row: RowCotangent, heads: HeadBlock, rows: Range
    ) -> None:
        query = walk.query(heads, rows)
        gradient = None
        for block in walk.outer_blocks(rows):
            side = walk.outer_side(query, heads, rows, block)
            if side is None:
                continue
            held = None
            for keys in walk.key_blocks(rows, block):
                inner = walk.inner_side(heads, rows, keys)
                if inner is None:
                    continue
                mask = walk.mask(rows, block, keys)
                tile = walk.arithmetic.gradients(row, side.folded, inner.contracted, mask, wanted)
                sums.add_contracted(heads, rows, keys, inner, tile)
                held = merged(held, tile)
            if held is not None:
                part = sums.add_outer(walk, side, heads, rows, block, held)
                gradient = part if gradient is None else gradient + part
        if gradient is not None:
            sums.add_rows(heads, rows, gradient)

    def is_tame(self, layout: Layout, *cotangents: Array) -> bool:
        """Return whether a weight of zero makes a term zero; a kernel that is traced or recorded may look otherwise."""
        return is_tame(self.xp, layout, *cotangents)

    def _cotangent(self, layout: Layout, saved: KernelOutput, grads: OutputGradients) -> RowCotangent:
        """Gradients of the outputs laid out like the query, with delta; a row that saw nothing contributes nothing."""
        xp, groups = self.xp, self.plan.problem.groups
        wide = layout.query.dtype
        output = (saved.residuals or {}).get("output", saved.output)
        output, gradient = (by_key_head(xp, xp.astype(x, wide, copy=False), groups) for x in (output, grads.output))
        lse = by_key_head(xp, xp.astype(saved.lse, wide, copy=False), groups)
        delta = xp.sum(gradient * output, axis=-1)
        if grads.lse is not None:
            lse_gradient = by_key_head(xp, xp.astype(grads.lse, wide, copy=False), groups)
            delta = delta - xp.where(lse == -inf, xp.zeros_like(lse), lse_gradient)
        return RowCotangent(gradient, finite_reference(xp, lse), delta)

    def _walk(self, layout: Layout, operands: Operands, *cotangents: Array) -> TileWalk:
        problem = self.plan.problem
        geometry = MaskGeometry(
            problem.spec.mask,
            problem.queries,
            problem.lengths,
            self.tiling.contracted,
            operands.query_offset,
            operands.key_offsets or (0,) * problem.order,
        )
        closes = problem.spec.mask.kind != "full" or any(x is not None for x in (*layout.biases, *layout.key_masks))
        if not closes or self.is_tame(layout, *cotangents):
            return TileWalk(self.xp, layout, geometry, self.tiling, self.steps, self.arithmetic(layout), True)
        tiling = row_by_row(self.tiling, geometry)
        return TileWalk(self.xp, layout, geometry, tiling, self.steps, TileArithmetic(self.xp), False)
