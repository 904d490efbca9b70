"""The exact method for XLA: loops over tiles with an online softmax, compiled once for a plan and any offsets.

The outer keys are folded into the query, so a tile is two matrix products and one exponential. Weights multiply only
finite numbers (NaN travels through scores and through `values`), so what is masked cannot leak.
"""

from __future__ import annotations

from functools import partial
from math import inf, prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from korder.spi import KernelError, KernelOutput, OperandGradients, Operands, OutputGradients, Plan
from korder_jax.arrays import HIGHEST, clamped, cleaned, filled, joined, mapped
from korder_jax.exact_gradients import Cotangent, Sums, bias_sums, unit_gradients
from korder_jax.layout import Layout, Variables, lay_out, masks_of, variables_of, wanted
from korder_jax.positions import Bounds, Sight, bounds_of
from korder_jax.tiles import KeyBlock, Tiles, Unit, UnitTiles, clean, fold, gate
from korder_jax.values import any_unfinished, with_unfinished_values

Array = Any
Masks = tuple[Array | None, ...]


class JaxExactKernel:
    """Order-k attention to rounding, any order, mask, bias and weight.

    Shapes:   `Operands` of the plan's problem; output (b, h, n, e); lse (b, h, n).
    Cost:     2 n m1..mk (d + e) flop a head forward, three times that backward, times the share of tiles with a live
              tuple; workspace as the plan's.
    Numerics: sums in `problem.accumulation`; a tuple that is masked never matters, not even NaN. An infinite value that
              a row sees makes its channel infinite in order 1, NaN above.
    Source:   online softmax; order 2: Alman & Song, arXiv 2310.04064; its gradient: Liang et al., arXiv 2405.16411.
    """

    def __init__(self, plan: Plan) -> None:
        if plan.tiling is None:
            raise KernelError("the exact kernel needs a plan with a tiling.", expected="an exact plan", got=plan.method)
        self.plan = plan
        self.problem = plan.problem
        self.tiles = Tiles.of(plan)
        self.workspace_bytes = plan.cost.peak_memory
        self._forward = jax.jit(self.traced_forward, static_argnames="save")
        self._backward = jax.jit(self.traced_backward, static_argnames="needs")

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, object] | None = None) -> KernelOutput:
        """Compute output and lse; `residuals` are ignored, the exact method has no statistics to fix."""
        with jax.enable_x64(self.problem.accumulation == "float64"):
            narrow = self.problem.dtype != self.problem.accumulation  # else there is nothing to keep
            output, lse, kept = self._forward(*self._arguments(operands), save=save and narrow)
        return KernelOutput(output, lse, residuals=kept if save else None)

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names, from the saved output and lse; weights are computed again."""
        output = (saved.residuals or {}).get("output", saved.output)
        rows = (output, saved.lse, grads.output, grads.lse)
        with jax.enable_x64(self.problem.accumulation == "float64"):
            found = self._backward(*self._arguments(operands), rows, needs=needs)
        return OperandGradients(*found)

    def _arguments(self, operands: Operands) -> tuple[Variables, Masks, Bounds]:
        return variables_of(operands), masks_of(operands), bounds_of(self.problem.spec.mask, operands)

    def traced_forward(
        self, variables: Variables, masks: Masks, bounds: Bounds, *, save: bool
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Return output, lse and what backward wants beside them."""
        problem = self.problem
        layout = lay_out(problem, variables, masks)
        rows = (problem.batch, problem.heads, problem.queries)
        if not prod(rows) * problem.tuples:
            empty = filled((*rows, problem.value_width), 0.0, layout.query)
            return empty.astype(variables.query.dtype), filled(rows, -inf, layout.query), {}
        unfinished = any_unfinished(layout.values)
        one = partial(self._unit_forward, layout, masks, bounds, unfinished)
        output, lse = mapped(one, problem.batch * problem.groups, self.tiles.together)
        output, lse = output.reshape(*rows, problem.value_width), lse.reshape(rows)
        narrow = output.astype(variables.query.dtype)
        return narrow, lse, {"output": output} if save and narrow.dtype != output.dtype else {}

    def traced_backward(
        self,
        variables: Variables,
        masks: Masks,
        bounds: Bounds,
        rows: tuple[Array, Array, Array, Array | None],
        *,
        needs: frozenset[str],
    ) -> Variables:
        """Return the gradients of the operands; `rows` are output, lse and the gradients of both."""
        problem = self.problem
        layout = lay_out(problem, variables, masks)
        # Linear in each operand, so the adjoint at finite ones is the adjoint, without NaN of masked keys.
        _, to_operands = jax.vjp(lambda x: lay_out(problem, x, masks), jax.tree.map(cleaned, variables))
        if problem.batch * problem.heads * problem.queries * problem.tuples:
            gradient = self._layout_gradients(layout, masks, bounds, rows, "biases" in needs)
        else:
            gradient = jax.tree.map(jnp.zeros_like, layout)
        (found,) = to_operands(gradient)
        return wanted(found, needs)

    def _layout_gradients(self, layout: Layout, masks: Masks, bounds: Bounds, rows: Any, biases: bool) -> Layout:
        output, lse, gradient, lse_gradient = (
            None if x is None else x.astype(layout.query.dtype).reshape(*layout.query.shape[:3], *x.shape[3:])
            for x in rows
        )
        cotangent = Cotangent.of(output, lse, gradient, lse_gradient)

        def one(unit: Array) -> tuple[Array, Sums]:
            return unit_gradients(
                self.unit_tiles(layout, masks, bounds, unit), Cotangent(*(x[unit] for x in cotangent)), biases
            )

        query, sums = mapped(one, self.problem.batch * self.problem.groups, self.tiles.together)
        return Layout(
            query,
            sums.keys,
            sums.values,
            bias_sums(layout, sums.biases, self.problem.groups),
            None if sums.weight is None else jnp.sum(sums.weight, axis=0),
        )

    def unit_tiles(self, layout: Layout, masks: Masks, bounds: Bounds, unit: Array) -> UnitTiles:
        """Return the tiles of one key head."""
        batch, group = unit // self.problem.groups, unit % self.problem.groups

        def shared(x: Array | None) -> Array | None:
            """The entry of this batch and key head, whose axes may be shared."""
            return None if x is None else x[batch if x.shape[0] > 1 else 0, group if x.shape[1] > 1 else 0]

        one = Unit(
            layout.query[unit],
            tuple(key[unit] for key in layout.keys),
            tuple(value[unit] for value in layout.values),
            tuple(shared(bias) for bias in layout.biases),
            layout.weight,
            tuple(shared(mask) for mask in masks),
        )
        return UnitTiles(self.tiles, Sight(self.problem.spec.mask.kind, bounds), one)

    def _unit_forward(
        self, layout: Layout, masks: Masks, bounds: Bounds, unfinished: Array, unit: Array
    ) -> tuple[Array, Array]:
        tiles = self.unit_tiles(layout, masks, bounds, unit)

        def row_block(block: Array) -> tuple[Array, Array]:
            output, lse = _attend_rows(tiles, block)
            return with_unfinished_values(tiles, unfinished, tiles.rows(block), output, lse), lse

        output, lse = lax.map(jax.checkpoint(row_block), jnp.arange(tiles.row_blocks))
        return joined(output, tiles.queries, 1), joined(lse, tiles.queries, 1)


State = tuple[Array, Array, Array]
"""Largest score so far, sum of weights relative to it (c, I), weighted values (c, I, e)."""


def _attend_rows(tiles: UnitTiles, block: Array) -> tuple[Array, Array]:
    """Return output (c, I, e) and lse (c, I) of a block of rows."""
    rows = tiles.rows(block)
    query = tiles.query(rows[0])
    shape, width = query.shape[:2], tiles.unit.values[0].shape[-1]
    empty = (filled(shape, -inf, query), filled(shape, 0.0, query), filled((*shape, width), 0.0, query))

    def outer_block(state: State, number: Array) -> tuple[State, None]:
        outer = tiles.outer(number, rows)
        keys = [mode.key for mode in outer]
        folded = fold(query, keys, tiles.tiles.outer, full=tiles.unit.weight is not None)
        extra = tiles.outer_extra(outer)
        gates = gate([cleaned(mode.value) for mode in outer])

        def key_block(state: State, number: Array) -> tuple[State, None]:
            inner = tiles.contracted(number, rows)

            def absorbed(state: State) -> State:
                return absorb(state, tiles.scores(folded, extra, outer, inner), gates, clean(inner))

            if not tiles.sight.closes:
                return absorbed(state), None
            return lax.cond(tiles.alive(rows, outer, inner), absorbed, lambda same: same, state), None

        return lax.scan(jax.checkpoint(key_block, prevent_cse=False), state, jnp.arange(tiles.key_blocks))[0], None

    blocks = jnp.arange(tiles.tiles.blocks(tiles.lengths))
    return finish(lax.scan(jax.checkpoint(outer_block, prevent_cse=False), empty, blocks)[0])


def absorb(state: State, scores: Array, gates: Array | None, inner: KeyBlock) -> State:
    """Return the state after one more tile."""
    reference, total, weighted = state
    # References cancel in the result, so no gradient goes through them.
    highest = lax.stop_gradient(jnp.maximum(reference, jnp.max(scores, axis=(2, 3))))
    shift = jnp.where(highest == -inf, 0.0, highest)
    weights = jnp.exp(scores - shift[..., None, None])
    rescale = jnp.exp(lax.stop_gradient(reference) - shift)
    sums = jnp.einsum("cifs,se->cife", weights, inner.value, precision=HIGHEST)
    if gates is not None:
        sums = sums * clamped(gates)
    return (
        highest,
        total * rescale + jnp.sum(weights, axis=(2, 3)),
        weighted * rescale[..., None] + jnp.sum(sums, axis=2),
    )


def finish(state: State) -> tuple[Array, Array]:
    """Return output and lse; zeros and -inf where nothing was live."""
    reference, total, weighted = state
    empty = total == 0.0
    safe = jnp.where(empty, 1.0, total)
    shift = jnp.where(reference == -inf, 0.0, reference)
    return weighted / safe[..., None], jnp.where(empty, reference, shift + jnp.log(safe))
